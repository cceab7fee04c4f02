"""Ternary statistics of a model: how each matrix's weights are spread over -1, 0 and +1."""

from typing import Any

import numpy as np

from bitnet_jax import params as trees
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import ModelConfig
from bitnet_jax.params import Params
from kernels_pallas import PackedTernary, unpack


def ternary_layers(params: Params, config: ModelConfig) -> list[dict[str, Any]]:
    """One row a matrix: layer, name, shape (K, N), the shares of -1, 0 and +1, and the scale (the mean of them where they are grouped).

    Args:
        params: latent or packed parameters, scanned or looped.
        config: their configuration; without ternary layers there are no rows.
    """
    if not is_ternary(config):
        return []
    if not any(isinstance(leaf, PackedTernary) for _, leaf in trees.leaves(params)):
        params = trees.pack(params, config)
    rows = []
    for path, leaf in trees.leaves(params):
        if not isinstance(leaf, PackedTernary):
            continue
        codes, scale = np.asarray(unpack(leaf)), np.asarray(leaf.scale)
        if codes.ndim == 2:
            codes, scale = codes[None], scale[None]
        first = int(path[0].removeprefix("block_")) if path[0].startswith("block_") else 0
        for layer, (matrix, steps) in enumerate(zip(codes, scale, strict=True)):
            shares = [float(np.mean(matrix == value)) for value in (-1, 0, 1)]
            rows.append(
                {
                    "layer": first + layer,
                    "matrix": "/".join(path[1:-1]),
                    "shape": list(matrix.shape),
                    "fractions": shares,
                    "scale": float(np.mean(steps)),
                }
            )
    return sorted(rows, key=lambda row: (row["layer"], row["matrix"]))
