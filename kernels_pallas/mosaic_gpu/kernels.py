"""The kernels themselves, in Pallas for Mosaic GPU; what they compute and how data lies is said in `kernels_pallas.mosaic_gpu`.

Imported when a kernel is first traced: the interface changes from one version of JAX to the next, and takes time to import.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from kernels_pallas.mosaic_gpu import plane_of_bytes
from kernels_pallas.mosaic_gpu.blocks import MULTIPROCESSORS, SHARED_MEMORY, GpuConfig, shared_memory, steps_of

plgpu: Any = mosaic_gpu  # its declared types say less than it accepts

_HEIGHT = 64
"""Rows of the left operand of a `wgmma`: the fewest outputs that a warpgroup computes."""

_PLANES = 4
"""Codes in a byte."""

_WARPGROUPS = 2
"""Warpgroups of `pipelined` that multiply: while one unpacks, the other keeps the tensor cores busy."""


def split(x: Any, codes: Any, layer: Any, shape: tuple[int, ...], out_dtype: Any, config: GpuConfig, *step: Any) -> jax.Array:
    """-64 times the sums over each part of K, int32 [splits, folds, M, N]; with one part and the step of each row, the result."""
    inputs, size, steps = config.inputs, config.inputs // 4, steps_of(config, x.shape[2])

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
        shape if step else (config.splits or 1, *shape),
        out_dtype,
        config,
        grid={"fold": folds, "rows": pl.cdiv(m, config.rows), "part": config.splits or 1, "outputs": pl.cdiv(n, config.outputs)},
        groups=config.outputs // _HEIGHT,
        height=_HEIGHT,
        x_smem=plgpu.SMEM((steps, config.rows, inputs), jnp.int8, transforms=_swizzle(size)),
        codes_smem=plgpu.SMEM((steps, config.outputs, size), jnp.uint8, transforms=_swizzle(size)),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=steps),
    )


def pipelined(x: Any, codes: Any, layer: Any, shape: tuple[int, ...], out_dtype: Any, config: GpuConfig, step: Any) -> jax.Array:
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
                memory_registers=56,
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


def _first(codes: Any, fold: Any, folds: int, size: int) -> Any:
    """The piece of a row of codes [layers, outputs, bytes] in which the row of `fold` begins."""
    return lax.div(fold * (codes.shape[2] // folds), size)


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
    used, itemsize = shared_memory(config, operands[0].shape[2], dtype), jnp.dtype(dtype).itemsize
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


def _plane(packed: jax.Array, plane: int) -> jax.Array:
    """`plane_of_bytes`, both as left operands of `wgmma` in registers: four bytes at a time."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu.utils import bitcast
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith

    layout = plgpu.Layout.WGMMA_8BIT

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(packed.shape, jnp.int8, layout=layout))
    def unpack(_: Any, array: Any) -> Any:
        word = ir.IntegerType.get_signless(32)

        def constant(byte: int) -> Any:
            return arith.constant(word, byte * 0x01010101 - (byte >> 7 << 32))  # signed

        registers = np.empty_like(array.registers)
        for place, register in np.ndenumerate(array.registers):
            codes = arith.xori(bitcast(register, word), constant(0x55))
            shifted = arith.shli(codes, arith.constant(word, 2 * plane)) if plane else codes
            registers[place] = bitcast(arith.andi(shifted, constant(0xC0)), register.type)
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
