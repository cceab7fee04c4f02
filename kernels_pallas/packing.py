"""The packed format of ternary weights, version 1. This text defines it; everything else in the repository follows it.

A matrix W of codes in {-1, 0, 1} is logically [K, N]: K input features, N outputs. It is stored row by row of N, as unsigned
bytes `codes` [N, bytes_per_row]: row n holds the column W[:, n].

- Code map: w is stored as c = w + 1, so -1, 0, 1 become 0, 1, 2.
- Blocks: along K, codes are cut into blocks of B bytes. A block has P planes of B consecutive k; byte j of a block (0 ≤ j < B)
  holds k = j, j + B, …, j + B (P - 1), counted from the start of the block.
- `Encoding.TWO_BIT`: P = 4, B = 32, so blocks of 128 codes; two bits a code, the first plane in the top bits:
  byte = c0 << 6 | c1 << 4 | c2 << 2 | c3. The bit pattern 3 is not a code. These are the bytes of bitnet.cpp's I2_S on x86.
- `Encoding.BASE3`: P = 5, B = ceil(K / 5), so one block a row, with at most 4 codes of padding: 1.6 bits a code whatever K is.
  The first plane is the most significant digit: byte = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4. Bytes above 242 are not codes.
- Padding: K is filled up to whole blocks with c = 1, a weight of zero. N is not padded.
- `scale` is the multiplicative step in float32: W ≈ w * scale. It has no axis for a matrix with one scale (per tensor), and
  [G, N] where every K / G consecutive input features of a column share one (per group).
- Leading axes (layers, experts) stand in front of both arrays alike.

A plane of a block is a contiguous range of k, so that unpacking is a shift and a mask (or a division) without any shuffle.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

FORMAT_VERSION = 1
"""Version of the layout above. It rises when any byte would mean something else."""

_TWO_BIT_BLOCK = 32  # bytes

Array: TypeAlias = jax.Array | np.ndarray

_CHUNK = 1 << 22  # codes that the numpy functions hold unpacked at a time


class Encoding(enum.Enum):
    """How ternary codes share a byte."""

    TWO_BIT = "two_bit"  # 4 codes a byte
    BASE3 = "base3"  # 5 codes a byte

    @property
    def planes(self) -> int:
        """Codes in a byte (P)."""
        return 4 if self is Encoding.TWO_BIT else 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PackedTernary:
    """A packed ternary matrix [..., K, N]: a pytree of `codes` and `scale`, with `k` and `encoding` static.

    Indexing or scanning the leaves strips leading axes. Nothing is checked on construction, because a pytree must be able to
    hold placeholders; `check_shapes` and `check` do it.
    """

    codes: Array
    """Packed codes, uint8 [..., N, bytes_per_row(k, encoding)]."""
    scale: Array
    """Multiplicative step, float32 [...] (per tensor) or [..., G, N] (per group of K / G input features)."""
    k: int = dataclasses.field(metadata={"static": True}, kw_only=True)
    """Input features (K), without padding."""
    encoding: Encoding = dataclasses.field(metadata={"static": True}, kw_only=True)
    """How codes share a byte."""

    @property
    def n(self) -> int:
        """Outputs (N)."""
        return self.codes.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that is packed, [..., K, N]."""
        return (*self.codes.shape[:-2], self.k, self.n)

    @property
    def group(self) -> int | None:
        """Input features that share a scale, or None for one scale per matrix."""
        return None if self.scale.ndim == self.codes.ndim - 2 else self.k // self.scale.shape[-2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.size * self.codes.dtype.itemsize + self.scale.size * self.scale.dtype.itemsize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PackedLayer:
    """One matrix [K, N] of a stack [L, K, N], named and not cut out: inside a loop over layers a slice is a copy of its bytes."""

    stack: PackedTernary
    """The matrices of all layers, [L, K, N]."""
    layer: Array
    """Which, int32 []; from 0 to L - 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, [K, N]."""
        return self.stack.shape[1:]

    @property
    def k(self) -> int:
        """Input features (K)."""
        return self.stack.k

    @property
    def n(self) -> int:
        """Outputs (N)."""
        return self.stack.n

    @property
    def encoding(self) -> Encoding:
        """How codes share a byte."""
        return self.stack.encoding

    @property
    def group(self) -> int | None:
        """Input features that share a scale, or None for one scale."""
        return self.stack.group

    def sliced(self) -> PackedTernary:
        """The matrix itself; of a layer out of range, the nearest."""
        layer = jnp.clip(self.layer, 0, self.stack.codes.shape[0] - 1)
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False), self.stack)


def bytes_per_row(k: int, encoding: Encoding) -> int:
    """Bytes that hold one row of K = `k` codes, padding included."""
    block = block_bytes(k, encoding)
    return -(-k // (block * encoding.planes)) * block


def block_bytes(k: int, encoding: Encoding) -> int:
    """Bytes of a block (B), and consecutive k of a plane of it, in rows of K = `k` codes."""
    return _TWO_BIT_BLOCK if encoding is Encoding.TWO_BIT else -(-k // encoding.planes)


# --- planes ----------------------------------------------------------------------------------------------------------


def planes(codes: Array, encoding: Encoding) -> list[Array]:
    """The P planes of packed bytes: plane p of a byte is its code c_p in {0, 1, 2}. Same shape and type as `codes`."""
    if encoding is Encoding.TWO_BIT:
        return [(codes >> shift) & 3 for shift in (6, 4, 2, 0)]
    return [codes // power % 3 for power in (81, 27, 9, 3, 1)]


def decode_rows(codes: Array, k: int, encoding: Encoding) -> Array:
    """Packed rows uint8 [..., N, bytes_per_row] as ternary rows int8 [..., N, K]. Bytes that are not codes are not looked for."""
    xp: Any = np if isinstance(codes, np.ndarray) else jnp
    blocks = codes.reshape(*codes.shape[:-1], -1, block_bytes(k, encoding))
    stacked = xp.stack(planes(blocks, encoding), axis=-2)
    return stacked.reshape(*codes.shape[:-1], -1)[..., :k].astype(np.int8) - 1


def _encode(ternary: Any, encoding: Encoding) -> Any:
    """Ternary [..., K, N] as packed rows [..., N, bytes]. A value that is no code becomes a byte that is no code (255)."""
    xp: Any = np if isinstance(ternary, np.ndarray) else jnp
    lead, (k, n) = ternary.shape[:-2], ternary.shape[-2:]
    padded = bytes_per_row(k, encoding) * encoding.planes
    ternary = xp.pad(ternary, [(0, 0)] * len(lead) + [(0, padded - k), (0, 0)])
    ternary = ternary.reshape(*lead, -1, encoding.planes, block_bytes(k, encoding), n)
    # Bytes are put together before the transposition, which then moves a quarter of the data.
    code = (ternary + 1).astype(np.uint8)
    byte = code[..., 0, :, :]
    for plane in range(1, encoding.planes):
        byte = byte * (4 if encoding is Encoding.TWO_BIT else 3) + code[..., plane, :, :]
    byte = xp.where((code > 2).any(axis=-3), np.uint8(255), byte)
    return xp.swapaxes(byte.reshape(*lead, -1, n), -1, -2)


# --- pack and unpack -------------------------------------------------------------------------------------------------


def pack(ternary: Array, scale: Array, encoding: Encoding = Encoding.TWO_BIT) -> PackedTernary:
    """Pack ternary int8 [..., K, N] with its scale, float32 [...] or [..., K / group, N].

    NumPy arrays give NumPy arrays, a block of columns at a time; JAX arrays give JAX arrays. Values are checked wherever they
    can be seen. Inside a transformation (jit, vmap, scan) they cannot: a value that is not in {-1, 0, 1} then makes its whole byte
    255, which is not a code in either encoding, and which `check` and `unpack` report later.

    Raises:
        ValueError: a type or shape is wrong, or a value is not in {-1, 0, 1}. The values of `scale` are left to `check`.
    """
    if not isinstance(encoding, Encoding):
        raise ValueError(f"encoding={encoding!r} must be an Encoding")
    if ternary.dtype != np.int8:
        raise ValueError(f"ternary has dtype {ternary.dtype}: must be int8")
    if ternary.ndim < 2 or 0 in ternary.shape:
        raise ValueError(f"ternary has shape {ternary.shape}: must be [..., K, N] and not empty")
    k, n = ternary.shape[-2:]
    if isinstance(ternary, np.ndarray):
        codes: Array = np.empty((*ternary.shape[:-2], n, bytes_per_row(k, encoding)), np.uint8)
        for index in np.ndindex(ternary.shape[:-2]):
            for columns in _chunks(n, k):
                piece = ternary[index][:, columns]
                _check_ternary(piece, (*index, 0, columns.start))
                codes[index][columns] = _encode(piece, encoding)
    else:
        if _any(lambda values: (values < -1) | (values > 1), ternary):
            _check_ternary(np.asarray(ternary), (0,) * ternary.ndim)
        codes = _encode(ternary, encoding)
    packed = PackedTernary(codes, scale, k=k, encoding=encoding)
    check_shapes(packed)
    return packed


def unpack(packed: PackedTernary) -> Array:
    """The ternary codes int8 [..., K, N] of a packed matrix; `scale` is left out. NumPy in, NumPy out; JAX in, JAX out.

    Raises:
        ValueError: a type or shape is wrong, or, outside a transformation, a byte is not a code.
    """
    check_shapes(packed)
    codes = packed.codes
    if not isinstance(codes, np.ndarray):
        if _any(lambda values: _bad_bytes(values, packed.encoding), codes):
            _check_bytes(np.asarray(codes), packed.encoding, (0,) * codes.ndim)
        return jnp.swapaxes(decode_rows(codes, packed.k, packed.encoding), -1, -2)
    ternary = np.empty(packed.shape, np.int8)
    for index in np.ndindex(codes.shape[:-2]):
        for rows in _chunks(packed.n, packed.k):
            piece = codes[index][rows]
            _check_bytes(piece, packed.encoding, (*index, rows.start, 0))
            ternary[index][:, rows] = decode_rows(piece, packed.k, packed.encoding).T
    return ternary


def transcode(packed: PackedTernary, encoding: Encoding) -> PackedTernary:
    """The same matrix in another encoding. NumPy in, NumPy out; JAX in, JAX out.

    Raises:
        ValueError: as `unpack`.
    """
    return packed if packed.encoding is encoding else pack(unpack(packed), packed.scale, encoding)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_shapes(packed: PackedTernary) -> None:
    """Check types and shapes, which are known in a transformation too.

    Raises:
        ValueError: names what is wrong and the rule.
    """
    codes, scale, k = packed.codes, packed.scale, packed.k
    if codes.dtype != np.uint8:
        raise ValueError(f"codes have dtype {codes.dtype}: must be uint8")
    if scale.dtype != np.float32:
        raise ValueError(f"scale has dtype {scale.dtype}: must be float32")
    if not 1 <= k < 1 << 24:  # 128 * K < 2^31: the sums of int8 activations fit in int32
        raise ValueError(f"K={k} must be from 1 to {(1 << 24) - 1}")
    row = bytes_per_row(k, packed.encoding)
    if codes.ndim < 2 or 0 in codes.shape or codes.shape[-1] != row:
        raise ValueError(f"codes have shape {codes.shape}: must be [..., N, {row}] for K={k} in {packed.encoding.value}, and not empty")
    lead, n = codes.shape[:-2], codes.shape[-2]
    if scale.shape == lead:
        return
    if scale.ndim != codes.ndim or scale.shape[:-2] != lead or scale.shape[-1] != n:
        raise ValueError(f"scale has shape {scale.shape}: must be {lead}, or {lead} followed by (G, {n}), for codes of shape {codes.shape}")
    if scale.shape[-2] < 1 or k % scale.shape[-2]:
        raise ValueError(f"K={k} must be a multiple of the G={scale.shape[-2]} groups that scale {scale.shape} has")


def check(packed: PackedTernary) -> None:
    """Check every byte and every scale, on the host; for matrices that come from outside, such as files.

    Raises:
        ValueError: names the first thing that is wrong and where: a type or shape, a byte that is not a code, padding that is not a
            weight of zero, a scale that is not positive and finite.
    """
    check_shapes(packed)
    codes, scale = np.asarray(packed.codes), np.asarray(packed.scale)
    block = block_bytes(packed.k, packed.encoding)
    whole = block * packed.encoding.planes
    used = packed.k % whole or whole
    unused = np.arange(used, whole)
    for index in np.ndindex(codes.shape[:-2]):
        for rows in _chunks(packed.n, packed.k):
            piece = codes[index][rows]
            _check_bytes(piece, packed.encoding, (*index, rows.start, 0))
            if used == whole:
                continue
            held = np.stack(planes(piece[:, -block:][:, unused % block], packed.encoding))  # only the bytes that hold padding
            padding = held[unused // block, :, np.arange(unused.size)].T.astype(np.int8) - 1
            if padding.any():
                *row, k = _first(padding != 0, (*index, rows.start, packed.k))
                raise ValueError(f"codes{row} hold {padding[padding != 0][0]} as padding at k={k}: must be 0 from K={packed.k} on")
    bad = np.asarray(~(np.isfinite(scale) & (scale > 0)))
    if bad.any():
        place = list(_first(bad, (0,) * scale.ndim)) or ""
        raise ValueError(f"scale{place}={scale[bad][0]} must be positive and finite")


def _chunks(n: int, k: int) -> list[slice]:
    step = max(1, _CHUNK // k)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _any(bad: Callable[[jax.Array], jax.Array], values: jax.Array) -> bool:
    """Whether `values` are known, so not traced, and some are bad; a traced function may close over known ones."""
    if isinstance(values, Tracer):
        return False
    with jax.ensure_compile_time_eval():
        return bool(bad(values).any())


def _first(bad: np.ndarray, origin: tuple[int, ...]) -> tuple[int, ...]:
    """Place of the first True in `bad`, a piece that begins at `origin` of an array with perhaps more leading axes."""
    place = np.argwhere(bad)[0]
    return tuple(int(i) for i in np.add(origin, np.pad(place, (len(origin) - len(place), 0))))


def _check_ternary(values: np.ndarray, origin: tuple[int, ...]) -> None:
    bad = (values < -1) | (values > 1)
    if bad.any():
        raise ValueError(f"ternary{list(_first(bad, origin))}={values[bad][0]} must be -1, 0 or 1")


def _bad_bytes(codes: Any, encoding: Encoding) -> Any:
    return codes > 242 if encoding is Encoding.BASE3 else (codes & (codes >> 1) & 0x55) != 0


def _check_bytes(codes: np.ndarray, encoding: Encoding, origin: tuple[int, ...]) -> None:
    flat = np.ascontiguousarray(codes).reshape(-1)
    if encoding is Encoding.TWO_BIT and flat.size % 8 == 0:  # eight bytes at a time: what large files are opened by
        words = flat.view(np.uint64)
        if not (words & (words >> np.uint64(1)) & np.uint64(0x5555555555555555)).any():
            return
    bad = _bad_bytes(codes, encoding)
    if bad.any():
        rule = "must be at most 242" if encoding is Encoding.BASE3 else "must not hold the bit pair 11"
        raise ValueError(f"codes{list(_first(bad, origin))}={codes[bad][0]} is not a {encoding.value} byte: {rule}")
