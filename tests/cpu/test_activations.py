"""Normalised and quantised activations: the codes and steps of the twins, and of the model's own functions up to a rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cpu
from bitnet_jax.config import NormKind, QuantConfig
from bitnet_jax.norms import normalize
from bitnet_jax.quant import quantize_activations

each_isa = pytest.mark.parametrize("isa", cpu.load())
each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
each_shape = pytest.mark.parametrize(("m", "d"), [(1, 1), (1, 256), (3, 77), (40, 1030)])


def operands(m: int, d: int, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(m + d)
    gate, up = rng.standard_normal((2, m, d)) * rng.choice([0.01, 1, 20], (2, m, 1))
    return jnp.asarray(gate, dtype), jnp.asarray(up, dtype), jnp.asarray(rng.uniform(0.5, 2, d), jnp.float32)


@each_isa
@each_shape
@pytest.mark.parametrize("threads", [1, 2])
def test_bfloat16_codes_and_steps_are_the_bits_of_the_twin(m: int, d: int, threads: int, isa: str) -> None:
    gate, up, gain = operands(m, d, jnp.bfloat16)
    config = cpu.CpuConfig(threads, isa)
    for native, twin in (
        (cpu.norm_quantize(gate, gain, 1e-5, config), cpu.norm_quantize_twin(gate, gain, 1e-5)),
        (cpu.relu2_norm_quantize(gate, up, gain, 1e-5, config), cpu.relu2_norm_quantize_twin(gate, up, gain, 1e-5)),
    ):
        assert np.array_equal(native[0], twin[0])
        assert np.array_equal(native[1], twin[1])


@each_dtype
@each_isa
@each_shape
def test_they_are_those_of_the_model_up_to_a_rounding(m: int, d: int, isa: str, dtype: Any) -> None:
    gate, up, gain = operands(m, d, dtype)
    inner = jnp.square(jax.nn.relu(gate)) * up
    config = cpu.CpuConfig(isa=isa)
    for x, native in (
        (gate, cpu.norm_quantize(gate, gain, 1e-5, config)),
        (inner, cpu.relu2_norm_quantize(gate, up, gain, 1e-5, config)),
    ):
        model = quantize_activations(normalize(x, NormKind.RMS, 1e-5) * gain.astype(dtype)[None], QuantConfig())
        assert np.max(np.abs(np.asarray(native[0], np.int32) - np.asarray(model.codes))) <= 1
        np.testing.assert_allclose(native[1], model.scale, rtol=1e-5 if dtype == jnp.float32 else 2.0**-7)


@each_isa
def test_zeros_have_codes_of_zero(isa: str) -> None:
    codes, step = cpu.norm_quantize(jnp.zeros((2, 33), jnp.bfloat16), jnp.ones((33,), jnp.float32), 1e-5, cpu.CpuConfig(isa=isa))
    assert not np.asarray(codes).any()
    assert np.all(np.asarray(step) == np.float32(1e-5) * np.float32(1 / 127))


def test_wrong_input_is_named() -> None:
    gate, up, gain = operands(3, 77, jnp.float32)
    for call, message in (
        (lambda: cpu.norm_quantize(gate, gain[:76], 1e-5), "gain has"),
        (lambda: cpu.relu2_norm_quantize(gate, up[:2], gain, 1e-5), "up has"),
        (lambda: cpu.norm_quantize(gate, gain, -1.0), "eps=-1.0* must not be negative"),
        (lambda: cpu.norm_quantize(gate.astype(jnp.float16), gain, 1e-5), "x must be float32 or bfloat16"),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
            jax.block_until_ready(call())


@each_isa
@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 8, 76])
def test_what_is_not_finite_has_a_step_that_is_not_finite(place: int, bad: float, dtype: Any, isa: str) -> None:
    gate, up, gain = operands(3, 77, dtype)
    config = cpu.CpuConfig(isa=isa)
    broken = gate.at[1, place].set(bad)
    found = [
        cpu.norm_quantize(broken, gain, 1e-5, config)[1],
        cpu.relu2_norm_quantize(gate, up.at[1, place].set(bad), gain, 1e-5, config)[1],
    ]
    if bad > 0 or np.isnan(bad):
        found.append(cpu.relu2_norm_quantize(broken, jnp.abs(up) + 1, gain, 1e-5, config)[1])
    for step in found:
        assert np.array_equal(np.isfinite(step[:, 0]), [True, False, True])


@each_isa
def test_a_square_that_overflows_is_not_finite(isa: str) -> None:
    gate, up, gain = operands(2, 77, jnp.float32)
    step = cpu.relu2_norm_quantize(gate.at[0, 5].set(1e30), jnp.abs(up) + 1, gain, 1e-5, cpu.CpuConfig(isa=isa))[1]
    assert np.array_equal(np.isfinite(step[:, 0]), [False, True])
