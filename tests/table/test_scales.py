"""Scales that no encoding writes are found in whole records and in parts of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tables import random_records

from lookup_experts.table.encoding import get_encoding
from lookup_experts.table.layout import RecordLayout, TableShape
from lookup_experts.table.scales import scale_check


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_same_records_are_found_as_by_the_encoding(data):
    name = data.draw(st.sampled_from(["int8", "nf4", "nf3"]))
    block_size = None if name == "int8" else data.draw(st.integers(1, 20))
    layers, experts, hidden = (data.draw(st.integers(1, 5)) for _ in range(3))
    encoding = get_encoding(name, block_size)
    layout = RecordLayout(TableShape(6, layers, experts, hidden), encoding)
    records = random_records(layout)
    records[:, layout.record_bytes :] = 255  # what pads a record is nobody's scale
    size = encoding.scale_dtype.itemsize
    scales = encoding.layer_bytes(experts, hidden) - encoding.code_bytes(experts * hidden)
    for _ in range(data.draw(st.integers(0, 3))):
        row, layer = data.draw(st.integers(0, 5)), data.draw(st.integers(0, layers - 1))
        end = layout.layer_slice(layer).stop - size * data.draw(st.integers(0, scales // size - 1))
        value = data.draw(st.sampled_from([np.nan, np.inf, -1.0, 65504.0, 0.0]))
        wrong = torch.tensor([value], dtype=encoding.scale_dtype).view(torch.uint8).numpy()
        records[row, end - size : end] = wrong
    expected = {
        row
        for layer in range(layers)
        for row in torch.nonzero(
            encoding.invalid(
                torch.from_numpy(records)[:, layout.layer_slice(layer)], experts, hidden
            )
        )
        .flatten()
        .tolist()
    }
    assert set(scale_check(layout).rows(records).tolist()) == expected


@pytest.mark.parametrize("group", [slice(0, 4096), slice(4096, 8192), slice(4096, 12288)])
def test_a_part_is_checked_as_far_as_its_layers_are_whole(group):
    layout = RecordLayout(TableShape(3, 8, 4, 768), get_encoding("nf4"))
    records = random_records(layout)
    for layer in range(8):
        damaged = records.copy()
        end = layout.layer_slice(layer).stop
        damaged[1, end - 2 : end] = 255
        part = np.ascontiguousarray(damaged[:, group])
        whole = layout.layer_slice(layer).start >= group.start and end <= group.stop
        assert scale_check(layout).rows(part, group.start).tolist() == [1] * whole


def test_floats_have_no_scales():
    assert scale_check(RecordLayout(TableShape(3, 2, 2, 8), get_encoding("bfloat16"))) is None
