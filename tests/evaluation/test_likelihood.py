"""Each continuation's likelihood is that of the plain forward pass on its own tokens, however requests are sorted, shared and padded."""

import functools
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import generate
from bitnet_jax import params as trees
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.evaluation import Likelihood, likelihoods
from bitnet_jax.evaluation.likelihood import _length, _program
from bitnet_jax.transformer import Transformer
from tests.shapes import tiny

CONFIG = tiny(init_std=0.3)
DRAW = np.random.default_rng(0)
PAIRS = [(DRAW.integers(0, 61, before).tolist(), DRAW.integers(0, 61, after).tolist()) for before, after in
         [(1, 1), (20, 3), (7, 12), (40, 1), (3, 60), (33, 17), (1, 64), (5, 5), (12, 2), (30, 30), (50, 15)]]  # fmt: skip
SHARED = DRAW.integers(0, 61, 25).tolist()
PAIRS += [(SHARED, [letter]) for letter in (3, 9, 27)] + [(SHARED[:20], [*SHARED[20:], 3]), (SHARED, [9])]


@functools.cache
def latent():
    return jax.jit(lambda: Transformer(CONFIG).init(jax.random.key(4), jnp.zeros((1, 2), jnp.int32))["params"])()


@functools.cache
def packed():
    return trees.pack(latent(), CONFIG)


@functools.cache
def forward():
    tree = latent()
    return jax.jit(lambda ids: Transformer(CONFIG).apply({"params": tree}, ids).logits)


@functools.cache
def direct():
    """One request at a time, all logits; log_softmax in float64."""
    found = []
    for context, continuation in PAIRS:
        ids = (context + continuation)[-65:-1]
        logits = np.asarray(forward()(np.array([ids + [0] * (64 - len(ids))], np.int32))[0], np.float64)
        logits = logits[len(ids) - len(continuation) : len(ids)]
        highest = logits.max(-1, keepdims=True)
        logs = logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))
        total = logs[np.arange(len(continuation)), continuation].sum()
        found.append(Likelihood(log_probability=total, greedy=bool((logits.argmax(-1) == continuation).all())))
    return found


def computed(params, pairs=None, config=CONFIG, **options):
    found = dict(likelihoods(params, config, PAIRS if pairs is None else pairs, **options))
    return [found[number] for number in range(len(found))]


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("params", [latent, packed], ids=["latent", "packed"])
def test_likelihoods_are_those_of_the_plain_forward_pass(params, batch_size):
    found = computed(params(), batch_size=batch_size)
    np.testing.assert_allclose([one.log_probability for one in found], [one.log_probability for one in direct()], rtol=2e-6)
    assert [one.greedy for one in found] == [one.greedy for one in direct()]


def test_the_order_of_requests_changes_nothing():
    order = np.random.default_rng(1).permutation(len(PAIRS))
    found, shuffled = computed(latent(), batch_size=4), computed(latent(), [PAIRS[i] for i in order], batch_size=4)
    assert [found[i] for i in order] == shuffled


@pytest.mark.parametrize("params", [latent, packed], ids=["latent", "packed"])
def test_what_generate_writes_is_greedy_and_anything_else_is_not(params):
    contexts = [context for context, _ in PAIRS[:3]]
    rows = generate(params(), CONFIG, contexts, max_new_tokens=4).rows
    pairs = [(context, list(row.tokens)) for context, row in zip(contexts, rows, strict=True)]
    other = [(context, [*tokens[:3], (tokens[3] + 1) % 61]) for context, tokens in pairs]
    assert [one.greedy for one in computed(params(), [*pairs, *other])] == [True] * 3 + [False] * 3


def test_ids_that_the_tokenizer_lacks_are_never_the_most_probable_but_keep_their_probability():
    logits = forward()(np.full((1, 64), 5, np.int32))[0, 0]
    best = int(logits.argmax())
    second = int(logits[:best].argmax())
    assert best > 0
    assert [one.greedy for one in computed(latent(), [([5], [best]), ([5], [second])])] == [True, False]
    fewer = computed(latent(), [([5], [best]), ([5], [second])], vocabulary=best)
    assert [one.greedy for one in fewer] == [False, True]
    assert fewer[0].log_probability == pytest.approx(computed(latent(), [([5], [best])])[0].log_probability, rel=1e-6)


def test_requests_that_differ_in_their_last_token_are_one_row_and_equal_ones_are_one(monkeypatch):
    from bitnet_jax.evaluation import likelihood

    shapes = []
    arrays = likelihood._arrays

    def note(batch, time, size):
        made = arrays(batch, time, size)
        shapes.append([array.shape for array in made])
        return made

    monkeypatch.setattr(likelihood, "_arrays", note)
    found = computed(latent(), PAIRS[11:])
    assert shapes == [[(1, 32), (1, 8), (1, 8, 4)]]
    assert found[1] == found[4]


def test_a_request_that_is_too_long_loses_its_beginning_with_a_warning(caplog):
    context, continuation = DRAW.integers(0, 61, 80).tolist(), [4, 5, 6]
    with caplog.at_level(logging.WARNING, logger="bitnet_jax"):
        found = computed(latent(), [(context, continuation), ([1], [2])])
    assert "1 of 2 requests are longer than max_seq_len=64 and lose their beginning, up to 18 tokens of it" in caplog.text
    assert found[0] == computed(latent(), [(context[18:], continuation), ([1], [2])])[0]
    caplog.clear()
    computed(latent(), [(context[18:], continuation)])
    assert not caplog.records


def test_few_programs_are_compiled_and_none_for_other_numbers_of_the_same_sizes():
    config = replace(CONFIG, init_std=0.25)
    program = _program(config.for_inference, 61, None)
    draw = np.random.default_rng(3)
    for _ in range(2):
        pairs = [(draw.integers(0, 61, draw.integers(17, 32)).tolist(), draw.integers(0, 61, 1).tolist()) for _ in range(20)]
        computed(latent(), pairs, config, batch_size=8)
        assert program.compiled <= 2  # 8 rows, and the 4 that are left


def test_lengths_have_two_steps_in_a_doubling():
    assert sorted({_length(size) for size in range(1, 300)}) == [16, 32, 48, 64, 96, 128, 192, 256, 384]
    assert all(size <= _length(size) < size + max(16, size / 2) for size in range(1, 300))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "the context of request 0 has no tokens"),
        (([1], []), "the continuation of request 0 has no tokens"),
        (([1], [61]), "the continuation of request 0 holds token 61: must be from 0 to 60"),
        (([-1], [1]), "the context of request 0 holds token -1"),
        (([1], [2] * 65), "has 65 tokens: must be at most max_seq_len=64"),
    ],
)
def test_what_cannot_be_scored_is_an_error(pair, message):
    with pytest.raises(UserError, match=message):
        computed(latent(), [pair])


def test_a_batch_of_none_is_an_error():
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        computed(latent(), batch_size=0)


def test_damaged_parameters_are_no_likelihood():
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, latent())
    with pytest.raises(RunError, match="ln p of request 0 is nan"):
        computed(broken, [([1], [2])])


def test_no_requests_have_no_likelihoods():
    assert computed(latent(), []) == []
