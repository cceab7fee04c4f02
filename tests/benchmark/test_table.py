"""What a user sees of results."""

import pytest

from bitnet_jax import config as configs
from bitnet_jax import costs
from bitnet_jax.benchmark import table
from bitnet_jax.benchmark.traffic import traffic
from tests.shapes import tiny

CELL = {"threads": 2, "prompt": 8, "generate": 4}


def run(subject, repeat=0, command="", source="new", **figures):
    return {"subject": subject, "command": command, "repeat": repeat, "source": source, "peak_bytes": 2e6, **CELL, **figures}


def paces(prefill, decode, **more):
    return {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode, **more}


def results(*runs):
    model = {"name": "700m two_bit", "kind": "model file", "bytes": 1, "storage": "two_bit", "config": configs.to_dict(tiny())}
    return {"format": "", "model": model, "sessions": [], "runs": list(runs)}


def ours(repeat, decode, **more):
    return run("bitnet-jax", repeat, **paces(100 + repeat, decode, head="float32", streamed_tokens_per_second=decode / 2), **more)


def test_medians_with_least_and_most_beside_the_fastest_peer():
    peers = [run("slow", **paces(1, 8)), run("fast", source=None, **paces(500, 10)), run("full precision in XLA, float32", **paces(10, 12))]
    found = table.speeds(results(*(ours(repeat, decode) for repeat, decode in enumerate((30, 20, 16))), *peers))
    assert [row[0] for row in found.rows] == ["bitnet-jax", "full precision in XLA, float32", "slow", "fast"]
    assert found.rows[0][1:] == ["2", "8 + 4", "101 (100–102)", "20.0 (16.0–30.0)", "10.0 (8.0–15.0)", "2", "2.00"]
    assert [row[-1] for row in found.rows[1:]] == ["", "", ""]


def test_the_first_use_has_a_row_of_its_own():
    cold = {"cold_prefill_tokens_per_second": 3.0, "cold_decode_tokens_per_second": 2.0}
    rows = table.speeds(results(ours(0, 20.0, **cold), run("a", **paces(1, 2)))).rows
    assert [row[0] for row in rows] == ["bitnet-jax", "bitnet-jax, cold", "a"]
    assert rows[1][1:] == ["2", "8 + 4", "3.0", "2.0", "", "", ""]


def test_a_failure_is_shown():
    rows = table.speeds(results(ours(0, 3.0), run("a", failed="exit code 1: why"), run("b", **paces(1, 2)), run("b", 1, failed="x"))).rows
    assert rows[1][3] == "failed: exit code 1: why"
    assert rows[2][0] == "b, 1 of 2 failed"


def test_figures_of_other_code_are_not_mixed_in():
    found = results(ours(0, 5.0, source="old"), ours(1, 7.0, source="old"), ours(0, 30.0))
    assert table.speeds(found).rows[0][4] == "30.0"


def test_the_ceiling_is_bandwidth_over_the_bytes_of_a_step():
    found = results(ours(0, 20.0), run("read bandwidth", bytes_per_second=2e6), run("read bandwidth", 1, bytes_per_second=4e6))
    step = traffic(tiny(), costs.Storage.TWO_BIT, "float32", 8, 4)
    (row,) = table.bounds(found).rows
    assert row[7:] == [f"{3e6 / step.total:,.1f}", "20.0", f"{20 * step.total / 3e6:.0%}"]


def test_the_twin_stands_beside_the_published_ratio():
    (row,) = table.twins(results(ours(0, 20.0), run("full precision in XLA, float32", **paces(50, 8)))).rows
    assert row[:3] == ["float32", "2", "8 + 4"]
    assert row[5:] == ["2.50", "2.00", "1.70 (M2 Ultra), 3.88 (i7-13700H)"]


def test_starts_are_in_their_order():
    states = {state: {"first_token_seconds": seconds} for state, seconds in (("warm", 1.0), ("cold", 2.0), ("nothing compiled", 3.0))}
    assert table.starts(results(run("start", states=states))).rows == [["2", "8", "3.0", "2.0", "1.0"]]


def test_energy_is_counted_or_said_to_be_a_model():
    (row,) = table.energies(results(ours(0, 20.0, joules_per_token=None))).rows
    assert row[1] == "this machine does not count"
    (row,) = table.energies(results(ours(0, 20.0, joules_per_token=1.5))).rows
    assert row[1] == "1.5"
    model = costs.energy(tiny(), costs.Precision.BITNET, tokens=1).total
    assert float(row[2]) == pytest.approx(1e3 * model, rel=1e-2)


def test_what_was_not_measured_has_no_table():
    assert table.tables(results()) == []
    assert [one.title for one in table.tables(results(run("a", **paces(1, 2))))] == ["700m two_bit: speed"]
