"""A random model of any size, made leaf by leaf: what conversions and speed are measured on where the real weights are not at hand."""

import zlib

import ml_dtypes
import numpy as np

from bitnet_jax.config import DType, ModelConfig
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets, Leaf, Weights
from bitnet_jax.params import is_bitlinear
from kernels_pallas import Encoding, PackedTernary, bytes_per_row, pack

_BYTES = np.array([byte for byte in range(256) if not byte & (byte >> 1) & 0x55], np.uint8)
"""Every byte that holds four codes."""


def random_packed(config: ModelConfig, assets: Assets | None = None, seed: int = 0) -> Weights:
    """A packed model: -1, 0 and 1 equally often; scales, gains and embeddings are bfloat16 numbers that float16 holds exactly too.

    Args:
        config: any ternary model with one scale for a matrix.
        assets: what goes with it.
        seed: the same seed gives the same model, leaf by leaf.
    """

    def read(path: leafwise.Path) -> Leaf:
        random = np.random.default_rng((seed, zlib.crc32("/".join(path).encode())))
        shape = leafwise.shape(config, path)
        if is_bitlinear(path):
            k, n = shape
            scale = np.array(random.uniform(0.5, 2), ml_dtypes.bfloat16).astype(np.float32)
            if k % 128:
                return pack(random.integers(-1, 2, shape, np.int8), scale)
            codes = _BYTES[random.integers(0, len(_BYTES), (n, bytes_per_row(k, Encoding.TWO_BIT)), np.uint8)]
            return PackedTernary(codes, scale, k=k, encoding=Encoding.TWO_BIT)
        if len(shape) == 1:
            return random.uniform(0.5, 2, shape).astype(ml_dtypes.bfloat16)
        # A sign, one of 8 exponents, 7 bits of fraction: numbers from 2^-8 to 1 in size.
        bits = random.integers(0, 1 << 11, shape, np.uint16)
        return (((bits & 0x400) << 5) | (0x3B80 + (bits & 0x3FF))).astype(np.uint16).view(ml_dtypes.bfloat16)

    return Weights(
        config=config,
        read=read,
        encoding=Encoding.TWO_BIT,
        assets=assets or Assets(),
        provenance={"random": seed},
        where="a random model",
        stored=DType.BFLOAT16,
    )
