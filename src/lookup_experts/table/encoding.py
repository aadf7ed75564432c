"""How a record stores numbers: the float types, int8, nf4 and nf3.

An encoding turns one layer of one record, its N rows (of as many experts), into bytes and back:
first the codes of all N experts, then their scales. Everything here is plain torch and runs
alike on any device. Where the bytes lie in a file is in `format.py`.

- `float32`, `bfloat16`, `float16`: the numbers themselves, little-endian, no scales.
- `int8`: round(x / scale) in [-127, 127]; one float32 scale, absmax / 127, for each expert's row.
- `nf4`, `nf3`: the 4 or 3 bit code of the nearest codebook value of x / scale; one float16 scale,
  the absmax, for each block of `block_size` neighbours in a row. A block never spans two rows;
  the last block of a row may be shorter. Codes are packed from the lowest bit up, without gaps:
  2 nf4 codes in a byte, 8 nf3 codes in three; the end of the layer's last group is zeros.

float16 scales bring nf3 at block 128 to 19.53 % of float16 and nf4 at block 768 to 25.13 %. They
reach from 6e-8 to 65504: an absmax beyond is refused, one below becomes a block of zeros.

Letters: U records, N experts, r row size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lookup_experts.errors import UserError, unknown_name

INT8_MAX = 127
MAX_BLOCK_SIZE = 2**20
ENCODED_AT_ONCE = 2**18
"""Numbers that the CPU encodes at a time: what lies between stays in its caches."""
DECODED_AT_ONCE = 2**22
"""Numbers that the CPU decodes at a time: memory beyond the result is bounded."""
_CELLS = 256
"""Of equal width from -2 to 2, for quantising to nf4 and nf3. Numbers are within 1.5: an absmax
below the normal range of float16 may be rounded down to two thirds."""
_ELEMENT_OF = {4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A type for each width in bytes of an entry of a look-up table."""


@dataclass(frozen=True)
class Encoding(ABC):
    """One way to store the rows of a layer; get one with `get_encoding`."""

    name: str
    block_size: int | None = None
    """Neighbours in a row that share a scale; None where the encoding has no blocks."""
    torch_dtype: torch.dtype | None = None
    """The type that is stored, for the float encodings; None where numbers are codes."""

    @property
    def is_float(self) -> bool:
        """Whether records hold plain floats, so that `decode` to that type copies nothing."""
        return self.torch_dtype is not None

    @abstractmethod
    def layer_bytes(self, num_experts: int, row_size: int) -> int:
        """Bytes of one layer of one record: codes of the N experts, then their scales."""

    @abstractmethod
    def encode(self, rows: Tensor) -> Tensor:
        """The bytes of `rows`.

        Args:
            rows: [U, N, r], any float type.

        Returns:
            uint8 [U, layer_bytes].

        Raises:
            UserError: a number is not finite, or too large for this encoding.
        """

    @abstractmethod
    def decode(
        self, records: Tensor, num_experts: int, row_size: int, dtype: torch.dtype
    ) -> Tensor:
        """The rows that `records` hold, [U, N, r] in `dtype`.

        Float encodings give a view into `records` when `dtype` is the stored type.

        Args:
            records: uint8 [U, layer_bytes]; may be a slice of longer records.
        """

    def decode_unscaled(
        self, records: Tensor, num_experts: int, row_size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Rows before their scaling, and the factor that each still lacks; None where a row has
        no single factor, and for types wider than float32.

        In a sum of rows the factor can go to the row's weight: one product instead of d.

        Args:
            records: as in `decode`.

        Returns:
            Rows [U, N, r] in `dtype`, and factors [U, N] float32.
        """
        return None

    @abstractmethod
    def invalid(self, records: Tensor, num_experts: int, row_size: int) -> Tensor:
        """Which records hold what `encode` never writes, bool [U].

        That is a scale (for float encodings: a number) that is NaN or infinite, or a scale below
        zero. Records are uint8 [U, layer_bytes].
        """


@dataclass(frozen=True)
class FloatEncoding(Encoding):
    """Numbers stored as they are, in `torch_dtype`."""

    @property
    def _dtype(self) -> torch.dtype:
        assert self.torch_dtype is not None
        return self.torch_dtype

    def layer_bytes(self, num_experts: int, row_size: int) -> int:
        return num_experts * row_size * self._dtype.itemsize

    def encode(self, rows: Tensor) -> Tensor:
        _require_floats(rows)
        _require_finite(rows)
        stored = rows.to(self._dtype).flatten(1)
        if not bool(_finite_rows(stored).all()):
            raise _too_large(rows, self.name)
        return _view_as(stored, torch.uint8)

    def decode(
        self, records: Tensor, num_experts: int, row_size: int, dtype: torch.dtype
    ) -> Tensor:
        numbers = _view_as(records, self._dtype)
        return numbers.unflatten(1, (num_experts, row_size)).to(dtype)

    def invalid(self, records: Tensor, num_experts: int, row_size: int) -> Tensor:
        return ~_finite_rows(_view_as(records, self._dtype))


@dataclass(frozen=True)
class ScaledEncoding(Encoding):
    """Codes of few bits, multiplied by the scale of their block."""

    scale_dtype: ClassVar[torch.dtype]
    largest_code: ClassVar[float]
    """The value that a block's absmax is mapped to before coding."""

    @abstractmethod
    def code_bytes(self, num_codes: int) -> int:
        """Bytes that `num_codes` packed codes take."""

    @abstractmethod
    def _quantize(self, scaled: Tensor) -> Tensor:
        """The nearest codes of numbers in [-largest_code, largest_code], uint8, same shape."""

    @abstractmethod
    def _pack(self, codes: Tensor) -> Tensor:
        """Codes uint8 [U, num_codes] -> uint8 [U, code_bytes]."""

    @abstractmethod
    def _lookup(self, packed: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
        """Packed codes [U, code_bytes] -> what they stand for before scaling, [U, num_codes] in
        `dtype`, in memory of its own."""

    def layer_bytes(self, num_experts: int, row_size: int) -> int:
        num_scales = num_experts * self._blocks_per_row(row_size)
        return self.code_bytes(num_experts * row_size) + num_scales * self.scale_dtype.itemsize

    def encode(self, rows: Tensor) -> Tensor:
        _require_floats(rows)
        if rows.device.type != "cpu":
            return self._encode_part(rows)
        step = max(1, ENCODED_AT_ONCE // math.prod(rows.shape[1:]))
        return torch.cat([self._encode_part(part) for part in rows.split(step)])

    def _encode_part(self, rows: Tensor) -> Tensor:
        row_size = rows.shape[-1]
        num_blocks, width = self._blocks_per_row(row_size), self._block_width(row_size)
        numbers = rows.float()
        if num_blocks * width != row_size:
            numbers = F.pad(numbers, (0, num_blocks * width - row_size))
        blocks = numbers.unflatten(-1, (num_blocks, width))
        largest = blocks.abs().amax(dim=-1)  # carries NaN on
        scales = (largest / self.largest_code).to(self.scale_dtype)
        if not bool(scales.isfinite().all()):
            _require_finite(rows)
            raise _too_large(rows, self.name)
        # Codes are chosen for the scale as it is stored; a block of zeros has the scale zero.
        divisor = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(-1)
        codes = self._quantize(blocks / divisor).flatten(2)[..., :row_size]
        packed, stored = self._pack(codes.flatten(1)), _view_as(scales.flatten(1), torch.uint8)
        return torch.cat([packed, stored], dim=1)

    def decode(
        self, records: Tensor, num_experts: int, row_size: int, dtype: torch.dtype
    ) -> Tensor:
        return _in_parts(self._decode_part, records, num_experts, row_size, dtype)

    def _decode_part(
        self, records: Tensor, num_experts: int, row_size: int, dtype: torch.dtype
    ) -> Tensor:
        values = self._unscaled_part(records, num_experts, row_size, torch.float32)
        scales = self._scales(records, num_experts, row_size)
        width = self._block_width(row_size)
        whole = row_size // width
        values[..., : whole * width].unflatten(2, (whole, width)).mul_(
            scales[..., :whole].unsqueeze(-1)
        )
        if row_size % width:
            values[..., whole * width :].mul_(scales[..., whole:])
        return values.to(dtype)

    def decode_unscaled(
        self, records: Tensor, num_experts: int, row_size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        if self._blocks_per_row(row_size) > 1 or dtype.itemsize > torch.float32.itemsize:
            return None
        rows = _in_parts(self._unscaled_part, records, num_experts, row_size, dtype)
        return rows, self._scales(records, num_experts, row_size).squeeze(-1)

    def _unscaled_part(
        self, records: Tensor, num_experts: int, row_size: int, dtype: torch.dtype
    ) -> Tensor:
        num_codes = num_experts * row_size
        values = self._lookup(records[:, : self.code_bytes(num_codes)], num_codes, dtype)
        return values.unflatten(1, (num_experts, row_size))

    def invalid(self, records: Tensor, num_experts: int, row_size: int) -> Tensor:
        scales = self._scales(records, num_experts, row_size)
        return ~(scales.isfinite() & (scales >= 0)).flatten(1).all(dim=1)

    def _block_width(self, row_size: int) -> int:
        return row_size if self.block_size is None else min(self.block_size, row_size)

    def _blocks_per_row(self, row_size: int) -> int:
        return -(-row_size // self._block_width(row_size))

    def _scales(self, records: Tensor, num_experts: int, row_size: int) -> Tensor:
        """The scales of records uint8 [U, layer_bytes], float32 [U, N, blocks]."""
        stored = records[:, self.code_bytes(num_experts * row_size) :]
        # Copied, because behind the codes they may start anywhere; there are few of them.
        aligned = stored.clone(memory_format=torch.contiguous_format)
        return (
            aligned.view(self.scale_dtype)
            .float()
            .unflatten(1, (num_experts, self._blocks_per_row(row_size)))
        )


@dataclass(frozen=True)
class Int8Encoding(ScaledEncoding):
    """Signed bytes with one scale for each expert's row."""

    scale_dtype = torch.float32
    largest_code = float(INT8_MAX)

    def code_bytes(self, num_codes: int) -> int:
        return num_codes

    def _quantize(self, scaled: Tensor) -> Tensor:
        return scaled.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8).view(torch.uint8)

    def _pack(self, codes: Tensor) -> Tensor:
        return codes

    def _lookup(self, packed: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
        return packed.view(torch.int8).to(dtype)


@dataclass(frozen=True)
class NormalFloatEncoding(ScaledEncoding):
    """Codes of `bits` bits for the values of `normal_float_codebook(bits)`."""

    bits: int = 4

    scale_dtype = torch.float16
    largest_code = 1.0

    @property
    def _group(self) -> tuple[int, int]:
        """The least (codes, bytes) that fill whole bytes: (2, 1) for 4 bits, (8, 3) for 3."""
        shared = math.gcd(self.bits, 8)
        return 8 // shared, self.bits // shared

    def code_bytes(self, num_codes: int) -> int:
        codes, num_bytes = self._group
        return -(-num_codes // codes) * num_bytes

    def _quantize(self, scaled: Tensor) -> Tensor:
        # A narrow cell has room for one midpoint between two codes; which side of it a number is
        # on decides. The cell's number grows with the number itself, so this is exact.
        first_codes, midpoints = _quantizing_tables(self.bits, str(scaled.device))
        cells = (scaled * (_CELLS / 4)).add_(_CELLS / 2).to(torch.int32).flatten()
        # The sign bit of the difference is a faster comparison.
        beyond = (midpoints.index_select(0, cells) - scaled.flatten()).view(torch.int32) >> 31
        return (first_codes.index_select(0, cells) - beyond).to(torch.uint8).view(scaled.shape)

    def quantize_reference(self, scaled: Tensor) -> Tensor:
        """`_quantize` by the book: how many midpoints lie below each number."""
        codebook = normal_float_codebook(self.bits).to(scaled.device)
        midpoints = (codebook[1:] + codebook[:-1]) / 2
        return torch.bucketize(scaled.contiguous(), midpoints, out_int32=True).to(torch.uint8)

    def _pack(self, codes: Tensor) -> Tensor:
        num_codes, _ = self._group
        if codes.shape[1] % num_codes:
            codes = F.pad(codes, (0, -codes.shape[1] % num_codes))
        codes = codes.contiguous()
        if self.bits == 4:
            pairs = codes.view(torch.int16)
            return (pairs | (pairs >> 4)).to(torch.uint8)
        # Eight codes in the eight bytes of a word move together: to pairs, to fours, to 24 bits.
        words = codes.view(torch.int64)
        words = (words | (words >> 5)) & 0x003F003F003F003F
        words = (words | (words >> 10)) & 0x00000FFF00000FFF
        words = words | (words >> 20)
        return words.view(torch.uint8).unflatten(1, (-1, 8))[..., :3].flatten(1)

    def _lookup(self, packed: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
        # One look-up yields several numbers: two for a byte of nf4, four for 12 bits of nf3.
        if self.bits == 4:
            entries, codes_per_entry = packed.int(), 2
        else:
            entries, codes_per_entry = _halves_of_three_bytes(packed), 4
        table = _lookup_table(self.bits, codes_per_entry, dtype, str(packed.device))
        values = table.index_select(0, entries.flatten()).view(dtype)
        return values.view(len(packed), entries.shape[1] * codes_per_entry)[:, :num_codes]


ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        FloatEncoding("float32", torch_dtype=torch.float32),
        FloatEncoding("bfloat16", torch_dtype=torch.bfloat16),
        FloatEncoding("float16", torch_dtype=torch.float16),
        Int8Encoding("int8"),
        NormalFloatEncoding("nf4", block_size=768, bits=4),
        NormalFloatEncoding("nf3", block_size=128, bits=3),
    )
}
"""Every encoding by name, with its default block size."""


def get_encoding(name: str, block_size: int | None = None) -> Encoding:
    """The encoding called `name`.

    Args:
        block_size: for nf4 and nf3, the neighbours that share a scale; None for the default.

    Raises:
        UserError: an unknown name, or a block size that this encoding can't have.
    """
    if name not in ENCODINGS:
        raise unknown_name("encoding", name, ENCODINGS)
    encoding = ENCODINGS[name]
    if block_size is None:
        return encoding
    if encoding.block_size is None:
        raise UserError(f"Encoding {name} has no blocks, but block size {block_size} was given.")
    if type(block_size) is not int or not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise UserError(
            f"Block size {block_size!r} of {name} must be a whole number "
            f"from 1 to {MAX_BLOCK_SIZE}."
        )
    return replace(encoding, block_size=block_size)


def normal_float_codebook(bits: int) -> Tensor:
    """The 2^bits values of NormalFloat, ascending from -1 to 1, float32.

    Quantiles of the standard normal distribution: 2^(bits-1) evenly spaced for the positive
    side, one fewer for the negative side, and an exact zero, divided by the largest (QLoRA,
    arXiv 2305.14314, appendix E; `create_normal_map` of bitsandbytes). The outermost quantile
    is 1 - (1/(2·2^bits) + 1/(2·(2^bits - 1))) / 2 (arXiv 2306.06965, section 2), which for 4
    bits is the 0.9677083 of bitsandbytes.
    """
    num_values, half = 2**bits, 2 ** (bits - 1)
    outermost = 1 - (1 / (2 * num_values) + 1 / (2 * (num_values - 1))) / 2
    positive = _normal_quantiles(outermost, half)
    negative = -_normal_quantiles(outermost, half - 1)
    values = torch.cat([negative, torch.zeros_like(positive[:1]), positive.flip(0)])
    return (values / values.max()).float()


def _normal_quantiles(outermost: float, count: int) -> Tensor:
    """`count` quantiles, evenly spaced from probability `outermost` down towards 0.5, float64."""
    steps = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64, device="cpu")
    return torch.special.ndtri(steps[:-1])


@lru_cache
def _quantizing_tables(bits: int, device: str) -> tuple[Tensor, Tensor]:
    """For each cell: the code of its lower end, int32, and the midpoint in it, or infinity."""
    with torch.inference_mode(False):
        codebook = normal_float_codebook(bits)
        midpoints = (codebook[1:] + codebook[:-1]) / 2
        cells = (midpoints * (_CELLS / 4) + _CELLS / 2).to(torch.int64)
        assert len(cells.unique()) == len(cells)
        first_codes = (cells < torch.arange(_CELLS).unsqueeze(1)).sum(dim=1, dtype=torch.int32)
        inside = torch.full((_CELLS,), math.inf).index_put((cells,), midpoints)
        return first_codes.to(device), inside.to(device)


_lookup_tables: dict[tuple[int, int, torch.dtype, str], Tensor] = {}


# A graph takes the table as it is, instead of computing it anew in every run.
@torch.compiler.assume_constant_result
def _lookup_table(bits: int, codes_per_entry: int, dtype: torch.dtype, device: str) -> Tensor:
    """The numbers in `dtype` behind `codes_per_entry` packed codes, [2^(bits·codes_per_entry)].

    The two or four numbers of an entry are one element of 4 to 16 bytes, because selecting
    elements takes a quarter of the time of selecting short rows.
    """
    key = (bits, codes_per_entry, dtype, device)
    if key not in _lookup_tables:
        with torch.inference_mode(False):
            _lookup_tables[key] = _build_lookup_table(*key)
    return _lookup_tables[key]


def _build_lookup_table(bits: int, codes_per_entry: int, dtype: torch.dtype, device: str) -> Tensor:
    entries = torch.arange(2 ** (bits * codes_per_entry), device="cpu").unsqueeze(1)
    codes = (entries >> _steps(codes_per_entry, bits, torch.device("cpu"))) & (2**bits - 1)
    values = normal_float_codebook(bits)[codes].to(device, dtype)
    return values.view(_ELEMENT_OF[codes_per_entry * dtype.itemsize]).flatten()


def _in_parts(
    decode: Callable[[Tensor, int, int, torch.dtype], Tensor],
    records: Tensor,
    num_experts: int,
    row_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """What `decode` gives, on the CPU of so many records at a time that memory is bounded."""
    step = max(1, DECODED_AT_ONCE // (num_experts * row_size))
    if len(records) <= step or records.device.type != "cpu":
        return decode(records, num_experts, row_size, dtype)
    rows = torch.empty(len(records), num_experts, row_size, dtype=dtype)
    for target, part in zip(rows.split(step), records.split(step), strict=True):
        target.copy_(decode(part, num_experts, row_size, dtype))
    return rows


def _halves_of_three_bytes(packed: Tensor) -> Tensor:
    """Each three bytes [U, 3·G] as two numbers of 12 bits, int32 [U, 2·G], low bits first."""
    words = F.pad(packed.unflatten(1, (-1, 3)), (0, 1)).view(torch.int32)
    return torch.cat([words & 0xFFF, words >> 12], dim=-1).flatten(1)


def _steps(count: int, step: int, device: torch.device) -> Tensor:
    """0, step, 2·step, ... (`count` of them), int32."""
    return torch.arange(0, count * step, step, dtype=torch.int32, device=device)


def _view_as(records: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of [U, n] seen as `dtype`, [U, m]; copied only where they aren't aligned."""
    if torch.compiler.is_compiling():
        # Asking for the offset would break the graph. Floats are aligned in any table: a layer
        # is a whole number of them, and records start at multiples of 16.
        return records.view(dtype)
    size = max(1, dtype.itemsize // records.element_size())
    if records.storage_offset() % size or records.stride(0) % size or records.stride(1) != 1:
        records = records.clone(memory_format=torch.contiguous_format)
    return records.view(dtype)


def _finite_rows(numbers: Tensor) -> Tensor:
    """Whether all numbers of each row of [U, n] are finite, bool [U]."""
    # A maximum carries NaN on, and takes a tenth of the time of asking every 16-bit number.
    return numbers.abs().amax(dim=1).isfinite()


def _require_floats(rows: Tensor) -> None:
    if rows.dim() != 3 or not rows.is_floating_point():
        raise ValueError(f"Expected floats [U, N, r], got {rows.dtype} {tuple(rows.shape)}.")


def _require_finite(rows: Tensor) -> None:
    if not bool(_finite_rows(rows.flatten(1)).all()):
        raise UserError("The rows hold NaN or infinite numbers, which a table can't store.")


def _too_large(rows: Tensor, name: str) -> UserError:
    return UserError(
        f"The rows reach {rows.abs().max().item():.3g}, too large for {name}. "
        "Use bfloat16 or float32."
    )
