"""Encodings: round trips, packing, codebooks, sizes, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookup_experts.errors import UserError
from lookup_experts.table.encoding import (
    ENCODINGS,
    Encoding,
    get_encoding,
    normal_float_codebook,
)

# QLoRA, arXiv 2305.14314, appendix E.
PUBLISHED_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
FLOATS = ("float32", "bfloat16", "float16")
CODED = ("int8", "nf4", "nf3")


def reference_decode(encoding: Encoding, record: bytes, num_experts: int, hidden_size: int):
    """One coded record, number by number: a list of N·d floats."""
    num_codes = num_experts * hidden_size
    bits = getattr(encoding, "bits", 8)
    block = min(encoding.block_size or hidden_size, hidden_size)
    blocks_per_row = math.ceil(hidden_size / block)
    scale_dtype = torch.float32 if bits == 8 else torch.float16
    scales_at = len(record) - num_experts * blocks_per_row * scale_dtype.itemsize
    scales = torch.frombuffer(bytearray(record[scales_at:]), dtype=scale_dtype).tolist()
    bit_string = int.from_bytes(record[:scales_at], "little")
    codebook = None if bits == 8 else normal_float_codebook(bits).tolist()
    numbers = []
    for position in range(num_codes):
        code = bit_string >> (bits * position) & (2**bits - 1)
        value = codebook[code] if codebook else code - 256 * (code > 127)
        expert, column = divmod(position, hidden_size)
        numbers.append(value * scales[expert * blocks_per_row + column // block])
    return numbers


def reference_codes(encoding: Encoding, rows: torch.Tensor, record: bytes) -> list[int]:
    """The nearest code of each number of [N, d], given the scales that `record` stores."""
    num_experts, hidden_size = rows.shape
    block = min(encoding.block_size or hidden_size, hidden_size)
    blocks_per_row = math.ceil(hidden_size / block)
    scales_at = len(record) - num_experts * blocks_per_row * 2
    scales = torch.frombuffer(bytearray(record[scales_at:]), dtype=torch.float16).float()
    codebook = normal_float_codebook(encoding.bits)
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    codes = []
    for expert in range(num_experts):
        for column in range(hidden_size):
            scale = scales[expert * blocks_per_row + column // block]
            scaled = rows[expert, column] / (scale if scale else 1.0)
            codes.append(int((scaled > midpoints).sum()))
    return codes


@st.composite
def cases(draw, names=tuple(ENCODINGS)):
    """(encoding, rows [U, N, d])."""
    name = draw(st.sampled_from(names))
    hidden_size = draw(st.integers(1, 40))
    block_size = draw(st.none() | st.integers(1, 45)) if name in ("nf4", "nf3") else None
    size = (draw(st.integers(0, 4)), draw(st.integers(1, 5)), hidden_size)
    scale = draw(st.sampled_from([1e-3, 1.0, 100.0]))
    rows = torch.randn(size, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    return get_encoding(name, block_size), rows * scale


@settings(max_examples=150, deadline=None)
@given(cases())
def test_round_trip_stays_within_the_error_of_the_encoding(case):
    encoding, rows = case
    num_records, num_experts, hidden_size = rows.shape
    records = encoding.encode(rows)
    assert records.dtype == torch.uint8
    assert records.shape == (num_records, encoding.layer_bytes(num_experts, hidden_size))
    decoded = encoding.decode(records, num_experts, hidden_size, torch.float32)
    assert decoded.shape == rows.shape and decoded.dtype == torch.float32
    assert not encoding.invalid(records, num_experts, hidden_size).any()
    # The widest gap of a codebook is 0.46 (nf3), and a scale is rounded to 11 bits.
    worst = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 0.5 / 127, "nf4": 0.16}
    largest = rows.abs().amax(dim=-1, keepdim=True) if rows.numel() else rows
    assert ((decoded - rows).abs() <= worst.get(encoding.name, 0.25) * largest + 1e-6).all()


@settings(max_examples=80, deadline=None)
@given(cases(CODED))
def test_decode_agrees_with_the_reference(case):
    encoding, rows = case
    records = encoding.encode(rows)
    decoded = encoding.decode(records, *rows.shape[1:], torch.float32)
    for record, row in zip(records, decoded, strict=True):
        expected = reference_decode(encoding, bytes(record.tolist()), *rows.shape[1:])
        torch.testing.assert_close(row.flatten(), torch.tensor(expected), rtol=1e-6, atol=0)


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_unscaled_rows_times_their_factors_are_the_rows(case, dtype):
    encoding, rows = case
    hidden_size = rows.shape[-1]
    records = encoding.encode(rows)
    unscaled = encoding.decode_unscaled(records, *rows.shape[1:], dtype)
    blocks = math.ceil(hidden_size / min(encoding.block_size or hidden_size, hidden_size))
    if encoding.name in FLOATS or blocks > 1 or dtype == torch.float64:
        assert unscaled is None
        return
    values, factors = unscaled
    assert values.shape == rows.shape and values.dtype == dtype
    assert factors.shape == rows.shape[:2] and factors.dtype == torch.float32
    found = values.float() * factors.unsqueeze(-1)
    expected = encoding.decode(records, *rows.shape[1:], torch.float32)
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(found, expected, rtol=rounding, atol=0)


@settings(max_examples=40, deadline=None)
@given(cases(("nf4", "nf3")))
def test_codes_are_the_nearest_and_packed_without_gaps(case):
    encoding, rows = case
    for row, record in zip(rows, encoding.encode(rows), strict=True):
        content = bytes(record.tolist())
        codes = reference_codes(encoding, row, content)
        bit_string = sum(code << encoding.bits * place for place, code in enumerate(codes))
        packed = encoding.code_bytes(len(codes))
        assert content[:packed] == bit_string.to_bytes(packed, "little")


@pytest.mark.parametrize("name", ["nf4", "nf3"])
def test_quantising_agrees_with_the_reference_at_every_midpoint(name):
    encoding = get_encoding(name)
    codebook = normal_float_codebook(encoding.bits)
    above = below = (codebook[1:] + codebook[:-1]) / 2
    numbers = [torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 3 - 1.5]
    for _ in range(4):
        numbers += [above, below]
        above = torch.nextafter(above, torch.tensor(math.inf))
        below = torch.nextafter(below, torch.tensor(-math.inf))
    scaled = torch.cat([*numbers, torch.arange(-96, 97) / 64, torch.tensor([-0.0, 1e-45])])
    assert torch.equal(encoding._quantize(scaled), encoding.quantize_reference(scaled))


@pytest.mark.parametrize("name", CODED)
def test_working_in_parts_changes_nothing(monkeypatch, name):
    rows = torch.randn(7, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    encoding = get_encoding(name)
    whole = encoding.encode(rows)
    decoded = encoding.decode(whole, 3, 50, torch.bfloat16)
    values, _ = encoding.decode_unscaled(whole, 3, 50, torch.bfloat16)
    for limit in ("ENCODED_AT_ONCE", "DECODED_AT_ONCE"):
        monkeypatch.setattr(f"lookup_experts.table.encoding.{limit}", 2 * 3 * 50 + 1)
    assert torch.equal(encoding.encode(rows), whole)
    assert torch.equal(encoding.decode(whole, 3, 50, torch.bfloat16), decoded)
    assert torch.equal(encoding.decode_unscaled(whole, 3, 50, torch.bfloat16)[0], values)
    assert encoding.encode(rows[:0]).shape == (0, whole.shape[1])


@pytest.mark.parametrize("name", ["nf4", "nf3"])
def test_numbers_below_the_range_of_float16_keep_their_signs(name):
    """The scale of a tiny absmax is rounded down by up to a third: numbers go beyond 1."""
    rows = torch.tensor([[[8.9e-8, -8.9e-8, 0.0, 3e-8]]])
    decoded = get_encoding(name).decode(get_encoding(name).encode(rows), 1, 4, torch.float32)
    assert decoded.flatten()[:3].sign().tolist() == [1, -1, 0]


def test_nf3_takes_three_bits():
    assert get_encoding("nf3").code_bytes(4 * 768) == 4 * 768 * 3 // 8


@pytest.mark.parametrize(("name", "share"), [("nf4", 0.255), ("nf3", 0.196), ("int8", 0.503)])
def test_share_of_float16(name, share):
    assert get_encoding(name).layer_bytes(4, 768) <= share * 4 * 768 * 2


@pytest.mark.parametrize(
    ("name", "error"), [("bfloat16", 0.002), ("int8", 0.01), ("nf4", 0.105), ("nf3", 0.215)]
)
def test_relative_error_on_normal_numbers(name, error):
    rows = torch.randn(64, 4, 768, generator=torch.Generator().manual_seed(0))
    encoding = get_encoding(name)
    decoded = encoding.decode(encoding.encode(rows), 4, 768, torch.float32)
    assert (decoded - rows).norm() / rows.norm() < error


def test_nf4_codebook_is_the_published_one():
    torch.testing.assert_close(
        normal_float_codebook(4), torch.tensor(PUBLISHED_NF4), rtol=0, atol=2e-7
    )


def test_nf3_codebook_is_built_alike():
    codebook = normal_float_codebook(3)
    assert len(codebook) == 8 and (codebook.diff() > 0).all()
    assert codebook[0] == -1 and codebook[-1] == 1 and codebook[3] == 0


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_decoded_without_a_copy(name):
    encoding, rows = get_encoding(name), torch.randn(5, 3, 7)
    layer_bytes = encoding.layer_bytes(3, 7)
    stride = -(-2 * layer_bytes // 64) * 64
    records = torch.zeros(5, stride, dtype=torch.uint8)
    layer = records[:, layer_bytes : 2 * layer_bytes]
    layer.copy_(encoding.encode(rows))
    decoded = encoding.decode(layer, 3, 7, encoding.torch_dtype)
    assert encoding.is_float and decoded.data_ptr() == layer.data_ptr()
    assert torch.equal(decoded, rows.to(encoding.torch_dtype))


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_records_at_any_offset_and_stride(name, offset):
    encoding, rows = get_encoding(name), torch.randn(3, 2, 5)
    encoded = encoding.encode(rows)
    longer = torch.zeros(3, encoded.shape[1] + offset + 2, dtype=torch.uint8)
    longer[:, offset : offset + encoded.shape[1]] = encoded
    found = encoding.decode(longer[:, offset : offset + encoded.shape[1]], 2, 5, torch.float32)
    assert torch.equal(found, encoding.decode(encoded, 2, 5, torch.float32))


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_to_any_dtype(name, dtype):
    encoding, rows = get_encoding(name), torch.randn(3, 2, 5)
    encoded = encoding.encode(rows.to(dtype))
    decoded = encoding.decode(encoded, 2, 5, dtype)
    exact = encoding.decode(encoded, 2, 5, torch.float32)
    assert decoded.dtype == dtype and torch.equal(decoded, exact.to(dtype))


@pytest.mark.parametrize("name", ENCODINGS)
def test_zeros_stay_zeros(name):
    encoding = get_encoding(name)
    decoded = encoding.decode(encoding.encode(torch.zeros(2, 3, 9)), 3, 9, torch.float32)
    assert (decoded == 0).all()


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(name, value):
    rows = torch.zeros(2, 2, 5)
    rows[1, 1, 4] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        get_encoding(name).encode(rows)


@pytest.mark.parametrize("name", ["float16", "nf4", "nf3"])
def test_numbers_too_large_are_refused(name):
    with pytest.raises(UserError, match=r"1e\+06, too large for"):
        get_encoding(name).encode(torch.full((1, 1, 4), 1e6))


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_impossible_scales_are_found(name, scale):
    encoding = get_encoding(name)
    records = encoding.encode(torch.randn(4, 2, 6))
    stored = torch.tensor([scale], dtype=encoding.scale_dtype).view(torch.uint8)
    records[2, -len(stored) :] = stored
    assert encoding.invalid(records, 2, 6).tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", FLOATS)
def test_impossible_floats_are_found(name):
    encoding = get_encoding(name)
    records = encoding.encode(torch.randn(3, 2, 6))
    nan = torch.tensor([math.nan], dtype=encoding.torch_dtype).view(torch.uint8)
    records[1, -len(nan) :] = nan
    assert encoding.invalid(records, 2, 6).tolist() == [False, True, False]


def test_names_and_blocks():
    assert get_encoding("nf4") == ENCODINGS["nf4"] and get_encoding("nf4").block_size == 768
    assert get_encoding("nf3", 64).block_size == 64
    with pytest.raises(UserError, match="Did you mean 'bfloat16'"):
        get_encoding("bfloat")
    with pytest.raises(UserError, match="has no blocks"):
        get_encoding("int8", 64)
    for wrong in (0, -1, 1.5, "64", True):
        with pytest.raises(UserError, match="whole number from 1 to"):
            get_encoding("nf4", wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ENCODINGS)
def test_cuda_gives_the_same(name):
    encoding, rows = get_encoding(name), torch.randn(5, 3, 200)
    records = encoding.encode(rows)
    assert torch.equal(encoding.encode(rows.cuda()).cpu(), records)
    for dtype in (torch.float32, torch.bfloat16):
        expected = encoding.decode(records, 3, 200, dtype)
        assert torch.equal(encoding.decode(records.cuda(), 3, 200, dtype).cpu(), expected)
