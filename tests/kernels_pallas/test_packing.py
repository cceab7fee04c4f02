"""The packed format: the bytes that packing.py's docstring promises, and that nothing is lost or let through."""

import dataclasses
import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Encoding, PackedTernary, bytes_per_row, check, check_shapes, pack, transcode, unpack
from kernels_pallas.arg_specs import MATRICES

ONE = np.ones((), np.float32)
RAGGED_K = (1, 127, 161, 300, 5460, 8640)
pack_jit = jax.jit(pack, static_argnums=2)
unpack_jit = jax.jit(unpack)
each_encoding = pytest.mark.parametrize("encoding", Encoding)


def ternary(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


def scales(*lead: int) -> np.ndarray:
    return np.full(lead, 0.5, np.float32)


def with_codes(packed: PackedTernary, place: tuple[int, ...], value: int) -> PackedTernary:
    codes = np.array(packed.codes)
    codes[place] = value
    return dataclasses.replace(packed, codes=codes)


# --- identity --------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 9)),
    lead=st.lists(st.integers(1, 3), max_size=2),
    encoding=st.sampled_from(Encoding),
    data=st.data(),
)
def test_unpack_undoes_pack(shape: tuple[int, int], lead: list[int], encoding: Encoding, data: st.DataObject) -> None:
    w = data.draw(hypothesis.extra.numpy.arrays(np.int8, (*lead, *shape), elements=st.integers(-1, 1)))
    packed = pack(w, scales(*lead), encoding)
    check(packed)
    assert packed.shape == w.shape
    assert packed.codes.shape[-1] == bytes_per_row(shape[0], encoding)
    assert np.array_equal(unpack(packed), w)


@each_encoding
def test_every_number_of_input_features_is_restored(encoding: Encoding) -> None:
    for k in (*range(1, 301), 5460, 8640):
        w = ternary((k, 2), seed=k)
        packed = pack(w, ONE, encoding)
        check(packed)
        assert np.array_equal(unpack(packed), w), f"K={k}"


@each_encoding
@pytest.mark.parametrize("k", RAGGED_K)
def test_jax_and_numpy_pack_the_same_bytes(k: int, encoding: Encoding) -> None:
    w = ternary((2, k, 3), seed=k)
    packed = pack(w, scales(2), encoding)
    with_jax = pack_jit(jnp.asarray(w), jnp.asarray(scales(2)), encoding)
    assert isinstance(with_jax.codes, jax.Array)
    assert isinstance(packed.codes, np.ndarray)
    assert np.array_equal(np.asarray(with_jax.codes), packed.codes)
    unpacked = unpack_jit(with_jax)
    assert isinstance(unpacked, jax.Array)
    assert np.array_equal(np.asarray(unpacked), w)
    check(with_jax)


@each_encoding
def test_packing_in_pieces_gives_the_bytes_of_packing_at_once(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    w = ternary((2, 200, 37))
    whole = pack(w, scales(2), encoding)
    monkeypatch.setattr("kernels_pallas.packing._CHUNK", 200 * 5)
    pieces = pack(w, scales(2), encoding)
    assert np.array_equal(pieces.codes, whole.codes)
    assert np.array_equal(unpack(pieces), w)
    check(pieces)


@each_encoding
def test_transformations_give_what_plain_calls_give(encoding: Encoding) -> None:
    w, scale = ternary((3, 130, 5)), scales(3)
    packed = pack(w, scale, encoding)
    plain = pack(jnp.asarray(w), jnp.asarray(scale), encoding)
    mapped = jax.jit(jax.vmap(lambda a, s: pack(a, s, encoding)))(jnp.asarray(w), jnp.asarray(scale))
    for other in (plain, mapped):
        assert np.array_equal(np.asarray(other.codes), packed.codes)
        assert np.array_equal(np.asarray(unpack(other)), w)


def test_arrays_that_a_traced_function_closes_over_are_checked() -> None:
    w = ternary((40, 3))
    packed = jax.tree.map(jnp.asarray, pack(w, ONE))
    assert np.array_equal(np.asarray(jax.jit(lambda: unpack(pack(unpack(packed), packed.scale)))()), w)
    bad = jax.tree.map(jnp.asarray, with_codes(packed, (2, 1), 0xFF))
    with pytest.raises(ValueError, match=r"codes\[2, 1\]=255"):
        jax.jit(lambda: unpack(bad))()


def test_scan_and_indexing_strip_layers() -> None:
    w = ternary((4, 130, 5))
    packed = jax.tree.map(jnp.asarray, pack(w, np.arange(1, 5, dtype=np.float32)))
    _, layers = jax.lax.scan(lambda carry, layer: (carry, unpack(layer)), None, packed)
    assert np.array_equal(np.asarray(layers), w)
    third = jax.tree.map(lambda leaf: leaf[2], packed)
    assert third.shape == (130, 5)
    assert float(third.scale) == 3
    assert np.array_equal(np.asarray(unpack(third)), w[2])


def test_transcode_keeps_codes_and_scale() -> None:
    w = ternary((2, 333, 4))
    packed = pack(w, scales(2))
    base3 = transcode(packed, Encoding.BASE3)
    assert base3.encoding is Encoding.BASE3
    assert base3.scale is packed.scale
    assert np.array_equal(base3.codes, pack(w, scales(2), Encoding.BASE3).codes)
    assert np.array_equal(transcode(base3, Encoding.TWO_BIT).codes, packed.codes)
    assert transcode(packed, Encoding.TWO_BIT) is packed


@each_encoding
@pytest.mark.parametrize("matrix", MATRICES)
def test_named_shapes_pack_without_being_allocated(matrix: str, encoding: Encoding) -> None:
    k, n = MATRICES[matrix]
    arguments = jax.ShapeDtypeStruct((k, n), np.int8), jax.ShapeDtypeStruct((), np.float32)
    packed = jax.eval_shape(functools.partial(pack, encoding=encoding), *arguments)
    row = 32 * int(np.ceil(k / 128)) if encoding is Encoding.TWO_BIT else int(np.ceil(k / 5))
    assert packed.codes.shape == (n, row)
    assert packed.nbytes == n * row + 4
    assert jax.eval_shape(unpack, packed).shape == packed.shape == (k, n)


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_two_bit_bytes_by_hand() -> None:
    w = np.zeros((130, 2), np.int8)
    w[[5, 37, 69, 101], 0] = (-1, 0, 1, 1)  # byte 5 of the first block: codes 0, 1, 2, 2, first in the top bits
    w[128, 1] = 1  # byte 0 of the second block, first plane
    codes = pack(w, ONE, Encoding.TWO_BIT).codes
    expected = np.full((2, 64), 0b01_01_01_01, np.uint8)
    expected[0, 5] = 0b00_01_10_10
    expected[1, 32] = 0b10_01_01_01
    assert np.array_equal(codes, expected)


def test_base3_bytes_by_hand() -> None:
    w = np.zeros((162, 2), np.int8)  # planes of ceil(162 / 5) = 33, the last with 3 codes of padding
    w[[7, 40, 73, 106, 139], 0] = (1, -1, 0, 1, -1)  # byte 7: trits 2, 0, 1, 2, 0, most significant first
    w[161, 1] = -1  # byte 29 of the last plane
    codes = pack(w, ONE, Encoding.BASE3).codes
    expected = np.full((2, 33), 81 + 27 + 9 + 3 + 1, np.uint8)
    expected[0, 7] = 2 * 81 + 0 * 27 + 1 * 9 + 2 * 3 + 0
    expected[1, 29] = 81 + 27 + 9 + 3 + 0
    assert np.array_equal(codes, expected)


def test_the_largest_base3_byte_is_242() -> None:
    assert pack(np.ones((160, 1), np.int8), ONE, Encoding.BASE3).codes.max() == 242


# --- bad input -------------------------------------------------------------------------------------------------------


@each_encoding
@pytest.mark.parametrize("value", [2, -2, 127, -128])
def test_pack_names_a_value_that_is_no_code(value: int, encoding: Encoding) -> None:
    w = ternary((2, 40, 3))
    w[1, 17, 2] = value
    for array in (w, jnp.asarray(w)):
        with pytest.raises(ValueError, match=rf"ternary\[1, 17, 2\]={value} must be -1, 0 or 1"):
            pack(array, scales(2), encoding)


@each_encoding
@pytest.mark.parametrize("value", [2, -2, 127, -128])
def test_a_value_that_is_no_code_is_still_found_after_a_traced_pack(value: int, encoding: Encoding) -> None:
    w = ternary((200, 3))
    w[170, 1] = value
    packed = pack_jit(w, ONE, encoding)
    byte = 32 + (170 - 128) % 32 if encoding is Encoding.TWO_BIT else 170 % 40  # the second block of 32, or planes of 200 / 5
    for read in (check, unpack):
        with pytest.raises(ValueError, match=rf"codes\[1, {byte}\]=255 is not a {encoding.value} byte"):
            read(packed)


@pytest.mark.parametrize(
    ("encoding", "value"),
    [(Encoding.TWO_BIT, 0b11_01_01_01), (Encoding.TWO_BIT, 0b01_11_01_01), (Encoding.TWO_BIT, 0b01_01_01_11), (Encoding.BASE3, 243)],
)
def test_bytes_that_are_not_codes_are_named(encoding: Encoding, value: int) -> None:
    packed = with_codes(pack(ternary((2, 300, 4)), scales(2), encoding), (1, 3, 40), value)
    on_device = jax.tree.map(jnp.asarray, packed)
    for read, argument in ((check, packed), (unpack, packed), (unpack, on_device), (check, on_device)):
        with pytest.raises(ValueError, match=rf"codes\[1, 3, 40\]={value} is not a {encoding.value} byte"):
            read(argument)


@pytest.mark.parametrize(
    ("encoding", "k", "byte", "value", "place"),
    [
        (Encoding.TWO_BIT, 100, 4, 0b01_01_01_10, 96 + 4),  # fourth plane: the first k of the padding
        (Encoding.TWO_BIT, 1, 31, 0b00_01_01_01, 31),
        (Encoding.BASE3, 172, 33, 121 - 1, 4 * 35 + 33),  # the last of five planes of 35
    ],
)
def test_padding_that_is_not_a_zero_weight_is_named(encoding: Encoding, k: int, byte: int, value: int, place: int) -> None:
    packed = pack(np.zeros((2, k, 4), np.int8), scales(2), encoding)
    check(packed)
    with pytest.raises(ValueError, match=rf"codes\[1, 2\] hold -?1 as padding at k={place}: must be 0 from K={k} on"):
        check(with_codes(packed, (1, 2, byte), value))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_not_positive_and_finite_are_named(bad: float) -> None:
    scale = np.ones((4, 3), np.float32)
    scale[2, 1] = bad
    with pytest.raises(ValueError, match=rf"scale\[2, 1\]={bad} must be positive and finite"):
        check(pack(ternary((40, 3)), scale))
    with pytest.raises(ValueError, match=rf"scale={bad} must be positive and finite"):
        check(pack(ternary((40, 3)), np.asarray(bad, np.float32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.zeros((3, 64), np.int8)}, "codes have dtype int8: must be uint8"),
        ({"codes": np.zeros((3, 32), np.uint8)}, r"codes have shape \(3, 32\): must be \[..., N, 64\] for K=200 in two_bit"),
        ({"codes": np.zeros((0, 64), np.uint8)}, "and not empty"),
        ({"scale": np.ones((), np.float64)}, "scale has dtype float64: must be float32"),
        ({"scale": np.ones((3,), np.float32)}, r"scale has shape \(3,\): must be \(\)"),
        ({"scale": np.ones((4, 2), np.float32)}, r"scale has shape \(4, 2\): must be \(\), or \(\) followed by \(G, 3\)"),
        ({"scale": np.ones((7, 3), np.float32)}, "K=200 must be a multiple of the G=7 groups"),
        ({"scale": np.ones((0, 3), np.float32)}, "K=200 must be a multiple of the G=0 groups"),
        ({"k": 0}, "K=0 must be from 1 to 16777215"),
        ({"k": 1 << 24}, "K=16777216 must be from 1 to 16777215"),
    ],
)
def test_wrong_shapes_and_types_are_named(change: dict, message: str) -> None:
    packed = dataclasses.replace(pack(ternary((200, 3)), ONE), **change)
    for function in (check_shapes, check, unpack):
        with pytest.raises(ValueError, match=message):
            function(packed)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.float32), "ternary has dtype float32: must be int8"),
        (np.zeros((4,), np.int8), r"ternary has shape \(4,\)"),
        (np.zeros((4, 0), np.int8), r"ternary has shape \(4, 0\)"),
    ],
)
def test_pack_names_wrong_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(array, ONE)
    with pytest.raises(ValueError, match="encoding='two_bit' must be an Encoding"):
        pack(np.zeros((4, 4), np.int8), ONE, "two_bit")  # pyright: ignore[reportArgumentType]


def test_group_is_the_share_of_k_that_has_one_scale() -> None:
    w = ternary((2, 200, 3))
    assert pack(w, scales(2)).group is None
    grouped = pack(w, scales(2, 5, 3))
    assert grouped.group == 40
    assert grouped.n == 3
    assert grouped.nbytes == 2 * 3 * 64 + 2 * 5 * 3 * 4
