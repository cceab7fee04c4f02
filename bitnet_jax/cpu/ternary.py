"""`ternary_matmul` by the native library, and the product of one input with several matrices.

int8 activations, one scale a matrix, either encoding, any M, K and N. Sums are exact for every input; the result is
float32(sum) * (x_scale * scale) rounded to `out_dtype`, the same bits as the reference's and the portable implementation's.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax.array_types import Array, Float, Float32, Int8
from bitnet_jax.cpu import build
from bitnet_jax.cpu.native import CpuConfig, call
from kernels_pallas import IMPLEMENTATIONS, ArgSpec, Implementation, PackedLayer, PackedTernary, check_shapes

_LARGEST = 2**31 - 1


def register() -> None:
    """Makes the native library an implementation of `kernels_pallas.ternary_matmul`: "native", which None then prefers where it can run."""
    IMPLEMENTATIONS.setdefault("native", Implementation(ternary_matmul, supported, ternary_matmuls))


def supported(spec: ArgSpec) -> str | None:
    """The reason why the native library does not support a call, or None.

    The library itself is looked for, and compiled if need be, only where nothing else speaks against the call.
    """
    if spec.platform != "cpu":
        return f"platform={spec.platform} must be cpu"
    if spec.x_dtype != "int8":
        return f"activations are {spec.x_dtype}: must be int8"
    if spec.out_dtype not in ("float32", "bfloat16"):
        return f"out_dtype={spec.out_dtype} must be float32 or bfloat16"
    if spec.group is not None:
        return f"weights have a scale for every {spec.group} inputs: must have one a matrix"
    if max(spec.m, spec.n) > _LARGEST:
        return f"M={spec.m} and N={spec.n} must be at most {_LARGEST}"
    return build.unavailable()


def ternary_matmul(
    x: Int8[Array, "M K"],
    w: PackedTernary | PackedLayer,
    x_scale: Float32[Array, "M 1"],
    out_dtype: Any,
    config: CpuConfig | None = None,
) -> Float[Array, "M N"]:
    """x [M, K] times w [K, N], as [M, N] in `out_dtype`; equations in `kernels_pallas.ternary_matmul`."""
    return ternary_matmuls(x, [w], x_scale, out_dtype, config)[0]


def ternary_matmuls(
    x: Int8[Array, "M K"],
    matrices: Sequence[PackedTernary | PackedLayer],
    x_scale: Float32[Array, "M 1"],
    out_dtype: Any,
    config: CpuConfig | None = None,
) -> list[Float[Array, "M N"]]:
    """x [M, K] times each of `matrices` [K, N], which may differ in N, in one call: q, k and v, or gate and up.

    Each result has the bits that `ternary_matmul` gives. Of a `PackedLayer` only that layer's bytes are read, where they lie; a
    layer out of range is an error when it runs.

    Raises:
        ValueError: matrices of other types, shapes or encodings.
        RunError: there is no native library and none can be made.
        UserError: `config` names an instruction set that this machine lacks.
    """
    if not matrices:
        raise ValueError("matrices=[] must hold at least one")
    first = matrices[0]
    operands = []
    for w in matrices:
        stack, layer = (w.stack, w.layer) if isinstance(w, PackedLayer) else (w, np.int32(0))
        check_shapes(stack)
        if len(w.shape) != 2 or w.group is not None or w.k != x.shape[1] or w.encoding is not first.encoding:
            raise ValueError(f"w has shape {w.shape}: must be [{x.shape[1]}, N] in {first.encoding.value} with one scale")
        operands += [stack.codes.reshape(-1, w.n, stack.codes.shape[-1]), stack.scale.reshape(-1), layer]
    return call(
        "bitnet_ternary_matmul",
        [jax.ShapeDtypeStruct((x.shape[0], w.n), jnp.dtype(out_dtype)) for w in matrices],
        x,
        x_scale,
        *operands,
        config=config,
        encoding=first.encoding.value,
    )


def scale(
    sums: Float32[Array, "M N"],
    x_scale: Float32[Array, "M 1"],
    w_scale: Float32[Array, ""],
    out_dtype: Any,
    config: CpuConfig | None = None,
) -> Float[Array, "M N"]:
    """sums * (x_scale * w_scale) rounded to `out_dtype`, float32 or bfloat16: how `ternary_matmul` ends, for sums that XLA computed.

    XLA may contract its own multiplication with an addition that follows, and then rounds once where the native product rounds twice.
    """
    result = jax.ShapeDtypeStruct(sums.shape, jnp.dtype(out_dtype))
    return call("bitnet_scale", [result], sums, x_scale, w_scale, config=config)[0]
