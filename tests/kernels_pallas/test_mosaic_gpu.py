"""The GPU kernels: simulated on any machine, lowered for CUDA on any machine, and run where there is a Hopper GPU (`-m gpu`)."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import ArgSpec, Encoding, PackedLayer, PackedTernary, mosaic_gpu, pack, ternary_matmul, ternary_matmuls
from kernels_pallas.arg_specs import MATRICES, named
from kernels_pallas.mosaic_gpu import MAXIMUM_K, MINIMUM_JAX, blocks, permuted, plane_of_bytes
from kernels_pallas.mosaic_gpu.blocks import SHARED_MEMORY, GpuConfig, rule, shared_memory
from kernels_pallas.packing import planes

OLD = jax.__version_info__ < MINIMUM_JAX
needs_mosaic = pytest.mark.skipif(OLD, reason=str(mosaic_gpu.supported(ArgSpec(m=1, k=1, n=1, platform="gpu", chip="h200"))))

SPLIT = GpuConfig(rows=8, outputs=64, inputs=256, splits=2)
WHOLE = GpuConfig(rows=8, outputs=64, inputs=256, splits=1)
PIPELINED = GpuConfig(rows=8, outputs=128, inputs=256, stages=2)
each_kernel = pytest.mark.parametrize("blocks_", [SPLIT, WHOLE, PIPELINED], ids=["split", "whole", "pipelined"])


def interpreted(**settings: Any) -> dict[str, Any]:
    """Fields of a config for the interpreter: memory is poisoned, and what reaches beyond an array raises."""
    if jax.default_backend() != "cpu":
        pytest.skip("the interpreter runs on CPUs")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return {"chip": "h200", "interpret": plgpu.InterpretGPUParams(**settings)}


@pytest.fixture(params=["interpreter", pytest.param("device", marks=pytest.mark.gpu)])
def on(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Fields of a config: one suite for the interpreter and, where there is one, for a GPU."""
    return {} if request.param == "device" else interpreted()


def matrix(k: int, n: int, *lead: int) -> PackedTernary:
    rng = np.random.default_rng(k * n)
    ternary = rng.integers(-1, 2, (*lead, k, n)).astype(np.int8)
    return jax.tree.map(jnp.asarray, pack(ternary, rng.uniform(0.5, 2, lead).astype(np.float32)))


def activations(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).integers(-128, 128, shape).astype(np.int8))


def steps(*lead: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(lead)).uniform(0.01, 1, (*lead, 1)).astype(np.float32))


def call(x: jax.Array, w: Any, config: GpuConfig, x_scale: Any = None, out_dtype: Any = jnp.float32) -> jax.Array:
    x_scale = jnp.ones((*x.shape[:-1], 1), jnp.float32) if x_scale is None else x_scale
    return ternary_matmul(x, w, x_scale=x_scale, out_dtype=out_dtype, implementation="mosaic_gpu", config=config)


def reference(x: jax.Array, w: PackedTernary, x_scale: Any = None, out_dtype: Any = jnp.float32) -> np.ndarray:
    x_scale = jnp.ones((*x.shape[:-1], 1), jnp.float32) if x_scale is None else x_scale
    return np.asarray(ternary_matmul(x, w, x_scale=x_scale, out_dtype=out_dtype, implementation="reference"))


def run(function: Any, *arguments: Any) -> Any:
    """The result, waited for, so that what goes wrong in the interpreter is shown here."""
    return jax.block_until_ready(function(*arguments))


def same_bits(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- results ---------------------------------------------------------------------------------------------------------


@needs_mosaic
@each_kernel
@pytest.mark.parametrize(
    ("m", "k", "n", "out_dtype"),
    [
        (1, 1, 1, jnp.float32),  # less than a block of codes, a tile, a row of 16 bytes
        (9, 513, 128, jnp.bfloat16),  # one code more than two steps; rows that are no multiple of 8
        (5, 800, 144, jnp.float16),  # rows of 224 bytes: two are read as one; outputs that are no multiple of a tile
        (3, 300, 70, jnp.float32),  # outputs that are no multiple of 8
    ],
)
def test_results_equal_the_reference_bit_for_bit(m: int, k: int, n: int, out_dtype: Any, blocks_: GpuConfig, on: dict[str, Any]) -> None:
    x, w, x_scale = activations(m, k), matrix(k, n), steps(m) * 1e-3
    assert same_bits(run(call, x, w, dataclasses.replace(blocks_, **on), x_scale, out_dtype), reference(x, w, x_scale, out_dtype))


@needs_mosaic
@pytest.mark.parametrize(
    ("m", "k", "n", "blocks_"),
    [
        (40, 400, 256, GpuConfig(rows=32, outputs=256, inputs=256, splits=2)),  # four warpgroups, two tiles of rows
        (17, 800, 128, GpuConfig(rows=16, outputs=64, inputs=512, splits=2)),  # rows of 224 bytes in pieces of 128: four are read as one
        (24, 544, 256, GpuConfig(rows=16, outputs=256, inputs=512, stages=3)),  # each warpgroup computes two heights of a wgmma
    ],
)
def test_other_blocks_give_the_same(m: int, k: int, n: int, blocks_: GpuConfig, on: dict[str, Any]) -> None:
    x, w, x_scale = activations(m, k), matrix(k, n), steps(m)
    assert same_bits(run(call, x, w, dataclasses.replace(blocks_, **on), x_scale), reference(x, w, x_scale))


@needs_mosaic
@each_kernel
def test_sums_are_exact_at_the_extremes(blocks_: GpuConfig, on: dict[str, Any]) -> None:
    k, n, values = 700, 64, (-128, -127, 0, 127)
    ternary = np.repeat(np.array([-1, 0, 1, 1], np.int8), 16)[None].repeat(k, 0)
    w = jax.tree.map(jnp.asarray, pack(ternary, np.asarray(1, np.float32)))
    x = jnp.asarray(np.array(values, np.int8)[:, None].repeat(k, 1))
    out = np.asarray(run(call, x, w, dataclasses.replace(blocks_, **on))).astype(np.int64)
    assert out.shape == (4, n)
    assert np.array_equal(out, k * np.outer(values, ternary[0].astype(np.int64)))


@needs_mosaic
@pytest.mark.slow
def test_sums_beyond_sixteen_million_are_rounded_once(on: dict[str, Any]) -> None:
    k = 131_072 + 257
    w = jax.tree.map(jnp.asarray, pack(np.ones((k, 8), np.int8), np.asarray(1, np.float32)))
    out = run(call, jnp.full((2, k), 127, jnp.int8), w, GpuConfig(rows=8, outputs=128, inputs=512, stages=2, **on))
    assert np.array_equal(np.asarray(out), np.full((2, 8), np.float32(127 * k)))


@needs_mosaic
@each_kernel
def test_there_are_no_races(blocks_: GpuConfig) -> None:
    x, w = activations(9, 600), matrix(600, 128)
    config = dataclasses.replace(blocks_, **interpreted(detect_races=True))
    assert same_bits(run(call, x, w, config), reference(x, w))


# --- stacks, transformations and shapes ------------------------------------------------------------------------------


@needs_mosaic
@pytest.mark.parametrize("layer", [0, 1, 9])
def test_a_layer_is_read_in_its_stack(layer: int, on: dict[str, Any]) -> None:
    stack, other, x, x_scale = matrix(300, 48, 2), matrix(300, 16), activations(3, 300), steps(3)
    matrices = [PackedLayer(stack, jnp.int32(layer)), other]
    config = dataclasses.replace(SPLIT, **on)
    function = functools.partial(ternary_matmuls, x_scale=x_scale, out_dtype=jnp.float32, implementation="mosaic_gpu", config=config)
    outs = run(function, x, matrices)
    first = jax.tree.map(lambda leaf: leaf[min(layer, 1)], stack)  # out of range is clamped
    assert same_bits(outs[0], reference(x, first, x_scale))
    assert same_bits(outs[1], reference(x, other, x_scale))


@needs_mosaic
@each_kernel
def test_jit_and_vmap_over_rows_and_over_matrices(blocks_: GpuConfig, on: dict[str, Any]) -> None:
    x, w, x_scale = activations(2, 3, 300), matrix(300, 40, 2), steps(2, 3)
    config = dataclasses.replace(blocks_, **on)
    both = run(jax.jit(jax.vmap(lambda a, b, s: call(a, b, config, s))), x, w, x_scale)
    second = jax.tree.map(lambda leaf: leaf[1], w)
    rows = run(jax.jit(jax.vmap(lambda a, s: call(a, second, config, s))), x, x_scale)
    for i in range(2):
        assert same_bits(both[i], reference(x[i], jax.tree.map(lambda leaf, i=i: leaf[i], w), x_scale[i]))
        assert same_bits(rows[i], reference(x[i], second, x_scale[i]))


@needs_mosaic
@pytest.mark.parametrize("lead", [(), (2, 3), (0, 3)])
def test_leading_axes_are_kept(lead: tuple[int, ...], on: dict[str, Any]) -> None:
    x, w, x_scale = activations(*lead, 40), matrix(40, 8), steps(*lead)
    assert same_bits(run(call, x, w, dataclasses.replace(SPLIT, **on), x_scale), reference(x, w, x_scale))


@needs_mosaic
def test_shard_map_over_outputs() -> None:
    w, x, x_scale = matrix(300, 16), activations(2, 300), steps(2)
    spec, devices = jax.sharding.PartitionSpec, jax.devices()[:1]  # the interpreter's memory is one for all, so that a second is in its way
    mesh = jax.make_mesh((1,), ("n",), (jax.sharding.AxisType.Auto,), devices=devices)
    config = dataclasses.replace(SPLIT, **interpreted())
    specs = PackedTernary(spec("n"), spec(), k=w.k, encoding=w.encoding)  # pyright: ignore[reportArgumentType]
    mapped = jax.shard_map(lambda a, s, b: call(a, b, config, s), mesh=mesh, in_specs=(spec(), spec(), specs), out_specs=spec(None, "n"))
    assert same_bits(run(jax.jit(mapped), x, x_scale, w), reference(x, w, x_scale))


@needs_mosaic
def test_gradients_that_do_not_exist_are_refused() -> None:
    x, w, config = activations(2, 40), matrix(40, 8), dataclasses.replace(SPLIT, chip="h200")
    with pytest.raises(NotImplementedError, match="no gradient through int8 activations"):
        jax.grad(lambda s: call(x, w, config, s).sum())(steps(2))


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_plane_of_every_byte_is_its_weights_times_minus_64() -> None:
    codes = np.array([b for b in range(256) if all(b >> shift & 3 != 3 for shift in (0, 2, 4, 6))], np.uint8)
    assert codes.size == 81
    for plane, expected in enumerate(planes(codes, Encoding.TWO_BIT)):
        found = np.asarray(plane_of_bytes(jnp.asarray(codes), plane)).astype(np.int8)
        assert np.array_equal(found, -64 * (expected.astype(np.int8) - 1))


@pytest.mark.parametrize("inputs", [256, 512])
def test_permuted_columns_are_in_the_order_of_planes(inputs: int) -> None:
    k = 2 * inputs
    x = permuted(jnp.arange(k, dtype=jnp.int32)[None], inputs)[0]
    for place, column in enumerate(np.asarray(x)):
        step, inside = divmod(place, inputs)
        plane, byte = divmod(inside, inputs // 4)
        block, within = divmod(step * inputs // 4 + byte, 32)
        assert column == 128 * block + 32 * plane + within


def test_the_sum_of_the_largest_k_fits_in_int32() -> None:
    assert 64 * 128 * MAXIMUM_K < 2**31 <= 64 * 128 * (MAXIMUM_K + 1)


# --- who is served ---------------------------------------------------------------------------------------------------


def test_what_is_not_supported_is_named() -> None:
    spec = ArgSpec(m=1, k=128, n=64, platform="gpu", chip="h200")
    if OLD:
        assert mosaic_gpu.supported(spec) == f"needs JAX 0.12.0 or newer, not {jax.__version__}: the interface of Mosaic GPU changed"
        with pytest.raises(NotImplementedError, match=r"mosaic_gpu: needs JAX 0\.12\.0"):
            call(activations(1, 128), matrix(128, 64), GpuConfig(chip="h200"))
        return
    assert mosaic_gpu.supported(spec) is None
    for reason, wrong in {
        "encoding=base3 must be two_bit": {"encoding": Encoding.BASE3},
        "group=64 must be None": {"group": 64},
        "x_dtype=bfloat16 must be int8": {"x_dtype": "bfloat16"},
        "K=262144 must be at most 262143": {"k": MAXIMUM_K + 1},
        "out_dtype=float64 must be float32, bfloat16 or float16": {"out_dtype": "float64"},
        "platform=cpu must be gpu": {"platform": "cpu", "chip": None},
        r"compute capability 8\.0 is older than Hopper's 9\.0": {"chip": "a100"},
        r"compute capability 10\.0 is newer than Hopper's 9\.0": {"chip": "b200"},
    }.items():
        assert re.match(reason, mosaic_gpu.supported(dataclasses.replace(spec, **wrong)) or ""), reason


def test_wrong_blocks_are_named() -> None:
    for message, wrong in {
        "rows=12 must be a multiple of 8": {"rows": 12},
        "outputs=96 must be 64, 128 or 256": {"outputs": 96},
        "inputs=128 must be 256 or 512": {"inputs": 128},
        "outputs=64 must be at least 128 where tiles are pipelined": {"rows": 8, "outputs": 64},
        "splits=0 must be at least 1": {"splits": 0},
        "stages=0 must be at least 1": {"stages": 0},
        "chip='v6e' must be one of a100, h100, h200, b200": {"chip": "v6e"},
    }.items():
        with pytest.raises(ValueError, match=message):
            GpuConfig(**wrong)


@needs_mosaic
def test_too_much_shared_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 425984 bytes of shared memory: must be at most 232448"):
        call(activations(256, 1024), matrix(1024, 128), GpuConfig(rows=256, outputs=128, inputs=256, stages=4, chip="h200"))


def test_every_named_shape_gets_blocks_that_fit() -> None:
    for name, spec in named():
        found = rule(spec)
        assert shared_memory(found, spec.k, spec.out_dtype) <= SHARED_MEMORY - 2048, name
        assert blocks(spec, GpuConfig(chip="h200")) == dataclasses.replace(found, chip="h200"), name


# --- lowering --------------------------------------------------------------------------------------------------------


def lowered(spec: ArgSpec, config: GpuConfig | None = None) -> str:
    """The module of a call for CUDA, made without a GPU: the whole of Mosaic's lowering in Python runs, with its inference of layouts."""
    config = dataclasses.replace(config or GpuConfig(), chip="h200")
    shape = jax.ShapeDtypeStruct
    w = jax.eval_shape(lambda: pack(jnp.zeros((spec.k, spec.n), jnp.int8), jnp.ones((), jnp.float32)))
    call_ = jax.jit(functools.partial(call, config=config, out_dtype=jnp.dtype(spec.out_dtype)))
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    arguments = shape((spec.m, spec.k), jnp.int8), w
    return jax.export.export(call_, platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("2b4t/qkv/1", "split"),
        ("2b4t/down/16", "split"),
        ("1.3b/down/32", "split"),  # rows of 1376 bytes, two read as one
        ("2b4t/o/128", "split"),
        ("3b/gate_up/512", "pipelined"),  # rows of 800 bytes, likewise
        ("7b/down/4096", "pipelined"),
    ],
)
def test_calls_are_lowered_for_cuda_with_the_kernel_in_them(name: str, kernel: str) -> None:
    text = lowered(dict(named())[name])
    assert len(re.findall(r"custom_call @mosaic_gpu_v2\b", text)) == 1
    assert set(re.findall(r"ternary_matmul_mosaic_gpu_\w+?(?=_mosaic|\b)", text)) >= {f"ternary_matmul_mosaic_gpu_{kernel}"}


@needs_mosaic
def test_codes_reach_the_kernel_without_a_copy() -> None:
    for name in ("2b4t/qkv/1", "3b/o/4096"):
        text = lowered(dict(named())[name])
        # Nothing but reshapes, which move no bytes, is done to unsigned bytes.
        assert set(re.findall(r"stablehlo\.(\w+)[^\n]*-> tensor<[\dx]+xui8>", text)) <= {"reshape", "broadcast_in_dim"}, name


@needs_mosaic
@each_kernel
def test_stacks_and_batches_are_lowered_too(blocks_: GpuConfig) -> None:
    config = dataclasses.replace(blocks_, chip="h200")
    w = jax.eval_shape(lambda: pack(jnp.zeros((2, 3, 3200, 128), jnp.int8), jnp.ones((2, 3), jnp.float32)))  # two rows are read as one

    def call_(x: jax.Array, stack: PackedTernary, layer: jax.Array) -> jax.Array:
        return jax.vmap(lambda a, b: call(a, PackedLayer(b, layer), config))(x, stack)

    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    shapes = jax.ShapeDtypeStruct((2, 9, 3200), jnp.int8), w, jax.ShapeDtypeStruct((), jnp.int32)
    assert "mosaic_gpu_v2" in jax.export.export(jax.jit(call_), platforms=["cuda"], disabled_checks=checks)(*shapes).mlir_module()


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("matrix_", MATRICES)
def test_every_named_shape_is_lowered(matrix_: str) -> None:
    for name, spec in named():
        if name.startswith(f"{matrix_}/"):
            assert "mosaic_gpu_v2" in lowered(spec), name
