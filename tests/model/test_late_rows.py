"""`LateRows` against the tensor that it stands for."""

import pytest
import torch

from lookup_experts.model.late_rows import LateLayer, LateRows

BATCH, TOKENS, LAYERS, SIZE = 2, 5, 3, 4
INDEX = torch.tensor([[0, 1, 2, 1, 0], [3, 3, 2, 0, 1]])
ROWS = torch.randn(4, LAYERS, 1, SIZE, generator=torch.Generator().manual_seed(0))


class Rows:
    """Which notes the layers that were asked for."""

    def __init__(self, in_parts: bool) -> None:
        self.in_parts, self.row_size, self.index = in_parts, SIZE, INDEX
        self.asked: list[int | None] = []

    def layer(self, layer: int) -> torch.Tensor:
        self.asked.append(layer)
        return ROWS[:, layer]

    def every_layer(self) -> torch.Tensor:
        assert not self.in_parts
        self.asked.append(None)
        return ROWS


@pytest.fixture(params=[True, False], ids=["in parts", "at once"])
def rows(request):
    return Rows(request.param)


def _late(rows: Rows) -> LateRows:
    return LateRows(rows, INDEX, LAYERS, torch.float32)


def _tensor() -> torch.Tensor:
    return ROWS[INDEX].flatten(2)


PROJECTION = torch.randn(BATCH, TOKENS, LAYERS, SIZE, generator=torch.Generator().manual_seed(1))


def _like_gemma(embedded):
    split = (embedded * torch.tensor(16.0)).reshape(BATCH, TOKENS, LAYERS, SIZE)
    return (PROJECTION + split) * 0.7


def test_what_gemma_does_waits_for_nothing(rows):
    late, whole = _like_gemma(_late(rows)), _like_gemma(_tensor())
    assert isinstance(late, LateRows)
    assert late.shape == whole.shape
    last = late[:, -2:, :, :]
    assert isinstance(last, LateRows)
    parts = [late[:, :, layer, :] for layer in range(LAYERS)]
    assert all(isinstance(part, LateLayer) for part in parts)
    assert parts[0].shape == (BATCH, TOKENS, SIZE)
    assert rows.asked == []
    hidden = torch.ones(BATCH, TOKENS, SIZE)
    for layer, part in enumerate(parts):
        assert torch.equal(torch.multiply(hidden, part), whole[:, :, layer, :])
        assert torch.equal(hidden * part, whole[:, :, layer, :])
    assert rows.asked == ([0, 1, 2] if rows.in_parts else [None])
    for layer in range(LAYERS):
        assert torch.equal(1 * last[:, :, layer, :], whole[:, -2:, layer, :])


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: x * 2,
        lambda x: 2 * x,
        lambda x: x - 1,
        lambda x: 1 - x,
        lambda x: x / 3,
        lambda x: -x,
        lambda x: x[0],
        lambda x: x[..., :3],
        lambda x: x.sum(dim=-1),
        lambda x: x.float(),
        lambda x: x.to(torch.bfloat16),
        lambda x: x.reshape(-1, LAYERS * SIZE),
        lambda x: x.reshape((BATCH, TOKENS, LAYERS, SIZE)) + 0,
        lambda x: x.view(BATCH, TOKENS, LAYERS, SIZE)[:, 1:3, 0, :] + 0,
        lambda x: x.view(BATCH, TOKENS, LAYERS, SIZE)[..., :2, :] + 0,
        lambda x: x.view(BATCH, TOKENS, LAYERS, SIZE)[:, :, -1, :] + 0,
        lambda x: torch.cat([x, torch.ones(BATCH, TOKENS, 1)], dim=-1),
        lambda x: torch.ones(LAYERS * SIZE) + x,
        lambda x: x + torch.ones(BATCH, TOKENS, 1, dtype=torch.float64),
        lambda x: torch.nn.functional.relu(x),
        lambda x: torch.stack((x, x)),
        lambda x: torch.add(x, x),
        lambda x: torch.add(x, 1, alpha=3),
    ],
)
def test_everything_else_is_that_of_the_tensor(rows, operation):
    found, expected = operation(_late(rows)), operation(_tensor())
    found = found.tensor() if isinstance(found, LateRows | LateLayer) else found
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype


def test_it_has_no_names_that_python_asks_for(rows):
    with pytest.raises(AttributeError):
        getattr(_late(rows), "__no_such_name__")  # noqa: B009
    with pytest.raises(AttributeError, match="no_such_method"):
        _late(rows).no_such_method()
    assert len(_late(rows)) == BATCH
