"""Block types: bytes by hand from their layouts, and against the `gguf` package where it is installed."""

import importlib.util

import numpy as np
import pytest

from bitnet_jax.errors import UserError
from bitnet_jax.formats.gguf_blocks import BlockType, decode_floats, decode_ternary, encode_floats, encode_ternary, i2_s_tail
from kernels_pallas import Encoding, pack

HALF = np.array([0.5], "<f2").view(np.uint8)
TERNARY = (BlockType.TQ1_0, BlockType.TQ2_0)


def block(kind, **values):
    """One block of 256 zeros but for `values`, {k: weight}, as its layout says; slowly."""
    codes = [1] * 256
    for k, weight in values.items():
        codes[int(k[1:])] = weight + 1
    if kind is BlockType.TQ2_0:
        return bytes(sum(codes[128 * half + j + 32 * p] << 2 * p for p in range(4)) for half in range(2) for j in range(32))
    runs = [[codes[j + 32 * p] for p in range(5)] for j in range(32)] + [[codes[160 + j + 16 * p] for p in range(5)] for j in range(16)]
    runs += [[*(codes[240 + j + 4 * p] for p in range(4)), 0] for j in range(4)]
    return bytes(-(-sum(c * 3 ** (4 - p) for p, c in enumerate(run)) * 256 // 243) for run in runs)


def packed_row(**values):
    weights = np.zeros((256, 1), np.int8)
    for k, weight in values.items():
        weights[int(k[1:])] = weight
    return np.asarray(pack(weights, np.float32(1), Encoding.TWO_BIT).codes)


@pytest.mark.parametrize("kind", TERNARY)
@pytest.mark.parametrize(
    "values", [{}, {"k0": 1}, {"k33": -1, "k130": 1}, {"k159": 1, "k160": -1, "k239": 1, "k240": -1, "k255": 1, "k243": 1}]
)
def test_ternary_blocks_have_the_bytes_of_their_layout(kind, values):
    raw = np.frombuffer(block(kind, **values) + HALF.tobytes(), np.uint8)
    assert raw.size == kind.bytes
    np.testing.assert_array_equal(encode_ternary(kind, packed_row(**values), np.array([[0.5]], "<f2")), raw)
    codes, scale = decode_ternary(kind, raw, 1, "x")
    np.testing.assert_array_equal(codes, packed_row(**values))
    assert scale.tolist() == [[0.5]]


@pytest.mark.parametrize("kind", TERNARY)
def test_decoding_undoes_encoding(kind):
    rng = np.random.default_rng(0)
    weights = rng.integers(-1, 2, (768, 5)).astype(np.int8)
    codes = np.asarray(pack(weights, np.float32(1), Encoding.TWO_BIT).codes)
    d = rng.random((5, 3)).astype("<f2")
    raw = encode_ternary(kind, codes, d)
    assert raw.size == kind.size(weights.size)
    found, scale = decode_ternary(kind, raw, 5, "x")
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(scale, d)


def test_i2_s_is_our_two_bit_bytes_and_a_scale_in_32_bytes():
    weights = np.random.default_rng(0).integers(-1, 2, (128, 3)).astype(np.int8)
    codes = np.asarray(pack(weights, np.float32(1), Encoding.TWO_BIT).codes)
    raw = np.concatenate([codes.reshape(-1), i2_s_tail(np.float32(0.75))])
    assert raw.size == BlockType.I2_S.size(weights.size)
    by_hand = [sum(int(weights[j + 32 * p, 0] + 1) << (6 - 2 * p) for p in range(4)) for j in range(32)]
    assert raw[:32].tolist() == by_hand
    found, scale = decode_ternary(BlockType.I2_S, raw, 3, "x")
    np.testing.assert_array_equal(found, codes)
    assert (scale.shape, scale) == ((), 0.75)


def test_a_byte_that_is_no_five_trits_is_refused():
    raw = np.frombuffer(block(BlockType.TQ1_0) + HALF.tobytes(), np.uint8).copy()
    raw[3] = 1  # between ceil(0 * 256 / 243) and ceil(1 * 256 / 243)
    with pytest.raises(UserError, match="x holds byte 1: it is no TQ1_0 code"):
        decode_ternary(BlockType.TQ1_0, raw, 1, "x")


def test_a_code_of_three_survives_for_the_check_to_find():
    raw = np.frombuffer(block(BlockType.TQ2_0) + HALF.tobytes(), np.uint8).copy()
    raw[0] |= 3
    assert decode_ternary(BlockType.TQ2_0, raw, 1, "x")[0][0, 0] >> 6 == 3


def test_quantised_floats_have_the_values_of_their_layout():
    nibbles = np.arange(16, dtype=np.uint8) | (15 - np.arange(16, dtype=np.uint8)) << 4
    q = np.concatenate([np.arange(16), 15 - np.arange(16)]).astype(np.float32)
    two = np.array([2.0], "<f2").view(np.uint8)
    np.testing.assert_array_equal(decode_floats(BlockType.Q4_0, np.concatenate([HALF, nibbles]), (32,)), 0.5 * (q - 8))
    np.testing.assert_array_equal(decode_floats(BlockType.Q4_1, np.concatenate([HALF, two, nibbles]), (32,)), 0.5 * q + 2)
    eight = np.arange(-16, 16, dtype=np.int8)
    np.testing.assert_array_equal(decode_floats(BlockType.Q8_0, np.concatenate([HALF, eight.view(np.uint8)]), (32,)), 0.5 * eight)
    six = np.zeros(210, np.uint8)
    six[[0, 33]] = 0x51, 0xA0  # nibbles of k = 0 and 64, and of 97
    six[128] = 0b00110010  # pairs of k = 0 and 64
    six[192], six[196] = 3, 255  # s of k / 16 = 0 and 4
    six[208:] = HALF
    values = decode_floats(BlockType.Q6_K, six, (256,))
    assert values[[0, 64, 97]].tolist() == [0.5 * 3 * (33 - 32), -0.5 * (53 - 32), 0.0]


@pytest.mark.parametrize("kind", [BlockType.F32, BlockType.F16, BlockType.BF16])
def test_plain_floats_are_kept(kind):
    values = np.array([[1.5, -2.0, 0.0, 384.0]], np.float32)
    raw = encode_floats(kind, values, "x")
    assert raw.size == kind.size(4)
    np.testing.assert_array_equal(decode_floats(kind, raw, (1, 4)).astype(np.float32), values)


def test_a_value_beyond_float16_is_refused():
    with pytest.raises(UserError, match=r"x holds 1e\+06: must be at most 65504"):
        encode_floats(BlockType.F16, np.full((1, 2), 1e6, np.float32), "x")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q6_K", "TQ1_0", "TQ2_0"])
def test_the_gguf_package_reads_and_writes_the_same_bytes(name):
    import gguf  # pyright: ignore[reportMissingImports]

    rng, kind, number = np.random.default_rng(0), BlockType[name], gguf.GGMLQuantizationType[name]
    if kind.ternary:
        weights = rng.integers(-1, 2, (512, 30)).astype(np.int8)
        codes = np.asarray(pack(weights, np.float32(1), Encoding.TWO_BIT).codes)
        raw = gguf.quants.quantize(weights.T.astype(np.float32) * np.float32(0.37), number)
        np.testing.assert_array_equal(encode_ternary(kind, codes, np.full((30, 2), 0.37, "<f2")), raw.reshape(-1))
        found, scale = decode_ternary(kind, raw.reshape(-1), 30, "x")
        values = gguf.quants.dequantize(raw, number)
        np.testing.assert_array_equal(np.asarray(found), codes)
        np.testing.assert_array_equal(weights.T * np.repeat(scale.astype(np.float32), 256, 1), values)
        return
    raw = rng.integers(0, 256, (20, kind.bytes), dtype=np.uint8)
    halves = rng.standard_normal((20, 2)).astype("<f2").view(np.uint8)
    raw[:, :2], raw[:, -2:] = halves[:, :2], halves[:, 2:]
    if kind is BlockType.Q4_1:
        raw[:, 2:4] = halves[:, 2:]
    values = gguf.quants.dequantize(raw, number)
    np.testing.assert_array_equal(decode_floats(kind, raw.reshape(-1), values.shape), values)
    if kind is BlockType.Q8_0:
        floats = rng.standard_normal((20, 96)).astype(np.float32)
        floats[0, :32] = 0
        np.testing.assert_array_equal(encode_floats(kind, floats, "x"), gguf.quants.quantize(floats, number).reshape(-1))
