from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.config import ModelConfig, NormPlacement, OptimizerConfig, Schedule
from bitnet_jax.training.optimizer import averaged, decays, make_optimizer
from bitnet_jax.transformer import Transformer
from tests.shapes import tiny

CONSTANT = OptimizerConfig(schedule=Schedule.CONSTANT, learning_rate=0.01, warmup_steps=0, weight_decay=0.1, clip_norm=None)


def shapes(config: ModelConfig) -> Any:
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def params() -> Any:
    return {
        "embed": {"embedding": jnp.full((3, 2), 2.0)},
        "attn_norm": {"scale": jnp.full((2,), 2.0)},
        "q": {"kernel": jnp.full((2, 2), 2.0)},
        "head": {"kernel": jnp.full((2, 3), 2.0)},
    }


def update(config: OptimizerConfig, grads: Any, step: int = 1, steps: int = 10) -> Any:
    """Change of the parameters, by the path of the leaf's module."""
    transform = make_optimizer(config, steps).transform
    with jax.numpy_dtype_promotion("standard"):
        changes, _ = jax.jit(transform.update)(grads, transform.init(params()), params(), step=jnp.int32(step))
    return {name: np.asarray(next(iter(leaf.values()))) for name, leaf in changes.items()}


@pytest.mark.parametrize("norm", list(NormPlacement))
def test_decay_acts_on_every_matrix_and_on_no_norm_or_embedding(norm: NormPlacement) -> None:
    tree = decays(shapes(replace(tiny(), norm=norm, tie_embeddings=False)))
    for path, decayed in jax.tree_util.tree_leaves_with_path(tree):
        names = [key.key for key in path]
        assert decayed == (names[-1] == "kernel"), names
    assert tree["head"]["kernel"] is True
    assert tree["embed"]["embedding"] is False


def test_zero_gradients_shrink_decayed_parameters_by_rate_times_decay_and_leave_the_others() -> None:
    changes = update(CONSTANT, jax.tree.map(jnp.zeros_like, params()))
    for name, change in changes.items():
        expected = -0.01 * 0.1 * 2.0 if name in ("q", "head") else 0.0
        np.testing.assert_allclose(change, expected, rtol=1e-6)


def test_first_update_is_that_of_adamw() -> None:
    grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params())
    changes = update(CONSTANT, grads)
    for name, change in changes.items():
        g = np.asarray(next(iter(grads[name].values())), np.float64)
        direction = g / (np.abs(g) + 1e-8) + (0.1 * 2.0 if name in ("q", "head") else 0.0)
        np.testing.assert_allclose(change, -0.01 * direction, rtol=1e-5)


def test_gradients_are_clipped_to_the_global_norm_before_the_moments() -> None:
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 100.0), params())
    transform = make_optimizer(replace(CONSTANT, clip_norm=1.0), 10).transform
    with jax.numpy_dtype_promotion("standard"):
        _, state = transform.update(grads, transform.init(params()), params(), step=jnp.int32(1))
    first = next(leaf for leaf in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(leaf, "mu")).mu
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(first))))
    assert norm == pytest.approx(1.0 - CONSTANT.beta1, rel=1e-4)


def test_rate_and_decay_follow_the_step_that_is_passed_and_no_counter_of_their_own() -> None:
    two_stage = replace(CONSTANT, schedule=Schedule.TWO_STAGE_LINEAR, second_learning_rate=0.004, final_learning_rate=0.0)
    grads = jax.tree.map(jnp.zeros_like, params())
    assert update(two_stage, grads, step=4)["q"][0, 0] == pytest.approx(-0.01 * 0.6 * 0.1 * 2.0, rel=1e-5)
    assert update(two_stage, grads, step=5)["q"][0, 0] == 0.0


def test_moments_are_float32() -> None:
    state = make_optimizer(CONSTANT, 10).transform.init(params())
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("float32")}


def test_the_average_follows_the_new_parameters_and_changes_no_update() -> None:
    grads = jax.tree.map(jnp.ones_like, params())
    with_average, without = make_optimizer(replace(CONSTANT, ema_decay=0.75), 10).transform, make_optimizer(CONSTANT, 10).transform
    state, plain, p = with_average.init(params()), without.init(params()), params()
    expected = p
    for step in (1, 2, 3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = with_average.update(grads, state, p, step=jnp.int32(step))
            same, plain = without.update(grads, plain, p, step=jnp.int32(step))
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(same), strict=True))
        p = jax.tree.map(jnp.add, p, updates)
        expected = jax.tree.map(lambda mean, new: 0.75 * mean + 0.25 * new, expected, p)
    for found, value in zip(jax.tree.leaves(averaged(state)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-6)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(plain)) + len(jax.tree.leaves(p))
