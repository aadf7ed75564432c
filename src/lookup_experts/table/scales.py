"""Scales of records that were just read: are they numbers that an encoding writes?

One scale that is NaN or infinite spreads over every logit. Codes can't be wrong in that way, and
a check of all bytes is what checksums are for; scales are few, so they are looked at in every
record that comes from a store. Numbers of float encodings are not looked at.
"""

import numpy as np

from lookup_experts.table.encoding import ScaledEncoding
from lookup_experts.table.layout import RecordLayout

PROBLEM = "a number or scale is not valid"


class ScaleCheck:
    """Finds records with a scale that is NaN, infinite or negative.

    Seen as whole numbers, the floats from zero to the largest finite one are those from zero to
    its bits; anything else is larger. So one maximum is the check.
    """

    def __init__(self, layout: RecordLayout, encoding: ScaledEncoding) -> None:
        shape = layout.shape
        self._layer_bytes = layout.layer_bytes
        self._record_bytes = layout.record_bytes
        self._first = encoding.code_bytes(shape.num_experts * shape.row_size)
        size = encoding.scale_dtype.itemsize
        self._bits = np.dtype(f"<u{size}")
        self._largest = {2: 0x7BFF, 4: 0x7F7FFFFF}[size]
        self._per_layer = (layout.layer_bytes - self._first) // size

    def rows(self, records: np.ndarray, start: int = 0) -> np.ndarray:
        """Which rows of `records` hold such a scale, int64.

        Args:
            records: uint8 [n, width], each row contiguous.
            start: the byte of the records that a row begins with. Layers that don't lie whole
                in the rows are left out.
        """
        first_layer = -(-start // self._layer_bytes)
        end = min(start + records.shape[1], self._record_bytes) // self._layer_bytes
        if end <= first_layer or not len(records):
            return np.zeros(0, np.int64)
        scales = np.ndarray(
            (len(records), end - first_layer, self._per_layer),
            self._bits,
            buffer=records,
            offset=first_layer * self._layer_bytes - start + self._first,
            strides=(records.strides[0], self._layer_bytes, self._bits.itemsize),
        )
        if scales.max() <= self._largest:
            return np.zeros(0, np.int64)
        return np.flatnonzero((scales > self._largest).any(axis=(1, 2)))


def scale_check(layout: RecordLayout) -> ScaleCheck | None:
    """The check for tables of this layout; None where records have no scales."""
    encoding = layout.encoding
    return ScaleCheck(layout, encoding) if isinstance(encoding, ScaledEncoding) else None
