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

Two kernels. `_split` is for few rows, where reading W takes the time: K is split over blocks of threads, each of which asks for all of
its bytes before it waits for the first. `_pipelined` is for many rows, where the products take it: blocks of threads stay and take tile
after tile; one warpgroup loads, and two take turns at unpacking and multiplying.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.arg_specs import ArgSpec
from kernels_pallas.block_config import MULTIPROCESSORS, GpuConfig, gpu_blocks, gpu_shared_memory, gpu_steps
from kernels_pallas.packing import Encoding, PackedLayer, PackedTernary

plgpu: Any
try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:
    plgpu = None

MINIMUM_JAX = (0, 12, 0)
"""The first JAX whose Mosaic GPU has the interface that is used here."""

MAXIMUM_K = (1 << 18) - 1
"""64 * 128 * K must be below 2^31."""

SHARED_MEMORY = 232_448
"""Bytes of shared memory that a block of threads may have (CUDA C++ Programming Guide, compute capability 9.0)."""

_CAPABILITIES = {"a100": "8.0", "h100": "9.0", "h200": "9.0", "b200": "10.0"}
"""Compute capabilities of the GPUs in `CHIPS`."""

_HEIGHT = 64
"""Rows of the left operand of a `wgmma`: the fewest outputs that a warpgroup computes."""

_PLANES = 4
"""Codes in a byte."""

_WARPGROUPS = 2
"""Warpgroups of `_pipelined` that multiply: while one unpacks, the other keeps the tensor cores busy."""


def supported(spec: ArgSpec) -> str | None:
    """Why a call is not supported, or None."""
    if plgpu is None or jax.__version_info__ < MINIMUM_JAX:
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
    capability = _CAPABILITIES.get(spec.chip or "") or str(getattr(jax.devices()[0], "compute_capability", "unknown"))
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
    m, n = x.shape[0], w.n
    config = gpu_blocks(ArgSpec(m=m, k=w.k, n=n, out_dtype=str(jnp.dtype(out_dtype)), platform="gpu"), config)
    if isinstance(w, PackedLayer):
        layer = jnp.clip(w.layer.astype(jnp.int32), 0, w.stack.codes.shape[0] - 1).reshape(1)
        codes, scale = w.stack.codes, w.stack.scale[layer]
    else:
        layer, codes, scale = jnp.zeros((1,), jnp.int32), w.codes[None], w.scale
    size = config.inputs // 4
    folds = _folds(codes.shape[2], size)
    if n % (8 * folds):  # no model's shape: a copy of the weights in every call
        codes = jnp.pad(codes, ((0, 0), (0, -n % 8), (0, -codes.shape[2] % size)))
        folds = 1
    row = codes.shape[2]
    offsets = [fold * row % size for fold in range(folds)]  # where the row of a fold begins in its first piece
    columns = pl.cdiv(max(offsets) + row, size) * config.inputs
    x = jnp.pad(x, ((0, -m % 8 if m > 8 else 0), (0, 0)))
    x = jnp.stack([permuted(jnp.pad(x, ((0, 0), (4 * offset, columns - 4 * offset - w.k))), config.inputs) for offset in offsets])
    codes = codes.reshape(codes.shape[0], -1, folds * row)
    height = codes.shape[1]
    shape = (folds, x.shape[1], -(-height // 64) * 64)
    step = x_scale * scale
    if config.splits is not None and config.splits > 1:
        parts = _split(x, codes, layer, shape, jnp.int32, config)
        sums = _unfolded(-parts.sum(axis=0, dtype=jnp.int32) >> 6, m, height, n)
        return (sums.astype(jnp.float32) * step).astype(out_dtype)
    kernel = _pipelined if config.splits is None else _split
    step = jnp.pad(step[:, 0], (0, -m % config.rows))  # not read by the copy engine, which would fill in zeros
    return _unfolded(kernel(x, codes, layer, shape, out_dtype, config, step), m, height, n)


def _folds(row: int, size: int) -> int:
    """Rows of `row` bytes that are taken as one, so that it is a multiple of `size` bytes."""
    return size // math.gcd(row, size)


def _first(codes: Any, fold: Any, folds: int, size: int) -> Any:
    """The piece of a row of codes [layers, outputs, bytes] in which the row of `fold` begins."""
    return lax.div(fold * (codes.shape[2] // folds), size)


def _unfolded(out: jax.Array, m: int, height: int, n: int) -> jax.Array:
    """[folds, rows, outputs of one fold], both of the latter filled up, as [M, N]."""
    return jnp.moveaxis(out[:, :m, :height], 0, 2).reshape(m, -1)[:, :n]


def permuted(x: jax.Array, inputs: int) -> jax.Array:
    """x [M, K], K a multiple of `inputs`, with columns in the order in which the planes of packed bytes hold them.

    Of `inputs` columns, those in plane 0 of the blocks of 128 come first, then those in plane 1, 2 and 3.
    """
    return x.reshape(x.shape[0], -1, inputs // 128, 4, 32).swapaxes(2, 3).reshape(x.shape[0], -1)


# --- kernels ---------------------------------------------------------------------------------------------------------


def _split(x: Any, codes: Any, layer: Any, shape: tuple[int, ...], out_dtype: Any, config: GpuConfig, *step: Any) -> jax.Array:
    """-64 times the sums over each part of K, int32 [splits, folds, M, N]; with one part and the step of each row, the result."""
    inputs, size, steps = config.inputs, config.inputs // 4, gpu_steps(config, x.shape[2])

    def kernel(x_gmem: Any, codes_gmem: Any, layer_gmem: Any, *rest: Any, x_smem: Any, codes_smem: Any, full: Any, **scratch: Any) -> None:
        *step_gmem, out_gmem = rest
        part, fold, group = (lax.axis_index(name) for name in ("part", "fold", "group"))
        rows, outputs = lax.axis_index("rows") * config.rows, lax.axis_index("outputs") * config.outputs
        first = _first(codes, fold, shape[0], size)
        weights = codes_gmem.at[layer_gmem[0], pl.ds(outputs, config.outputs)]
        activations = x_gmem.at[fold, pl.ds(rows, config.rows)]

        @pl.when(group == 0)
        def _() -> None:
            for i in range(steps):
                k = part * steps + i
                plgpu.copy_gmem_to_smem(weights.at[:, pl.ds((first + k) * size, size)], codes_smem.at[i], full.at[i])
                plgpu.copy_gmem_to_smem(activations.at[:, pl.ds(k * inputs, inputs)], x_smem.at[i], full.at[i])

        @functools.partial(pl.run_scoped, acc=plgpu.ACC((_HEIGHT, config.rows), jnp.int32))
        def _(acc: Any) -> None:
            for i in range(steps):
                plgpu.barrier_wait(full.at[i])
                _multiply(acc, codes_smem.at[i, pl.ds(group * _HEIGHT, _HEIGHT)], x_smem.at[i], group, **scratch)
                plgpu.wgmma_wait(_PLANES)  # the step before is done with its registers
            plgpu.wgmma_wait(0)
            out = out_gmem.at[fold] if step else out_gmem.at[part, fold]
            _store(acc, out, rows, outputs, group, step_gmem, **scratch)

        plgpu.wait_smem_to_gmem(0)

    folds, m, n = shape
    return _call(
        kernel,
        [x, codes, layer, *step],
        shape if step else (config.splits, *shape),
        out_dtype,
        config,
        grid={"fold": folds, "rows": pl.cdiv(m, config.rows), "part": config.splits, "outputs": pl.cdiv(n, config.outputs)},
        groups=config.outputs // _HEIGHT,
        height=_HEIGHT,
        x_smem=plgpu.SMEM((steps, config.rows, inputs), jnp.int8, transforms=_swizzle(size)),
        codes_smem=plgpu.SMEM((steps, config.outputs, size), jnp.uint8, transforms=_swizzle(size)),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=steps),
    )


def _pipelined(x: Any, codes: Any, layer: Any, shape: tuple[int, ...], out_dtype: Any, config: GpuConfig, step: Any) -> jax.Array:
    """The result [folds, M, N], by blocks of threads that take one tile after the other."""
    (folds, m, n), inputs, size = shape, config.inputs, config.inputs // 4
    steps, tiles = x.shape[2] // inputs, (folds, pl.cdiv(m, config.rows), pl.cdiv(n, config.outputs))
    height = config.outputs // _WARPGROUPS

    def kernel(x_gmem: Any, codes_gmem: Any, layer_gmem: Any, step_gmem: Any, out_gmem: Any, **scratch: Any) -> None:
        group = lax.axis_index("group")

        def pipeline(body: Callable[..., Any], context: Callable[..., None], first: Any = 0) -> Any:
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(steps,),
                in_specs=[
                    plgpu.BlockSpec((config.outputs, size), lambda k: (0, first + k), transforms=_swizzle(size), memory_space=plgpu.SMEM),
                    plgpu.BlockSpec((config.rows, inputs), lambda k: (0, k), transforms=_swizzle(size), memory_space=plgpu.SMEM),
                ],
                wg_axis="group",
                num_compute_wgs=_WARPGROUPS,
                memory_registers=40,
                max_concurrent_steps=min(config.stages, steps),
                compute_context=context,
            )

        buffers = pipeline(_nothing, _nothing).get_allocations(codes_gmem.at[0], x_gmem.at[0])

        @functools.partial(pl.run_scoped, buffers=buffers, collective_axes="group")
        def _(buffers: Any) -> None:
            @plgpu.nd_loop(tiles, collective_axes="block")
            def _(loop: Any) -> None:
                fold, rows, outputs = loop.index[0], loop.index[1] * config.rows, loop.index[2] * config.outputs
                weights = codes_gmem.at[layer_gmem[0]].at[pl.ds(outputs, config.outputs)]
                activations = x_gmem.at[fold].at[pl.ds(rows, config.rows)]

                def body(_: Any, codes_smem: Any, x_smem: Any, acc: Any) -> Any:
                    _multiply(acc, codes_smem.at[pl.ds(group * height, height)], x_smem, group, **scratch)
                    plgpu.wgmma_wait(0)
                    return acc

                def context(run: Callable[[Any], Any]) -> None:
                    @functools.partial(pl.run_scoped, acc=plgpu.ACC((height, config.rows), jnp.int32))
                    def _(acc: Any) -> None:
                        run(acc)
                        _store(acc, out_gmem.at[fold], rows, outputs, group, [step_gmem], **scratch)

                pipeline(body, context, _first(codes, fold, folds, size))(weights, activations, allocations=buffers)

        plgpu.wait_smem_to_gmem(0)

    grid = {"block": min(math.prod(tiles), MULTIPROCESSORS)}
    return _call(kernel, [x, codes, layer, step], shape, out_dtype, config, grid, _WARPGROUPS + 1, height)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _call(
    kernel: Any,
    operands: list[Any],
    shape: Any,
    dtype: Any,
    config: GpuConfig,
    grid: dict[str, int],
    groups: int,
    height: int,
    **scratch: Any,
) -> jax.Array:
    used, itemsize = gpu_shared_memory(config, operands[0].shape[2], dtype), jnp.dtype(dtype).itemsize
    if used > SHARED_MEMORY:
        raise ValueError(f"{config} needs {used} bytes of shared memory: must be at most {SHARED_MEMORY}")
    tiles = config.outputs // height
    scratch["out_smem"] = plgpu.SMEM((tiles, config.rows, height), dtype, transforms=_swizzle(128 // itemsize, itemsize))
    if config.interpret is not None:
        scratch["left_smem"] = plgpu.SMEM((tiles, height, config.inputs // 4), jnp.int8, transforms=_swizzle(config.inputs // 4))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups,
        thread_name="group",
        kernel_name=f"ternary_matmul_mosaic_gpu_{'pipelined' if config.splits is None else 'split'}",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=scratch,
        interpret=config.interpret,
    )(*operands)


def _swizzle(columns: int, itemsize: int = 1) -> tuple[Any, Any]:
    """How rows of `columns` elements lie in shared memory: in tiles of 8 rows, without bank conflicts."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * itemsize)


# --- parts of both ---------------------------------------------------------------------------------------------------


def _multiply(acc: Any, codes: Any, x: Any, group: Any, out_smem: Any, left_smem: Any = None) -> None:
    """acc int32 [outputs, rows] += -64 times the four planes of codes [outputs, bytes], side by side, times x [rows, 4 * bytes]."""
    size = codes.shape[1]
    packed = codes[...]
    for plane in range(_PLANES):
        if left_smem is None:
            left = _plane(packed, plane)
        else:  # the interpreter knows no left operand in registers, nor what is not a Pallas operation
            left = left_smem.at[group]
            left[...] = plane_of_bytes(packed, plane).astype(jnp.int8)
            plgpu.commit_smem()
        plgpu.wgmma(acc, left, x.at[:, pl.ds(plane * size, size)].T)


def plane_of_bytes(packed: Any, plane: int) -> Any:
    """-64 times the weights in a plane of packed bytes uint8, as int8 in two's complement."""
    return ((packed ^ 0x55) << (2 * plane)) & 0xC0


def _plane(packed: jax.Array, plane: int) -> jax.Array:
    """`plane_of_bytes`, both as left operands of `wgmma` in registers: four bytes at a time."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, llvm
    from jax.experimental.mosaic import gpu as mgpu

    layout = plgpu.Layout.WGMMA_8BIT

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(packed.shape, jnp.int8, layout=layout))
    def unpack(_: Any, array: Any) -> Any:
        word = ir.IntegerType.get_signless(32)

        def constant(byte: int) -> Any:
            return arith.constant(word, byte * 0x01010101 - (byte >> 7 << 32))  # signed

        registers = np.empty_like(array.registers)
        for place, register in np.ndenumerate(array.registers):
            codes = arith.xori(llvm.bitcast(word, register), constant(0x55))
            shifted = arith.shli(codes, arith.constant(word, 2 * plane)) if plane else codes
            registers[place] = llvm.bitcast(register.type, arith.andi(shifted, constant(0xC0)))
        return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=True)

    return unpack(packed)


def _store(acc: Any, out: Any, rows: Any, outputs: Any, group: Any, step: Any, out_smem: Any, left_smem: Any = None) -> None:
    """Write a warpgroup's tile acc [outputs, rows] to out [rows, outputs]: as it is, or scaled and rounded where there are steps."""
    height, width = acc.shape
    rows = pl.ds(rows, width)
    tile = acc[...]
    for ref in step:
        factors = plgpu.load(ref.at[rows], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        tile = ((-tile >> 6).astype(jnp.float32) * lax.broadcast_in_dim(factors, tile.shape, (1,))).astype(out.dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy of the tile before may still read what is written now
    out_smem.at[group].T[...] = plgpu.layout_cast(tile, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem.at[group], out.at[rows, pl.ds(outputs + group * height, height)])
