"""The kernels of `device_cache_kernels.py` against their references: by Triton's interpreter on the
CPU, which reads and writes the words of a real worker, and compiled for GPUs that aren't here.

As in `test_kernels.py` both run in processes of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_tables import make_table

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    pytest.mark.timeout(170),
]

ANSWERED = """
import random
import torch
from lookup_experts.table.device_cache_kernels import gather_kernel, locate_kernel
from lookup_experts.table.device_cache_reference import gather_reference, locate_reference
from lookup_experts.table.miss_messages import NEVER, STEP_MASK, UNREADABLE

def answers(draw, step, ids, where, num_hot, num_ram):
    # As a worker gives them: slots, sources, evictions, errors; some late, or from a dead one.
    words = [0] * 192
    given_to = {}
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < len(where) or where[token_id] >= 0:
            continue
        kind, slot = draw.choice(["ram", "ram", "hot", "bad"]), draw.randrange(num_ram)
        place, source = num_hot + slot, 0
        if kind == "hot" and num_hot:
            place, source = draw.randrange(num_hot), slot + 1
        if kind == "bad":
            place, source = UNREADABLE, 0
        evicted = draw.randrange(len(where) + 1)
        if token_id in given_to or evicted - 1 in ids:
            evicted = 0
        if token_id in given_to:
            place, source = given_to[token_id], 0
        given_to[token_id] = place
        words[position::64] = [step << 32 | value for value in (place, source, evicted)]
    how = draw.choice(["right"] * 4 + ["late", "dead", "dead in between"])
    if how == "late":
        for place in draw.sample(range(192), 5):
            words[place] = (step - 1) << 32 | 1
    if how.startswith("dead"):
        first = draw.randrange(64) if how == "dead in between" else 0
        words[first:] = [NEVER] * (192 - first)
    return torch.tensor(words)

def compare(seed):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    vocab, num_hot, num_ram = draw.randint(1, 90), draw.randint(0, 5), 64
    stride = 16 * draw.choice([1, 3, 37, 520])
    size = draw.choice([0, 1, 2, 7, 7, 64])
    ids = [draw.randint(-1 if seed % 3 == 0 else 0, vocab - seed % 2) for _ in range(size)]
    where = torch.randint(0, num_hot + num_ram, (vocab,), generator=generator)
    where[torch.rand(vocab, generator=generator) >= draw.choice([0, 0.5, 1])] = -1
    counts = torch.randint(0, 99, (8,), generator=generator)
    counts[0] = draw.choice([0, 7, STEP_MASK - 1, STEP_MASK, 2**30])
    counts[1] = draw.choice([0, 0, 0, 1])
    step = int(counts[0]) + 1 & STEP_MASK
    memory = torch.randint(0, 256, (num_hot + 1 + num_ram, stride), generator=generator)
    memory = memory.to(torch.uint8)
    replies = answers(draw, step, ids, where.tolist(), num_hot, num_ram)
    results = []
    for locate, gather in ((locate_reference, gather_reference), (locate_kernel, gather_kernel)):
        hot, ram = memory[: num_hot + 1].clone(), memory[num_hot + 1 :].clone()
        state = [where.to(torch.int32), torch.full((64,), -7), counts.clone()]
        shared = [torch.zeros(64, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)]
        given_ids = torch.tensor([*ids, 0])
        locate(given_ids, *state, *shared, replies.clone(), hot, ram, size, num_hot, 3)
        outs = [torch.zeros(size, stride, dtype=torch.uint8)]
        outs += [torch.zeros(size, 16, dtype=torch.uint8)]
        for out, start in zip(outs, (0, stride - 16)):
            gather(state[1][:size], hot, ram, num_hot, start, out)
        outside = [number for number in ids if not 0 <= number < vocab]
        assert not outside or int(state[2][6]) in outside
        assert not outside or int(shared[1][6]) in outside
        state[2][6] = shared[1][6] = 0  # any of them
        results.append([*state, *shared, hot[:num_hot], *outs])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found), (seed, expected, found)

for seed in range(120):
    compare(seed)
"""

WITH_A_WORKER = """
import sys
import numpy as np
import torch
from lookup_experts.table import device_cache
from lookup_experts.table.device_cache import CachedRecords
from lookup_experts.table.device_cache_kernels import gather_kernel, locate_kernel
from lookup_experts.table.opening import open_table
from lookup_experts.table.store_choice import open_store

device_cache._kernels = lambda device: (locate_kernel, gather_kernel)
table = open_table(sys.argv[1])
with open_store(table, "memory", notify=print) as store:
    records = store.whole().copy()
stride, vocab_size = table.layout.stride, table.layout.shape.vocab_size
cache = CachedRecords(table, torch.device("cpu"), 9 * stride, 64 * stride)
generator = np.random.default_rng(0)
for step in range(40):
    ids = generator.integers(0, vocab_size if step % 2 else 40, [1, 8, 32, 64][step % 4])
    ids[-1], ids[0] = vocab_size - 1, 0
    out = torch.zeros((len(ids), stride), dtype=torch.uint8)
    cache.gather(cache.locate(torch.from_numpy(ids)), 0, out)
    assert np.array_equal(out.numpy(), records[ids]), step
    cache.check()
counts = cache.counts()
assert counts.hot_hits and counts.ram_hits and counts.records_read > 100, counts
cache.close()
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lookup_experts.table import device_cache_kernels as kernels

def compile_for(architecture, kernel, types, constants, num_warps):
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(types)
               if kind[0] == "*" and kernel.arg_names[place] != "ids"}
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types)), constants, aligned)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target, options={"num_warps": num_warps}).asm["ptx"]

for architecture in (80, 90):
    types = ["*i64", "*i32", *["*i64"] * 5, *["*i32"] * 2, *["i32"] * 4, *["constexpr"] * 2]
    constants = {"stride": 73728 // 4, "copied_at_once": kernels.COPIED_AT_ONCE}
    ptx = compile_for(architecture, kernels._locate, types, constants, 1)
    assert ptx.count("ld.volatile.global.b64") >= 3  # the answers
    assert "ld.volatile.global.v4.b32" in ptx  # records out of RAM, 16 bytes each
    assert ptx.count("st.global.wt") >= 2  # requests and counts
    types = ["*i64", *["*i32"] * 3, *["i32"] * 4, "constexpr"]
    ptx = compile_for(architecture, kernels._gather, types, {"piece": kernels.PIECE}, 4)
    assert ptx.count("ld.volatile.global.v4.b32") == 1
    assert ptx.count("st.global.v4.b32") == 3
"""


def run(code: str, *arguments: object, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=160,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_kernels_do_what_their_references_do():
    run(ANSWERED, TRITON_INTERPRET="1")


def test_the_kernels_with_a_worker(tmp_path: Path):
    table, _ = make_table(tmp_path / "table", vocab_size=300, encoding="nf4", ids_per_shard=77)
    run(WITH_A_WORKER, table.folder, TRITON_INTERPRET="1")


def test_the_kernels_compile_for_gpus_without_one(tmp_path: Path):
    run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
