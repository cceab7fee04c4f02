"""The bytes of transformers and of this project hold the same codes."""

import numpy as np
import pytest

from bitnet_jax.formats.huggingface.packing import decode, encode, rows
from kernels_pallas import Encoding, check, pack, unpack

ONE = np.array(1, np.float32)


def reference(ternary: np.ndarray) -> np.ndarray:
    """transformers' own layout, code by code: row n is in byte row n mod R at bits 2 (n div R)."""
    k, n = ternary.shape
    packed = np.zeros((rows(n), k), np.uint8)
    for output in range(n):
        for i in range(k):
            packed[output % rows(n), i] |= (int(ternary[i, output]) + 1) << 2 * (output // rows(n))
    return packed


def test_the_published_example() -> None:
    ternary = np.array([[-1, 0, 1, 1]], np.int8)
    assert encode(pack(ternary, ONE)).tolist() == [[0xA4]]


@pytest.mark.parametrize(("k", "n"), [(1, 1), (128, 4), (127, 6), (130, 13), (300, 3), (256, 64)])
def test_both_directions_are_the_layout_written_out(k: int, n: int) -> None:
    ternary = np.random.default_rng(k * n).integers(-1, 2, (k, n)).astype(np.int8)
    packed = reference(ternary)
    assert np.array_equal(encode(pack(ternary, ONE)), packed)
    found = decode(packed, ONE, n)
    check(found)
    assert np.array_equal(unpack(found), ternary)
    assert np.array_equal(found.codes, pack(ternary, ONE, Encoding.TWO_BIT).codes)


def test_matrices_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitnet_jax.formats.huggingface.packing._CHUNK", 1024)
    ternary = np.random.default_rng(0).integers(-1, 2, (260, 90)).astype(np.int8)
    assert np.array_equal(encode(pack(ternary, ONE)), reference(ternary))
    assert np.array_equal(unpack(decode(reference(ternary), ONE, 90)), ternary)


@pytest.mark.parametrize("shift", [0, 2, 4, 6])
def test_a_bit_pair_that_is_no_code_is_found(shift: int) -> None:
    packed = np.full((5, 200), 0b01010101, np.uint8)
    packed[4, 199] |= 3 << shift
    with pytest.raises(ValueError, match=r"byte \[4, 199\] is .* must not hold the bit pair 11"):
        decode(packed, ONE, 20)
