"""What attaching added to a pass is timed apart from the backbone's own work."""

import time

import pytest
import torch
from tiny_models import attached_model, token_ids

from lookup_experts.benchmarks.added_time import AddedTime, added_time


class SlowSource:
    """An expert source that takes its time at the entrance and in each block."""

    def __init__(self, source, entrance, block):
        self._source, self._entrance, self._block = source, entrance, block

    def rows(self, token_ids, ready=False, base_model=None):
        time.sleep(self._entrance)
        rows, block = self._source.rows(token_ids, ready, base_model), self._block

        class SlowRows:
            num_positions = rows.num_positions

            def mix(self, layer, weights, experts=None):
                time.sleep(block)
                return rows.mix(layer, weights, experts)

        return SlowRows()


def test_the_entrance_and_the_blocks_are_told_apart():
    model = attached_model(layers=[1]).eval()
    model.set_expert_source(SlowSource(model.expert_source, 0.05, 0.02))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with torch.inference_mode():
        with added_time(model) as added:
            for _ in range(3):
                model(token_ids(1, 4))
        model(token_ids(1, 4))  # not timed any more
    entrance_ms, blocks_ms = added.medians_ms(skip=1)
    assert 50 <= entrance_ms < 70 and 20 <= blocks_ms < 40
    assert len(added.entrance) == len(added.blocks) == 3
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_pass_is_the_sum_of_its_blocks():
    added = AddedTime()
    added.entrance = [9.0, 0.001, 0.003]
    added.blocks = [9.0, 9.0, 0.001, 0.002, 0.003, 0.004]
    assert added.medians_ms(skip=1) == pytest.approx((2.0, 5.0))
