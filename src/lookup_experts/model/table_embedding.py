"""An embedding whose rows lie in a table: what stands in a model where the embedding was.

It stays an embedding of its own class, so a factor, or whatever else that class adds to looking
rows up, is done as ever, by the class's own code; only the look-up is another one. It has no
weight: who asks for it gets a tensor of its shape without values, on the device `meta`, so that
sizes can be read, and nothing can be computed with it in silence.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lookup_experts.made_classes import make_class
from lookup_experts.model.late_rows import LateRows, whole_rows
from lookup_experts.model.rows import EmbeddingSource


class TableEmbedding(nn.Embedding):
    """What an embedding does differently once its rows lie in a table.

    Attributes:
        source: where rows come from; None: nothing has been opened yet.
        layers: L, in how many parts a row is used, each in a block of its own; 1: at once.
        like: without numbers; follows the model to its dtype and device.
    """

    source: EmbeddingSource | None
    layers: int
    like: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[V, L·r] without values."""
        return torch.empty(
            self.num_embeddings, self.embedding_dim, dtype=self.like.dtype, device="meta"
        )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Rows [..., L·r] of ids [...]; several layers' are `LateRows`, where nobody needs a
        tensor at once: autograd does, and so does a compiled graph.

        Raises:
            TableError: an id is outside of the table, or its row can't be read.
        """
        return self._look_up(input, torch.compiler.is_compiling())

    # What is read depends on the data; torch.compile breaks its graph here.
    @torch.compiler.disable
    def _look_up(self, token_ids: Tensor, compiled: bool) -> Tensor:
        if self.source is None:
            raise RuntimeError(
                "The table of this embedding has not been opened: load the model's folder by "
                "from_pretrained."
            )
        dtype: torch.dtype = self.like.dtype
        if not token_ids.numel():
            shape = (*token_ids.shape, self.embedding_dim)
            return torch.empty(shape, dtype=dtype, device=token_ids.device)
        rows: Any = self.source.rows(token_ids.long())
        is_late = self.layers > 1 and token_ids.dim() == 2
        if is_late and not compiled and not torch.is_grad_enabled():
            late: Any = LateRows(rows, rows.index, self.layers, dtype)
            return late
        return whole_rows(rows, rows.index, self.layers, dtype).flatten(-2)


@cache
def table_embedding_class(kind: type[nn.Embedding]) -> Any:
    """The class that embeddings of a class become; one for each."""
    bases = (TableEmbedding,) if kind is nn.Embedding else (kind, TableEmbedding)
    return make_class(
        table_embedding_class,
        kind,
        f"Table{kind.__name__}",
        bases,
        __doc__=f"{kind.__name__} whose rows lie in a table.",
    )


def put_in_table(module: nn.Embedding, layers: int) -> None:
    """Let an embedding give up its weight, and take its rows from a source that is set later.

    Args:
        module: the embedding, changed in place.
        layers: see `TableEmbedding.layers`.
    """
    weight = module._parameters.pop("weight")
    assert weight is not None
    like = torch.empty(0, dtype=weight.dtype, device=weight.device)
    module.register_buffer("like", like, persistent=False)
    kind: Any = type(module)
    module.__class__ = table_embedding_class(kind)
    module.source, module.layers = None, layers  # type: ignore[assignment]


def table_embeddings(model: nn.Module) -> dict[str, TableEmbedding]:
    """The embeddings of a model whose rows lie in tables, by their names."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, TableEmbedding)
    }
