"""Gathering records: the kernel by Triton's interpreter and compiled, places that are unique."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_here import needs_triton, run

from lookup_experts.table.gather import NO_PROBLEM, SKIP, gather, gather_reference, unique_places

INTERPRETED = """
import torch
from hypothesis import given, settings, strategies as st
from lookup_experts.table.gather import NO_PROBLEM, SKIP, gather_reference
from lookup_experts.table.gather_kernels import gather_kernel

@settings(max_examples=50, deadline=None, database=None)
@given(st.data())
def test(data):
    num_records, quads = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 700))
    start = data.draw(st.integers(0, quads - 1))
    width = 16 * data.draw(st.integers(1, quads - start))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    records = torch.randint(0, 256, (num_records, 16 * quads), generator=generator).byte()
    place = st.sampled_from([SKIP, -1, num_records, 0, num_records - 1, 2**40])
    places = torch.tensor(data.draw(st.lists(place, min_size=1, max_size=5)))
    wrong = {each for each in places.tolist() if each != SKIP and not 0 <= each < num_records}
    told = wrong if start == 0 else set()
    found = torch.full((len(places), width), 7, dtype=torch.uint8)
    expected, problems = found.clone(), torch.full((2,), NO_PROBLEM)
    gather_kernel(records, places, 16 * start, found, problems[:1], SKIP)
    gather_reference(records, places, 16 * start, expected, problems[1:])
    assert torch.equal(found, expected)
    assert all(each in (told or {NO_PROBLEM}) for each in problems.tolist())

test()
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lookup_experts.table.gather_kernels import PIECE, _gather

types = ["*i32", "*i64", "*i32", "*i64", *["i32"] * 4, "i64", "constexpr"]
aligned = {(number,): [["tt.divisibility", 16]] for number in range(4)}
source = ASTSource(_gather, dict(zip(_gather.arg_names, types)), {"piece": PIECE}, aligned)
for architecture in (80, 90):
    made = triton.compile(source, GPUTarget("cuda", architecture, 32), options={"num_warps": 8})
    assert "ld.global.v4.b32" in made.asm["ptx"] and "st.global.v4.b32" in made.asm["ptx"]
"""


@needs_triton
def test_the_kernel_gives_what_its_reference_gives():
    run(INTERPRETED, TRITON_INTERPRET="1")


@needs_triton
def test_the_kernel_copies_16_bytes_at_once(tmp_path):
    run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))


def test_no_place_at_all():
    out = torch.empty(0, 16, dtype=torch.uint8)
    problem = torch.tensor([NO_PROBLEM])
    gather(torch.zeros(1, 16, dtype=torch.uint8), torch.empty(0).long(), 0, out, problem)
    assert int(problem[0]) == NO_PROBLEM


@settings(deadline=None)
@given(st.lists(st.integers(-3, 6) | st.just(2**40), min_size=1, max_size=40))
def test_unique_places_are_those_of_torch(ids):
    given_ids = torch.tensor(ids)
    places, index = unique_places(given_ids)
    expected, inverse = given_ids.unique(return_inverse=True)
    assert torch.equal(places[: len(expected)], expected) and torch.equal(index, inverse)
    assert (places[len(expected) :] == SKIP).all()


def test_the_reference_leaves_what_is_skipped():
    out, problem = torch.full((2, 16), 7, dtype=torch.uint8), torch.tensor([NO_PROBLEM])
    records = torch.arange(32, dtype=torch.uint8).view(2, 16)
    gather_reference(records, torch.tensor([SKIP, 1]), 0, out, problem)
    assert (out[0] == 7).all() and torch.equal(out[1], records[1])
