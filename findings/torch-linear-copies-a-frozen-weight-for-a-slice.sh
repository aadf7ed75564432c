#!/usr/bin/env bash
# torch 2.13.0 on a processor: a product of a slice of states with a weight that takes no gradients
# copies the whole weight first, under no_grad as well; with one that takes gradients it does not.
#
# A head is given the last position of a prompt, states[:, -1:], a view whose strides are not those
# of a tensor of its own (it still calls itself contiguous where there is one sequence). torch then
# takes it for a batch of products, and lays the weight out anew for each of its sequences. Only a
# weight that requires gradients is spared, whether gradients are being recorded or not. So
# `model.requires_grad_(False)`, or to load a model within torch.inference_mode(), makes the first
# token of every prompt later by many times, and takes the memory of the head once per sequence.
# The slice as a matrix, states[:, -1], is not slow. In float32 the copy is there as well, but goes unseen with
# one sequence, since the product takes as long.
#
# Output seen (two processors with AVX-512; milliseconds, weight of 65,536 x 512 in bfloat16):
#   one sequence:   takes gradients 3.9, frozen 149, frozen and the slice as a matrix 3.9
#   four sequences: takes gradients 4.3, frozen 488, frozen and the slice as a matrix 4.4
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/python -m pip install -q torch==2.13.0
env/bin/python -W ignore - <<'PYTHON'
import time

import torch
import torch.nn.functional as F

weight = torch.randn(65_536, 512).bfloat16()
trained = torch.nn.Parameter(weight)


def milliseconds(states: torch.Tensor, weight: torch.Tensor) -> float:
    taken = []
    for _ in range(7):
        begin = time.perf_counter()
        F.linear(states, weight)
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[3] * 1e3


with torch.no_grad():
    for sequences in (1, 4):
        last = torch.randn(sequences, 512, 512).bfloat16()[:, -1:]
        assert torch.equal(F.linear(last, weight), F.linear(last, trained))
        spared = milliseconds(last, trained)
        frozen = milliseconds(last, weight)
        matrix = milliseconds(last.flatten(0, 1), weight)
        print(f"{sequences} sequences: {spared:.1f}; frozen {frozen:.1f}; as a matrix {matrix:.1f}")
        assert frozen > 3 * spared, "a frozen weight isn't copied any more"
        assert matrix < frozen / 3, "it is copied for a matrix as well"
PYTHON
