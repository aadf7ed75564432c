"""The demo: what its stages are, in which order, from which files, and what they do.

Modules that import torch are imported by the stages that need them: a demo that is finished is
shown again at once.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.text import Text as Words

from lookup_experts import console
from lookup_experts.benchmarks.demo.journal import Journal, Result, Stage
from lookup_experts.benchmarks.demo.report import (
    DENSE,
    MOLE,
    SYSTEMS,
    TABLE,
    Report,
    draw,
    format_count,
    markdown,
)
from lookup_experts.benchmarks.text import Text, train_tokenizer, write_corpus
from lookup_experts.errors import DiskFullError, TableError, UserError
from lookup_experts.training.files import atomic_write, locked
from lookup_experts.units import format_bytes

CORPUS, TOKENIZER, DATA = "corpus.jsonl", "tokenizer", "data"
REPORTS = ("report.json", "report.md", "report.png")
MIN_HELD_OUT_SEQUENCES = 4
BYTES_PER_NUMBER = 4
"""Everything is float32: then table and experts agree to the last token."""
CHECKPOINT_BYTES_PER_PARAMETER = 12
CHECKPOINTS = 2
"""One is kept, and one more is there while it is written."""

progress_bar = partial(console.progress_bar, transient=True)


@dataclass(frozen=True)
class Sizes:
    """Of the text, the models and the measurements: all that decides how long the demo takes and
    what it can show."""

    text_bytes: int
    """At most so much text is used, from the beginning."""
    min_text_bytes: int
    """With less text there is nothing to learn and too little to hold out."""
    vocab_size: int
    """Entries of the tokenizer, unless the text has fewer."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_experts: int
    """Routed experts per layer of the MoLE model; each is as large as the FFN."""
    context_length: int
    sequences_per_step: int
    steps: int
    learning_rate: float
    validate_sequences: int
    held_out: float = 0.05
    """The share of the text that is held out."""
    validations: int = 5
    """Evenly over the training; so often a checkpoint is written, too."""
    prompts: int = 6
    """Passages of held-out text that are continued from the experts and from the table."""
    prompt_tokens: int = 24
    new_tokens: int = 40
    decode_passages: int = 2
    """Passages of held-out text, each a context long, that decoding is timed on."""

    @property
    def ffn_size(self) -> int:
        return 4 * self.hidden_size

    def recipe(self, num_experts: int | None) -> dict[str, Any]:
        """The content of a recipe: the MoLE model's, or with None that of the dense model."""
        model: dict[str, Any] = {
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "ffn_size": self.ffn_size,
            "init_std": 0.02,
        }
        if num_experts is not None:
            model["experts"] = {"num_experts": num_experts}
        every = -(-self.steps // self.validations)
        return {
            "model": model,
            "training": {
                "context_length": self.context_length,
                "steps": self.steps,
                "sequences_per_step": self.sequences_per_step,
                "sequences_per_micro_batch": self.sequences_per_step,
                "learning_rate": self.learning_rate,
                "warmup_fraction": 0.05,
                # Many processors have no bfloat16 arithmetic and take longer for it.
                "precision": "fp32",
                "validate_every": every,
                "validate_sequences": self.validate_sequences,
                "checkpoint_every": every,
                "keep_checkpoints": 1,
            },
        }

    def disk_bytes(self) -> int:
        """About what a demo needs on the disk at its fullest."""
        dense = 2 * self.vocab_size * self.hidden_size + self.num_layers * (
            4 * self.hidden_size**2 + 2 * self.hidden_size * self.ffn_size
        )
        experts = self.num_layers * self.num_experts * 2 * self.hidden_size * self.ffn_size
        table = self.num_layers * self.num_experts * self.hidden_size * self.vocab_size
        checkpoints = CHECKPOINTS * (2 * dense + experts) * CHECKPOINT_BYTES_PER_PARAMETER
        models = (3 * dense + experts + table) * BYTES_PER_NUMBER
        return checkpoints + models + 2 * self.text_bytes


FULL = Sizes(
    text_bytes=16_000_000,
    min_text_bytes=200_000,
    vocab_size=8192,
    hidden_size=384,
    num_layers=3,
    num_heads=6,
    num_experts=4,
    context_length=256,
    sequences_per_step=4,
    steps=170,
    learning_rate=1.5e-3,
    validate_sequences=64,
)
QUICK = Sizes(
    text_bytes=2_500_000,
    min_text_bytes=200_000,
    vocab_size=4096,
    hidden_size=256,
    num_layers=3,
    num_heads=4,
    num_experts=4,
    context_length=256,
    sequences_per_step=2,
    steps=100,
    learning_rate=1e-3,
    validate_sequences=32,
    validations=2,
    decode_passages=1,
)


def run_demo(text: Text, sizes: Sizes, out: Path, command: str) -> Report:
    """Everything, or what of it isn't finished yet in `out`.

    Args:
        text: what to learn from.
        sizes: how large everything is.
        out: the demo's folder: new, empty, or one of an earlier demo.
        command: what the user typed, for the report.

    Returns:
        The report, which is in `out/report.json`, too.

    Raises:
        UserError: the text or the folder can't be used, or a package is missing.
        DiskFullError: there is too little space; what is finished is kept.
        TableError: the table disagrees with the experts, or is damaged.
    """
    for package in ("accelerate", "matplotlib"):  # before five minutes have gone by
        if find_spec(package) is None:
            raise UserError(
                f"The demo needs the package {package}: pip install 'lookup-experts[train,plot]'."
            )
    terminal = Console(stderr=True, highlight=False)
    with locked(out, "running a demo"), _told_when_disk_is_full(out):
        journal, stages = Journal(out), _Demo(text, sizes, out, command).stages()
        results: dict[str, Result] = {}
        for number, stage in enumerate(stages, start=1):
            terminal.print(Words.assemble((f"{number:>2}/{len(stages)}  ", "bold cyan"), stage.why))
            finished = journal.result(stage)
            if finished is None:
                _check_space(out, sizes)
                console.quiet_transformers()
                started_at = perf_counter()
                journal.begin(stage)
                found = stage.work(results)
                found["seconds"] = perf_counter() - started_at
                journal.finish(stage, found)
            results[stage.name] = found if finished is None else finished
            when = "finished earlier" if finished else f"{found['seconds']:.1f} s"
            told = stage.tell(results[stage.name])
            terminal.print(Words(f"       {told} ({when})", style="dim"))
        return json.loads((out / REPORTS[0]).read_bytes())


def _check_space(out: Path, sizes: Sizes) -> None:
    free = shutil.disk_usage(out).free
    held = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if free + held < sizes.disk_bytes():
        raise DiskFullError(
            f"The demo needs about {format_bytes(sizes.disk_bytes())} in {out}, "
            f"{format_bytes(free)} are free. Free some space, or choose an --out on another disk."
        )


@contextmanager
def _told_when_disk_is_full(out: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from lookup_experts.training.disk_space import says_disk_full

        if not says_disk_full(error):
            raise
        raise DiskFullError(
            f"The disk of {out} is full. What is finished is kept: free some space and run the "
            "same command again."
        ) from error


class _Demo:
    """The stages of one demo, and what they do; see `run_demo`."""

    def __init__(self, text: Text, sizes: Sizes, out: Path, command: str) -> None:
        self._text, self._sizes, self._out, self._command = text, sizes, out, command

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        sizes, models = self._sizes, ("dense", "mole", "table")
        dense, mole = sizes.recipe(None), sizes.recipe(sizes.num_experts)
        return [
            Stage(
                "text",
                f"Collect text: {self._text.name}",
                lambda _: write_corpus(
                    self._text, self._out / CORPUS, sizes.text_bytes, sizes.min_text_bytes
                ),
                lambda r: f"{format_bytes(r['num_bytes'])}, {r['num_documents']:,} documents",
                inputs=[self._text.identity(), sizes.text_bytes, sizes.min_text_bytes],
                outputs=(CORPUS,),
            ),
            Stage(
                "tokenizer",
                "Learn a tokenizer from it; a token's id will be its place in the table",
                self._train_tokenizer,
                lambda r: f"{r['entries']:,} entries",
                inputs=sizes.vocab_size,
                needs=("text",),
                outputs=(TOKENIZER,),
            ),
            Stage(
                "tokens",
                f"Turn the text into tokens; {sizes.held_out:.0%} are held out, to measure on",
                self._prepare,
                lambda r: (
                    f"{format_count(r['train_tokens'])} to train on, "
                    f"{format_count(r['validation_tokens'])} held out"
                ),
                inputs=[sizes.held_out, sizes.context_length],
                needs=("text", "tokenizer"),
                outputs=(DATA,),
            ),
            Stage(
                "dense",
                "Train a dense model, to compare with",
                lambda _: self._train(dense, DENSE),
                _tell_training,
                inputs=dense,
                needs=("tokens",),
                outputs=(DENSE,),
            ),
            Stage(
                "mole",
                f"Train it with {sizes.num_experts} lookup experts per layer, on the same tokens",
                lambda _: self._train(mole, MOLE),
                _tell_training,
                inputs=mole,
                needs=("tokens",),
                outputs=(MOLE,),
            ),
            Stage(
                "table",
                "Fold the experts into a table: what they say of every token id, on disk",
                self._fold,
                lambda r: (
                    f"{r['num_records']:,} records of {format_bytes(r['record_bytes'])}, "
                    f"{format_bytes(r['table_bytes'])} in float32"
                ),
                needs=("mole",),
                outputs=(TABLE,),
                leftovers=(f"{TABLE}.partial",),
            ),
            Stage(
                "verification",
                "Verify the table: every record by its checksum, and that it is the model's",
                self._verify,
                lambda r: f"all {r['num_records']:,} records are intact and belong to the model",
                needs=("table",),
            ),
            Stage(
                "agreement",
                "Continue held-out text from the experts and from the table on disk: the same?",
                self._compare_tokens,
                lambda r: (
                    f"yes, all {r['num_tokens']} tokens after {r['num_prompts']} prompts, "
                    f"read by {r['backend']}"
                ),
                inputs=[sizes.prompts, sizes.prompt_tokens, sizes.new_tokens],
                needs=models,
            ),
            Stage(
                "decoding",
                "Time decoding: all four ways step by step in turn, so that they share conditions",
                self._measure_decoding,
                lambda r: f"{r['dense']['steps']} steps each",
                inputs=[sizes.decode_passages, sizes.context_length],
                needs=models,
            ),
            Stage(
                "memory",
                "Measure resident memory, each way in a fresh process",
                self._measure_memory,
                lambda r: (
                    f"dense {format_bytes(r['dense']['model_bytes'])}, "
                    f"MoLE with its table on disk {format_bytes(r['mole_disk']['model_bytes'])}"
                ),
                needs=models,
            ),
            Stage(
                "report",
                "Write the report",
                self._write_report,
                lambda _: ", ".join(str(self._out / name) for name in REPORTS),
                needs=("verification", "agreement", "decoding", "memory"),
                outputs=REPORTS,
            ),
        ]

    def _train_tokenizer(self, _: Mapping[str, Result]) -> Result:
        entries, folder = self._sizes.vocab_size, self._out / TOKENIZER
        with Console(stderr=True).status("Learning the tokenizer takes some seconds"):
            return {"entries": train_tokenizer(self._out / CORPUS, entries, folder)}

    def _prepare(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.training.prepare import prepare

        manifest = prepare(
            [self._out / CORPUS],
            tokenizer=self._out / TOKENIZER,
            out=self._out / DATA,
            validation=self._sizes.held_out,
            progress=progress_bar,
        ).manifest
        held_out = manifest.num_tokens("validation")
        needed = MIN_HELD_OUT_SEQUENCES * self._sizes.context_length
        if held_out < needed:
            raise UserError(
                f"Only {held_out:,} tokens of {self._text.name} could be held out, {needed:,} are "
                "needed to measure on. Name more files, or longer ones, with --data."
            )
        return {
            "train_tokens": manifest.num_tokens("train"),
            "validation_tokens": held_out,
            "held_out_by": manifest.held_out["by"],
        }

    def _train(self, recipe: dict[str, Any], folder: str) -> Result:
        from lookup_experts.training.recipe import Recipe
        from lookup_experts.training.run_folder import RunFolder
        from lookup_experts.training.train import train

        summary = train(Recipe.from_dict(recipe), self._out / DATA, self._out / folder)
        history = RunFolder(self._out / folder).history.read_text().splitlines()
        return {
            **summary.to_dict(),
            "validation_curve": [
                {key: line[key] for key in ("tokens", "validation_loss")}
                for line in map(json.loads, history)
                if "validation_loss" in line
            ],
        }

    def _fold(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.generation.folding import reparameterize
        from lookup_experts.table.opening import open_table

        out = self._out / TABLE
        if not out.exists():  # else it was finished just before an interruption
            with progress_bar("Folding the experts") as progress:
                reparameterize(self._out / MOLE, out, encoding="float32", progress=progress)
        layout = open_table(out / "table").layout
        return {
            "num_records": layout.shape.vocab_size,
            "record_bytes": layout.record_bytes,
            "table_bytes": layout.table_bytes,
        }

    def _verify(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.generation.inspection import verify_folder

        with progress_bar("Verifying") as progress:
            found = verify_folder(self._out / TABLE, progress)
        if found.problems:
            raise TableError(f"{found.folder}: {'; '.join(found.problems)}.")
        return {"num_records": found.report.num_ids}

    def _compare_tokens(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.benchmarks.demo.measure import continue_held_out_text

        amounts = self._sizes.prompts, self._sizes.prompt_tokens, self._sizes.new_tokens
        return continue_held_out_text(self._out, self._out / DATA, *amounts)

    def _measure_decoding(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.benchmarks.demo.measure import measure_decoding

        amounts = self._sizes.decode_passages, self._sizes.context_length
        with progress_bar("Decoding") as progress:
            return measure_decoding(self._out, self._out / DATA, *amounts, progress)

    def _measure_memory(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.benchmarks.demo.measure import measure_memory

        measured: Result = {}
        with progress_bar("Measuring memory") as progress:
            for system in SYSTEMS:
                progress(len(measured), len(SYSTEMS))
                measured[system.name] = measure_memory(self._out, system)
        return measured

    def _write_report(self, results: Mapping[str, Result]) -> Result:
        from lookup_experts.benchmarks.demo.measure import count_parameters
        from lookup_experts.benchmarks.machine import describe_machine

        parameters = count_parameters(self._out)
        report: Report = {
            "command": self._command,
            "machine": describe_machine().to_dict(),
            "sizes": asdict(self._sizes),
            **{name: results[name] for name in ("text", "tokens", "table", "agreement")},
            "training": {name: results[name] for name in ("dense", "mole")},
            "systems": {
                system.name: {
                    **parameters[system.name],
                    "validation_loss": results["dense" if system.folder == DENSE else "mole"][
                        "validation_loss"
                    ],
                    **results["decoding"][system.name],
                    **results["memory"][system.name],
                }
                for system in SYSTEMS
            },
            "page_cache_bypassed": (
                "page cache" not in results["decoding"]["mole_disk"]["backend"]
            ),
            "seconds": {name: result["seconds"] for name, result in results.items()},
        }
        written = (json.dumps(report, indent=1) + "\n").encode(), markdown(report).encode()
        for name, content in zip(REPORTS, (*written, draw(report)), strict=True):
            with atomic_write(self._out / name) as file:
                file.write(content)
        return {}


def _tell_training(result: Result) -> str:
    return (
        f"validation loss {result['validation_loss']:.3f} after {result['tokens']:,} tokens, "
        f"{result['tokens_per_second']:,.0f} tokens/s"
    )
