"""Statistics of activations are those of what the linear layers multiply, whatever form the parameters have."""

import dataclasses
import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bitnet_jax import params as trees
from bitnet_jax import quant
from bitnet_jax.bitlinear import BitLinear
from bitnet_jax.config import ActivationQuantizer, FeedForward, Layers, Linear, ModelConfig, NormKind, NormPlacement, QuantConfig
from bitnet_jax.errors import UserError
from bitnet_jax.evaluation import ActivationStatistics, activation_statistics
from bitnet_jax.norms import normalize
from bitnet_jax.transformer import Transformer
from kernels_pallas import Encoding
from tests.shapes import tiny

CONFIG = tiny(init_std=0.3, num_layers=3)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 11)).astype(np.uint16)
INPUTS = ("qkv", "o", "gate_up", "down")
NEAR = 5e-3  # compiled and not compiled, a last bit may differ, and so, in a later layer, a few codes


@functools.cache
def params(config: ModelConfig) -> Any:
    made = jax.jit(lambda: Transformer(config).init(jax.random.key(4), jnp.zeros((1, 2), jnp.int32))["params"])()
    return trees.map_leaves(lambda path, leaf: leaf * jnp.float32(1.5) if path[-1] == "scale" else leaf, made)


def inputs(config: ModelConfig) -> dict[tuple[int, str], np.ndarray]:
    """(layer, linear layer) → what it is given in a forward pass of the whole model, written out and not compiled."""
    tree = trees.unstack(params(config)) if config.layers is Layers.SCAN else params(config)
    found = {}

    def keep(method, args, kwargs, context):
        if isinstance(context.module, BitLinear) and context.method_name == "kernel":
            found[int(context.module.path[0].removeprefix("block_")), context.module.path[-1]] = np.asarray(args[0], np.float64)
        return method(*args, **kwargs)

    with nn.intercept_methods(keep):
        Transformer(replace(config, layers=Layers.LOOP)).apply({"params": tree}, TOKENS.astype(np.int32))
    return found


def close(found: list[ActivationStatistics], expected: list[ActivationStatistics]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.layer, one.input) == (other.layer, other.input)
        for field in dataclasses.fields(one)[2:]:
            a, b = getattr(one, field.name), getattr(other, field.name)
            if b is None:
                assert a is None
            else:
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=f"{one.layer} {one.input} {field.name}")


VARIANTS = [
    CONFIG,
    replace(CONFIG, norm=NormPlacement.INSIDE),
    replace(CONFIG, norm=NormPlacement.INSIDE, norm_kind=NormKind.LAYER, ffn=FeedForward.GELU),
    replace(CONFIG, norm=NormPlacement.NONE, ffn=FeedForward.RELU2),
    replace(CONFIG, ffn=FeedForward.RELU2),
    CONFIG.twin,
]


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: f"{config.norm.value}-{config.ffn.value}-{config.linear.value}")
def test_numbers_are_those_of_the_inputs_of_the_linear_layers(config: ModelConfig) -> None:
    found = activation_statistics(params(config), config, TOKENS)
    assert [(row.layer, row.input) for row in found] == [(layer, name) for layer in range(3) for name in INPUTS]
    given = inputs(config)
    for row in found:
        x = given[row.layer, {"qkv": "q", "gate_up": "up"}.get(row.input, row.input)]
        if config.norm is NormPlacement.INSIDE:
            x = np.asarray(normalize(jnp.asarray(x, jnp.float32), config.norm_kind, config.norm_eps), np.float64)
        rms = np.sqrt(np.mean(x**2))
        assert row.absmax == pytest.approx(np.abs(x).max(), rel=NEAR)
        assert row.token_absmax == pytest.approx(np.median(np.abs(x).max(-1)), rel=NEAR)
        assert row.rms == pytest.approx(rms, rel=NEAR)
        assert row.kurtosis == pytest.approx(np.mean((x - x.mean()) ** 4) / x.var() ** 2, rel=NEAR)
        assert row.outliers == pytest.approx(np.mean(np.abs(x) > 6 * rms), abs=2 / x.size)
        assert row.zeros == pytest.approx(np.mean(x == 0), abs=2 / x.size)
        np.testing.assert_allclose(row.channel_absmax, np.abs(x).max((0, 1)), rtol=3 * NEAR)
        if config.linear is Linear.FULL:
            assert row.zero_codes is None
        else:
            codes = np.round(x * 127 / np.abs(x).max(-1, keepdims=True))
            assert row.zero_codes == pytest.approx(np.mean(codes == 0), abs=8 / x.size)


def test_the_layers_of_one_input_share_it() -> None:
    given = inputs(CONFIG)
    for layer in range(3):
        for first, others in (("q", ("k", "v")), ("up", ("gate",))):
            for other in others:
                np.testing.assert_array_equal(given[layer, first], given[layer, other])


def test_relu_leaves_zeros_before_the_down_projection_alone() -> None:
    found = activation_statistics(params(VARIANTS[4]), VARIANTS[4], TOKENS)
    # Elsewhere a product of few integers may come out as 0 now and then.
    assert all(0.2 < row.zeros < 0.8 if row.input == "down" else row.zeros < 0.01 for row in found)
    assert all(row.zero_codes is not None and row.zero_codes >= row.zeros for row in found)


def test_outliers_are_counted() -> None:
    """One feature of the embedding a hundred times as large: after the norm it is the outlier of every token, sqrt(32) at most."""
    config = tiny(hidden_size=64, num_layers=1, num_heads=8, num_kv_heads=8)
    tree = params(config)
    table = tree["embed"]["embedding"].at[:, 5].set(100.0)
    row = activation_statistics({**tree, "embed": {"embedding": table}}, config, TOKENS)[0]
    assert row.outliers == pytest.approx(1 / 64)
    assert np.argmax(row.channel_absmax) == 5
    assert row.kurtosis > 50
    assert row.absmax == pytest.approx(8 * 1.5, rel=1e-3)


def test_looped_and_scanned_parameters_give_the_same() -> None:
    expected = activation_statistics(params(CONFIG), CONFIG, TOKENS)
    close(activation_statistics(trees.unstack(params(CONFIG)), replace(CONFIG, layers=Layers.LOOP), TOKENS), expected)


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("layers", Layers)
def test_packed_parameters_give_the_same(encoding: Encoding, layers: Layers) -> None:
    config = replace(CONFIG, layers=layers)
    expected = activation_statistics(params(CONFIG), CONFIG, TOKENS)
    packed = trees.pack(params(CONFIG), CONFIG, encoding)
    tree = packed if layers is Layers.SCAN else trees.unstack(packed)
    close(activation_statistics(tree, config, TOKENS, "xla"), expected)


def test_activations_that_are_not_quantised_have_no_codes() -> None:
    config = replace(CONFIG, quant=QuantConfig(activation=ActivationQuantizer.NONE))
    assert all(row.zero_codes is None for row in activation_statistics(params(CONFIG), config, TOKENS))


def test_zero_codes_are_those_of_the_quantiser_at_inference() -> None:
    config = replace(CONFIG, quant=QuantConfig(activation_bits=4, activation=ActivationQuantizer.PER_TENSOR))
    row = activation_statistics(params(CONFIG), config, TOKENS)[0]
    x = inputs(config)[0, "q"]
    codes, _ = quant.quantize_activations(jnp.asarray(x, jnp.float32), config.quant.for_inference)
    assert row.zero_codes == pytest.approx(float(np.mean(np.asarray(codes) == 0)), abs=2 / x.size)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[0], r"tokens are uint16 of shape \(11,\): must be integers \[B, T\]"),
        (TOKENS[:, :0], r"shape \(2, 0\)"),
        (TOKENS.astype(np.float32), "float32"),
        (np.array([[3, 61]]), "tokens hold 61: must be from 0 to 60, as vocab_size says"),
        (np.array([[3, -1]]), "tokens hold -1"),
    ],
)
def test_wrong_tokens_are_named(tokens: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        activation_statistics(params(CONFIG), CONFIG, tokens)
