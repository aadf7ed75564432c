"""Which records are damaged: by their checksums, or by numbers that no encoding writes."""

import numpy as np
import torch

from lookup_experts.table.layout import RecordLayout
from lookup_experts.table.shard import wrong_checksums


def find_damage(
    layout: RecordLayout, records: np.ndarray, checksums: np.ndarray
) -> list[tuple[int, str]]:
    """(row, problem) of each damaged record, in order.

    Args:
        records: uint8 [n, stride].
        checksums: uint32 [n], as stored in the shard.
    """
    problems = dict.fromkeys(_invalid_rows(layout, records), "a number or scale is not valid")
    problems |= dict.fromkeys(wrong_checksums(records, checksums), "its checksum is another")
    return sorted((int(row), problem) for row, problem in problems.items())


def _invalid_rows(layout: RecordLayout, records: np.ndarray) -> np.ndarray:
    """The rows of uint8 [n, stride] in which a layer holds what its encoding never writes."""
    shape, tensor = layout.shape, torch.from_numpy(records)
    invalid = torch.zeros(len(records), dtype=torch.bool)
    for layer in range(shape.num_layers):
        layer_records = tensor[:, layout.layer_slice(layer)]
        invalid |= layout.encoding.invalid(layer_records, shape.num_experts, shape.row_size)
    return invalid.numpy().nonzero()[0]
