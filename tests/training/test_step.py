from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.training.losses import IGNORED
from bitnet_jax.training.optimizer import Optimizer, make_optimizer
from bitnet_jax.training.step import TrainState, compile_step, init_state, train_step
from tests.training.runs import BATCH, TIME, VOCAB, same, small_config

CONFIG = small_config(optimizer_warmup_steps=0)
BROKEN = VOCAB + 1
"""A target outside the vocabulary, whose loss is NaN."""


def apply(params: Any, tokens: jax.Array) -> jax.Array:
    return jnp.tanh(params["embed"]["embedding"][tokens]) @ params["head"]["kernel"]


def start(optimizer: Optimizer) -> TrainState:
    keys = jax.random.split(jax.random.key(0))
    params = {"embed": {"embedding": jax.random.normal(keys[0], (VOCAB, 8))}, "head": {"kernel": jax.random.normal(keys[1], (8, VOCAB))}}
    return init_state(params, optimizer)


def batch(targets: Any = None) -> dict[str, jax.Array]:
    tokens = jax.random.randint(jax.random.key(3), (BATCH, TIME + 1), 0, VOCAB)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:] if targets is None else jnp.asarray(targets, jnp.int32)}


@cache
def jitted(**options: Any) -> Any:
    return jax.jit(partial(train_step, apply=apply, optimizer=make_optimizer(CONFIG.optimizer, CONFIG.steps), **options))


def step(data: dict[str, jax.Array], state: TrainState | None = None, **options: Any) -> Any:
    return jitted(**options)(start(make_optimizer(CONFIG.optimizer, CONFIG.steps)) if state is None else state, data)


def uneven() -> np.ndarray:
    """Targets whose rows have 8, 5, 1 and 0 that count: means of microbatches are not the mean of the batch."""
    targets = np.array(batch()["targets"])
    for row, kept in enumerate((8, 5, 1, 0)):
        targets[row, kept:] = IGNORED
    return targets


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_gives_the_step_of_the_large_batch(accumulation: int) -> None:
    state, metrics = step(batch(uneven()), z_loss=1e-2)
    parts, parts_metrics = step(batch(uneven()), z_loss=1e-2, accumulation=accumulation)
    assert int(metrics.tokens) == int(parts_metrics.tokens) == 14
    for name in ("loss", "z_loss", "grad_norm"):
        assert float(getattr(parts_metrics, name)) == pytest.approx(float(getattr(metrics, name)), rel=1e-6)
    # Adam's first direction is the sign of the gradient, so compare the moment, which is linear in it.
    for one, other in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(parts.opt_state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)


def test_loss_is_the_mean_over_all_targets_that_count() -> None:
    _, metrics = step(batch(uneven()))
    logits = np.asarray(apply(start(make_optimizer(CONFIG.optimizer, 8)).params, batch()["tokens"]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = [-log_p[row, t, target] for row, targets in enumerate(uneven()) for t, target in enumerate(targets) if target != IGNORED]
    assert float(metrics.loss) == pytest.approx(np.mean(counted), rel=1e-5)


def test_z_loss_is_reported_always_and_moves_parameters_only_where_weighted() -> None:
    off, on = step(batch())[1], step(batch(), z_loss=0.5)[1]
    assert float(off.z_loss) == float(on.z_loss) > 0
    assert float(off.loss) == float(on.loss)
    assert float(off.grad_norm) != float(on.grad_norm)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_non_finite_step_leaves_parameters_and_moments_and_is_counted(accumulation: int) -> None:
    broken = np.array(batch()["targets"])
    broken[2, 3] = BROKEN
    before, _ = step(batch())
    after, metrics = step(batch(broken), before, accumulation=accumulation)
    assert not np.isfinite(float(metrics.loss))
    assert not bool(metrics.finite)
    assert same((before.params, before.opt_state), (after.params, after.opt_state))
    assert (int(after.step), int(after.non_finite), int(after.non_finite_run)) == (2, 1, 1)
    again, _ = step(batch(broken), after)
    assert (int(again.non_finite), int(again.non_finite_run)) == (2, 2)
    recovered, metrics = step(batch(), again)
    assert bool(metrics.finite)
    assert (int(recovered.step), int(recovered.non_finite), int(recovered.non_finite_run)) == (4, 2, 0)
    assert not same(again.params, recovered.params)


def test_infinite_gradient_of_a_finite_loss_is_skipped_too() -> None:
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.steps)

    def steep(params: Any, tokens: jax.Array) -> jax.Array:
        return apply(params, tokens) + jnp.sqrt(params["head"]["kernel"][0, 0] * 0.0)

    state = start(optimizer)
    after, metrics = jax.jit(partial(train_step, apply=steep, optimizer=optimizer))(state, batch())
    assert np.isfinite(float(metrics.loss))
    assert not bool(metrics.finite)
    assert same(state.params, after.params)


def test_batch_without_targets_moves_nothing_but_by_weight_decay() -> None:
    before = start(make_optimizer(CONFIG.optimizer, CONFIG.steps))
    after, metrics = step(batch(np.full((BATCH, TIME), IGNORED)))
    assert float(metrics.loss) == 0.0
    assert int(metrics.tokens) == 0
    assert same(before.params["embed"], after.params["embed"])


def test_metrics_name_the_rate_and_decay_of_the_update() -> None:
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.steps)
    state, first = step(batch())
    _, second = step(batch(), state)
    for number, metrics in ((1, first), (2, second)):
        assert float(metrics.learning_rate) == pytest.approx(float(optimizer.learning_rate(number)), rel=1e-6)
        assert float(metrics.weight_decay) == pytest.approx(float(optimizer.weight_decay(number)), rel=1e-6)


def test_compiled_step_equals_the_pure_one_and_gives_its_old_state_away() -> None:
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.steps)
    state = start(optimizer)
    compiled = compile_step(CONFIG, apply, optimizer, state, batch())
    expected, _ = train_step(state, batch(), apply=apply, optimizer=optimizer)
    kept = jax.tree.leaves(state)
    after, metrics = compiled(state, batch())
    assert all(leaf.is_deleted() for leaf in kept)
    for one, other in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    losses = [float(metrics.loss)]
    for _ in range(6):
        after, metrics = compiled(after, batch())
        losses.append(float(metrics.loss))
    assert losses == sorted(losses, reverse=True)


def test_compiled_step_refuses_another_shape() -> None:
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.steps)
    compiled = compile_step(CONFIG, apply, optimizer, start(optimizer), batch())
    with pytest.raises(TypeError, match="int32"):
        compiled(start(optimizer), {name: rows[:2] for name, rows in batch().items()})
