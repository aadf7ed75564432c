"""All that is to be shown on a GPU, in one run of a few minutes.

Sections run one after the other, the most important first, and what each gives is kept as it
comes. One that fails is noted, with its error, and the next begins; after a fault of the device
itself, whose context is lost then, none does.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lookup_experts import console
from lookup_experts.benchmarks.beside_dense import Comparison, System, moles_of
from lookup_experts.benchmarks.decode import CONTEXT, SEQUENCE_STEPS, measure_decode
from lookup_experts.benchmarks.models import Case, dense_model, random_table, table_model
from lookup_experts.benchmarks.prefill import measure_prefill
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.serve import EAGER, loaded, take_turns
from lookup_experts.benchmarks.text import TextWindows, id_stream
from lookup_experts.errors import UserError, unknown_name
from lookup_experts.generation.captured import Decoding
from lookup_experts.model.gateless_llama import paper_config
from lookup_experts.units import parse_bytes

SMALL_VOCABULARY = 8192
"""Of the larger shapes, whose tables would take minutes to write; a step reads as much."""
BATCHES = (1, 8, 32)
PROMPTS = (512, 2048)
CACHE = "256MB"
SERVED_STREAMS = (8, 32)
SERVED_TOKENS = 128

Measure = Callable[["Setting"], Iterator[Result]]


@dataclass(frozen=True)
class Setting:
    """What a section runs on.

    Attributes:
        ids: see `id_stream`; where a vocabulary is small, ids are taken modulo its size.
        work: where tables are kept.
        pairs: steps of each system.
        device: `cuda`, or `cpu` to try it all.
    """

    ids: Path | None
    work: Path
    pairs: int
    device: str

    def text(self, case: Case) -> np.ndarray:
        """Token ids that the case's model has."""
        ids = id_stream(self.ids, replace(case, vocab_size=None).layout.shape.vocab_size, self.work)
        return ids % case.layout.shape.vocab_size


def bench_gpu(setting: Setting, names: list[str], seconds: float, results: Results) -> None:
    """`mole bench gpu`: the sections of these names, or all, for as long as it may take."""
    for name in names:
        if name not in SECTIONS:
            raise unknown_name("section", name, SECTIONS)
    started_at = time.monotonic()
    for name in names or SECTIONS:
        taken = time.monotonic() - started_at
        if taken > seconds:
            console.say(f"{taken:.0f} s have gone: not begun: {name} and what follows it.")
            break
        console.say(f"[{taken:.0f} s] {name}")
        try:
            for result in SECTIONS[name](setting):
                results.add({"section": name, **result})
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            results.add({"section": name, "error": f"{type(error).__name__}: {reason}"})
            if "CUDA error" in reason:
                break
    results.finish()


@contextmanager
def _comparison(
    setting: Setting, case: Case, store: str, cache: str = "0"
) -> Iterator[tuple[dict[System, Any], Any]]:
    """Both models and text; closed and let go in the end, since the next ones need the room."""
    comparison = Comparison(
        case, store, parse_bytes(cache), setting.ids, setting.work, setting.device
    )
    models, windows = comparison.prepare(setting.text(case))
    try:
        yield models, windows
    finally:
        for mole in moles_of(models).values():
            mole.expert_source.close()
        models.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _decode(case: Case, store: str, setting: Setting) -> Iterator[Result]:
    cache = CACHE if store == "direct" else "0"
    longest = CONTEXT + SEQUENCE_STEPS
    with _comparison(setting, case, store, cache) as (models, windows):
        for batch in BATCHES:
            decodings = {name: Decoding(model, longest) for name, model in models.items()}
            for result in measure_decode(
                models, windows, batch, setting.pairs, lambda done, of: None, decodings
            ):
                yield result | {"shape": case.shape, "vocabulary": case.layout.shape.vocab_size}


def _memory(case: Case, store: str, cache: str, setting: Setting) -> Iterator[Result]:
    """What each model takes of the device's memory, as the driver counts it."""
    table = random_table(case, setting.work)
    ids = TextWindows(setting.text(case), device=setting.device).take(max(BATCHES), CONTEXT)
    taken = {}
    for name in ("dense", "mole"):
        before = _free_bytes()
        if name == "dense":
            model = dense_model(case, setting.device)
        else:
            cache_bytes = parse_bytes(cache)
            model = table_model(case, table, store, cache_bytes, console.say, setting.device)
        decoding = Decoding(model, CONTEXT + SEQUENCE_STEPS)
        decoding.begin(ids)
        for _ in range(4):
            decoding.step()
        taken[name] = before - _free_bytes()
        if name == "mole":
            model.expert_source.close()
        del model, decoding
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    yield {
        "what": "device memory",
        "store": store,
        "cache_bytes": parse_bytes(cache),
        "dense_bytes": taken["dense"],
        "beyond_dense_bytes": taken["mole"] - taken["dense"],
    }


def _free_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def _prefill(case: Case, store: str, setting: Setting) -> Iterator[Result]:
    cache = CACHE if store == "direct" else "0"
    with _comparison(setting, case, store, cache) as (models, windows):
        for tokens in PROMPTS:
            pairs = max(5, setting.pairs // 4)
            yield from measure_prefill(models, windows, tokens, pairs, lambda done, of: None)


def _serve(case: Case, setting: Setting) -> Iterator[Result]:
    common = ("--device", setting.device, "--max-batch", max(SERVED_STREAMS))
    mole = ("--store", "memory", *common)
    servers = {"dense": common, "mole": mole, f"mole{EAGER}": (*mole, "--no-graphs")}
    found: list[Result] = []
    with loaded(case, servers, CONTEXT, SERVED_TOKENS, setting.ids, setting.work) as clients:
        asyncio.run(take_turns(clients, SERVED_STREAMS, 2, lambda done, of: None, found.append))
    yield from found


def _tests(setting: Setting) -> Iterator[Result]:
    """The tests that need a GPU, where the repository is at hand."""
    tests = Path("tests")
    if not tests.is_dir():
        raise UserError("The tests are run from the repository's folder, which this isn't.")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x", "--maxfail", "8"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(tests)],
        capture_output=True,
        text=True,
        check=False,
    )
    console.say(done.stdout[-6000:])
    yield {"what": "tests", "exit_code": done.returncode, "said": done.stdout.splitlines()[-1:]}


def _case(shape: str, encoding: str = "bfloat16", form: str = "mole", share: int = 1) -> Case:
    """A case of rows of a share of the width; of the larger shapes with a small vocabulary."""
    row_size = None if share == 1 else paper_config(shape).hidden_size // share
    case = Case(
        shape, 4 if form == "mole" else 1, encoding, torch.bfloat16, form=form, row_size=row_size
    )
    return case if shape == "160m" else replace(case, vocab_size=SMALL_VOCABULARY)


SECTIONS: dict[str, Measure] = {
    "decode": partial(_decode, _case("160m"), "memory"),
    "decode-meki-quarter": partial(_decode, _case("160m", form="meki", share=4), "memory"),
    "decode-quarter": partial(_decode, _case("160m", share=4), "memory"),
    "decode-nf4": partial(_decode, _case("160m", "nf4"), "memory"),
    "prefill": partial(_prefill, _case("160m"), "memory"),
    "decode-disk": partial(_decode, _case("160m"), "direct"),
    "serve": partial(_serve, _case("160m")),
    "memory": partial(_memory, _case("160m"), "memory", "0"),
    "memory-disk": partial(_memory, _case("160m"), "direct", CACHE),
    "decode-410m": partial(_decode, _case("410m"), "memory"),
    "decode-1b": partial(_decode, _case("1b"), "memory"),
    "prefill-nf4": partial(_prefill, _case("160m", "nf4"), "memory"),
    "prefill-disk": partial(_prefill, _case("160m"), "direct"),
    "decode-disk-nf4": partial(_decode, _case("160m", "nf4"), "direct"),
    "prefill-disk-nf4": partial(_prefill, _case("160m", "nf4"), "direct"),
    "tests": _tests,
}
"""In the order in which they are worth a GPU's time."""
