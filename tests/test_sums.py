"""The mean of weights is right, and the same bits whatever the order of summation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitnet_jax.sums import exact_mean

SHAPES = [(1, 1), (7, 3), (5000, 3), (3, 5000), (4096, 64), (8200, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 3e15])
def test_the_mean_is_right_to_float32(shape, scale):
    x = (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)
    top = np.abs(x).max()
    for values in (np.abs(x), x):
        assert abs(float(exact_mean(jnp.asarray(values), (-2, -1))[0, 0]) - values.astype(np.float64).mean()) <= 1e-7 * top


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_do_not_depend_on_the_order(shape):
    """Permuted, transposed, eager or compiled among other operations: a plain float32 sum fails each of these."""
    rng = np.random.default_rng(1)
    x = np.abs(rng.standard_normal(shape)).astype(np.float32)
    expected = np.asarray(exact_mean(jnp.asarray(x), (-2, -1)))[0, 0]
    shuffled = rng.permutation(x.ravel()).reshape(shape)
    assert exact_mean(jnp.asarray(shuffled), (-2, -1))[0, 0] == expected
    assert exact_mean(jnp.asarray(x.T), (-2, -1))[0, 0] == expected
    assert exact_mean(jnp.asarray(x), (-1, -2))[0, 0] == expected
    fused = jax.jit(lambda x: exact_mean(jnp.abs(jnp.sin(jnp.arcsin(x * 0.0)) + x), (-2, -1)))
    assert fused(x)[0, 0] == expected
    scanned = jax.lax.map(lambda x: exact_mean(x, (-2, -1)), jnp.stack([x, x]))
    assert (scanned == expected).all()


@given(
    x=arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.floats(-1024, 1024, width=32, allow_subnormal=False))
)
@settings(max_examples=50, deadline=None)
def test_any_small_matrix_has_its_mean(x):
    mean = float(exact_mean(jnp.asarray(x), (-2, -1))[0, 0])
    smallest = np.finfo(np.float32).tiny  # XLA takes what is below it for zero on the way
    assert abs(mean - x.astype(np.float64).mean()) <= 1e-6 * np.abs(x).max() + smallest


def test_zeros_and_groups():
    assert exact_mean(jnp.zeros((3, 3)), (-2, -1)).tolist() == [[0.0]]
    x = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)
    np.testing.assert_allclose(exact_mean(x, (-2,)), np.asarray(x).mean(1, keepdims=True), rtol=1e-6)
