"""The block types of GGUF files: their bytes, decoded and encoded a row at a time.

A row of K weights is a whole number of blocks; a matrix is its rows end to end. Float types become floats, ternary types become the
bytes of `Encoding.TWO_BIT` and their scales. Layouts (ggml's `ggml-common.h` and `ggml-quants.c`; I2_S: bitnet.cpp's
`ggml-bitnet-mad.cpp`), with d and m stored as float16 and all bytes little-endian:

    Q8_0   32 weights: d, 32 int8;               w = d * q
    Q4_0   32 weights: d, 16 bytes of nibbles;   w = d * (q - 8), the low nibbles first, then the high ones
    Q4_1   32 weights: d, m, 16 bytes;           w = d * q + m, in the same order
    Q6_K   256 weights: 128 bytes of low nibbles, 64 of high pairs, 16 int8 s, d;  w = d * s[k / 16] * (q - 32); in each half of 128,
               k = j + 32 p has its nibble in byte j + 32 (p mod 2), the low one for p < 2, and its pair in byte j at bit 2 p
    TQ2_0  256 weights: 64 bytes, d;             w = d * (c - 1); byte j of each half holds k = j + 32 p of its 128 weights at bit 2 p
    TQ1_0  256 weights: 48 bytes, 4 bytes, d;    w = d * (c - 1); byte = ceil(q * 256 / 243), q = sum of c_p 3^(4 - p):
               bytes 0 to 31 hold k = j + 32 p, bytes 32 to 47 k = 160 + j + 16 p, the last four k = 240 + j + 4 p with p < 4
    I2_S   the bytes of `Encoding.TWO_BIT` for the whole matrix, then its one scale as float32, then 28 bytes of nothing. This is the
           order that bitnet.cpp writes and reads on x86; on ARM it uses another one under the same number, which nothing tells apart.
"""

import enum
from typing import Any

import ml_dtypes
import numpy as np

from bitnet_jax.errors import UserError
from kernels_pallas import Encoding
from kernels_pallas.packing import planes

CHUNK = 1 << 22
"""Weights that are held unpacked at a time."""
_I2_S_TAIL = 32  # bytes


class BlockType(enum.Enum):
    """A type of ggml by its number, with the weights and bytes of a block."""

    F32 = (0, 1, 4)
    F16 = (1, 1, 2)
    Q4_0 = (2, 32, 18)
    Q4_1 = (3, 32, 20)
    Q8_0 = (8, 32, 34)
    Q6_K = (14, 256, 210)
    BF16 = (30, 1, 2)
    TQ1_0 = (34, 256, 54)
    TQ2_0 = (35, 256, 66)
    I2_S = (36, 128, 32)

    @property
    def number(self) -> int:
        return self.value[0]

    @property
    def weights(self) -> int:
        """Weights of a block."""
        return self.value[1]

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return self.value[2]

    @property
    def ternary(self) -> bool:
        return self in (BlockType.TQ1_0, BlockType.TQ2_0, BlockType.I2_S)

    def size(self, count: int) -> int:
        """Bytes of a tensor of `count` weights."""
        return count // self.weights * self.bytes + (_I2_S_TAIL if self is BlockType.I2_S else 0)


BY_NUMBER = {kind.number: kind for kind in BlockType}
OTHER_TYPES = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    15: "Q8_K",
    38: "TL1",
    39: "MXFP4, or TL2 of bitnet.cpp",
    133: "Q6_0",
    134: "IQ1_BN",
    135: "IQ2_BN",
    335: "IQ2_BN_R4",  # the last four: ik_llama.cpp
}
"""Names of types that are not read, for messages."""
_PLAIN = {BlockType.F32: np.dtype("<f4"), BlockType.F16: np.dtype("<f2"), BlockType.BF16: np.dtype(ml_dtypes.bfloat16)}


# --- floats ----------------------------------------------------------------------------------------------------------


def decode_floats(kind: BlockType, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A float tensor of `shape`, the last axis within a row: as it is stored where it is not quantised, else as float32."""
    if kind in _PLAIN:
        return (raw if raw.ctypes.data % _PLAIN[kind].itemsize == 0 else raw.copy()).view(_PLAIN[kind]).reshape(shape)
    blocks = raw.reshape(-1, kind.bytes)
    values = np.empty((len(blocks), kind.weights), np.float32)
    step = CHUNK // kind.weights
    for start in range(0, len(blocks), step):
        _decode_blocks(kind, blocks[start : start + step], values[start : start + step])
    return values.reshape(shape)


def _decode_blocks(kind: BlockType, blocks: np.ndarray, values: np.ndarray) -> None:
    if kind is BlockType.Q6_K:
        low, high = blocks[:, :128].reshape(-1, 2, 1, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
        nibbles = np.concatenate([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
        pairs = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
        steps = _float16(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8)
        q = (nibbles | pairs << 4).reshape(-1, 16, 16).astype(np.int8) - 32
        np.multiply(q, steps[:, :, None], out=values.reshape(-1, 16, 16))
        return
    d = _float16(blocks[:, :2])
    if kind is BlockType.Q8_0:
        np.multiply(blocks[:, 2:].view(np.int8), d, out=values)
        return
    nibbles = blocks[:, -16:]
    values[:, :16], values[:, 16:] = nibbles & 15, nibbles >> 4
    if kind is BlockType.Q4_0:
        values -= 8
    values *= d
    if kind is BlockType.Q4_1:
        values += _float16(blocks[:, 2:4])


def encode_floats(kind: BlockType, values: np.ndarray, name: str) -> np.ndarray:
    """The bytes of floats [rows, K].

    Q8_0, as ggml: d = absmax / 127 in float32, q = w / d rounded half away from zero, then d as float16.

    Raises:
        UserError: a value is too large for float16; `name` is what the message calls the tensor.
    """
    if kind is BlockType.Q8_0:
        blocks = values.astype(np.float32).reshape(-1, kind.weights)
        d = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
        scaled = blocks * np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
        magnitude = np.abs(scaled)
        whole = np.floor(magnitude)
        q = np.copysign(whole + np.floor(2 * (magnitude - whole)), scaled).astype(np.int8)
        return np.concatenate([_as_float16(d, name).view(np.uint8), q.view(np.uint8)], 1).reshape(-1)
    if kind is BlockType.F16:
        values = _as_float16(values, name)
    return np.ascontiguousarray(values.astype(_PLAIN[kind], copy=False)).reshape(-1).view(np.uint8)


def _float16(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _as_float16(values: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        raise UserError(f"{name} holds {float(np.abs(values.astype(np.float32)).max()):.6g}: must be at most 65504 for float16")
    return half


# --- ternary ---------------------------------------------------------------------------------------------------------

_POWERS = np.array([81, 27, 9, 3, 1], np.uint8)
_ALL = np.arange(256, dtype=np.uint16)
# The trit p of a TQ1_0 byte: the byte times 3^p, modulo 256, is a fraction of 256, whose first trit is times 3 shifted by 8.
_TRITS = np.stack([((_ALL * 3**p & 255) * 3 >> 8) for p in range(5)]).astype(np.uint8)
_IS_FIVE, _IS_FOUR = np.zeros(256, bool), np.zeros(256, bool)
_IS_FIVE[(np.arange(243) * 256 + 242) // 243] = True
_IS_FOUR[(np.arange(0, 243, 3) * 256 + 242) // 243] = True
# TQ2_0 has the four codes of a byte in the opposite order of TWO_BIT.
_REVERSED = ((_ALL & 3) << 6 | (_ALL & 12) << 2 | (_ALL & 48) >> 2 | _ALL >> 6).astype(np.uint8)
_TQ1_RUNS = ((0, 160, 32), (160, 240, 16), (240, 256, 4))  # weights from, to, and bytes that hold them


def scales(kind: BlockType, raw: np.ndarray, rows: int) -> np.ndarray:
    """The scales of a TQ tensor's blocks, float16 [rows, K / 256]."""
    return np.ascontiguousarray(raw.reshape(rows, -1, kind.bytes)[:, :, -2:]).view("<f2")[:, :, 0]


def decode_ternary(kind: BlockType, raw: np.ndarray, rows: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a ternary tensor in `Encoding.TWO_BIT`, uint8 [rows, K / 4], and its scales: float32 () of I2_S, else float16 [rows, G].

    Codes of value 3 stay what they are; scales are not checked.

    Raises:
        UserError: a TQ1_0 byte is no code.
    """
    if kind is BlockType.I2_S:
        codes, tail = raw[:-_I2_S_TAIL], raw[-_I2_S_TAIL:]
        return codes.reshape(rows, -1), np.frombuffer(tail[:4].tobytes(), "<f4").reshape(())
    blocks = raw.reshape(rows, -1, kind.bytes)
    codes = np.empty((rows, blocks.shape[1] * 64), np.uint8)
    step = max(1, CHUNK // (blocks.shape[1] * kind.weights))
    for start in range(0, rows, step):
        piece = blocks[start : start + step]
        if kind is BlockType.TQ2_0:
            codes[start : start + step] = _REVERSED[piece[:, :, :64]].reshape(len(piece), -1)
        else:
            codes[start : start + step] = _two_bit(_tq1_codes(piece, name))
    return codes, scales(kind, raw, rows)


def _tq1_codes(blocks: np.ndarray, name: str) -> np.ndarray:
    codes, place = np.empty((*blocks.shape[:2], 256), np.uint8), 0
    for start, stop, width in _TQ1_RUNS:
        raw = blocks[:, :, place : place + width]
        known = _IS_FIVE if (stop - start) // width == 5 else _IS_FOUR
        if not known[raw].all():
            raise UserError(f"{name} holds byte {raw[~known[raw]][0]}: it is no TQ1_0 code")
        trits = _TRITS[: (stop - start) // width][:, raw]
        codes[:, :, start:stop] = np.moveaxis(trits, 0, 2).reshape(*blocks.shape[:2], -1)
        place += width
    return codes


def _two_bit(codes: np.ndarray) -> np.ndarray:
    """Codes {0, 1, 2} [rows, ..., 256] as bytes of `Encoding.TWO_BIT` [rows, K / 4]."""
    part = codes.reshape(len(codes), -1, 4, 32)
    return (part[:, :, 0] << 6 | part[:, :, 1] << 4 | part[:, :, 2] << 2 | part[:, :, 3]).reshape(len(codes), -1)


def encode_ternary(kind: BlockType, codes: np.ndarray, d: Any) -> np.ndarray:
    """The bytes of TQ rows: `codes` in `Encoding.TWO_BIT` [rows, K / 4] without code 3, `d` float16 [rows, K / 256]."""
    halves = codes.reshape(len(codes), -1, 2, 32)
    if kind is BlockType.TQ2_0:
        body = _REVERSED[codes].reshape(len(codes), -1, 64)
    else:
        trits = np.stack(planes(halves, Encoding.TWO_BIT), 3).reshape(*halves.shape[:2], 256)
        body = np.concatenate([_tq1_bytes(trits[:, :, start:stop], width) for start, stop, width in _TQ1_RUNS], 2)
    return np.concatenate([body, np.ascontiguousarray(d, "<f2")[:, :, None].view(np.uint8)], 2).reshape(-1)


def _tq1_bytes(trits: np.ndarray, width: int) -> np.ndarray:
    count = trits.shape[2] // width
    q = (trits.reshape(*trits.shape[:2], count, width) * _POWERS[:count, None]).sum(2, dtype=np.uint16)
    return ((q * 256 + 242) // 243).astype(np.uint8)


def i2_s_tail(scale: Any) -> np.ndarray:
    """The 32 bytes behind the codes of an I2_S tensor."""
    tail = np.zeros(_I2_S_TAIL, np.uint8)
    tail[:4] = np.frombuffer(np.asarray(scale, "<f4").tobytes(), np.uint8)
    return tail
