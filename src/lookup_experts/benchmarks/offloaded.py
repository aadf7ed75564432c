"""Models with embeddings in tables, beside the same models as transformers has them.

| system | its embeddings |
|---|---|
| `resident` | in memory of the process |
| `mapped` | as transformers loads them on a CPU: the checkpoint, mapped, in the page cache |
| `offloaded` | in tables |

All other weights are in memory of the process in each, so that what differs is the embeddings
alone. Warm and with memory enough they run in one process, step by step in turn; from a cold page
cache, or where memory is limited, each in a process of its own.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lookup_experts import allocation, console
from lookup_experts.benchmarks.processes import (
    DiskCounter,
    in_fresh_process,
    proportional_set_size,
)
from lookup_experts.benchmarks.results import Result, Results
from lookup_experts.benchmarks.text import TOKENIZER_ENTRIES, TextWindows, id_stream
from lookup_experts.benchmarks.timing import (
    clock_of,
    interleave,
    median,
    pair_ratios,
    spread,
)
from lookup_experts.errors import UserError
from lookup_experts.folders.checkpoint import StoredTensor, stored_tensors
from lookup_experts.folders.load import load
from lookup_experts.folders.model_folder import read_config
from lookup_experts.folders.readers import TableReaders, table_readers
from lookup_experts.folders.tables import EMBEDDINGS
from lookup_experts.model.cache_names import cache_argument, cache_of
from lookup_experts.model.embedding_settings import embedding_settings
from lookup_experts.table.cache_budget import parse_cache
from lookup_experts.table.lanes import check_device
from lookup_experts.units import format_bytes, parse_bytes

CONTEXT = 64
"""Tokens of each sequence before its first decoding step."""
SEQUENCE_STEPS = 64
WARM_UP_STEPS = 4
DECODING_STEPS = 128
"""Of a process whose memory is measured."""
PROMPT_TOKENS = 512
CONTROL_GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
"""Of the first and the second version."""
_GROUP = "mole-bench-"
"""With a process's number, the name of its control group."""


@dataclass(frozen=True)
class Subjects:
    """Two folders of one model, and what it is run on."""

    offloaded: Path
    resident: Path
    store: str
    """Where the tables are read from."""
    cache: str
    """Budget of the row caches together."""
    ids: Path | None
    """See `id_stream`."""
    work: Path
    device: str = "cpu"

    def check(self) -> None:
        """Raise a `UserError` for folders that aren't such a pair."""
        check_device(self.device)
        parse_cache(self.cache)
        if not embedding_settings(read_config(self.offloaded)):
            raise UserError(
                f"{self.offloaded} has no embeddings in tables; make it by mole offload, and give "
                "the folder that it was made from with --resident."
            )
        stored_tensors(self.resident)

    def windows(self, vocab_size: int) -> TextWindows:
        """Text for it; ids of the standard library's are spread over the vocabulary, as those of
        its own tokenizer would be."""
        ids = id_stream(self.ids, min(vocab_size, TOKENIZER_ENTRIES), self.work)
        if self.ids is None and vocab_size > TOKENIZER_ENTRIES:
            ids = np.asarray(ids).astype(np.int64) * (vocab_size // TOKENIZER_ENTRIES)
        return TextWindows(ids, device=self.device)

    # A weight that was made in inference mode, as one that takes no gradients, is copied whole by
    # torch for a product with a slice of states: the head for each prompt.
    @torch.inference_mode(False)
    def load(self, system: str) -> Any:
        """One of the systems."""
        console.quiet_transformers()
        names = {f"{name}.weight" for name in embedding_settings(read_config(self.offloaded))}
        if system == "offloaded":
            model = load(
                self.offloaded,
                store=self.store,
                cache=self.cache,
                device=self.device,
                weights="plain",  # as the others have them
                notify=lambda message: None,
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(self.resident).eval().to(self.device)
        for name, weight in model.named_parameters():
            if system == "resident" or name not in names:
                weight.data = weight.data.clone()
        return model

    def table_files(self, system: str) -> list[tuple[Path, int, int]]:
        """File, first byte and number of bytes of what a system reads rows from."""
        if system == "offloaded":
            files = sorted((self.offloaded / EMBEDDINGS).rglob("*.safetensors"))
            return [(file, 0, file.stat().st_size) for file in files]
        stored = stored_tensors(self.resident)
        ends = {name.rpartition(".")[2] for name in embedding_settings(read_config(self.offloaded))}
        return [
            (one.file, one.start, one.num_bytes) for one in stored.values() if _is_of(one, ends)
        ]


def _is_of(stored: StoredTensor, ends: set[str]) -> bool:
    """Whether a tensor is of a module whose name ends so, maybe one of its shards."""
    return bool(ends & set(stored.name.split(".")[-3:]))


# --------------------------------------------------------------------------- in one process


def bench_decode(
    subjects: Subjects, batches: Sequence[int], pairs: int, limit: str | None, results: Results
) -> None:
    """`mole bench decode --model`; with `limit`, in control groups that leave so much memory beside
    the other weights."""
    subjects.check()
    if limit is None:
        models, windows = _prepare(subjects)
        for batch in batches:
            results.add(*_measure_decode(subjects, models, windows, batch, pairs))
    else:
        for batch in batches:
            results.add(*_in_turn(subjects, "decode", batch, pairs, limit))
    results.finish()


def bench_prefill(
    subjects: Subjects,
    lengths: Sequence[int],
    pairs: int,
    limit: str | None,
    cold: bool,
    results: Results,
) -> None:
    """`mole bench prefill --model`; `cold`: the first prompt of a process, `pairs` processes of
    each system, of whose tables the page cache holds nothing."""
    subjects.check()
    if cold:
        for tokens in lengths:
            results.add(*_measure_cold(subjects, tokens, pairs))
    elif limit is None:
        models, windows = _prepare(subjects)
        for tokens in lengths:
            results.add(*_measure_prefill(subjects, models, windows, tokens, pairs))
    else:
        for tokens in lengths:
            results.add(*_in_turn(subjects, "prefill", tokens, pairs, limit))
    results.finish()


def _prepare(subjects: Subjects) -> tuple[dict[str, Any], TextWindows]:
    allocation.keep_freed_memory()
    on_cpu = subjects.device == "cpu"
    systems = ["resident", "mapped", "offloaded"] if on_cpu else ["resident", "offloaded"]
    models = {system: subjects.load(system) for system in systems}
    return models, subjects.windows(models["offloaded"].config.get_text_config().vocab_size)


@torch.inference_mode()
def _measure_decode(
    subjects: Subjects,
    models: dict[str, Any],
    windows: TextWindows,
    batch: int,
    pairs: int,
) -> list[Result]:
    seconds: dict[str, list[float]] = {name: [] for name in models}
    readers = _readers(models["offloaded"])
    _decode(models, windows.take(batch, CONTEXT + SEQUENCE_STEPS))
    readers.reset_stats()
    disk = DiskCounter()
    with console.progress_bar(f"decode {batch}") as advance:
        while len(seconds["resident"]) < pairs:
            for name, taken in _decode(
                models, windows.take(batch, CONTEXT + SEQUENCE_STEPS)
            ).items():
                seconds[name] += taken
            advance(min(len(seconds["resident"]), pairs), pairs)
    return _results(subjects, "decode", {"batch": batch}, seconds, readers, disk.bytes_read())


def _decode(models: dict[str, Any], tokens: Tensor) -> dict[str, list[float]]:
    """Seconds of each step that counts."""
    pasts = {
        name: {
            cache_argument(model): cache_of(
                model(tokens[:, :CONTEXT], use_cache=True, logits_to_keep=1)
            )
        }
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    clock = clock_of(tokens.device)
    for number in range(tokens.shape[1] - CONTEXT):
        column = tokens[:, CONTEXT + number, None]
        steps = {
            name: partial(model, column, use_cache=True, **pasts[name])
            for name, model in models.items()
        }
        for name, taken in interleave(steps, 1, number, clock).items():
            seconds[name] += taken if number >= WARM_UP_STEPS else []
    return seconds


@torch.inference_mode()
def _measure_prefill(
    subjects: Subjects,
    models: dict[str, Any],
    windows: TextWindows,
    tokens: int,
    pairs: int,
) -> list[Result]:
    readers = _readers(models["offloaded"])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model(windows.take(1, tokens), logits_to_keep=1)
    readers.reset_stats()
    disk = DiskCounter()
    with console.progress_bar(f"prefill {tokens}") as advance:
        for pair in range(pairs):
            prompt = windows.take(1, tokens)
            prompts = {
                name: partial(model, prompt, logits_to_keep=1) for name, model in models.items()
            }
            for name, taken in interleave(prompts, 1, pair, clock_of(prompt.device)).items():
                seconds[name] += taken
            advance(pair + 1, pairs)
    return _results(subjects, "prefill", {"tokens": tokens}, seconds, readers, disk.bytes_read())


def _readers(model: Any) -> TableReaders:
    readers = table_readers(model)
    assert readers is not None, "checked by `Subjects.check`"
    return readers


def _results(
    subjects: Subjects,
    what: str,
    size: dict[str, int],
    seconds: dict[str, list[float]],
    readers: TableReaders,
    from_disk: int,
) -> list[Result]:
    read = readers.stats()
    wanted = 0
    for reader in readers.by_place.values():
        asked = reader.stats()
        missed = asked.ids_unique - asked.cache_hits
        wanted += missed * reader.table.layout.record_bytes
    found: list[Result] = []
    for system, taken in seconds.items():
        ratios = pair_ratios(taken, seconds["resident"])
        result: Result = {
            "what": what,
            "system": system,
            "ms_per_step": median(taken) * 1e3,
            "ratio_to_resident": median(ratios),
            "spread": spread(ratios),
            "pairs": len(taken),
            **size,
        }
        if "mapped" in seconds:
            result["ratio_to_mapped"] = median(pair_ratios(taken, seconds["mapped"]))
        if system == "offloaded":
            result |= {
                "store": read.store,
                "backend": read.backend,
                "cache_bytes": read.cache_bytes,
                "hit_rate": read.cache_hits / max(1, read.ids_unique),
                "bytes_per_step": read.bytes_read / max(1, read.batches),
                "share_wanted": wanted / read.bytes_read if read.bytes_read else None,
                "wait_ms": read.wait_seconds / max(1, read.batches) * 1e3,
                "page_cache_bypassed": (
                    from_disk >= read.bytes_read if read.store == "direct" else None
                ),
            }
        found.append(result)
    return found


# --------------------------------------------------------------- in processes of their own


def _measure_cold(subjects: Subjects, tokens: int, pairs: int) -> list[Result]:
    """`rows_ms`: what the rows alone of so many tokens take, their ids drawn at random."""
    seconds: dict[str, list[float]] = {"mapped": [], "offloaded": []}
    of_rows: dict[str, list[float]] = {system: [] for system in seconds}
    for _ in range(pairs):
        for system, taken in seconds.items():
            prompt, rows = in_fresh_process(
                "A cold prompt", _first_prompt, subjects, system, tokens
            )
            taken.append(prompt)
            of_rows[system].append(rows)
    return [
        {
            "what": "prefill",
            "cold": True,
            "system": system,
            "ms_per_step": median(taken) * 1e3,
            "ratio_to_mapped": median(pair_ratios(taken, seconds["mapped"])),
            "rows_ms": median(of_rows[system]) * 1e3,
            "rows_ratio_to_mapped": median(pair_ratios(of_rows[system], of_rows["mapped"])),
            "pairs": pairs,
            "tokens": tokens,
        }
        for system, taken in seconds.items()
    ]


@torch.inference_mode()
def _first_prompt(subjects: Subjects, system: str, tokens: int) -> tuple[float, float]:
    """Seconds, of the prompt and of rows alone; to be called in a fresh process."""
    allocation.keep_freed_memory()  # as `mole serve` does
    for place in subjects.table_files(system):
        _forget(*place)
    model = subjects.load(system)
    windows = subjects.windows(model.config.get_text_config().vocab_size)
    prompt = windows.take(1, tokens)
    other = torch.full_like(prompt, int(prompt[0, 0]))
    model(other, logits_to_keep=1)  # what is set up once is no part of it; one row is touched
    taken = interleave({"": lambda: model(prompt, logits_to_keep=1)}, 1)[""][0]
    seconds = 0.0
    for name, settings in embedding_settings(read_config(subjects.offloaded)).items():
        module = model.get_submodule(name)
        ids = torch.randint(0, module.num_embeddings, (1, tokens * settings.rows_per_token))
        seconds += interleave({"": partial(_sum_of_rows, module, ids)}, 1)[""][0]
    return taken, seconds


def _sum_of_rows(embedding: Any, ids: Tensor) -> Tensor:
    """A sum, so that all rows must have come."""
    total: Tensor = embedding(ids).sum()
    return total


def _in_turn(subjects: Subjects, what: str, size: int, pairs: int, limit: str) -> list[Result]:
    found: list[Result] = []
    for system in ("mapped", "offloaded"):
        seconds, limit_bytes, failed = in_fresh_process(
            "Decoding within a limit", _within_limit, subjects, system, what, size, pairs, limit
        )
        found.append(
            {
                "what": what,
                "limit": limit,
                "limit_bytes": limit_bytes,
                "system": system,
                "ms_per_step": median(seconds) * 1e3,
                "spread_ms": [one * 1e3 for one in spread(seconds)],
                "pairs": len(seconds),
                "batch" if what == "decode" else "tokens": size,
                "times_at_the_limit": failed,
            }
        )
    found[1]["ratio_to_mapped"] = found[1]["ms_per_step"] / found[0]["ms_per_step"]
    return found


@torch.inference_mode()
def _within_limit(
    subjects: Subjects, system: str, what: str, size: int, pairs: int, limit: str
) -> tuple[list[float], int, int]:
    """Seconds of each step, the limit, and how often it was met; to be called in a fresh process,
    which stays in the control group that is made for it."""
    group = _ControlGroup()
    for place in subjects.table_files(system):
        _forget(*place)
    model = subjects.load(system)
    windows = subjects.windows(model.config.get_text_config().vocab_size)
    tokens = CONTEXT + SEQUENCE_STEPS if what == "decode" else size
    rows = size if what == "decode" else 1
    same = torch.full((rows, tokens), int(windows.take(1, 1)[0, 0]))
    _steps(model, what, same)  # what attention and the allocator take, without the tables
    for place in subjects.table_files("mapped"):
        _forget(*place)
    try:
        limit_bytes = group.limit_beyond_now(parse_bytes(limit))
        seconds: list[float] = []
        _steps(model, what, windows.take(rows, tokens))
        with console.progress_bar(f"{system} {what} {size}") as advance:
            while len(seconds) < pairs:
                seconds += _steps(model, what, windows.take(rows, tokens))
                advance(min(pairs, len(seconds)), pairs)
        return seconds[:pairs], limit_bytes, group.times_at_the_limit()
    finally:
        group.lift()


def _steps(model: Any, what: str, tokens: Tensor) -> list[float]:
    if what == "decode":
        return _decode({"": model}, tokens)[""]
    return interleave({"": lambda: model(tokens, logits_to_keep=1)}, 1)[""]


class _ControlGroup:
    """A control group with this process in it, of the kernel's first or second version; those that
    killed processes left behind are removed.

    Raises:
        UserError: none can be made here.
    """

    def __init__(self) -> None:
        first, second = CONTROL_GROUPS
        self._is_first = first.is_dir()
        groups = first if self._is_first else second
        self._place = groups / f"{_GROUP}{os.getpid()}"
        try:
            for left in groups.glob(f"{_GROUP}*"):
                if not Path("/proc", left.name.removeprefix(_GROUP)).exists():
                    left.rmdir()
            self._place.mkdir()
            (self._place / "cgroup.procs").write_text(str(os.getpid()))
            self._file("limit_in_bytes", "max").read_text()
        except OSError as error:
            raise UserError(
                f"No memory control group can be made in {self._place.parent} "
                f"({error.strerror}); that takes a superuser. Leave --limit out."
            ) from error

    def _file(self, first: str, second: str) -> Path:
        return self._place / f"memory.{first if self._is_first else second}"

    def limit_beyond_now(self, num_bytes: int) -> int:
        """Let the group have so much more than it has now; gives the limit."""
        limit = int(self._file("usage_in_bytes", "current").read_text()) + num_bytes
        limit = limit // mmap.PAGESIZE * mmap.PAGESIZE
        self._file("limit_in_bytes", "max").write_text(str(limit))
        return limit

    def times_at_the_limit(self) -> int:
        """How often something had to give way."""
        if self._is_first:
            return int((self._place / "memory.failcnt").read_text())
        events = dict(
            line.split() for line in (self._place / "memory.events").read_text().splitlines()
        )
        return int(events["max"])

    def lift(self) -> None:
        """Leave the group, and remove it."""
        (self._place.parent / "cgroup.procs").write_text(str(os.getpid()))
        self._place.rmdir()


# ------------------------------------------------------------------------------- memory


def bench_memory(subjects: Subjects, results: Results) -> None:
    """`mole bench memory --model`: what the machine holds after a prompt and some decoding.

    Of each system `resident_bytes`, the proportional set size; `page_cache_bytes`, what the page
    cache has of the files of its tables; and `table_bytes_held`: both, less the first of the same
    model with rows that come from nowhere.
    """
    subjects.check()
    found: list[Result] = []
    for system in ("without", "offloaded", "mapped", "resident"):
        held, cached = in_fresh_process("Memory", _after_decoding, subjects, system)
        found.append(
            {
                "what": "memory",
                "system": system,
                "resident_bytes": held,
                "page_cache_bytes": cached,
                "table_bytes_held": held + cached - found[0]["resident_bytes"] if found else 0,
            }
        )
        results.add(found[-1])
    console.say(f"  row caches: {format_bytes(parse_cache(subjects.cache).total)}")
    results.finish()


@torch.inference_mode()
def _after_decoding(subjects: Subjects, system: str) -> tuple[int, int]:
    """Bytes that the process holds, and that the page cache has of its tables besides; to be called
    in a fresh process."""
    is_without = system == "without"
    system = "offloaded" if is_without else system
    places = subjects.table_files(system)
    for place in places:
        _forget(*place)
    model = subjects.load(system)
    if is_without:
        for name in model.embedding_readers:
            module = model.get_submodule(name)
            module.source = _NoRows(module)
    windows = subjects.windows(model.config.get_text_config().vocab_size)
    tokens = windows.take(1, PROMPT_TOKENS + DECODING_STEPS)
    cache = cache_of(model(tokens[:, :PROMPT_TOKENS], use_cache=True, logits_to_keep=1))
    for step in range(PROMPT_TOKENS, PROMPT_TOKENS + DECODING_STEPS):
        model(tokens[:, step, None], use_cache=True, **{cache_argument(model): cache})
    held = proportional_set_size()
    if is_without or system == "resident":
        return held, 0
    in_cache = sum(_cached_bytes(*place) for place in places)
    # What is mapped is in both.
    return held, max(0, in_cache - _mapped_bytes(places)) if system == "mapped" else in_cache


class _NoRows:
    """An `EmbeddingSource` of zeros."""

    in_parts = False

    def __init__(self, embedding: Any) -> None:
        self._layers = embedding.layers
        self.row_size = embedding.embedding_dim // embedding.layers
        self._dtype = embedding.like.dtype
        self.index = torch.zeros(0, dtype=torch.int64)

    def rows(self, token_ids: Tensor) -> "_NoRows":
        self.index = torch.zeros_like(token_ids)
        return self

    def layer(self, layer: int) -> Tensor:
        return torch.zeros(1, 1, self.row_size, dtype=self._dtype)

    def every_layer(self) -> Tensor:
        return torch.zeros(1, self._layers, 1, self.row_size, dtype=self._dtype)


# --------------------------------------------------------------------------- the page cache


def _forget(file: Path, start: int, num_bytes: int) -> None:
    """Have the page cache drop a part of a file that nobody has mapped."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, start, num_bytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _cached_bytes(file: Path, start: int, num_bytes: int) -> int:
    """What the page cache has of a part of a file."""
    page = mmap.PAGESIZE
    first = start // page * page
    length = start + num_bytes - first
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), length, mmap.MAP_SHARED, mmap.PROT_READ, offset=first)
    seen = np.frombuffer(mapped, np.uint8)
    states = np.zeros(-(-length // page), np.uint8)
    library = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(seen.ctypes.data)
    if library.mincore(address, ctypes.c_size_t(length), ctypes.c_void_p(states.ctypes.data)):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((states & 1).sum()) * page


def _mapped_bytes(places: Sequence[tuple[Path, int, int]]) -> int:
    """What of these files this process has mapped and in memory."""
    names = {str(file.resolve()) for file, _, _ in places}
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            counts = len(words) > 5 and " ".join(words[5:]) in names
        elif counts and words[0] == "Pss:":
            total += int(words[1]) * 1024
    return total
