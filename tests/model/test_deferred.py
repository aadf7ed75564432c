"""A sum that waits for the next addition is that sum, whatever becomes of it."""

import pytest
import torch
from torch import Tensor

from lookup_experts.model.deferred import DeferredSum


class Noted:
    """An addition of some numbers, and what it was asked for."""

    is_deferred = True

    def __init__(self, added: Tensor) -> None:
        self.added, self.asked = added, []

    def add_to(self, output: Tensor, residual: Tensor | None = None) -> Tensor:
        self.asked.append(residual)
        total = output + self.added
        return total if residual is None else total + residual


@pytest.fixture(params=[torch.no_grad, torch.inference_mode])
def given(request):
    """(deferred, the sum that it is, its addition)."""
    with request.param():
        output, added = torch.randn(2, 3, 4, 8).unbind()
        addition = Noted(added)
        yield DeferredSum(output, addition), output + added, addition


def test_added_to_another_it_is_one_operation(given):
    deferred, expected, addition = given
    residual = torch.randn(3, 4, 8)
    for total in (residual + deferred, deferred + residual, torch.add(residual, deferred)):
        assert type(total) is Tensor
        torch.testing.assert_close(total, residual + expected)
    assert len(addition.asked) == 3 and all(each is residual for each in addition.asked)


def test_what_it_is_like_is_known_without_the_sum(given):
    deferred, expected, addition = given
    assert deferred.shape == expected.shape and deferred.dtype == expected.dtype
    assert deferred.device == expected.device and deferred.numel() == expected.numel()
    assert deferred.stride() == expected.stride() and not deferred.requires_grad
    assert addition.asked == []


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.double(),
        lambda x: x.view(12, 8),
        lambda x: torch.nn.functional.rms_norm(x, (8,)),
        lambda x: torch.cat([x, x]),
        lambda x: torch.add(torch.ones(3, 4, 8), x, alpha=2),
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: x + x,
        lambda x: torch.ones(2, 3, 4, 8) + x,
        lambda x: torch.ones(3, 4, 8, dtype=torch.float64) + x,
        lambda x: torch.ones(3, 4, 8).add_(x),
        lambda x: x * 2 - x,
        lambda x: torch.dropout(x, 0.5, False) + 0,
        lambda x: x.unsqueeze(0)[0, 1],
        lambda x: x.clone(),
        lambda x: torch.where(x > 0, x, 0.0),
    ],
)
def test_in_any_other_operation_it_is_the_sum(given, operation):
    deferred, expected, addition = given
    expected = operation(expected.clone())
    found = operation(deferred)
    assert type(found) is Tensor and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    assert addition.asked == [None]  # once


def test_written_into_it_stays_one_tensor(given):
    deferred, expected, addition = given
    deferred.add_(1)
    deferred.mul_(2)
    torch.testing.assert_close(deferred + torch.zeros(3, 4, 8), (expected + 1) * 2)
    assert addition.asked == [None]


def test_two_of_them(given):
    deferred, expected, _ = given
    other = DeferredSum(torch.ones(3, 4, 8), Noted(torch.ones(3, 4, 8)))
    torch.testing.assert_close(deferred + other, expected + 2)


def test_its_memory_is_nobodys(given):
    """Half of the sum lies in memory; nobody gets at it."""
    deferred, _, _ = given
    with pytest.raises(RuntimeError):
        deferred.data_ptr()
    with pytest.raises((RuntimeError, TypeError)):
        deferred.numpy()
