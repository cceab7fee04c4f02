"""Quantisers: the papers' worked examples, and what must hold for any input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitnet_jax import quant
from bitnet_jax.config import ActivationQuantizer, QuantConfig, WeightQuantizer
from bitnet_jax.errors import UserError

ABSMEAN = QuantConfig()
matrices = arrays(
    np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(-128, 128, width=32, allow_subnormal=False)
)


def test_absmean_of_the_worked_example():
    """The 3x3 example of the 1.58-bit article (papers: section 13, target 4)."""
    w = jnp.array([[0.8, -0.5, 1.2], [-1.5, 0.4, -0.9], [1.3, -0.7, 0.2]])
    codes, scale = quant.quantize_weights(w, ABSMEAN)
    assert codes.tolist() == [[1, -1, 1], [-1, 0, -1], [1, -1, 0]]
    np.testing.assert_allclose(scale, [[0.8333333]], rtol=1e-6)


def test_activations_of_the_worked_example():
    x = jnp.array([[1.0, -0.6, 0.7], [-0.9, 0.4, -1.2], [0.8, -0.5, 0.3]])
    codes, scale = quant.quantize_activations(x, ABSMEAN)
    assert codes.tolist() == [[127, -76, 89], [-95, 42, -127], [127, -79, 48]]
    np.testing.assert_allclose(scale, np.array([[1.0], [1.2], [0.8]]) / 127, rtol=1e-6)


def test_rounding_is_half_to_even():
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quant.quantize_activations(x, ABSMEAN).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("quantizer", [q for q in WeightQuantizer if q is not WeightQuantizer.NONE])
@given(w=matrices)
@settings(max_examples=30, deadline=None)
def test_codes_are_ternary_and_values_are_three(quantizer, w):
    config = QuantConfig(weight=quantizer)
    codes, scale = quant.quantize_weights(jnp.asarray(w), config)
    assert set(np.unique(codes)) <= {-1.0, 0.0, 1.0}
    values = quant.fake_quantize_weights(jnp.asarray(w), config)
    assert np.array_equal(values, np.asarray(codes) * np.asarray(scale))


@pytest.mark.parametrize("quantizer", [q for q in WeightQuantizer if q is not WeightQuantizer.NONE])
@pytest.mark.parametrize("power", [-3, 4])
def test_codes_do_not_change_with_a_power_of_two(quantizer, power):
    w = jax.random.normal(jax.random.key(0), (33, 17))
    config = QuantConfig(weight=quantizer)
    before, after = quant.quantize_weights(w, config), quant.quantize_weights(w * 2.0**power, config)
    assert np.array_equal(before.codes, after.codes)
    assert np.array_equal(before.scale * 2.0**power, after.scale)


def test_weights_in_zero_and_one_are_the_ternary_ones_without_what_is_negative():
    w = jax.random.normal(jax.random.key(0), (33, 17))
    codes, scale = quant.quantize_weights(w, QuantConfig(weight=WeightQuantizer.ZERO_ONE))
    ternary = quant.quantize_weights(w, ABSMEAN)
    assert np.array_equal(codes, np.maximum(ternary.codes, 0.0))
    assert np.array_equal(scale, ternary.scale)
    assert set(np.unique(codes)) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantised_in_part_is_between_the_value_and_the_quantised_one(dtype):
    """Exactly the value at 0, exactly the quantised one at 1, and the gradient passes as it does in full."""
    x = jax.random.normal(jax.random.key(0), (33, 17), dtype)
    for function in (quant.fake_quantize_weights, quant.fake_quantize_activations):
        full = function(x, ABSMEAN)
        assert np.array_equal(function(x, ABSMEAN, jnp.float32(0.0)), x)
        assert np.array_equal(function(x, ABSMEAN, jnp.float32(1.0)), full)
        quarter, gradient = jax.value_and_grad(lambda x, f=function: jnp.sum(f(x, ABSMEAN, jnp.float32(0.25))))(x)
        expected = x.astype(jnp.float32) + 0.25 * (full.astype(jnp.float32) - x.astype(jnp.float32))
        np.testing.assert_allclose(
            function(x, ABSMEAN, jnp.float32(0.25)).astype(jnp.float32), expected, rtol=1e-5 if dtype == jnp.float32 else 1e-2, atol=1e-6
        )
        assert quarter.dtype == dtype
        assert np.array_equal(gradient, jnp.ones_like(x))


def test_scales_are_what_the_papers_name():
    w = jnp.array([[0.1, -0.4], [0.3, 1.0], [-0.2, -0.6]])
    expected = {
        WeightQuantizer.ABSMEAN: 2.6 / 6,
        WeightQuantizer.ABSMEDIAN: 0.35,
        WeightQuantizer.ABSMAX: 1.0,
        WeightQuantizer.SIGN: 2.6 / 6,
    }
    for quantizer, scale in expected.items():
        np.testing.assert_allclose(quant.quantize_weights(w, QuantConfig(weight=quantizer)).scale, [[scale]], rtol=1e-6)


def test_sign_is_centred_and_zero_goes_to_minus_one():
    w = jnp.array([[1.0, 2.0, 3.0]])  # mean 2: the middle weight is exactly 0 after centring
    assert quant.quantize_weights(w, QuantConfig(weight=WeightQuantizer.SIGN)).codes.tolist() == [[-1, -1, 1]]


def test_groups_are_quantised_each_for_itself():
    w = jax.random.normal(jax.random.key(1), (8, 3)) * jnp.array([1.0, 100.0]).repeat(4)[:, None]
    grouped = quant.quantize_weights(w, QuantConfig(weight_group=4))
    assert grouped.scale.shape == (2, 1, 3)
    for group in range(2):
        for column in range(3):
            alone = quant.quantize_weights(w[4 * group : 4 * group + 4, column : column + 1], ABSMEAN)
            assert np.array_equal(grouped.codes[4 * group : 4 * group + 4, column : column + 1], alone.codes)
            np.testing.assert_allclose(grouped.scale[group, 0, column], alone.scale[0, 0], rtol=1e-6)
    np.testing.assert_array_equal(quant.dequantize_weights(grouped), grouped.codes * jnp.repeat(grouped.scale[:, 0], 4, axis=0))


@pytest.mark.parametrize("quantizer", [q for q in WeightQuantizer if q is not WeightQuantizer.NONE])
@pytest.mark.parametrize("axis", [-1, -2])
def test_shards_are_quantised_each_for_itself(axis, quantizer):
    """Codes and scales of the parts alone, put together, bit for bit; for a stack of layers as well."""
    w = (
        jax.random.normal(jax.random.key(1), (2, 12, 9))
        + jnp.linspace(-0.5, 2.0, 12)[None, :, None] * jnp.linspace(1.0, 3.0, 9)[None, None]
    )
    config = QuantConfig(weight=quantizer, weight_shards=3)
    found = quant.quantize_weights(w, config, axis)
    parts = [quant.quantize_weights(part, QuantConfig(weight=quantizer)) for part in jnp.split(w, 3, axis)]
    assert np.array_equal(found.codes, jnp.concatenate([part.codes for part in parts], axis))
    assert found.scale.shape == ((2, 1, 1, 9) if axis == -1 else (2, 3, 1, 9))
    values = jnp.concatenate([quant.dequantize_weights(part) for part in parts], axis)
    assert np.array_equal(quant.dequantize_weights(found), values)
    assert len(np.unique(found.scale)) == 6
    assert np.array_equal(quant.fake_quantize_weights(w, config, axis=axis), values)


def test_one_shard_is_the_matrix_whatever_the_axis():
    w = jax.random.normal(jax.random.key(1), (12, 9))
    for axis in (None, -1, -2):
        for found, expected in zip(
            quant.quantize_weights(w, QuantConfig(weight_shards=1), axis), quant.quantize_weights(w, ABSMEAN), strict=True
        ):
            assert found.shape == expected.shape
            assert np.array_equal(found, expected)


def test_shards_need_the_axis_that_they_cut():
    with pytest.raises(UserError, match="weight_shards=3 cut a matrix along its inputs or outputs: axis=None must be -2 or -1"):
        quant.quantize_weights(jnp.ones((12, 9)), QuantConfig(weight_shards=3))


@given(x=matrices, bits=st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_activation_codes_stay_in_range_and_close(x, bits):
    config = QuantConfig(activation_bits=bits)
    codes, scale = quant.quantize_activations(jnp.asarray(x), config)
    top = 2 ** (bits - 1) - 1
    assert np.max(np.abs(codes), initial=0) <= top
    assert np.array_equal(codes, np.round(codes))
    assert np.all(np.abs(np.asarray(codes) * np.asarray(scale) - x) <= 0.5001 * np.asarray(scale))


def test_per_tensor_shares_one_scale_and_per_token_does_not():
    x = jnp.array([[1.0, 2.0], [4.0, 0.5]])
    token = quant.quantize_activations(x, ABSMEAN)
    tensor = quant.quantize_activations(x, QuantConfig(activation=ActivationQuantizer.PER_TENSOR))
    np.testing.assert_allclose(token.scale, [[2 / 127], [4 / 127]], rtol=1e-6)
    np.testing.assert_allclose(tensor.scale, [[4 / 127], [4 / 127]], rtol=1e-6)
    assert tensor.codes.tolist() == [[32, 64], [127, 16]]


def test_a_row_of_zeros_is_held_up_by_eps():
    codes, scale = quant.quantize_activations(jnp.zeros((2, 4)), ABSMEAN)
    assert not codes.any()
    np.testing.assert_allclose(scale, np.full((2, 1), 1e-5 / 127), rtol=1e-6)
    assert np.isfinite(quant.quantize_weights(jnp.zeros((4, 4)), ABSMEAN).scale).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_is_exactly_the_quantised_value(dtype):
    """The order x + sg(q - x) fails this: it rounds, and gives more than three values in bfloat16."""
    w = jax.random.normal(jax.random.key(2), (64, 64), dtype)
    values = quant.fake_quantize_weights(w, ABSMEAN)
    codes, scale = quant.quantize_weights(w, ABSMEAN)
    assert np.array_equal(values, (codes * scale).astype(dtype))
    assert len(np.unique(values.astype(jnp.float32))) == 3


def test_the_gradient_passes_straight_through():
    w, x = jax.random.normal(jax.random.key(3), (2, 6, 5))
    upstream = jax.random.normal(jax.random.key(4), (6, 5))
    shards = partial(quant.fake_quantize_weights, axis=-2)
    for function, value, config in (
        (quant.fake_quantize_weights, w, ABSMEAN),
        (shards, w, QuantConfig(weight_shards=3)),
        (quant.fake_quantize_activations, x, ABSMEAN),
    ):
        gradient = jax.grad(lambda v, f=function, c=config: jnp.sum(f(v, c) * upstream))(value)
        assert np.array_equal(gradient, upstream)
