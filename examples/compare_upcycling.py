"""What lookup experts add to a trained model, beside further steps of the model itself.

The backbone is a folder of `mole train`. A variant says what is trained and how fast:
`experts@3e-3` (on the frozen backbone), `ffn@1e-3` (its FFNs alone), `all@1e-3` (all of it), or
experts with one of these: `experts@3e-3+ffn@1e-3`. All take the same steps; the seed draws the
experts and the order of the text. All losses are over the same sequences. The report is what
`make results` reads.

Run: python examples/compare_upcycling.py experts@3e-3 ffn@3e-3 experts@3e-3+ffn@3e-3 \
    --backbone runs/dense --data runs/novels4k --work runs/upcycling --seeds 1,2,3 --steps 500 \
    --json upcycling.json
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import lookup_experts as le
from lookup_experts.benchmarks.machine import describe_machine
from lookup_experts.benchmarks.results import write_report
from lookup_experts.training.recipe import load_recipe
from lookup_experts.training.sources import TrainingData
from lookup_experts.training.upcycling import UpcycleRecipe

RECIPE = "upcycle-tiny"
PARTS = {"experts": "experts", "ffn": "its FFNs", "all": "all of it"}


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
    parser.add_argument("--seeds", default="1", help="others than the backbone's")
    parser.add_argument("--also", type=Path, help="another trained model to compare with, as it is")
    parser.add_argument("--json", type=Path, required=True, help="the report to write")
    arguments = parser.parse_args()

    before = validation_loss(arguments.backbone, arguments.data)
    results: list[dict[str, Any]] = [{"system": "before", "validation_loss": before}]
    for rates in arguments.variants:
        runs = [train(arguments, rates, seed) for seed in arguments.seeds.split(",")]
        results.append(summarise(rates, runs, before))
    if arguments.also is not None:
        loss = validation_loss(arguments.also, arguments.data)
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
    if not set(rates) <= set(PARTS) or len(rates) < len(parts) or {"ffn", "all"} <= set(rates):
        raise ValueError(text)
    return rates


def train(arguments: argparse.Namespace, rates: dict[str, str], seed: str) -> dict[str, Any]:
    """Train a variant, or go on with it; what `summary.json` says at its end."""
    name = "+".join(f"{part}@{rate}" for part, rate in rates.items())
    name = name.replace("experts", f"{arguments.experts}-experts")
    out = arguments.work / f"{name}-seed{seed}"
    summary = out / "summary.json"
    if not summary.exists():
        command = [Path(sys.executable).with_name("mole"), "upcycle", arguments.backbone]
        command += ["--data", arguments.data, "--out", out, "--recipe", RECIPE]
        command += ["--set", f"training.steps={arguments.steps}"]
        command += ["--set", f"training.seed={seed}"]
        for part, rate in rates.items():
            if part == "experts":
                command += ["--set", f"training.learning_rate={rate}"]
            else:
                command += ["--train-backbone", part, "--backbone-lr", rate]
        command += ["--experts", arguments.experts if "experts" in rates else 0]
        subprocess.run([str(word) for word in command], check=True)
    found: dict[str, Any] = json.loads(summary.read_text())
    if found["steps"] != arguments.steps:
        sys.exit(f"{out} has {found['steps']} steps, not {arguments.steps}; choose another --work.")
    return found


@torch.inference_mode()
def validation_loss(folder: Path, data: Path) -> float:
    """Of a model, on the sequences that every run is validated on."""
    held_out = TrainingData([data]).held_out(load_recipe(RECIPE, kind=UpcycleRecipe).training)
    if held_out is None:
        sys.exit(f"{data} has no text to validate on; prepare it with --validation.")
    model = le.load(folder, dtype="float32")
    return statistics.fmean(model(**batch).loss.item() for batch in DataLoader(held_out))


def summarise(rates: dict[str, str], runs: list[dict[str, Any]], before: float) -> dict[str, Any]:
    losses = [run["validation_loss"] for run in runs]
    return {
        "system": " and ".join(PARTS[part] for part in rates),
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
