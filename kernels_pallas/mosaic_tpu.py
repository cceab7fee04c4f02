"""TPU kernel of `ternary_matmul`: packed weights are unpacked in vector memory (VMEM), between their load and the matrix unit (MXU).

Layout. A kernel instance takes rows of activations, whole K, and a block of outputs: codes as [bytes, outputs], outputs on lanes. A block
of 32 bytes is then one tile of 32 sublanes, each of its four planes is one too, and the planes follow one another in the order of k: no
value ever changes its lane or sublane. The codes of `PackedTernary` are [N, bytes], so they are passed transposed; `place` lays them
out in memory so that this transposition moves nothing.

Unpacking. Two bits c = w + 1 become a two's complement number by one exclusive or for all planes: c ^ 1 is 01, 00, 11 = 1, 0, -1 for
w = -1, 0, 1. A number in the two top bits of an int8 is 64 times itself, and in those of a bfloat16, sign and first bit of the
exponent, it is twice itself. So a shift and a mask for each plane, on 32-bit words, give operands for the MXU, there is no offset to
subtract, and a power of two is taken out of the sums.

Exactness. int8 sums are at most 64 * 128 * K in int32. Where the MXU has no int8, operands are bfloat16, which holds every int8, and
their float32 sums of multiples of two are exact up to 2 * 2^24; K is split so that they stay below, and the parts are added in int32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType

from kernels_pallas.arg_specs import CHIPS, SIZES, ArgSpec, chip_name, cost, default_device
from kernels_pallas.block_config import TpuBlocks, TpuConfig, tpu_blocks, tpu_vmem_bytes
from kernels_pallas.packing import Encoding, PackedLayer, PackedTernary

_ROWS, _LANES = 32, 128
"""Rows of an int8 tile, and columns of any."""

_EXACT_K = 1 << 16
"""Inputs whose products are summed in float32: 128 * 2^16 = 2^23."""


def supported(spec: ArgSpec) -> str | None:
    """The reason why a call cannot run here, or None."""
    if spec.platform != "tpu":
        return f"it needs a TPU, or a config that names one and how to simulate it; the platform is {spec.platform}"
    if spec.chip is None:
        return "the TPU is of a generation that is not in CHIPS"
    if spec.encoding is not Encoding.TWO_BIT:
        return f"encoding {spec.encoding.value} is not unpacked on a TPU: transcode to {Encoding.TWO_BIT.value}"
    if spec.group is not None:
        return f"one scale per {spec.group} inputs is not applied in the kernel: one per matrix is"
    if spec.x_dtype not in ("int8", "bfloat16"):
        return f"activations in {spec.x_dtype} are not multiplied without rounding: int8 and bfloat16 are"
    if spec.out_dtype not in SIZES:
        return f"out_dtype={spec.out_dtype} must be float32, bfloat16 or float16"
    if spec.k > (1 << 18) - 128:
        return f"K={spec.k} must be at most {(1 << 18) - 128}: sums are int32"
    return _does_not_fit(spec, tpu_blocks(spec))


def _does_not_fit(spec: ArgSpec, blocks: TpuBlocks) -> str | None:
    needed, there = tpu_vmem_bytes(spec, blocks), CHIPS[spec.chip or ""].vmem or 0
    if needed <= there:
        return None
    return f"blocks of {blocks.rows} x {blocks.outputs} take {needed} bytes of vector memory at K={spec.k}: {spec.chip} has {there}"


def ternary_matmul(x: jax.Array, w: PackedTernary, x_scale: jax.Array | None, out_dtype: Any, config: TpuConfig | None = None) -> jax.Array:
    """x [M, K] times w [K, N] with x_scale float32 [M, 1] or None, as [M, N] in `out_dtype`; equations in `api.ternary_matmul`."""
    return _product(x, w, x_scale, out_dtype, config, quantize=False)


def ternary_matmuls(
    x: jax.Array, matrices: list[PackedTernary | PackedLayer], x_scale: jax.Array | None, out_dtype: Any, config: TpuConfig | None = None
) -> list[jax.Array]:
    """`ternary_matmul` of x with each of `matrices`; a layer is read where it lies in its stack."""
    return [_product(x, w, x_scale, out_dtype, config, quantize=False) for w in matrices]


def quantize_and_multiply(x: jax.Array, w: PackedTernary | PackedLayer, out_dtype: Any, config: TpuConfig | None = None) -> jax.Array:
    """x bfloat16 or float32 [M, K], each row quantised to int8 in the kernel, times w [K, N], as [M, N] in `out_dtype`.

    With size = max(max |x|, 1e-5) of a row (FAQ of b1.58, code listing; rounding is half to even, arithmetic float32),

        codes = clip(round(x * (127 / size)), -128, 127),   out = float32(codes @ W) * (size * (1 / 127) * w.scale)

    Raises:
        NotImplementedError: the kernel does not support the call.
    """
    spec = arg_spec(x, w, out_dtype, config or TpuConfig())
    platform = spec.platform if config and config.chip else default_device().platform
    kind = "bfloat16" if spec.x_dtype == "float32" else spec.x_dtype  # its products would be rounded; here they are of codes
    if (reason := supported(dataclasses.replace(spec, platform=platform, x_dtype=kind))) is not None or spec.x_dtype == "int8":
        raise NotImplementedError(f"mosaic_tpu: {reason or 'activations in int8 are quantised already'}")
    return _product(x, w, None, out_dtype, config, quantize=True)


def place(packed: PackedTernary) -> PackedTernary:
    """The same matrices with their codes laid out in memory as this kernel reads them, outputs innermost; nothing else can tell.

    Do it once, when weights are loaded: `jit` keeps the layout of arrays that are passed to it. Codes laid out otherwise, a whole stack
    where one of its layers is multiplied, are laid out anew in every call.
    """
    codes = jnp.asarray(packed.codes)
    return dataclasses.replace(packed, codes=jax.device_put(codes, Format(Layout(major_to_minor=placed(codes.ndim)), codes.sharding)))


def placed(axes: int) -> tuple[int, ...]:
    """The order of the axes of placed codes, from the outermost in."""
    return (*range(axes - 2), axes - 1, axes - 2)


# --- the call --------------------------------------------------------------------------------------------------------


def _product(
    x: jax.Array, w: PackedTernary | PackedLayer, x_scale: jax.Array | None, out_dtype: Any, config: TpuConfig | None, quantize: bool
) -> jax.Array:
    config = config or TpuConfig()
    spec = arg_spec(x, w, out_dtype, config)
    blocks = tpu_blocks(spec, config)
    if (reason := _does_not_fit(spec, blocks)) is not None:  # of blocks that a config names, or of rows that are wider than their codes
        raise NotImplementedError(f"mosaic_tpu: {reason}")
    if isinstance(w, PackedLayer):
        stack, layer = w.stack, jnp.clip(w.layer, 0, w.stack.codes.shape[0] - 1)
    else:
        stack, layer = jax.tree.map(lambda leaf: leaf[None], w), jnp.zeros((), jnp.int32)
    m, k = x.shape[0], 4 * stack.codes.shape[2]
    integer = quantize or x.dtype == jnp.int8
    operand = operand_dtype(spec, integer)

    x = jnp.pad(x, ((0, 0), (0, k - x.shape[1])))
    prepared = quantize or operand == jnp.bfloat16
    steps = pl.cdiv(spec.n, blocks.outputs)
    cores = CHIPS[spec.chip or ""].cores if steps > 1 else 1
    each = pl.cdiv(steps, cores)

    def output(core: Any, j: Any) -> Any:
        """The block of outputs; where they do not come out even, one core computes the last block twice."""
        return j if cores == 1 else jnp.minimum(core * each + j, steps - 1)

    inputs = [stack.scale[layer].reshape(1, 1), x]
    in_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec((blocks.rows, k), lambda i, core, j, layer: (i, 0))]
    if x_scale is not None:
        # A single column takes as many bytes as a tile's lanes, and XLA would copy it into them; this it writes where it makes x_scale.
        inputs.append(jnp.broadcast_to(x_scale, (m, _LANES)))
        in_specs.append(pl.BlockSpec((blocks.rows, _LANES), lambda i, core, j, layer: (i, 0)))
    inputs.append(jnp.swapaxes(stack.codes, 1, 2))
    in_specs.append(pl.BlockSpec((None, k // 4, blocks.outputs), lambda i, core, j, layer: (layer[0], 0, output(core, j))))

    found = cost(spec)
    return pl.pallas_call(
        functools.partial(_kernel, operand=operand, integer=integer, quantize=quantize),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(m, blocks.rows), cores, each),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((blocks.rows, blocks.outputs), lambda i, core, j, layer: (i, output(core, j))),
            scratch_shapes=[pltpu.VMEM((blocks.rows, k), operand)] * prepared + [pltpu.VMEM((blocks.rows, _LANES), jnp.float32)] * quantize,
        ),
        out_shape=jax.ShapeDtypeStruct((m, spec.n), out_dtype, manual_axis_type=_manual_axes([layer, *inputs])),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tpu_vmem_bytes(spec, blocks) * 4 // 3,  # and what the compiler puts there where registers do not suffice
        ),
        cost_estimate=pl.CostEstimate(flops=found.operations, transcendentals=0, bytes_accessed=found.bytes),
        interpret=config.interpret,
        name=f"ternary_matmul_tpu_{'quantize' if quantize else operand}",
    )(layer.reshape(1), *inputs)


def operand_dtype(spec: ArgSpec, integer: bool | None = None) -> Any:
    """The type that is multiplied: int8 where activations are integers, or quantised to be, and the chip has such products."""
    integer = spec.x_dtype == "int8" if integer is None else integer
    return jnp.dtype(jnp.int8 if integer and CHIPS[spec.chip or ""].int8 else jnp.bfloat16)


def _manual_axes(arrays: list[jax.Array]) -> ManualAxisType:
    """Over which axes of a surrounding `shard_map` a result of `arrays` varies: Pallas does not work it out."""
    return ManualAxisType(varying=frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays)))


def arg_spec(x: jax.Array, w: PackedTernary | PackedLayer, out_dtype: Any, config: TpuConfig) -> ArgSpec:
    """What the kernel needs to know of a call."""
    return ArgSpec(
        m=x.shape[0],
        k=w.k,
        n=w.n,
        x_dtype=str(x.dtype),
        out_dtype=str(jnp.dtype(out_dtype)),
        encoding=w.encoding,
        group=w.group,
        platform="tpu",
        chip=config.chip or chip_name(default_device().device_kind),
    )


# --- the kernel ------------------------------------------------------------------------------------------------------


def _kernel(layer_ref: Any, scale_ref: Any, x_ref: Any, *refs: Any, operand: Any, integer: bool, quantize: bool) -> None:
    """One block of rows times one block of outputs. Rows that are not multiplied as they come are prepared once for all their blocks."""
    del layer_ref  # read by the index map of the codes
    operands = list(refs)
    step_ref = operands.pop(0) if integer and not quantize else None
    codes_ref, out_ref, *scratch = operands
    if scratch:
        step_ref = scratch[1] if quantize else step_ref
        prepare = functools.partial(_quantize, x_ref, *scratch) if quantize else functools.partial(_reorder, x_ref, scratch[0])
        pl.when(pl.program_id(2) == 0)(prepare)
        x_ref = scratch[0]

    weights = _unpack(codes_ref[...], operand)
    if operand == jnp.int8:
        sums = -(_dot(x_ref[...], weights, jnp.int32) >> 6)
    elif integer:
        parts = [slice(start, start + _EXACT_K) for start in range(0, weights.shape[0], _EXACT_K)]
        sums = functools.reduce(jnp.add, [(_dot(x_ref[:, p], weights[p], jnp.float32) * -0.5).astype(jnp.int32) for p in parts])
    else:
        sums = _dot(x_ref[...], weights, jnp.float32) * -0.5
    scale = scale_ref[0, 0] if step_ref is None else step_ref[:, :1] * scale_ref[0, 0]
    out_ref[...] = (sums.astype(jnp.float32) * scale).astype(out_ref.dtype)


def _quantize(x_ref: Any, codes_ref: Any, step_ref: Any) -> None:
    """Writes the codes of each row and its step; a tile of rows at a time, since values of more would not fit in registers."""
    tile = min(_ROWS, x_ref.shape[0])

    def rows(i: Any, _: None) -> None:
        here = pl.ds(pl.multiple_of(i * tile, tile), tile)
        x = x_ref[here, :].astype(jnp.float32)
        size = jnp.maximum(jnp.max(jnp.abs(x), axis=1, keepdims=True), 1e-5)
        codes = jnp.clip(jnp.round(x * (127.0 / size)), -128.0, 127.0)
        step_ref[here, :] = jnp.broadcast_to(size * (1.0 / 127.0), (tile, _LANES))
        if codes_ref.dtype == jnp.int8:
            codes_ref[here, :] = codes.astype(jnp.int32).astype(jnp.int8)
        else:
            _write_reordered(codes_ref, here, codes)

    jax.lax.fori_loop(0, x_ref.shape[0] // tile, rows, None)


def _reorder(x_ref: Any, out_ref: Any) -> None:
    """Writes x as bfloat16 in the order in which `_unpack` gives weights for it."""
    _write_reordered(out_ref, slice(None), x_ref)


def _write_reordered(out_ref: Any, rows: Any, x: Any) -> None:
    """Of every 32 columns of x the even ones and then the odd ones, by the matrix unit: nothing else moves values between lanes as fast.

    A number that is not finite makes all 128 columns around it NaN.
    """
    source, place = (jax.lax.broadcasted_iota(jnp.int32, (_LANES, _LANES), axis) for axis in (0, 1))
    inside = place & 31
    wanted = place - inside + jnp.where(inside < 16, 2 * inside, 2 * inside - 31)
    permutation = jnp.where(source == wanted, 1.0, 0.0).astype(jnp.bfloat16)
    for start in range(0, x.shape[1], _LANES):
        columns = x[:, start : start + _LANES]
        columns = columns.astype(jnp.float32).astype(jnp.bfloat16) if columns.dtype == jnp.int8 else columns.astype(jnp.bfloat16)
        out_ref[rows, start : start + _LANES] = _dot(columns, permutation, jnp.float32).astype(jnp.bfloat16)


def _dot(x: jax.Array, weights: jax.Array, accumulator: Any) -> jax.Array:
    return jax.lax.dot_general(x, weights, (((1,), (0,)), ((), ())), preferred_element_type=accumulator)


def _unpack(codes: jax.Array, operand: Any) -> jax.Array:
    """Packed codes uint8 [bytes, outputs] as operands [4 * bytes, outputs]: -64 w in int8, or -2 w in bfloat16.

    In the order of k for int8. For bfloat16, every 32 of k come as the 16 even ones and then the 16 odd ones: a word has room for two
    of its four bytes, the first and third or the second and fourth.
    """
    words = pltpu.bitcast(codes, jnp.uint32) ^ jnp.uint32(0x55555555)
    mask = jnp.uint32(0xC0C0C0C0 if operand == jnp.int8 else 0xC000C000)
    shifts = [2 * p + odd for p in range(4) for odd in ((0,) if operand == jnp.int8 else (8, 0))]
    parts = [pltpu.bitcast((words << jnp.uint32(shift)) & mask, operand) for shift in shifts]
    tile, outputs = (32 if operand == jnp.int8 else 16), codes.shape[1]
    return jnp.stack([part.reshape(-1, tile, outputs) for part in parts], axis=1).reshape(-1, outputs)
