"""The vocabulary product: native results are the twins' bits, and the two-stage form is exact."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
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


# --- the int8 table --------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_the_int8_table_is_the_nearest_one(dtype: Any, isa: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bitnet_jax.cpu.head._BLOCK", 100)
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((230, 300)) * 10.0 ** rng.integers(-12, 12, (230, 1))).astype(dtype)
    values[7], values[8, 1:], values[9] = 0, 0, 1e-39
    (tmp_path / "table").write_bytes(values.tobytes())
    rough = cpu.quantize_table(np.memmap(tmp_path / "table", dtype, "r", shape=values.shape), cpu.CpuConfig(isa=isa))
    rows = values.astype(np.float64)
    scale = np.maximum(np.abs(rows).max(1) / 127, 2.0**-100)
    assert np.allclose(rough.scale, scale, rtol=2.0**-23, atol=0)
    off = rows - rough.codes * np.asarray(rough.scale, np.float64)[:, None]
    assert np.all(np.abs(off) <= scale[:, None] * (0.5 + 1e-4))
    true = np.linalg.norm(off, axis=1)
    assert np.all(true <= rough.error)
    assert np.all(rough.error <= true + 1e-4 * np.linalg.norm(rows, axis=1) + 1e-28)


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


def outliers(rng: np.random.Generator, v: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    x, table = rng.standard_normal((3, d)), rng.standard_normal((v, d))
    x[:, :: max(1, d // 3)] *= 3e4
    table[:, 1 :: max(1, d // 2)] *= 100
    return x, table


def near_ties(rng: np.random.Generator, v: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    table = np.repeat(rng.standard_normal((1, d)), v, 0)
    table[np.arange(v), np.arange(v) % d] *= 1 + 2.0**-7
    return rng.standard_normal((3, d)), table


def below_the_step(rng: np.random.Generator, v: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    # One feature sets the step of x, and no row has it. Of the others only two are as much as half a step, so that the first pass sees
    # row 0 before row 1, against all the rest.
    x, table = np.full((3, d), 0.45 / 32767), rng.integers(-1, 2, (v, d)) * 1.0
    x[:, 0], x[:, 1:3] = 1, 0.55 / 32767
    table[0], table[1] = -1, 1
    table[0, 1:3], table[1, 1:3], table[:, 0] = 1, -1, 0
    return x, table


def scaled(x_scale: float, table_scale: float) -> Any:
    return lambda rng, v, d: (rng.standard_normal((3, d)) * x_scale, rng.standard_normal((v, d)) * table_scale)


HARD = {
    "near ties": near_ties,
    "outliers": outliers,
    "equal rows": lambda rng, v, d: (rng.standard_normal((3, d)), np.ones((v, d))),
    "hidden states of zero": lambda rng, v, d: (np.zeros((3, d)), rng.standard_normal((v, d))),
    "a table of zeros": lambda rng, v, d: (rng.standard_normal((3, d)), np.zeros((v, d))),
    "features below the step": below_the_step,
    "one feature": lambda rng, v, d: (np.eye(3, d) * 7, rng.standard_normal((v, d))),
    "largest codes": lambda rng, v, d: (np.full((3, d), 1e3), np.where(np.arange(v)[:, None] % 2, 1.0, -1.0) * np.ones((v, d))),
    "tiny hidden states": scaled(1e-30, 1),
    "a tiny table": scaled(1, 1e-30),
    "both tiny": scaled(1e-18, 1e-18),
    "subnormal hidden states": scaled(1e-39, 1e3),
    "a subnormal table": scaled(1e3, 1e-39),
    "huge hidden states": scaled(1e30, 1e3),
    "sums that overflow": scaled(1e30, 1e9),
}


@each_isa
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("what", HARD)
def test_the_best_tokens_are_exact_however_hard(what: str, dtype: Any, isa: str) -> None:
    # Against all logits of the same functions, so that float32 is exact too; NaN, of sums that overflow, comes before all numbers.
    for v, d, k in ((70, 64, 1), (129, 257, 3), (600, 2560, 1)):
        x, table = (jnp.asarray(part, dtype) for part in HARD[what](np.random.default_rng(v), v, d))
        config = cpu.CpuConfig(2, isa)
        ids, values, read = cpu.top_logits(x, table, cpu.quantize_table(np.asarray(table), config), k, config=config)
        logits = np.asarray(cpu.logits(x, table, config))
        keys = np.where(np.isnan(logits), np.inf, logits)
        order = np.lexsort((np.broadcast_to(np.arange(v), keys.shape), -keys, ~np.isnan(logits)), axis=1)[:, :k]
        assert np.array_equal(ids, order)
        assert np.array_equal(values, np.take_along_axis(logits, order, 1), equal_nan=True)
        assert np.all(np.asarray(read) >= k)


@each_isa
def test_sums_of_the_first_pass_do_not_overflow_at_any_width(isa: str) -> None:
    for d in (45568, 100_000):
        signs = np.where(np.arange(6)[:, None] % 2, 1.0, -1.0)
        x, table = jnp.ones((1, d), jnp.bfloat16), jnp.asarray(signs * np.linspace(1, 1.01, 6)[:, None] * np.ones((6, d)), jnp.bfloat16)
        config = cpu.CpuConfig(isa=isa)
        ids, values, _ = cpu.top_logits(x, table, cpu.quantize_table(np.asarray(table)), 2, config=config)
        logits = np.asarray(cpu.logits(x, table, config))[0]
        assert ids[0].tolist() == np.lexsort((np.arange(6), -logits))[:2].tolist()
        assert np.array_equal(values[0], logits[np.asarray(ids[0])])


def test_few_rows_of_a_usual_table_are_read() -> None:
    x, table = operands(4, 6000, 512)
    _, _, read = cpu.top_logits(x, table, cpu.quantize_table(np.asarray(table)))
    assert np.all(np.asarray(read) < 60)


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
    with pytest.raises(UserError, match="table row 64 holds a number that is not finite"):
        cpu.quantize_table(np.asarray(table.at[64, 39].set(jnp.nan)))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="table must be float32 or bfloat16"):
        cpu.quantize_table(np.zeros((2, 3), np.float16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("m", "v", "d"), [(1, 1, 1), (1, 300, 64), (3, 2049, 40), (6, 5000, 257)])
def test_a_table_of_columns_gives_the_same_bits_everywhere_and_the_right_sums(m: int, v: int, d: int, dtype: Any) -> None:
    x, table = operands(m, v, d, dtype)
    table = jnp.asarray(np.ascontiguousarray(np.asarray(table).T))
    wide, weights = np.asarray(x, np.float32), np.asarray(table, np.float32)
    expected = np.zeros((m, v), np.float32)
    for i in range(d):
        expected += wide[:, i : i + 1] * weights[i]
    for isa in ISAS:
        for threads in (1, 2):
            assert np.array_equal(cpu.logits_of_columns(x, table, cpu.CpuConfig(threads, isa)), expected)


def test_a_table_of_columns_is_not_rough() -> None:
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="table must be float32 or bfloat16"):
        jax.block_until_ready(cpu.logits_of_columns(jnp.zeros((1, 4)), jnp.zeros((4, 3), jnp.int8)))
