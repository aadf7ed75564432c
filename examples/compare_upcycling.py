"""What lookup experts add to a trained model, beside further steps of the model itself.

A variant says what is trained and how fast: `experts@3e-3` (the paper's, on the frozen backbone),
`narrow@3e-3` (experts whose rows have --row-size numbers), `meki@3e-3` (MeKi's rows of that size),
`ffn@1e-3` (the backbone's FFNs alone), `all@1e-3` (all of it), `lora@1e-3` (adapters of rank 16 on
all its linear layers, by PEFT, merged at the end), or experts together with FFNs or with all:
`experts@3e-3+ffn@1e-3`. All take the same steps; the seed draws what is new and the order of the
text. All losses are over the same sequences. The report is what `make results` reads.

Run: python examples/compare_upcycling.py experts@3e-3 ffn@3e-3 experts@3e-3+ffn@3e-3 \
    --backbone runs/dense --data runs/novels4k --work runs/upcycling --seeds 1,2,3 --steps 500 \
    --json upcycling.json

A real model (examples/smollm2.py), on text that was prepared with its tokenizer:

    python examples/compare_upcycling.py experts@1e-3 narrow@1e-3 lora@1e-3 --row-size 64 \
        --backbone smollm2 --data novels --work runs/smollm2 --steps 122 \
        --set training.context_length=512 --set training.sequences_per_step=4 \
        --set training.sequences_per_micro_batch=4 --set training.precision=bf16 \
        --json smollm2.json
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import ProgressCallback

import lookup_experts as le
from lookup_experts.benchmarks.machine import describe_machine
from lookup_experts.benchmarks.results import write_report
from lookup_experts.training.callbacks import TakeOwnIntervals
from lookup_experts.training.models import count_parameters
from lookup_experts.training.recipe import load_recipe
from lookup_experts.training.run_folder import RunFolder
from lookup_experts.training.sources import TrainingData
from lookup_experts.training.trainer import RecipeTrainer
from lookup_experts.training.upcycling import UpcycleRecipe, for_backbone, upcycled_model

RECIPE = "upcycle-tiny"
EXPERTS = {
    "experts": "experts",
    "narrow": "experts with rows of {row_size}",
    "meki": "MeKi's rows of {row_size}",
}
LORA_RANK = 16
BACKBONE = {"ffn": "its FFNs", "all": "all of it", "lora": f"LoRA, rank {LORA_RANK}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", type=parse_variant, help="such as experts@3e-3")
    parser.add_argument("--backbone", type=Path, required=True, help="a folder of mole train")
    parser.add_argument("--data", type=Path, required=True, help="a folder of mole prepare")
    parser.add_argument(
        "--work", type=Path, required=True, help="the runs' folders, of one backbone and text"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--experts", type=int, default=4, help="per layer")
    parser.add_argument("--row-size", type=int, default=64, help="of narrow and meki")
    parser.add_argument("--set", action="append", default=[], help="a key of the recipe, for all")
    parser.add_argument("--seeds", default="1", help="others than the backbone's")
    parser.add_argument("--also", type=Path, help="another trained model to compare with, as it is")
    parser.add_argument("--json", type=Path, required=True, help="the report to write")
    arguments = parser.parse_args()

    before = validation_loss(arguments.backbone, arguments)
    results: list[dict[str, Any]] = [{"system": "before", "validation_loss": before}]
    for rates in arguments.variants:
        runs = [train(arguments, rates, seed) for seed in arguments.seeds.split(",")]
        results.append(summarise(arguments, rates, runs, before))
    if arguments.also is not None:
        loss = validation_loss(arguments.also, arguments)
        found = json.loads((arguments.also / "summary.json").read_text())
        results.append(
            {
                "system": f"{arguments.also.name}, not upcycled",
                "tokens": found["tokens"],
                "parameters_trained": found["parameters"]["trained"],
                "validation_loss": loss,
                "gain": before - loss,
            }
        )
    report = {
        "what": "upcycling",
        "command": f"python {' '.join(sys.argv)}",
        "machine": describe_machine().to_dict(),
        "results": results,
    }
    write_report(report, arguments.json)


def parse_variant(text: str) -> dict[str, str]:
    """`experts@3e-3+ffn@1e-3` -> {"experts": "3e-3", "ffn": "1e-3"}."""
    parts = text.split("+")
    rates = dict(part.split("@") for part in parts)
    parts_known = rates.keys() <= EXPERTS.keys() | BACKBONE.keys()
    twice = len(rates) < len(parts) or any(len(rates & of.keys()) > 1 for of in (EXPERTS, BACKBONE))
    if not parts_known or twice or ("lora" in rates and len(rates) > 1):
        raise ValueError(text)
    return rates


def train(arguments: argparse.Namespace, rates: dict[str, str], seed: str) -> dict[str, Any]:
    """Train a variant, or go on with it; what `summary.json` says at its end."""
    out = arguments.work / f"{'+'.join(words_of(arguments, rates))}-seed{seed}"
    summary = out / "summary.json"
    if not summary.exists():
        settings = [*arguments.set, f"training.steps={arguments.steps}", f"training.seed={seed}"]
        if "lora" in rates:
            train_lora(arguments, settings, float(rates["lora"]), out)
        else:
            upcycle(arguments, settings, rates, out)
    found: dict[str, Any] = json.loads(summary.read_text())
    if found["steps"] != arguments.steps:
        sys.exit(f"{out} has {found['steps']} steps, not {arguments.steps}; choose another --work.")
    return found


def words_of(arguments: argparse.Namespace, rates: dict[str, str]) -> list[str]:
    """What names a variant's folder."""
    words = {
        "experts": f"{arguments.experts}-experts",
        "narrow": f"{arguments.experts}-experts-of-{arguments.row_size}",
        "meki": f"meki-of-{arguments.row_size}",
    }
    return [f"{words.get(part, part)}@{rate}" for part, rate in rates.items()]


def upcycle(
    arguments: argparse.Namespace, settings: list[str], rates: dict[str, str], out: Path
) -> None:
    """`mole upcycle`"""
    command = [Path(sys.executable).with_name("mole"), "upcycle", arguments.backbone]
    command += ["--data", arguments.data, "--out", out, "--recipe", RECIPE]
    for part, rate in rates.items():
        if part in BACKBONE:
            command += ["--train-backbone", part, "--backbone-lr", rate]
            continue
        settings = [*settings, f"training.learning_rate={rate}"]
        if part != "experts":
            command += ["--row-size", arguments.row_size]
        command += ["--form", "meki"] if part == "meki" else ["--experts", arguments.experts]
    if not rates.keys() & EXPERTS.keys():
        command += ["--experts", 0]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run([str(word) for word in command], check=True)


def train_lora(arguments: argparse.Namespace, settings: list[str], rate: float, out: Path) -> None:
    """The same steps of adapters alone; leaves the merged model and its `summary.json`."""
    recipe = for_backbone(
        load_recipe(RECIPE, settings, kind=UpcycleRecipe),
        str(arguments.backbone),
        num_experts=0,
        trained="all",
        learning_rate=rate,
    )
    data = TrainingData([arguments.data])
    torch.manual_seed(recipe.training.seed)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
    model = get_peft_model(upcycled_model(recipe), lora)
    trained = count_parameters(model).trained
    sequences, held_out = data.sequences(recipe.training), data.held_out(recipe.training)
    callbacks = [TakeOwnIntervals(), ProgressCallback()]
    trainer = RecipeTrainer(RunFolder(out), recipe, model, sequences, held_out, callbacks)
    trainer.args.save_strategy = "no"
    trainer.train()
    found = trainer.evaluate()
    merged: Any = model.merge_and_unload()
    merged.config.use_cache = True  # the Trainer turns it off for training
    merged.save_pretrained(out)
    data.save_tokenizer(out)
    summary = {
        "steps": recipe.training.num_steps,
        "tokens": recipe.training.num_steps * recipe.training.tokens_per_step,
        "parameters": {"trained": trained},
        "validation_loss": found["eval_loss"],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


@torch.inference_mode()
def validation_loss(folder: Path, arguments: argparse.Namespace) -> float:
    """Of a model, on the sequences that every run is validated on."""
    recipe = load_recipe(RECIPE, arguments.set, kind=UpcycleRecipe)
    held_out = TrainingData([arguments.data]).held_out(recipe.training)
    if held_out is None:
        sys.exit(f"{arguments.data} has no text to validate on; prepare it with --validation.")
    model = le.load(folder, dtype="float32")
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.training.precision == "bf16"):
        return statistics.fmean(model(**batch).loss.item() for batch in DataLoader(held_out))


def summarise(
    arguments: argparse.Namespace, rates: dict[str, str], runs: list[dict[str, Any]], before: float
) -> dict[str, Any]:
    words = {**EXPERTS, **BACKBONE}
    losses = [run["validation_loss"] for run in runs]
    return {
        "system": " and ".join(words[part] for part in rates).format(**vars(arguments)),
        "learning_rates": [float(rate) for rate in rates.values()],
        "seeds": len(runs),
        "steps": runs[0]["steps"],
        "tokens": runs[0]["tokens"],
        "parameters_trained": runs[0]["parameters"]["trained"],
        "validation_loss": statistics.fmean(losses),
        "validation_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        "gain": before - statistics.fmean(losses),
    }


if __name__ == "__main__":
    main()
