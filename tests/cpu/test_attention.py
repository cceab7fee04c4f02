"""Attention over a cache: the model's own, for the tokens present."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cpu, layers

each_isa = pytest.mark.parametrize("isa", cpu.load())


def operands(b: int, t: int, n: int, kv: int, h: int, s: int, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(b + t + n + s)
    q, k, v = rng.standard_normal((b, t, n, h)), *rng.standard_normal((2, 3, b, s, kv, h))
    return jnp.asarray(q * 2, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


@each_isa
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2.0**-7)])
@pytest.mark.parametrize("shape", [(1, 1, 4, 4, 8, 40), (2, 3, 6, 2, 20, 33), (1, 1, 20, 5, 128, 70), (3, 1, 4, 1, 7, 9)])
def test_it_is_the_attention_of_the_model(shape: tuple[int, ...], dtype: Any, tolerance: float, isa: str) -> None:
    q, k, v = operands(*shape, dtype)
    b, t, *_, s = shape
    last = jnp.asarray(np.random.default_rng(s).integers(t - 1, s, b), jnp.int32)
    positions = last[:, None] + jnp.arange(t, dtype=jnp.int32)[None] - jnp.int32(t - 1)
    expected = np.asarray(layers.attention(q, k[1], v[1], positions).astype(jnp.float32))
    for threads in (1, 2):
        out = cpu.attention(q, k, v, jnp.int32(1), positions, cpu.CpuConfig(threads, isa))
        assert out.dtype == q.dtype
        np.testing.assert_allclose(np.asarray(out.astype(jnp.float32)), expected, rtol=tolerance, atol=tolerance)


def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    q, k, v = operands(2, 3, 6, 2, 20, 33, jnp.float32)
    positions = jnp.asarray([[4, 5, 6], [30, 31, 32]], jnp.int32)
    outs = [
        np.asarray(cpu.attention(q, k, v, jnp.int32(2), positions, cpu.CpuConfig(threads, isa))) for threads in (1, 2) for isa in cpu.load()
    ]
    for out in outs[1:]:
        assert np.array_equal(out, outs[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_lies_behind_a_position_is_not_read(dtype: Any) -> None:
    q, k, v = operands(1, 1, 4, 2, 16, 40, dtype)
    positions = jnp.asarray([[11]], jnp.int32)
    out = cpu.attention(q, k, v, jnp.int32(0), positions)
    hidden = cpu.attention(q, k.at[:, :, 12:].set(jnp.nan), v.at[:, :, 12:].set(jnp.nan), jnp.int32(0), positions)
    assert np.array_equal(out, hidden)


@each_isa
def test_an_int8_cache_is_the_attention_of_what_it_holds(isa: str) -> None:
    q, k, v = operands(2, 1, 6, 2, 20, 33, jnp.float32)
    k8, v8 = cpu.quantize_vectors(k), cpu.quantize_vectors(v)
    positions = jnp.asarray([[4], [32]], jnp.int32)
    out = cpu.attention(q, k8, v8, jnp.int32(1), positions, cpu.CpuConfig(isa=isa))
    held = [(part.codes.astype(jnp.float32) * part.scale[..., None])[1] for part in (k8, v8)]
    np.testing.assert_allclose(out, layers.attention(q, *held, positions), rtol=1e-5, atol=1e-6)
    exact = layers.attention(q, k[1], v[1], positions)
    assert float(jnp.max(jnp.abs(out - exact))) < 0.05


def test_wrong_input_is_named() -> None:
    q, k, v = operands(1, 1, 4, 2, 16, 40, jnp.float32)
    first, zero = jnp.asarray([[0]], jnp.int32), jnp.int32(0)
    for call, message in (
        (lambda: cpu.attention(q, k, v, zero, first + 40), "positions hold 40: must be from 0 to 39"),
        (lambda: cpu.attention(q, k, v, zero, first - 1), "positions hold -1"),
        (lambda: cpu.attention(q, k, v, jnp.int32(3), first), "layer=3 must be from 0 to 2"),
        (lambda: cpu.attention(q[:, :, :3], k, v, zero, first), "N=3 must be a multiple of K=2"),
        (lambda: cpu.attention(q, k, v[:, :, :39], zero, first), "values has"),
        (lambda: cpu.attention(q, k[0], v[0], zero, first), "keys has"),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
            jax.block_until_ready(call())
