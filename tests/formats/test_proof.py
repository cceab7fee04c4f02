"""The proof accepts a faithful conversion and catches every unfaithful one."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bitnet_jax.config import DType, FeedForward, NormPlacement
from bitnet_jax.errors import RunError
from bitnet_jax.formats import proof
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets, Weights
from bitnet_jax.inference import generate
from bitnet_jax.transformer import Transformer
from kernels_pallas import Encoding, PackedTernary
from tests.shapes import tiny

CONFIG = tiny(ffn=FeedForward.RELU2, init_std=0.3)


@pytest.fixture(scope="module")
def source() -> Weights:
    params = jax.jit(lambda: Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])()
    return leafwise.from_params(params, CONFIG, where="source")


@pytest.fixture(scope="module")
def packed(source: Weights) -> Weights:
    return replace(leafwise.packed(source, Encoding.TWO_BIT), where="result")


def changed(weights: Weights, at: str, change: Any) -> Weights:
    """`weights` with one leaf replaced."""

    def read(path: leafwise.Path) -> Any:
        leaf = weights.read(path)
        return change(leaf) if "/".join(path) == at else leaf

    return replace(weights, read=read)


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("dtype", DType)
def test_a_packed_model_is_proved(source: Weights, encoding: Encoding, dtype: DType) -> None:
    source = replace(source, config=replace(source.config, dtype=dtype))
    found = proof.prove(source, leafwise.packed(source, encoding))
    assert found.weights == 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)
    assert (found.floats_differ, found.tokens, found.tokens_differ) == (0, 8, 0)
    assert found.logits == 31 * 61
    assert "8 of 8 greedy tokens equal" in str(found)


def test_a_model_of_full_precision_is_proved(source: Weights) -> None:
    twin = replace(source, config=source.config.twin)
    assert proof.prove(twin, twin).weights == 0


def test_the_logits_are_those_of_the_model(source: Weights, packed: Weights) -> None:
    ids = np.arange(16, dtype=np.int32)[None] % 61
    params = leafwise.load(packed)
    expected = Transformer(CONFIG).apply({"params": jax.device_put(params)}, jnp.asarray(ids))
    np.testing.assert_allclose(proof._logits(packed, ids), expected.logits[0], rtol=1e-5, atol=1e-5)  # pyright: ignore[reportAttributeAccessIssue]
    prompt = ids[0, :5]
    tokens = generate(params, CONFIG, [prompt], max_new_tokens=3).rows[0].tokens
    for token in tokens:
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(prompt)] = prompt
        assert proof._logits(source, padded)[len(prompt) - 1].argmax() == token
        prompt = np.append(prompt, token)


def flipped(leaf: Any) -> Any:
    codes = leaf.codes.copy()
    codes[3, 0] ^= 0b01000000 if codes[3, 0] >> 6 != 2 else 0b10000000
    return PackedTernary(codes, leaf.scale, k=leaf.k, encoding=leaf.encoding)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        ("block_1/attn/k/kernel", flipped, "has other ternary weights than the source"),
        ("block_1/ffn/up/kernel", lambda leaf: replace(leaf, scale=leaf.scale * np.float32(1.5)), "differ"),
        ("block_0/ffn/sub_norm/scale", lambda leaf: leaf * np.linspace(0.5, 2, 48, dtype=np.float32), "differ"),
        ("embed/embedding", lambda leaf: leaf[::-1], "differ"),
    ],
)
def test_a_changed_leaf_is_caught(source: Weights, packed: Weights, at: str, change: Any, message: str, rounds: bool) -> None:
    with pytest.raises(RunError, match=message):
        proof.prove(source, changed(packed, at, change), rounds=rounds)


@pytest.mark.parametrize(
    "change",
    [
        {"ffn": FeedForward.SWIGLU},
        {"rope_theta": 100.0},
        {"norm_eps": 0.3},
        {"norm": NormPlacement.NONE},
    ],
)
def test_a_configuration_that_computes_something_else_is_caught(
    source: Weights, packed: Weights, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(packed, config=replace(CONFIG, **change))
    with pytest.raises(RunError, match=f"has another configuration than the source: {next(iter(change))}: "):
        proof.prove(source, other, rounds=True)
    monkeypatch.setattr(proof, "_compare_settings", lambda mine, theirs: None)
    with pytest.raises(RunError, match="is not the model it was made from: logits differ"):
        proof.prove(source, other, rounds=True)


@pytest.mark.parametrize(
    ("assets", "message"),
    [
        (Assets(prefix=(2,)), r"another prefix than the source: \(2,\)"),
        (Assets(prefix=(1,), chat_template="other", stop_tokens=(3,)), "another chat_template"),
        (Assets(prefix=(1,), chat_template="x", stop_tokens=(4,)), "another stop_tokens"),
    ],
)
def test_lost_assets_are_caught(source: Weights, packed: Weights, assets: Assets, message: str) -> None:
    source = replace(source, assets=Assets(prefix=(1,), chat_template="x", stop_tokens=(3,)))
    with pytest.raises(RunError, match=message):
        proof.prove(source, replace(packed, assets=assets))


def test_logits_that_are_no_numbers_prove_nothing(source: Weights, packed: Weights) -> None:
    huge = changed(source, "final_norm/scale", lambda leaf: np.full_like(leaf, 3e38))
    with pytest.raises(RunError, match="is not proved: logits are not finite"):
        proof.prove(huge, changed(packed, "final_norm/scale", lambda leaf: np.full_like(leaf, 3e38)))


def test_float32_numbers_beside_packed_weights_may_be_stored_as_they_are_computed_in(source: Weights, packed: Weights) -> None:
    config = replace(CONFIG, dtype=DType.BFLOAT16)
    mine, theirs = replace(source, config=config), replace(packed, config=config)
    stored = changed(theirs, "embed/embedding", lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16))
    assert proof.prove(mine, stored).floats_differ == 0
    with pytest.raises(RunError, match="embed/embedding differs from the source"):
        proof.prove(replace(mine, config=CONFIG), replace(stored, config=CONFIG))


def test_rotary_pairs_in_another_order_are_caught(source: Weights, packed: Weights) -> None:
    def interleaved(leaf: PackedTernary) -> PackedTernary:
        order = np.arange(leaf.n).reshape(-1, 2, 4).swapaxes(1, 2).reshape(-1)
        return PackedTernary(leaf.codes[order], leaf.scale, k=leaf.k, encoding=leaf.encoding)

    broken = changed(changed(packed, "block_0/attn/q/kernel", interleaved), "block_0/attn/k/kernel", interleaved)
    with pytest.raises(RunError, match="has other ternary weights"):
        proof.prove(source, broken)


def test_small_errors_are_counted_where_the_format_rounds_and_refused_where_not(source: Weights, packed: Weights) -> None:
    rounded = changed(packed, "block_0/attn/q/kernel", lambda leaf: replace(leaf, scale=np.float32(np.float16(leaf.scale))))
    found = proof.prove(source, rounded, rounds=True)
    assert found.floats_differ == 1
    with pytest.raises(RunError, match="block_0/attn/q/kernel differs from the source in 1 of 1 numbers, by"):
        proof.prove(source, rounded)
