"""The products of a linear layer agree with each other: integer, fake and packed, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bitnet_jax import dot, params, quant
from bitnet_jax.config import ActivationQuantizer, Arithmetic, ModelConfig, QuantConfig, WeightQuantizer
from kernels_pallas import Encoding, PackedTernary

SCHEMES = [
    QuantConfig(),
    QuantConfig(weight=WeightQuantizer.SIGN),
    QuantConfig(weight=WeightQuantizer.ZERO_ONE),
    QuantConfig(weight_group=16),
    QuantConfig(activation=ActivationQuantizer.PER_TENSOR),
    QuantConfig(activation=ActivationQuantizer.NONE),
    QuantConfig(activation_bits=4),
]
SHARDS = QuantConfig(weight_shards=2)
CASES = [*((config, None) for config in SCHEMES), (SHARDS, -1), (SHARDS, -2)]
"""Quantisers, and what their shards cut."""


def inputs(dtype=jnp.float32, rows=(2, 5), k=48, n=24):
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (*rows, k)).astype(dtype),
        jax.random.normal(keys[1], (k, n)),
        jax.random.normal(keys[2], (*rows, n)).astype(dtype),
    )


def fake(config: QuantConfig) -> QuantConfig:
    from dataclasses import replace

    return replace(config, arithmetic=Arithmetic.FAKE)


@pytest.mark.parametrize(("config", "axis"), CASES, ids=str)
def test_integer_and_fake_products_agree(config, axis):
    x, w, _ = inputs()
    np.testing.assert_allclose(dot.quantized(x, w, config, axis=axis), dot.quantized(x, w, fake(config), axis=axis), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("config", "axis"), [case for case in CASES if case[0].activation is not ActivationQuantizer.NONE], ids=str)
def test_int8_operands_give_the_bits_of_integer_ones(config, axis, dtype):
    """Forward and backward, and the forward multiplies int8."""
    from dataclasses import replace

    x, w, upstream = inputs(dtype)

    def result(config):
        y, gradients = jax.vjp(lambda x, w: dot.quantized(x, w, config, axis=axis), x, w)
        return (y, *gradients(upstream))

    int8 = replace(config, arithmetic=Arithmetic.INT8)
    for ours, reference in zip(jax.jit(result, static_argnums=0)(int8), jax.jit(result, static_argnums=0)(config), strict=True):
        assert np.array_equal(ours, reference)
    text = str(jax.make_jaxpr(lambda x, w: dot.quantized(x, w, int8, axis=axis))(x, w))
    assert "preferred_element_type=int32" in text
    assert "preferred_element_type=float32" not in text


def test_int8_operands_need_quantised_activations():
    with pytest.raises(ValueError, match="arithmetic=int8 needs quantised operands: activation must not be none"):
        QuantConfig(activation=ActivationQuantizer.NONE, arithmetic=Arithmetic.INT8)


@pytest.mark.parametrize(("config", "axis"), CASES, ids=str)
def test_integer_and_fake_gradients_agree(config, axis):
    """The second is plain autodiff of the straight-through estimator, so it is the reference."""
    x, w, upstream = inputs()

    def loss(x, w, config):
        return jnp.sum(dot.quantized(x, w, config, axis=axis) * upstream)

    for ours, reference in zip(jax.grad(loss, (0, 1))(x, w, config), jax.grad(loss, (0, 1))(x, w, fake(config)), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", [c for c in SCHEMES if c.weight_group is None and c.activation is not ActivationQuantizer.NONE], ids=str)
def test_packed_equals_integer_bit_for_bit(config, dtype, encoding):
    x, w, _ = inputs(dtype)
    model = ModelConfig.preset("ladder-0.2m")
    from dataclasses import replace

    tree = params.pack({"q": {"kernel": w}}, replace(model, quant=config), encoding)
    packed = tree["q"]["kernel"]
    assert isinstance(packed, PackedTernary)
    assert np.array_equal(dot.packed(x, [packed], config)[0], dot.quantized(x, w, config.for_inference))


def test_groups_are_multiplied_in_bfloat16_too():
    x, w, _ = inputs(jnp.bfloat16)
    for config, axis in ((QuantConfig(weight_group=16), None), (SHARDS, -2)):
        y = jax.jit(lambda x, w, config=config, axis=axis: dot.quantized(x, w, config, axis=axis))(x, w)
        expected = dot.quantized(x.astype(jnp.float32), w, config, axis=axis)  # the same codes: x is exact in float32
        assert np.array_equal(y, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "axis"), [("q", -1), ("o", -2)])
def test_packed_shards_are_the_integer_product(name, axis, dtype, encoding):
    """Bit for bit along the outputs; along the inputs but for the last bit, where a compiler may contract a product and a sum."""
    x, w, _ = inputs(dtype)
    w = w * jnp.linspace(0.1, 3.0, w.shape[axis]).reshape((-1, 1) if axis == -2 else (1, -1))
    packed = params.pack_kernel(w, SHARDS, encoding, f"{name}/kernel")
    assert packed.scale.shape == ((1, 24) if axis == -1 else (2, 24))
    for implementation in ("reference", "xla", None):
        found, expected = dot.packed(x, [packed], SHARDS, implementation)[0], dot.quantized(x, w, SHARDS, axis=axis)
        if axis == -1:
            assert np.array_equal(found, expected)
        tolerance = 1e-6 if dtype == jnp.float32 else 8e-3
        np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=tolerance, atol=4 * tolerance)
    with pytest.raises(NotImplementedError, match="native: weights have a scale for every"):
        dot.packed(x, [packed], SHARDS, "native")


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_product_of_shards_is_that_of_the_parts(axis):
    """Outputs side by side, or added up over parts of the inputs that are multiplied by themselves; so are the gradients."""
    x, w, upstream = inputs()
    config = QuantConfig(weight_shards=2, activation=ActivationQuantizer.NONE)
    alone = QuantConfig(activation=ActivationQuantizer.NONE)

    def parts(x, w):
        if axis == -1:
            return jnp.concatenate([dot.quantized(x, part, alone) for part in jnp.split(w, 2, -1)], -1)
        return sum(dot.quantized(one, part, alone) for one, part in zip(jnp.split(x, 2, -1), jnp.split(w, 2, 0), strict=True))

    y, pull = jax.vjp(lambda x, w: dot.quantized(x, w, config, axis=axis), x, w)
    expected, expected_pull = jax.vjp(parts, x, w)
    for found, reference in zip((y, *pull(upstream)), (expected, *expected_pull(upstream)), strict=True):
        np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "axis"), CASES, ids=str)
def test_quantised_in_part_goes_from_the_full_product_to_the_fake_one(config, axis):
    x, w, _ = inputs()
    compiled = []

    @jax.jit
    def product(x, w, strength):
        compiled.append(strength)
        return dot.quantized(x, w, config, strength=strength, axis=axis)

    np.testing.assert_allclose(product(x, w, jnp.float32(0.0)), dot.full(x, w), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(product(x, w, jnp.float32(1.0)), dot.quantized(x, w, fake(config), axis=axis), rtol=1e-6, atol=5e-6)
    assert len(compiled) == 1


def test_integer_operands_are_exact_in_bfloat16():
    """Codes up to 127 against +-1 at the widest feed-forward of the published sizes: the float sum is the integer sum."""
    k = 45568
    x = jnp.full((1, k), 127.0, jnp.bfloat16)
    w = jnp.where(jnp.arange(k) % 7 == 0, -1.0, 1.0)[:, None].astype(jnp.bfloat16)
    exact = int(np.sum(127 * np.asarray(w, np.int64)))
    assert int(dot._matmul(x, w)[0, 0]) == exact


def test_full_precision_is_the_plain_product():
    x, w, _ = inputs()
    np.testing.assert_allclose(dot.full(x, w), np.einsum("btk,kn->btn", x, w), rtol=1e-5, atol=1e-5)
    check_grads(dot.full, (x, w), order=1, modes=["rev"], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tied_head_is_the_product_with_the_transposed_table(dtype):
    x, table, upstream = inputs(dtype, k=24, n=48)[0], inputs()[1], inputs(dtype, n=48)[2]
    np.testing.assert_array_equal(dot.tied(x, table), dot.full(x, table.T))

    def gradients(product):
        return jax.jit(jax.grad(lambda x, w: jnp.sum((product(x, w) * upstream).astype(jnp.float32)), (0, 1)))(x, table)

    for ours, reference in zip(gradients(dot.tied), gradients(lambda x, w: jnp.matmul(x, w.T.astype(dtype))), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), reference.astype(jnp.float32), rtol=0.02, atol=0.05)


def test_activations_alone_can_be_quantised():
    x, w, _ = inputs()
    config = QuantConfig(weight=WeightQuantizer.NONE)
    expected = quant.fake_quantize_activations(x, config) @ w
    np.testing.assert_allclose(dot.quantized(x, w, config), expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_float32_kernel_is_float32_in_either_model():
    """Else the pair would differ in more than quantisation where activations are bfloat16."""
    x, w, upstream = inputs(jnp.bfloat16)
    for product in (dot.full, lambda x, w: dot.quantized(x, w, QuantConfig())):
        gradient = jax.grad(lambda w, product=product: jnp.sum((product(x, w) * upstream).astype(jnp.float32)))(w)
        assert gradient.dtype == jnp.float32
        assert not np.array_equal(gradient, gradient.astype(jnp.bfloat16).astype(jnp.float32))
