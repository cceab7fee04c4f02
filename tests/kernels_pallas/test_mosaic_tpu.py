"""The TPU kernel: simulated on any machine, lowered for a TPU on any machine, and run where there is one (`-m tpu`)."""

import dataclasses
import functools
import re
import types
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bitnet_jax import quant
from bitnet_jax.config import QuantConfig
from kernels_pallas import ArgSpec, Encoding, PackedLayer, PackedTernary, mosaic_tpu, pack, ternary_matmul, ternary_matmuls, transcode
from kernels_pallas.arg_specs import CHIPS, named
from kernels_pallas.block_config import TpuConfig, tpu_blocks, tpu_vmem_bytes

TPUS = [name for name, chip in CHIPS.items() if chip.platform == "tpu"]
SMALL = {"rows": 32, "outputs": 128}  # several blocks of small matrices
_matmul = jax.jit(ternary_matmul, static_argnames=("out_dtype", "implementation", "config"))


@pytest.fixture(params=["v6e", "7x", pytest.param("device", marks=pytest.mark.tpu)])
def on(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Fields of a config: a TPU with int8 products and one without are simulated, memory poisoned and bounds watched; or the device."""
    return {} if request.param == "device" else {"chip": request.param, "interpret": pltpu.InterpretParams()}


def matrix(k: int, n: int, *lead: int, fill: int | None = None) -> PackedTernary:
    rng = np.random.default_rng(k * n)
    ternary = rng.integers(-1, 2, (*lead, k, n)) if fill is None else np.full((*lead, k, n), fill)
    return jax.tree.map(jnp.asarray, pack(ternary.astype(np.int8), np.asarray(rng.uniform(0.5, 2, lead), np.float32)))


def activations(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).integers(-128, 128, shape).astype(np.int8))


def floats(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)).astype(dtype)


def steps(*lead: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(lead)).uniform(0.01, 1, (*lead, 1)).astype(np.float32))


def call(x: jax.Array, w: Any, config: TpuConfig, x_scale: Any = None, out_dtype: Any = jnp.float32) -> jax.Array:
    return _matmul(x, w, x_scale=x_scale, out_dtype=out_dtype, implementation="mosaic_tpu", config=config)


def reference(x: jax.Array, w: Any, x_scale: Any = None, out_dtype: Any = jnp.float32) -> np.ndarray:
    return np.asarray(_matmul(x, w, x_scale=x_scale, out_dtype=out_dtype, implementation="reference"))


def same_bits(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "k", "n", "out_dtype"),
    [
        (1, 1, 1, jnp.float32),  # less than a block of codes and than any tile
        (17, 129, 130, jnp.bfloat16),  # one code more than a block; outputs that are no multiple of a tile
        (40, 300, 300, jnp.float32),  # blocks of rows and of outputs, the last of both with a rest
        (64, 256, 256, jnp.bfloat16),  # nothing ragged
    ],
)
def test_results_equal_the_reference_bit_for_bit(m: int, k: int, n: int, out_dtype: Any, on: dict) -> None:
    w, x, x_scale = matrix(k, n), activations(m, k), steps(m)
    assert same_bits(call(x, w, TpuConfig(**SMALL, **on), x_scale, out_dtype), reference(x, w, x_scale, out_dtype))


@pytest.mark.parametrize("fill", [-1, 1])
@pytest.mark.parametrize("value", [-128, 127])
def test_sums_are_exact_at_the_extremes(value: int, fill: int, on: dict) -> None:
    m, k, n = 3, 2561, 130
    x, ones = jnp.full((m, k), value, jnp.int8), jnp.ones((m, 1), jnp.float32)
    w = dataclasses.replace(matrix(k, n, fill=fill), scale=jnp.ones((), jnp.float32))
    assert np.array_equal(np.asarray(call(x, w, TpuConfig(**on), ones)), np.full((m, n), k * value * fill))


@pytest.mark.slow  # a thousand products of 128 columns in a row are compiled where there is no int8
def test_sums_beyond_sixteen_million_are_rounded_once(on: dict) -> None:
    k = 131_072 + 257
    w = dataclasses.replace(matrix(k, 2, fill=1), scale=jnp.ones((), jnp.float32))
    x = jnp.full((2, k), 127, jnp.int8).at[0, 0].set(126)
    out = call(x, w, TpuConfig(**SMALL, **on), jnp.ones((2, 1), jnp.float32))
    assert np.array_equal(np.asarray(out), np.float32([[127 * k - 1] * 2, [127 * k] * 2]))


def test_products_of_bfloat16_are_right_within_rounding(on: dict) -> None:
    w, x = matrix(300, 130), floats(40, 300)
    exact = np.asarray(x).astype(np.float64)
    weights = reference(jnp.eye(300, dtype=jnp.float32), w).astype(np.float64)
    out = np.asarray(call(x, w, TpuConfig(**SMALL, **on)))
    # float32 sums of K terms: K roundings of 2^-24 of the sum of magnitudes bound the error in any order.
    assert np.all(np.abs(out - exact @ weights) <= 302 * 2.0**-24 * (np.abs(exact) @ np.abs(weights)))


# --- quantisation in the kernel --------------------------------------------------------------------------------------


def hard_rows(k: int, dtype: Any) -> jax.Array:
    """Rows on which a quantiser may err: ties, zeros, subnormals, one large value, a negative maximum, the smallest scale."""
    rng = np.random.default_rng(0)
    ties = (np.arange(k) - k // 2 + 0.5) % 127  # multiples of a half where the step is one
    ties[0] = 127
    rows = np.stack(
        [
            ties,
            -ties,
            np.zeros(k),
            np.full(k, 1e-40),
            np.full(k, -3.0),
            np.eye(k)[k // 2] * 1e30 + 1,
            rng.standard_normal(k) * 1e-5,
            *rng.standard_normal((33, k)) * np.exp(rng.uniform(-9, 9, (33, 1))),
        ]
    )
    return jnp.asarray(rows.astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("codes_dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_codes_and_steps_are_those_of_the_quantiser(dtype: Any, codes_dtype: Any) -> None:
    x = hard_rows(256, dtype)[:32]
    kernel = pl.pallas_call(
        mosaic_tpu._quantize,
        out_shape=[jax.ShapeDtypeStruct(x.shape, codes_dtype), jax.ShapeDtypeStruct((32, 128), jnp.float32)],
        interpret=pltpu.InterpretParams(),  # pyright: ignore[reportArgumentType]
    )
    codes, step = jax.jit(kernel)(x)
    expected = jax.jit(quant.quantize_activations, static_argnums=1)(x, QuantConfig().for_inference)
    wanted = np.asarray(expected.codes)
    if codes_dtype == jnp.bfloat16:  # of every 32 the even ones first
        wanted = wanted.reshape(32, -1, 16, 2).swapaxes(2, 3).reshape(32, -1)
    assert np.array_equal(np.asarray(codes).astype(np.float32), wanted)
    assert same_bits(step, np.broadcast_to(np.asarray(expected.scale), (32, 128)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_quantising_in_the_kernel_gives_what_quantising_before_gives(dtype: Any, on: dict) -> None:
    w, x = matrix(300, 300), hard_rows(300, dtype)
    assert x.shape[0] > 32  # more than one block of rows, of which each meets more than one of outputs
    codes, x_scale = jax.jit(quant.quantize_activations, static_argnums=1)(x, QuantConfig().for_inference)
    fused = jax.jit(mosaic_tpu.quantize_and_multiply, static_argnums=(2, 3))
    out = fused(x, w, jnp.bfloat16, TpuConfig(**SMALL, **on))
    assert same_bits(out, reference(codes.astype(jnp.int8), w, x_scale, jnp.bfloat16))


# --- transformations -------------------------------------------------------------------------------------------------


def test_gradient_of_x_is_that_of_the_reference(on: dict) -> None:
    w, x = matrix(300, 130), floats(2, 3, 300)
    g = floats(2, 3, 130, dtype=jnp.float32)
    dx = jax.vjp(lambda a: call(a, w, TpuConfig(**on)), x)[1](g)[0]
    expected = jax.vjp(lambda a: _matmul(a, w, out_dtype=jnp.float32, implementation="reference"), x)[1](g)[0]
    assert dx.dtype == x.dtype
    assert same_bits(dx, expected)


def test_vmap_over_rows_and_over_matrices(on: dict) -> None:
    w, x, x_scale = matrix(140, 130, 3), activations(3, 2, 140), steps(3, 2)
    config = TpuConfig(**{**on, "interpret": bool(on)})  # the simulator of memory takes no grid that vmap has widened
    both = jax.jit(jax.vmap(lambda a, b, s: call(a, b, config, s)))(x, w, x_scale)
    rows = jax.jit(jax.vmap(lambda a, b, s: call(a, b, config, s), in_axes=(0, None, 0)))(x, layer_of(w, 2), x_scale)
    for i in range(3):
        assert same_bits(both[i], reference(x[i], layer_of(w, i), x_scale[i]))
        assert same_bits(rows[i], reference(x[i], layer_of(w, 2), x_scale[i]))


def layer_of(w: PackedTernary, i: int) -> PackedTernary:
    return jax.tree.map(lambda leaf: leaf[i], w)


def test_shard_map_over_outputs() -> None:
    config = TpuConfig(chip="v6e", interpret=True)
    w, x, x_scale = matrix(300, 256), activations(2, 300), steps(2)
    spec = jax.sharding.PartitionSpec
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((len(devices),), ("n",), (jax.sharding.AxisType.Auto,), devices=devices)
    specs = PackedTernary(spec("n"), spec(), k=w.k, encoding=w.encoding)  # pyright: ignore[reportArgumentType]
    mapped = jax.shard_map(lambda a, s, b: call(a, b, config, s), mesh=mesh, in_specs=(spec(), spec(), specs), out_specs=spec(None, "n"))
    assert same_bits(jax.jit(mapped)(x, x_scale, w), reference(x, w, x_scale))


def test_layers_are_read_where_they_lie(on: dict) -> None:
    layers = 3
    stack, x, x_scale = matrix(140, 130, layers), activations(2, 140), steps(2)
    config = TpuConfig(**on)

    def scanned(stack: PackedTernary) -> jax.Array:
        numbers = jnp.arange(layers + 1, dtype=jnp.int32)  # the last is out of range, and clamped
        return jax.lax.map(lambda i: call(x, PackedLayer(stack, i), config, x_scale), numbers)

    out = jax.jit(scanned)(stack)
    for i in range(layers + 1):
        assert same_bits(out[i], reference(x, layer_of(stack, min(i, layers - 1)), x_scale))
    copies = re.findall(r"u8\[[\d,]*\] = (?:dynamic_slice|gather|squeeze)", str(jax.make_jaxpr(scanned)(stack)))
    assert not copies


def test_several_matrices_in_one_call(on: dict) -> None:
    x, x_scale = activations(2, 140), steps(2)
    matrices = [matrix(140, 130), PackedLayer(matrix(140, 5, 2), jnp.ones((), jnp.int32))]
    outs = jax.jit(
        lambda x, ws: ternary_matmuls(x, ws, x_scale=x_scale, out_dtype=jnp.float32, implementation="mosaic_tpu", config=TpuConfig(**on))
    )(x, matrices)
    for out, w in zip(outs, (matrices[0], matrices[1].sliced()), strict=True):  # pyright: ignore[reportAttributeAccessIssue]
        assert same_bits(out, reference(x, w, x_scale))


def test_no_two_steps_race(capsys: pytest.CaptureFixture[str]) -> None:
    config = TpuConfig(chip="v5p", interpret=pltpu.InterpretParams(detect_races=True), **SMALL)  # two cores, three blocks of outputs
    w, x = matrix(300, 300), hard_rows(300, jnp.bfloat16)
    codes, x_scale = quant.quantize_activations(x, QuantConfig().for_inference)
    out = mosaic_tpu.quantize_and_multiply(x, w, jnp.bfloat16, config)
    assert same_bits(out, reference(codes.astype(jnp.int8), w, x_scale, jnp.bfloat16))
    assert "race" not in capsys.readouterr().out.lower()  # an older JAX prints and does not raise


# --- what is lowered -------------------------------------------------------------------------------------------------


def lowered(spec: ArgSpec, fused: bool = False) -> str:
    """StableHLO of a call for a TPU, made without one."""
    w = jax.eval_shape(lambda: pack(jnp.zeros((spec.k, spec.n), jnp.int8), jnp.ones((), jnp.float32)))
    x = jax.ShapeDtypeStruct((spec.m, spec.k), spec.x_dtype)
    config = TpuConfig(chip=spec.chip)
    if fused:
        function = jax.jit(functools.partial(mosaic_tpu.quantize_and_multiply, out_dtype=spec.out_dtype, config=config))
        return jax.export.export(function, platforms=["tpu"])(x, w).mlir_module()
    x_scale = jax.ShapeDtypeStruct((spec.m, 1), jnp.float32) if spec.x_dtype == "int8" else None
    function = jax.jit(
        lambda x, w, s: ternary_matmul(x, w, x_scale=s, out_dtype=spec.out_dtype, implementation="mosaic_tpu", config=config)
    )
    return jax.export.export(function, platforms=["tpu"])(x, w, x_scale).mlir_module()


def kernels_in(module: str) -> list[str]:
    return re.findall(r'kernel_name = "(\w+)"', module)


@pytest.mark.parametrize(("chip", "operand"), [("v6e", "int8"), ("v4", "bfloat16"), ("7x", "bfloat16")])
def test_the_kernel_that_runs_is_named_in_the_program(chip: str, operand: str) -> None:
    spec = ArgSpec(m=2, k=300, n=130, platform="tpu", chip=chip)
    module = lowered(spec)
    assert kernels_in(module) == [f"ternary_matmul_tpu_{operand}"]
    assert "tpu_custom_call" in module
    assert kernels_in(lowered(dataclasses.replace(spec, x_dtype="bfloat16"))) == ["ternary_matmul_tpu_bfloat16"]
    assert kernels_in(lowered(dataclasses.replace(spec, x_dtype="bfloat16"), fused=True)) == ["ternary_matmul_tpu_quantize"]


def test_without_a_name_a_tpu_gets_the_kernel_where_it_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, x_scale = matrix(40, 3), activations(2, 40), steps(2)
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    monkeypatch.setattr("kernels_pallas.api.default_device", lambda: device)
    monkeypatch.setattr("kernels_pallas.mosaic_tpu.default_device", lambda: device)
    plain = functools.partial(ternary_matmul, out_dtype=jnp.float32)
    assert "name=ternary_matmul_tpu_int8" in str(jax.make_jaxpr(lambda: plain(x, w, x_scale=x_scale))())
    assert "ternary_matmul_tpu" not in str(jax.make_jaxpr(lambda: plain(x.astype(jnp.float32), w))())


@pytest.mark.parametrize("chip", TPUS)
def test_every_named_call_fits_in_vector_memory(chip: str) -> None:
    for name, spec in named():
        for x_dtype in ("int8", "bfloat16"):
            here = dataclasses.replace(spec, platform="tpu", chip=chip, x_dtype=x_dtype)
            assert mosaic_tpu.supported(here) is None, name
            assert tpu_vmem_bytes(here, tpu_blocks(here)) <= (CHIPS[chip].vmem or 0) * 3 // 4, name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu", "chip": None}, "needs a TPU"),
        ({"chip": None}, "not in CHIPS"),
        ({"encoding": Encoding.BASE3}, "encoding base3 is not unpacked"),
        ({"group": 64}, "one scale per 64 inputs"),
        ({"out_dtype": "float8_e4m3fn"}, "out_dtype=float8_e4m3fn must be float32, bfloat16 or float16"),
        ({"x_dtype": "float32"}, "activations in float32"),
        ({"k": 1 << 18}, "K=262144 must be at most 262016"),
        ({"chip": "v4", "k": 200_000}, "bytes of vector memory at K=200000: v4 has 16777216"),
    ],
)
def test_what_is_not_supported_is_named(change: dict, reason: str) -> None:
    spec = ArgSpec(**{"m": 16, "k": 512, "n": 256, "platform": "tpu", "chip": "v6e", **change})
    assert reason in (mosaic_tpu.supported(spec) or "")


def test_a_call_without_a_tpu_says_so() -> None:
    with pytest.raises(NotImplementedError, match="mosaic_tpu: it needs a TPU, or a config that names one"):
        ternary_matmul(activations(2, 40), matrix(40, 3), x_scale=steps(2), out_dtype=jnp.float32, implementation="mosaic_tpu")


def test_blocks_that_a_config_names_must_fit_too() -> None:
    w, config = matrix(40_000, 3), TpuConfig(chip="v4", rows=512, interpret=True)
    with pytest.raises(NotImplementedError, match=r"blocks of 512 x 128 take \d+ bytes of vector memory at K=40000: v4 has 16777216"):
        ternary_matmul(activations(512, 40_000), w, x_scale=steps(512), out_dtype=jnp.float32, implementation="mosaic_tpu", config=config)


def test_what_the_quantising_form_does_not_do_is_named() -> None:
    w, config = matrix(40, 3), TpuConfig(chip="v6e", interpret=True)
    for message, wrong in {
        "needs a TPU": lambda: mosaic_tpu.quantize_and_multiply(floats(2, 40), w, jnp.float32),
        "activations in float16": lambda: mosaic_tpu.quantize_and_multiply(floats(2, 40, dtype=jnp.float16), w, jnp.float32, config),
        "quantised already": lambda: mosaic_tpu.quantize_and_multiply(activations(2, 40), w, jnp.float32, config),
        "encoding base3": lambda: mosaic_tpu.quantize_and_multiply(floats(2, 40), transcode(w, Encoding.BASE3), jnp.float32, config),
    }.items():
        with pytest.raises(NotImplementedError, match=message):
            wrong()


def test_placing_codes_changes_no_value() -> None:
    w = matrix(300, 130, 2)
    moved = mosaic_tpu.place(w)
    assert np.array_equal(np.asarray(moved.codes), np.asarray(w.codes))
    assert moved.codes.format.layout.major_to_minor == mosaic_tpu.placed(3) == (0, 2, 1)
