"""The stages of the demo: what they are, in which order, from which files, and what they do."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lookup_experts import console
from lookup_experts.benchmarks.demo import systems
from lookup_experts.benchmarks.demo.corpus import Text, write_corpus
from lookup_experts.benchmarks.demo.journal import Result, Stage
from lookup_experts.benchmarks.demo.report import Report, format_count, markdown
from lookup_experts.benchmarks.demo.screen import Screen
from lookup_experts.benchmarks.demo.sizes import Sizes
from lookup_experts.errors import TableError, UserError
from lookup_experts.training.files import atomic_write
from lookup_experts.units import format_bytes

CORPUS, TOKENIZER, DATA = "corpus.jsonl", "tokenizer", "data"
REPORTS = ("report.json", "report.md", "report.png")
_MIN_HELD_OUT_SEQUENCES = 4

progress_bar = partial(console.progress_bar, transient=True)


class Stages:
    """The stages of one demo, and what they do.

    Args:
        text, sizes, out, command: see `run_demo`.
        screen: shows signs of life.
    """

    def __init__(self, text: Text, sizes: Sizes, out: Path, command: str, screen: Screen) -> None:
        self._text = text
        self._sizes = sizes
        self._out = out
        self._command = command
        self._screen = screen

    def in_order(self) -> list[Stage]:
        """All of them."""
        return [*self._of_the_text(), *self._of_the_models(), *self._of_the_measurements()]

    def _of_the_text(self) -> list[Stage]:
        sizes = self._sizes
        return [
            Stage(
                "text",
                f"Collect text: {self._text.name}",
                self._write_corpus,
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
        ]

    def _of_the_models(self) -> list[Stage]:
        sizes = self._sizes
        dense, mole = sizes.recipe(None), sizes.recipe(sizes.num_experts)
        return [
            Stage(
                "dense",
                "Train a dense model, to compare with",
                partial(self._train, dense, systems.DENSE),
                _tell_training,
                inputs=dense,
                needs=("tokens",),
                outputs=(systems.DENSE,),
            ),
            Stage(
                "mole",
                f"Train it with {sizes.num_experts} lookup experts per layer, on the same tokens",
                partial(self._train, mole, systems.MOLE),
                _tell_training,
                inputs=mole,
                needs=("tokens",),
                outputs=(systems.MOLE,),
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
                outputs=(systems.TABLE,),
                leftovers=(f"{systems.TABLE}.partial",),
            ),
            Stage(
                "verification",
                "Verify the table: every record by its checksum, and that it is the model's",
                self._verify,
                lambda r: f"all {r['num_records']:,} records are intact and belong to the model",
                needs=("table",),
            ),
        ]

    def _of_the_measurements(self) -> list[Stage]:
        sizes = self._sizes
        models = ("dense", "mole", "table")
        return [
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
                lambda r: ", ".join(str(self._out / name) for name in REPORTS),
                needs=("verification", "agreement", "decoding", "memory"),
                outputs=REPORTS,
            ),
        ]

    def _write_corpus(self, _: Mapping[str, Result]) -> Result:
        sizes = self._sizes
        return write_corpus(self._text, self._out / CORPUS, sizes.text_bytes, sizes.min_text_bytes)

    def _train_tokenizer(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.benchmarks.demo.tokenizer import train_tokenizer

        with self._screen.working("Learning the tokenizer takes some seconds"):
            entries = train_tokenizer(
                self._out / CORPUS, self._sizes.vocab_size, self._out / TOKENIZER
            )
        return {"entries": entries}

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
        needed = _MIN_HELD_OUT_SEQUENCES * self._sizes.context_length
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

    def _train(self, recipe: dict[str, Any], folder: str, _: Mapping[str, Result]) -> Result:
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

        out = self._out / systems.TABLE
        if not out.exists():  # else it was finished just before an interruption
            with progress_bar("Folding the experts") as progress:
                reparameterize(self._out / systems.MOLE, out, encoding="float32", progress=progress)
        layout = open_table(out / "table").layout
        return {
            "num_records": layout.shape.vocab_size,
            "record_bytes": layout.record_bytes,
            "table_bytes": layout.table_bytes,
        }

    def _verify(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.generation.inspection import verify_folder

        with progress_bar("Verifying") as progress:
            found = verify_folder(self._out / systems.TABLE, progress)
        if found.problems:
            raise TableError(f"{found.folder}: {'; '.join(found.problems)}.")
        return {"num_records": found.report.num_ids}

    def _compare_tokens(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.benchmarks.demo.agreement import continue_held_out_text

        sizes = self._sizes
        return continue_held_out_text(
            self._out, self._out / DATA, sizes.prompts, sizes.prompt_tokens, sizes.new_tokens
        )

    def _measure_decoding(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.benchmarks.demo.decoding import measure_decoding

        sizes = self._sizes
        with progress_bar("Decoding") as progress:
            return measure_decoding(
                self._out,
                self._out / DATA,
                sizes.decode_passages,
                sizes.context_length,
                progress,
            )

    def _measure_memory(self, _: Mapping[str, Result]) -> Result:
        from lookup_experts.benchmarks.demo.memory import measure_memory

        measured: Result = {}
        with progress_bar("Measuring memory") as progress:
            for system in systems.SYSTEMS:
                progress(len(measured), len(systems.SYSTEMS))
                measured[system.name] = measure_memory(self._out / system.folder, system.store)
        return measured

    def _write_report(self, results: Mapping[str, Result]) -> Result:
        from lookup_experts.benchmarks.demo.picture import draw

        report = self._report(results)
        contents = (
            (json.dumps(report, indent=1) + "\n").encode(),
            markdown(report).encode(),
            draw(report),
        )
        for name, content in zip(REPORTS, contents, strict=True):
            with atomic_write(self._out / name) as file:
                file.write(content)
        return {}

    def _report(self, results: Mapping[str, Result]) -> Report:
        from lookup_experts.benchmarks.machine import describe_machine

        return {
            "command": self._command,
            "machine": describe_machine().to_dict(),
            "sizes": asdict(self._sizes),
            **{name: results[name] for name in ("text", "tokens", "table", "agreement")},
            "training": {name: results[name] for name in ("dense", "mole")},
            "systems": self._systems(results),
            "page_cache_bypassed": (
                "page cache" not in results["decoding"]["mole_disk"]["backend"]
            ),
            "seconds": {name: result["seconds"] for name, result in results.items()},
        }

    def _systems(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """All that was measured, by system."""
        losses = {name: results[name]["validation_loss"] for name in ("dense", "mole")}
        return {
            system.name: {
                **parameters,
                "validation_loss": losses["dense" if system.folder == systems.DENSE else "mole"],
                **results["decoding"][system.name],
                **results["memory"][system.name],
            }
            for system, parameters in systems.count_parameters(self._out)
        }


def _tell_training(result: Result) -> str:
    return (
        f"validation loss {result['validation_loss']:.3f} after {result['tokens']:,} tokens, "
        f"{result['tokens_per_second']:,.0f} tokens/s"
    )
