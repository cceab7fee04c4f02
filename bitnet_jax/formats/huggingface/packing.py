"""The bytes of a ternary matrix in transformers and in this project, each from the other.

transformers splits the N outputs into four blocks of R = ceil(N / 4) rows: byte [r, k] of [R, K] holds the codes w + 1 of rows r, r + R,
r + 2R and r + 3R in bits 0-1, 2-3, 4-5 and 6-7 (papers: 2B4T, packing). Where N is no multiple of 4, the last block is short and its
missing codes are 0. The packed format of `kernels_pallas` shares a byte among four inputs of one output instead.
"""

import numpy as np

from kernels_pallas import Encoding, PackedTernary, bytes_per_row

_PLANES, _BLOCK = 4, 32
_CHUNK = 1 << 20  # bytes that are turned at a time: they stay in the cache


def rows(outputs: int) -> int:
    """R, rows of bytes for `outputs` rows of codes."""
    return -(-outputs // _PLANES)


def decode(packed: np.ndarray, scale: np.ndarray, n: int) -> PackedTernary:
    """The matrix [K, N] of `n` outputs whose bytes in transformers are `packed`, uint8 [R, K], with one float32 `scale`.

    Raises:
        ValueError: a byte holds the bit pair 11, which is no code.
    """
    r, k = packed.shape
    width = bytes_per_row(k, Encoding.TWO_BIT)
    codes = np.empty((_PLANES * r, width), np.uint8)
    step = max(1, _CHUNK // (_PLANES * width))
    for start in range(0, r, step):
        piece = packed[start : start + step]
        bad = (piece & (piece >> 1) & 0x55) != 0
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"byte [{start + row}, {column}] is {piece[row, column]}: must not hold the bit pair 11")
        padded = np.pad(piece, ((0, 0), (0, width * _PLANES - k)), constant_values=0b01010101)
        blocks = padded.reshape(len(piece), -1, _PLANES, _BLOCK)
        for i in range(_PLANES):
            byte = np.zeros((len(piece), width // _BLOCK, _BLOCK), np.uint8)
            for plane in range(_PLANES):
                byte |= (blocks[:, :, plane] >> (2 * i) & 3) << (6 - 2 * plane)
            codes[i * r + start : i * r + start + len(piece)] = byte.reshape(len(piece), width)
    return PackedTernary(codes[:n], scale, k=k, encoding=Encoding.TWO_BIT)


def encode(matrix: PackedTernary) -> np.ndarray:
    """The bytes uint8 [R, K] of transformers for a matrix [K, N] in `TWO_BIT`."""
    codes = np.asarray(matrix.codes)
    n, width = codes.shape
    r = rows(n)
    packed = np.zeros((r, width * _PLANES), np.uint8)
    step = max(1, _CHUNK // (_PLANES * width))
    for i in range(_PLANES):
        block = codes[i * r : (i + 1) * r]
        for start in range(0, len(block), step):
            piece = block[start : start + step].reshape(-1, width // _BLOCK, _BLOCK)
            out = packed[start : start + step].reshape(-1, width // _BLOCK, _PLANES, _BLOCK)
            for plane in range(_PLANES):
                out[: len(piece), :, plane] |= (piece >> (6 - 2 * plane) & 3) << (2 * i)
    return packed[:, : matrix.k]
