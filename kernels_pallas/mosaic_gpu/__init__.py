"""The product on NVIDIA's Hopper GPUs, by Pallas with the Mosaic GPU backend: `wgmma` of int8, with weights unpacked in registers.

The weights are the left operand, yᵀ = Wᵀ xᵀ, because `wgmma` takes that one from registers: packed bytes [outputs, bytes] come to shared
memory by the copy engine (TMA), and a warpgroup loads them as fragments of an int8 operand. x int8 [rows, K] stays in shared memory as
the right operand. Everything is laid out for the bytes as they are stored (`packing`); they are never written anew.

- Unpacking: one exclusive or of 32-bit registers makes the two bits of c = w + 1 the number -w in two's complement, c ^ 1 = 01, 00, 11,
  for all planes. In the two top bits of an int8 that number counts 64 times, so a shift and a mask per plane give operands, and there is
  no offset to subtract. Sums are -64 times what they should be, and exact in int32 for K up to `MAXIMUM_K`.
- Planes: a plane of a block holds 32 consecutive k, and `wgmma` wants at least 64. So columns of x change places (`permuted`): a plane of
  2 or 4 blocks side by side then meets a contiguous range of x.
- Edges: what lies beyond an array is read as zeros and not written. The copy engine cuts rows of bytes into pieces of 64 or 128; where a
  row is no multiple, 2 or 4 rows are taken as one, and their outputs are computed apart, with x shifted to where each begins (`_folds`).

Two kernels. `split` is for few rows, where reading W takes the time: K is split over blocks of threads, each of which asks for all of
its bytes before it waits for the first. `pipelined` is for many rows, where the products take it: blocks of threads stay and take tile
after tile; one warpgroup loads, and two take turns at unpacking and multiplying.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.arg_specs import ArgSpec, default_device
from kernels_pallas.mosaic_gpu.blocks import GpuConfig, blocks
from kernels_pallas.packing import Encoding, PackedLayer, PackedTernary

MINIMUM_JAX = (0, 12, 0)
"""The first JAX whose Mosaic GPU has the interface that is used here."""

MAXIMUM_K = (1 << 18) - 1
"""64 * 128 * K must be below 2^31."""

_CAPABILITIES = {"a100": "8.0", "h100": "9.0", "h200": "9.0", "b200": "10.0"}
"""Compute capabilities of the GPUs in `CHIPS`."""


def supported(spec: ArgSpec) -> str | None:
    """Why a call is not supported, or None."""
    if jax.__version_info__ < MINIMUM_JAX:
        return f"needs JAX {'.'.join(map(str, MINIMUM_JAX))} or newer, not {jax.__version__}: the interface of Mosaic GPU changed"
    if spec.encoding is not Encoding.TWO_BIT:
        return f"encoding={spec.encoding.value} must be {Encoding.TWO_BIT.value}"
    if spec.group is not None:
        return f"group={spec.group} must be None: one scale per matrix"
    if spec.x_dtype != "int8":
        return f"x_dtype={spec.x_dtype} must be int8"
    if spec.k > MAXIMUM_K:
        return f"K={spec.k} must be at most {MAXIMUM_K}: sums are int32"
    if spec.out_dtype not in ("float32", "bfloat16", "float16"):
        return f"out_dtype={spec.out_dtype} must be float32, bfloat16 or float16"
    if spec.platform != "gpu":
        return f"platform={spec.platform} must be gpu, an NVIDIA one of the Hopper generation"
    capability = _CAPABILITIES.get(spec.chip or "") or str(getattr(default_device(), "compute_capability", "unknown"))
    if capability == "9.0":
        return None
    age = "newer" if re.fullmatch(r"1\d\.\d", capability) else "older" if re.fullmatch(r"[1-8]\.\d", capability) else "other"
    return f"compute capability {capability} is {age} than Hopper's 9.0, of whose wgmma instructions the kernels are made"


def ternary_matmul(x: jax.Array, w: PackedTernary, x_scale: jax.Array | None, out_dtype: Any, config: GpuConfig | None = None) -> jax.Array:
    """int8 x [M, K] times w [K, N] with x_scale float32 [M, 1], as [M, N] in `out_dtype`; equations in `api.ternary_matmul`.

    Raises:
        ValueError: the blocks of `config` need more shared memory than there is.
    """
    return ternary_matmuls(x, [w], x_scale, out_dtype, config)[0]


def ternary_matmuls(x: jax.Array, matrices: list[Any], x_scale: Any, out_dtype: Any, config: GpuConfig | None = None) -> list[jax.Array]:
    """`ternary_matmul` with each of `matrices`, whose common work on x is done once. A layer of a stack is read where it lies.

    Raises:
        ValueError: as `ternary_matmul`.
    """
    return [_product(x, w, x_scale, out_dtype, config) for w in matrices]


def _product(x: jax.Array, w: PackedTernary | PackedLayer, x_scale: Any, out_dtype: Any, config: GpuConfig | None) -> jax.Array:
    from kernels_pallas.mosaic_gpu import kernels

    m, n = x.shape[0], w.n
    config = blocks(ArgSpec(m=m, k=w.k, n=n, out_dtype=str(jnp.dtype(out_dtype)), platform="gpu"), config)
    if isinstance(w, PackedLayer):
        layer = jnp.clip(w.layer.astype(jnp.int32), 0, w.stack.codes.shape[0] - 1).reshape(1)
        codes, scale = w.stack.codes, w.stack.scale[layer[0]]
    else:
        layer, codes, scale = jnp.zeros((1,), jnp.int32), w.codes[None], w.scale
    size = config.inputs // 4
    folds = _folds(codes.shape[2], size)
    if n % (8 * folds):  # no model's shape: a copy of the weights in every call
        codes = jnp.pad(codes, ((0, 0), (0, -n % 8), (0, -codes.shape[2] % size)))
        folds = 1
    row = codes.shape[2]
    offsets = [fold * row % size for fold in range(folds)]  # where the row of a fold begins in its first piece
    columns = math.ceil((max(offsets) + row) / size) * config.inputs
    x = jnp.pad(x, ((0, -m % 8 if m > 8 else 0), (0, 0)))
    x = jnp.stack([permuted(jnp.pad(x, ((0, 0), (4 * offset, columns - 4 * offset - w.k))), config.inputs) for offset in offsets])
    codes = codes.reshape(codes.shape[0], -1, folds * row)
    height = codes.shape[1]
    shape = (folds, x.shape[1], -(-height // 64) * 64)
    step = x_scale * scale
    if config.splits is not None and config.splits > 1:
        parts = kernels.split(x, codes, layer, shape, jnp.int32, config)
        sums = _unfolded(-parts.sum(axis=0, dtype=jnp.int32) >> 6, m, height, n)
        return (sums.astype(jnp.float32) * step).astype(out_dtype)
    kernel = kernels.pipelined if config.splits is None else kernels.split
    step = jnp.pad(step[:, 0], (0, -m % config.rows))  # not read by the copy engine, which would fill in zeros
    return _unfolded(kernel(x, codes, layer, shape, out_dtype, config, step), m, height, n)


def _folds(row: int, size: int) -> int:
    """Rows of `row` bytes that are taken as one, so that it is a multiple of `size` bytes."""
    return size // math.gcd(row, size)


def _unfolded(out: jax.Array, m: int, height: int, n: int) -> jax.Array:
    """[folds, rows, outputs of one fold], both of the latter filled up, as [M, N]."""
    return jnp.moveaxis(out[:, :m, :height], 0, 2).reshape(m, -1)[:, :n]


def permuted(x: jax.Array, inputs: int) -> jax.Array:
    """x [M, K], K a multiple of `inputs`, with columns in the order in which the planes of packed bytes hold them.

    Of `inputs` columns, those in plane 0 of the blocks of 128 come first, then those in plane 1, 2 and 3.
    """
    return x.reshape(x.shape[0], -1, inputs // 128, 4, 32).swapaxes(2, 3).reshape(x.shape[0], -1)


def plane_of_bytes(packed: Any, plane: int) -> Any:
    """-64 times the weights in a plane of packed bytes uint8, as int8 in two's complement."""
    return ((packed ^ 0x55) << (2 * plane)) & 0xC0
