import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.config import Layers, ModelConfig
from bitnet_jax.training import codes
from bitnet_jax.transformer import Transformer
from tests.shapes import tiny


def init(config: ModelConfig) -> dict:
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)


def tree(*rows: list[int]) -> codes.Codes:
    return {"blocks": {"attn": {"q": {"kernel": jnp.array([[row] for row in rows], jnp.int8)}}}}


def test_codes_are_counted_exactly() -> None:
    statistics = codes.summarize(codes.count(tree([-1, 0, 0, 1], [1, 1, 1, 0]), None))
    assert statistics is not None
    assert statistics.fractions == (1 / 8, 3 / 8, 4 / 8)
    assert statistics.by_kind == {"q": (1 / 8, 3 / 8, 4 / 8)}
    assert statistics.weights == 8
    assert statistics.flips is None


def test_flips_are_the_codes_that_differ_from_the_earlier_ones() -> None:
    statistics = codes.summarize(codes.count(tree([-1, 0, 0, 1], [1, 1, 1, 0]), tree([-1, 0, 1, -1], [1, 1, 1, 1])))
    assert statistics is not None
    assert statistics.flips == 3


@pytest.mark.parametrize("layers", list(Layers))
def test_every_kind_of_linear_layer_is_counted_and_nothing_else(layers: Layers) -> None:
    config = tiny(layers=layers, tie_embeddings=False)
    statistics = codes.summarize(codes.count(codes.snapshot(init(config), config), None))
    assert statistics is not None
    assert set(statistics.by_kind) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert sum(statistics.fractions) == pytest.approx(1.0)
    kernels = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert statistics.weights == kernels


def test_unchanged_parameters_have_no_flips_and_negated_ones_flip_all_but_zeros() -> None:
    config = tiny()
    params = init(config)
    now = codes.snapshot(params, config)
    same, negated = (
        codes.summarize(codes.count(codes.snapshot(jax.tree.map(lambda leaf, s=sign: leaf * np.float32(s), params), config), now))
        for sign in (1.0, -1.0)
    )
    assert same is not None
    assert negated is not None
    assert same.flips == 0
    assert negated.flips == round((1 - negated.fractions[1]) * negated.weights)


def test_full_precision_twin_has_no_codes() -> None:
    config = tiny().twin
    assert codes.summarize(codes.count(codes.snapshot(init(config), config), None)) is None


def test_codes_are_kept_in_one_byte_each() -> None:
    config = tiny()
    assert {leaf.dtype for leaf in jax.tree.leaves(codes.snapshot(init(config), config))} == {np.dtype("int8")}
