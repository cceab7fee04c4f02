"""Filters keep what their definitions say, rows do not see one another, and draws follow the distribution."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.errors import UserError
from bitnet_jax.inference import sampling
from bitnet_jax.inference.sampling import Controls, Sampling

ROWS, VOCABULARY = 3, 40
sample = jax.jit(sampling.sample)
top_k, top_p, min_p = jax.jit(sampling.top_k), jax.jit(sampling.top_p), jax.jit(sampling.min_p)


@functools.cache
def logits():
    return jax.random.normal(jax.random.key(0), (ROWS, VOCABULARY)) * 2


def keys(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))


def rows(value, dtype=jnp.float32):
    return jnp.full(ROWS, value, dtype)


def kept(filtered):
    """The ids of each row that are still possible; what is kept keeps its logit."""
    mask = np.isfinite(filtered)
    assert np.array_equal(np.asarray(filtered)[mask], np.asarray(logits())[mask])
    return [set(np.flatnonzero(row).tolist()) for row in mask]


def by_probability():
    return [np.argsort(-row).tolist() for row in np.asarray(logits())]


@pytest.mark.parametrize("k", [1, 2, 7, VOCABULARY, 2**31 - 1])
def test_top_k_keeps_the_k_most_probable(k):
    assert kept(top_k(logits(), rows(k, jnp.int32))) == [set(order[:k]) for order in by_probability()]


@pytest.mark.parametrize("p", [1e-30, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    expected = []
    for order, row in zip(by_probability(), np.asarray(logits(), np.float64), strict=True):
        probability = np.exp(row - row.max())
        total = np.cumsum(probability[order]) / probability.sum()
        expected.append(set(order if p == 1 else order[: int(np.searchsorted(total, p)) + 1]))
    assert kept(top_p(logits(), rows(p))) == expected


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_probable_enough(share):
    values = np.asarray(logits(), np.float64)
    expected = [set(np.flatnonzero(np.exp(row - row.max()) >= share).tolist()) for row in values]
    assert kept(min_p(logits(), rows(share))) == expected


def test_equally_probable_tokens_are_kept_together():
    level = jnp.array([[0.0, 3.0, 1.0, 1.0, -1.0]], jnp.float32)
    assert np.isfinite(top_k(level, jnp.array([2], jnp.int32)))[0].tolist() == [False, True, True, True, False]
    assert np.isfinite(top_p(level, jnp.array([0.85], jnp.float32)))[0].tolist() == [False, True, True, True, False]


def test_top_p_of_one_keeps_what_rounding_would_lose():
    """The first token's probability is 1 - 2e-13, and 1 in float32."""
    assert np.isfinite(top_p(jnp.array([[30.0, 0.0, 1.0]], jnp.float32), jnp.ones(1, jnp.float32))).all()


def test_filters_apply_one_after_the_other():
    """Top-p is of what top-k left: 0.4 is less than 0.55 of everything, but more than that of the best two."""
    scores = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]] * 64, jnp.float32))
    draws = [sample(scores, keys(*range(64)), None, Controls.of([Sampling(temperature=1.0, top_k=k, top_p=0.55)] * 64)) for k in (2, 4)]
    assert [set(ids.tolist()) for ids in draws] == [{0}, {0, 1}]


def test_repetition_penalty_lowers_what_was_seen_whatever_its_sign():
    seen = jnp.array([[True, False] * (VOCABULARY // 2)] * ROWS)
    before, after = np.asarray(logits()), np.asarray(sampling.repetition_penalty(logits(), seen, rows(1.5)))
    assert np.array_equal(after[:, 1::2], before[:, 1::2])
    assert (after[:, ::2] < before[:, ::2]).all()
    np.testing.assert_allclose(np.where(before > 0, before / 1.5, before * 1.5)[:, ::2], after[:, ::2], rtol=1e-6)


def test_temperature_zero_is_the_most_probable_token_under_every_filter():
    expected = np.argmax(logits(), -1)
    for one in (Sampling(), Sampling(top_k=3, top_p=0.5, min_p=0.1), Sampling(temperature=1e-4)):
        assert np.array_equal(sample(logits(), keys(0, 1, 2), None, Controls.of([one] * ROWS)), expected)


def test_draws_follow_the_distribution():
    """Of 4,000 draws each of five tokens comes as often as its probability at that temperature says, within five standard deviations."""
    scores, count = jnp.array([2.0, 1.0, 0.0, -1.0, -jnp.inf], jnp.float32), 4000
    controls = Controls.of([Sampling(temperature=1.5)] * count)
    drawn = sample(jnp.broadcast_to(scores[None], (count, 5)), keys(*range(count)), None, controls)
    expected = np.asarray(jax.nn.softmax(scores / 1.5))
    found = np.bincount(drawn, minlength=5) / count
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_a_row_depends_on_its_own_key_logits_and_controls_alone():
    mixed = [Sampling(temperature=2.0), Sampling(), Sampling(temperature=1.0, top_k=5, top_p=0.9, min_p=0.01)]
    for seed in range(8):
        together = sample(logits(), keys(seed, 8, seed + 9), None, Controls.of(mixed))
        for row, (one, key) in enumerate(zip(mixed, (seed, 8, seed + 9), strict=True)):
            assert sample(logits()[row : row + 1], keys(key), None, Controls.of([one]))[0] == together[row]
        again = sample(logits(), keys(seed, 1, 2), None, Controls.of([mixed[0], mixed[2], mixed[1]]))
        assert again[0] == together[0]


def test_only_the_filters_in_use_are_compiled():
    assert jax.tree.leaves(Controls.of([Sampling(), Sampling(top_k=3)])) == []
    used = Controls.of([Sampling(), replace(Sampling(), temperature=0.5, top_k=3)])
    assert used.top_p is None
    assert used.top_k.tolist() == [2**31 - 1, 3]  # type: ignore[union-attr]


WRONG = {
    "temperature": [-1.0, float("nan"), 1e-9],
    "top_k": [0],
    "top_p": [0.0, 1.1],
    "min_p": [-0.1, 1.5],
    "repetition_penalty": [0.0, float("inf")],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(UserError, match=f"{field}={value} must"):
        Sampling(**{field: value})
