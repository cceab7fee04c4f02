import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.training.losses import IGNORED, loss_sums


def example() -> tuple[jax.Array, jax.Array]:
    logits = jax.random.normal(jax.random.key(0), (3, 5, 7)) * 3
    targets = jax.random.randint(jax.random.key(1), (3, 5), 0, 7)
    return logits, targets.at[1, 2:].set(IGNORED)


def test_sums_are_those_of_the_definition_over_the_targets_that_count() -> None:
    logits, targets = example()
    rows = [(np.asarray(row, np.float64), target) for row, target in zip(logits.reshape(-1, 7), targets.reshape(-1).tolist(), strict=True)]
    z = [(np.log(np.exp(row).sum()), row, target) for row, target in rows if target != IGNORED]
    sums = loss_sums(logits, targets)
    assert int(sums.tokens) == len(z) == 12
    assert float(sums.cross_entropy) == pytest.approx(sum(log_z - row[target] for log_z, row, target in z), rel=1e-6)
    assert float(sums.z) == pytest.approx(sum(log_z**2 for log_z, _, _ in z), rel=1e-6)


def test_equal_logits_lose_the_logarithm_of_the_vocabulary() -> None:
    sums = loss_sums(jnp.zeros((2, 4, 11)), jnp.zeros((2, 4), jnp.int32))
    assert float(sums.cross_entropy) / int(sums.tokens) == pytest.approx(np.log(11), rel=1e-6)


def test_sums_of_parts_add_up_to_the_sums_of_the_whole() -> None:
    logits, targets = example()
    whole, parts = loss_sums(logits, targets), [loss_sums(logits[i : i + 1], targets[i : i + 1]) for i in range(3)]
    for i in range(2):
        assert float(whole[i]) == pytest.approx(sum(float(part[i]) for part in parts), rel=1e-6)
    assert int(whole.tokens) == sum(int(part.tokens) for part in parts)


def test_ignored_targets_get_no_gradient() -> None:
    logits, targets = example()
    gradient = jax.grad(lambda x: sum(loss_sums(x, targets)[:2]))(logits)
    moved = np.any(np.asarray(gradient) != 0, -1)
    assert np.array_equal(moved, np.asarray(targets) != IGNORED)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, targets = example()
    rounded = logits.astype(jnp.bfloat16)
    low, exact = loss_sums(rounded, targets), loss_sums(rounded.astype(jnp.float32), targets)
    assert low.cross_entropy.dtype == jnp.float32
    assert float(low.cross_entropy) == float(exact.cross_entropy)


def test_logits_too_large_for_an_exponential_give_a_finite_loss() -> None:
    sums = loss_sums(jnp.full((1, 1, 5), 1e4), jnp.zeros((1, 1), jnp.int32))
    assert float(sums.cross_entropy) == pytest.approx(np.log(5), abs=1e-2)
