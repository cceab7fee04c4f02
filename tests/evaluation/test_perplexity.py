"""Every token but the first is scored once, with the context that window and stride promise, however windows are batched."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import params as trees
from bitnet_jax.config import ActivationQuantizer, QuantConfig
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.evaluation import evaluator, perplexity
from bitnet_jax.evaluation.perplexity import Perplexity
from bitnet_jax.transformer import Transformer
from tests.shapes import tiny

CONFIG = tiny(init_std=0.3)
IDS = np.random.default_rng(0).integers(0, 61, 45).astype(np.uint16)


@functools.cache
def params():
    return jax.jit(lambda: Transformer(CONFIG).init(jax.random.key(4), jnp.zeros((1, 2), jnp.int32))["params"])()


@functools.cache
def measured(length=45, **options):
    return perplexity(params(), CONFIG, IDS[:length], **({"batch_size": 4} | options))


@functools.cache
def forward():
    tree = params()
    return jax.jit(lambda ids: jax.nn.log_softmax(Transformer(CONFIG).apply({"params": tree}, ids).logits))


@functools.cache
def nats(first, target):
    """-ln p(IDS[target]) where IDS[first:target] are seen."""
    ids = np.zeros((1, 64), np.int32)
    ids[0, : target - first] = IDS[first:target]
    return -float(forward()(ids)[0, target - first - 1, IDS[target]])


def test_a_window_as_long_as_the_text_is_the_full_forward_pass():
    expected = sum(nats(0, target) for target in range(1, 45))
    for options in ({}, {"window": 44}, {"window": 60, "stride": 7}):
        found = measured(**options)
        assert found.nats == pytest.approx(expected, rel=1e-5)
        assert found.tokens == 44


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 4), (16, 5), (16, 1), (43, 43)])
def test_each_token_is_scored_once_with_the_context_of_its_window(window, stride):
    """The window of token t is the first that reaches it: window 0 up to token `window`, then one more for every `stride` tokens."""
    expected = 0.0
    for target in range(1, 45):
        number = max(0, -(-(target - window) // stride))
        expected += nats(number * stride, target)
    found = measured(window=window, stride=stride)
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.window, found.stride) == (44, window, stride)


def test_stride_equal_to_the_window_is_the_sum_over_separate_pieces():
    pieces = [perplexity(params(), CONFIG, IDS[start : start + 17], window=16, batch_size=4).nats for start in (0, 16, 32)]
    assert measured(window=16).nats == pytest.approx(sum(pieces), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_batch_size_does_not_change_the_result(batch_size):
    assert measured(window=16, stride=5, batch_size=batch_size).nats == pytest.approx(measured(window=16, stride=5).nats, rel=1e-6)


def test_packed_parameters_predict_the_same():
    packed = perplexity(trees.pack(params(), CONFIG), CONFIG, IDS, window=16, batch_size=4)
    assert packed.nats == pytest.approx(measured(window=16).nats, rel=1e-6)


def test_numbers_follow_from_the_sum_of_nats():
    found = Perplexity(nats=20.0, tokens=9, window=8, stride=8, text_bytes=40, seconds=2.0, compile_seconds=0.0)
    assert found.loss == 20 / 9
    assert found.perplexity == pytest.approx(math.exp(20 / 9))
    assert found.bits_per_byte == pytest.approx(20 / 9 * 10 / 40 / math.log(2))
    assert found.tokens_per_second == 4.5
    assert measured().bits_per_byte is None
    assert Perplexity(nats=1e6, tokens=9, window=8, stride=8, text_bytes=None, seconds=1.0, compile_seconds=0.0).perplexity == math.inf


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    level = {**params(), "final_norm": {"scale": jnp.zeros(32)}}
    found = perplexity(level, CONFIG, IDS, window=16, batch_size=4, text_bytes=45)
    assert found.perplexity == pytest.approx(61, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(61), rel=1e-5)


def test_progress_counts_the_tokens():
    calls = []
    perplexity(params(), CONFIG, IDS, window=16, batch_size=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(16, 44), (32, 44), (44, 44)]


def test_an_evaluator_gives_the_training_loop_its_numbers():
    found = evaluator(CONFIG, IDS, window=16, text_bytes=90, batch_size=4)(params())
    expected = measured(window=16)
    assert found["validation_loss"] == pytest.approx(expected.loss)
    assert found["validation_perplexity"] == pytest.approx(expected.perplexity)
    assert found["validation_bits_per_byte"] == pytest.approx(expected.loss * 45 / 90 / math.log(2))
    part = evaluator(CONFIG, IDS, window=16, text_bytes=90, max_tokens=17, batch_size=4)(params())
    assert part["validation_loss"] == pytest.approx(measured(length=17, window=16).loss)
    assert part["validation_bits_per_byte"] == pytest.approx(part["validation_loss"] / 2 / math.log(2))
    assert "validation_bits_per_byte" not in evaluator(CONFIG, IDS, window=16, batch_size=4)(params())


def test_the_second_time_nothing_is_compiled():
    measured(window=16)
    assert perplexity(params(), CONFIG, IDS, window=16, batch_size=4).compile_seconds < 0.05


def test_a_loss_that_is_not_finite_is_an_error():
    broken = {**params(), "final_norm": {"scale": jnp.full(32, jnp.nan)}}
    with pytest.raises(RunError, match="the loss of token 1 is nan"):
        perplexity(broken, CONFIG, IDS, window=16, batch_size=4)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS[:1], {}, "the text has 1 tokens: must have at least 2"),
        (IDS[None], {}, r"tokens are uint16\[1, 45\]"),
        (IDS.astype(np.float32), {}, "tokens are float32"),
        (np.array([1, 61, 2]), {}, "token 61: must be from 0 to 60"),
        (np.array([1, 2, -1]), {}, "token -1"),
        (IDS, {"window": 65}, "window=65 must be from 1 to max_seq_len=64"),
        (IDS, {"window": 0}, "window=0"),
        (IDS, {"window": 16, "stride": 17}, "stride=17 must be from 1 to window=16"),
        (IDS, {"stride": 0}, "stride=0"),
        (IDS, {"batch_size": 0}, "batch_size=0"),
        (IDS, {"text_bytes": 0}, "text_bytes=0"),
    ],
)
def test_wrong_input_is_named(ids, options, message):
    with pytest.raises(UserError, match=message):
        perplexity(params(), CONFIG, ids, **options)


def test_a_model_trained_with_activations_per_tensor_is_measured_per_token():
    """Its perplexity then does not depend on what else is in the batch."""
    per_tensor = replace(CONFIG, quant=QuantConfig(activation=ActivationQuantizer.PER_TENSOR))
    assert perplexity(params(), per_tensor, IDS, window=16, batch_size=4).nats == measured(window=16).nats
