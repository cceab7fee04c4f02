"""A model leaf by leaf is the same model as its parameter tree."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bitnet_jax import params as trees
from bitnet_jax.config import FeedForward, Layers, Linear, NormPlacement, QuantConfig, WeightQuantizer
from bitnet_jax.errors import UserError
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.transformer import Transformer, parameter_shapes
from kernels_pallas import Encoding, PackedTernary
from tests.shapes import tiny

CONFIG = tiny(tie_embeddings=False)


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(lambda: Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])()


def equal(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("norm", NormPlacement)
@pytest.mark.parametrize("ffn", [FeedForward.RELU2, FeedForward.GELU])
@pytest.mark.parametrize("tied", [True, False])
def test_paths_and_shapes_are_those_of_the_tree(norm: NormPlacement, ffn: FeedForward, tied: bool) -> None:
    config = tiny(norm=norm, ffn=ffn, tie_embeddings=tied, layers=Layers.LOOP, num_layers=3)
    tree = {path: leaf.shape for path, leaf in trees.leaves(parameter_shapes(config))}
    assert sorted(leafwise.paths(config)) == sorted(tree)
    assert {path: leafwise.shape(config, path) for path in leafwise.paths(config)} == tree


def test_paths_come_in_the_order_of_the_forward_pass() -> None:
    names = ["/".join(path) for path in leafwise.paths(tiny(num_layers=2, tie_embeddings=False))]
    assert names[:4] == ["embed/embedding", "block_0/attn_norm/scale", "block_0/attn/q/kernel", "block_0/attn/k/kernel"]
    assert names[11:13] == ["block_0/ffn/down/kernel", "block_1/attn_norm/scale"]
    assert names[-2:] == ["final_norm/scale", "head/kernel"]


def test_a_number_of_layers_that_no_model_has_is_refused() -> None:
    with pytest.raises(UserError, match="num_layers=1000000 must be at most 10000"):
        leafwise.paths(tiny(num_layers=1_000_000))


@pytest.mark.parametrize("layers", Layers)
@pytest.mark.parametrize("encoding", [None, *Encoding])
def test_a_tree_taken_apart_and_put_together_is_the_same(params: Any, layers: Layers, encoding: Encoding | None) -> None:
    config = replace(CONFIG, layers=layers)
    tree = params if encoding is None else trees.pack(params, CONFIG, encoding)
    tree = tree if layers is Layers.SCAN else trees.unstack(tree)
    weights = leafwise.from_params(tree, config)
    assert weights.encoding is encoding
    assert equal(leafwise.load(replace(weights, tree=None)), tree)


@pytest.mark.parametrize("encoding", Encoding)
def test_packing_leaf_by_leaf_is_packing_the_tree(params: Any, encoding: Encoding) -> None:
    latent = leafwise.from_params(params, CONFIG)
    packed = leafwise.packed(latent, encoding)
    expected = trees.pack(params, CONFIG, encoding)
    assert equal(leafwise.load(packed), expected)
    other = next(one for one in Encoding if one is not encoding)
    assert equal(leafwise.load(leafwise.packed(leafwise.packed(latent, other), encoding)), expected)


def test_a_full_precision_model_cannot_be_packed(params: Any) -> None:
    with pytest.raises(UserError, match="linear=full: it has no ternary weights to pack"):
        leafwise.packed(leafwise.from_params(params, replace(CONFIG, linear=Linear.FULL)), Encoding.TWO_BIT)


def test_half_precision_of_others_becomes_float32(params: Any) -> None:
    halves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
    loaded = leafwise.load(replace(leafwise.from_params(halves, CONFIG), tree=None))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    assert equal(loaded, jax.tree.map(lambda leaf: leaf.astype(np.float32), halves))


def test_frugal_reading_gives_memory_back_before_every_leaf(params: Any) -> None:
    calls: list[str] = []
    weights = replace(leafwise.from_params(params, CONFIG), release=lambda: calls.append("release"))
    frugal = leafwise.frugal(weights, lambda path: calls.append(path[0]))
    frugal.read(("embed", "embedding"))
    frugal.read(("final_norm", "scale"))
    assert calls == ["release", "embed", "release", "final_norm"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_bad_number_anywhere_is_found(dtype: Any, bad: float) -> None:
    good = np.random.default_rng(0).standard_normal((300, 700)).astype(dtype)
    good[0, 0] = ml_dtypes.finfo(dtype).max
    good[1, 0] = ml_dtypes.finfo(dtype).min
    for values in (good, good.T, good[::3, ::2], good[0]):
        assert leafwise.all_finite(values)
    for place in ((0, 1), (299, 699), (150, 350)):
        values = good.copy()
        values[place] = bad
        assert not leafwise.all_finite(values)
        assert not leafwise.all_finite(values.T)
        assert not leafwise.all_finite(values[place[0]])


def test_damaged_leaves_are_named() -> None:
    path = ("block_1", "attn", "q", "kernel")
    good = np.zeros((32, 32), np.float32)
    assert leafwise.checked(good, path, CONFIG, "file") is good
    codes = PackedTernary(np.full((32, 32), 255, np.uint8), np.array(1, np.float32), k=32, encoding=Encoding.TWO_BIT)
    for leaf, message in (
        (good[:16], r"file: block_1/attn/q/kernel has shape \(16, 32\): must be \(32, 32\)"),
        (good + np.nan, "block_1/attn/q/kernel holds NaN or infinity"),
        (good.astype(np.int8), "has type int8: must be one of float32"),
        (codes, r"block_1/attn/q/kernel: codes\[0, 0\]=255 is not a two_bit byte"),
        (replace(codes, codes=codes.codes & 0b01010101, scale=np.array(0, np.float32)), "scale=0.0 must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            leafwise.checked(leaf, path, CONFIG, "file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"more": 1}, "unknown field 'more'"),
        ({"tokenizer": "x"}, "unknown field 'tokenizer'"),
        ({"chat_template": 1}, "chat_template must be text"),
        ({"prefix": [61]}, "prefix must be a list of token ids from 0 to 60"),
        ({"stop_tokens": [-1]}, "stop_tokens must be a list"),
        ({"stop_tokens": [True]}, "stop_tokens must be a list"),
        ({"stop_tokens": 3}, "stop_tokens must be a list"),
        ({"prefix": [1] * 1001}, "prefix must be a list"),
        ({"sampling": {"top_p": float("nan")}}, "sampling must be an object of numbers below 1e9"),
        ({"sampling": {"temperature": 10**400}}, "sampling must be an object of numbers below 1e9"),
        ({"sampling": {"top_k": 2.5}}, "sampling must be an object of numbers below 1e9"),
        ({"sampling": {"heat": 1}}, "sampling must be an object of numbers below 1e9"),
    ],
)
def test_assets_of_a_stranger_are_checked(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        leafwise.assets_from_json(values, CONFIG, None, "file: assets")


def test_a_kernel_of_absmax_groups_is_packed_with_its_groups(params: Any) -> None:
    config = replace(CONFIG, quant=QuantConfig(weight=WeightQuantizer.ABSMAX, weight_group=16))
    packed = leafwise.packed(leafwise.from_params(params, config), Encoding.TWO_BIT)
    leaf = packed.read(("block_0", "ffn", "down", "kernel"))
    assert isinstance(leaf, PackedTernary)
    assert leaf.scale.shape == (3, 32)
