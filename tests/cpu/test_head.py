"""The vocabulary product: native results are the twins' bits, and the two-stage form is exact."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import cpu
from bitnet_jax.errors import UserError

ISAS = cpu.load()
each_isa = pytest.mark.parametrize("isa", ISAS)
each_shape = pytest.mark.parametrize(("m", "v", "d"), [(1, 1, 1), (1, 300, 64), (3, 65, 40), (6, 130, 257), (2, 17, 31)])


def operands(m: int, v: int, d: int, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(m + v + d)
    x = rng.standard_normal((m, d)) * rng.choice([1e-3, 1, 30], (m, d))
    return jnp.asarray(x, dtype), jnp.asarray(rng.standard_normal((v, d)) * 0.02, dtype)


@each_isa
@each_shape
@pytest.mark.parametrize("threads", [1, 2])
def test_bfloat16_logits_are_the_bits_of_the_twin(m: int, v: int, d: int, threads: int, isa: str) -> None:
    x, table = operands(m, v, d)
    assert np.array_equal(cpu.logits(x, table, cpu.CpuConfig(threads, isa)), cpu.logits_twin(x, table))


@each_isa
@each_shape
def test_int8_logits_are_the_bits_of_the_twin(m: int, v: int, d: int, isa: str) -> None:
    x, table = operands(m, v, d)
    rough = cpu.quantize_table(np.asarray(table))
    out = cpu.rough_logits(x, rough, cpu.CpuConfig(isa=isa))
    assert np.array_equal(out, cpu.logits_twin(x, jnp.asarray(rough.codes), jnp.asarray(rough.scale)))


@each_isa
def test_float32_logits_agree_within_rounding(isa: str) -> None:
    x, table = operands(3, 70, 300, jnp.float32)
    out = cpu.logits(x, table, cpu.CpuConfig(isa=isa))
    exact = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    bound = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(table, np.float64)).T * (300 / 32 + 8) * 2.0**-24
    assert np.all(np.abs(np.asarray(out) - exact) <= bound)


# --- two stages ------------------------------------------------------------------------------------------------------


@each_shape
def test_the_error_of_the_int8_table_is_within_its_bound(m: int, v: int, d: int) -> None:
    x, table = operands(m, v, d)
    rough = cpu.quantize_table(np.asarray(table))
    difference = np.abs(np.asarray(cpu.rough_logits(x, rough), np.float64) - np.asarray(cpu.logits(x, table), np.float64))
    norm = np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True)
    assert np.all(difference <= norm * rough.error)


def test_the_bound_holds_for_the_worst_input() -> None:
    # x along the error of a row: Cauchy and Schwarz with equality.
    _, table = operands(1, 8, 64)
    rough = cpu.quantize_table(np.asarray(table))
    exact = np.asarray(table, np.float64)
    errors = exact - rough.codes.astype(np.float64) * rough.scale[:, None]
    x = jnp.asarray(errors / np.abs(errors).max(), jnp.bfloat16)
    difference = np.abs(np.asarray(cpu.rough_logits(x, rough), np.float64) - np.asarray(cpu.logits(x, table), np.float64))
    reached = np.diag(difference) / (np.linalg.norm(np.asarray(x, np.float64), axis=1) * rough.error)
    assert np.all(reached <= 1)
    assert np.all(reached > 0.98)


@each_isa
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_best_tokens_are_those_of_all_logits(threads: int, k: int, isa: str) -> None:
    for m, v, d in ((1, 300, 64), (3, 65, 40), (6, 1300, 257)):
        x, table = operands(m, v, d)
        rough = cpu.quantize_table(np.asarray(table))
        ids, values, read = cpu.top_logits(x, table, rough, k, config=cpu.CpuConfig(threads, isa))
        expected_ids, expected = cpu.top_logits_twin(x, table, k)
        assert np.array_equal(ids, expected_ids)
        assert np.array_equal(values, expected)
        assert np.all(k <= np.asarray(read))
        assert np.all(np.asarray(read) < v)


def test_equal_rows_are_told_apart_by_their_id() -> None:
    x, table = operands(2, 40, 64)
    best = int(cpu.top_logits_twin(x[:1], table)[0][0, 0])
    table = jnp.concatenate([table, table[best : best + 1], table])
    ids, _, _ = cpu.top_logits(x, table, cpu.quantize_table(np.asarray(table)), 3)
    assert np.array_equal(ids, cpu.top_logits_twin(x, table, 3)[0])
    assert ids[0].tolist() == [best, 40, 41 + best]


def test_rows_that_differ_by_less_than_the_int8_table_shows_are_told_apart() -> None:
    # A thousand rows with the same codes: only the table itself can say which is best.
    rng = np.random.default_rng(0)
    row = rng.standard_normal(64)
    row[0] = 4.0
    table = np.repeat(row[None], 1000, 0)
    table[np.arange(1000), 1 + np.arange(1000) % 63] *= 1 + 2.0**-7
    table = jnp.asarray(table, jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((4, 64)), jnp.bfloat16)
    ids, values, _ = cpu.top_logits(x, table, cpu.quantize_table(np.asarray(table)))
    expected_ids, expected = cpu.top_logits_twin(x, table)
    assert np.array_equal(ids, expected_ids)
    assert np.array_equal(values, expected)


def test_ids_from_the_limit_on_are_never_chosen() -> None:
    x, table = operands(3, 65, 40)
    rough = cpu.quantize_table(np.asarray(table))
    ids, _, _ = cpu.top_logits(x, table, rough, 4, jnp.int32(9))
    assert np.array_equal(ids, cpu.top_logits_twin(x, table, 4, jnp.int32(9))[0])
    assert np.all(np.asarray(ids) < 9)


def test_hidden_states_that_are_not_finite_give_logits_that_are_not() -> None:
    x, table = operands(2, 65, 40)
    ids, values, _ = cpu.top_logits(x.at[0, 3].set(jnp.nan), table, cpu.quantize_table(np.asarray(table)))
    assert np.isnan(values[0, 0])
    assert ids[1] == cpu.top_logits_twin(x, table)[0][1]


def test_wrong_input_is_named() -> None:
    x, table = operands(2, 65, 40)
    rough = cpu.quantize_table(np.asarray(table))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="limit=66 must be from k=1 to V=65"):
        jax.block_until_ready(cpu.top_logits(x, table, rough, 1, jnp.int32(66)))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="limit=2 must be from k=3"):
        jax.block_until_ready(cpu.top_logits(x, table, rough, 3, jnp.int32(2)))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=r"table has .* must be element type .* and shape \[any, 40\]"):
        jax.block_until_ready(cpu.logits(x, table[:, :39]))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="x must be float32 or bfloat16"):
        jax.block_until_ready(cpu.logits(x.astype(jnp.float16), table))
    with pytest.raises(UserError, match="table row 7 holds a number that is not finite"):
        cpu.quantize_table(np.asarray(table.at[7, 0].set(jnp.inf)))
