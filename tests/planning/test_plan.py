"""Estimates from rates, and messages of a compiler that found no room."""

from dataclasses import replace

import jax
import pytest

from bitnet_jax import costs, params, planning
from bitnet_jax.config import ModelConfig
from bitnet_jax.errors import UserError
from bitnet_jax.planning import compiled, formulas
from bitnet_jax.planning.plan import FORMULA
from bitnet_jax.transformer import Transformer
from tests.planning.test_formulas import CONFIG, MODEL

RATES = planning.Rates(flops=1e12, memory=1e10, link=1e9, capacity=1e9, source="made up")


def test_a_step_takes_the_longest_time_or_the_sum():
    times = planning.Times(compute=3.0, memory=1.0, links=2.0)
    assert (times.least, times.most) == (3.0, 6.0)
    assert planning.Times(compute=None, memory=1.0, links=2.0).least is None


def test_pace_and_days_follow_from_the_times():
    machine = planning.topology("h100:8")
    found = planning.training(CONFIG, machine, RATES, budget=1e9)
    tokens = 8 * 16
    assert found.source == FORMULA
    assert found.times.compute == formulas.flops(CONFIG, 8).computed / 1e12
    assert found.times.links == sum(one.bytes for one in found.sent.values()) / 1e9
    assert found.tokens_per_second == (tokens / found.times.most, tokens / found.times.least)
    assert found.days[1] == pytest.approx(1e9 / found.tokens_per_second[1] / 86_400)
    assert found.mfu[1] == pytest.approx(costs.train_flops(MODEL, 16) * tokens / 8 / found.times.least / 1e12)
    assert found.mfu[1] < 1


def test_what_does_not_fit_has_no_pace():
    found = planning.training(CONFIG, planning.topology("h100:8"), replace(RATES, capacity=1e4))
    assert not found.fits
    assert found.tokens_per_second is found.mfu is found.days is None


def test_without_a_peak_no_time_is_claimed():
    found = planning.training(CONFIG, planning.topology("cpu"), replace(RATES, flops=None))
    assert found.times.least is found.tokens_per_second is None
    assert found.times.links == 0


def test_a_decode_step_reads_every_weight_and_the_cache():
    found = planning.serving(MODEL, RATES, 3, 16)
    cache = costs.kv_cache_bytes(MODEL, 3, 16)
    parts = costs.bytes_by_part(MODEL, costs.Storage.TWO_BIT)
    assert found.bytes == parts.linear + 4 * 64 * 32 + cache
    assert found.total == parts.total + cache
    assert found.tokens_per_second == 3 / max(found.bytes / 1e10, found.flops / 1e12)
    with pytest.raises(UserError, match="decode_batch=0"):
        planning.serving(MODEL, RATES, 0, 16)


def test_a_cpu_reads_the_int8_copy_of_the_table_and_holds_both():
    both, plain = planning.serving(MODEL, RATES, 1, 16, table="int8"), planning.serving(MODEL, RATES, 1, 16)
    assert plain.bytes - both.bytes == (4 - 1) * 64 * 32 - 8 * 64  # a scale and a bound a row
    assert both.total - plain.total == 64 * 32 + 8 * 64


def test_the_seed_claim_of_100b_needs_a_bandwidth():
    found = planning.serving(ModelConfig.preset("dummy-100b"), RATES, 1, 1)
    assert found.bytes / 1e9 == pytest.approx(26.0, abs=0.8)  # 99 billion weights of 2 bits, and a float32 table of 1 GB


@pytest.mark.parametrize("scales", [{}, {"weight_group": 16}, {"weight_shards": 2}])
def test_packed_shapes_are_those_of_packed_parameters(scales):
    config = replace(MODEL, quant=replace(MODEL.quant, **scales))
    tree = Transformer(config).init(jax.random.key(0), jax.numpy.zeros((1, 1), jax.numpy.int32))["params"]
    packed = params.pack(tree, config)
    shapes = compiled.packed_shapes(config)
    assert jax.tree.structure(packed) == jax.tree.structure(shapes)  # k and the encoding of packed matrices are in it
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(packed)] == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)]


def test_the_decode_step_compiles_from_shapes_alone():
    program = compiled.decode(MODEL, jax.devices()[0], 2, 16)
    assert program.arguments["keys and values"] == costs.kv_cache_bytes(MODEL, 2, 16)
    assert program.arguments["packed matrices"] == costs.bytes_by_part(MODEL, costs.Storage.TWO_BIT).linear  # scales included


@pytest.mark.parametrize(
    "said",
    [
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
        "E1000: CompileTimeHbmOom: the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G).",
    ],
)
def test_no_room_is_a_result(said, monkeypatch):
    message = f"RESOURCE_EXHAUSTED: {said}"

    def full(*_):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(compiled, "compile_step", full)
    found = planning.training(CONFIG, planning.topology("v5e:2x1"), RATES, jax.devices()[:2], 1e9)
    assert not found.fits
    assert found.message == "does not fit: needs 20.50GiB of 15.75GiB"
    assert found.total == int(20.5 * 2**30)
    assert found.days is None
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        planning.training(CONFIG, planning.topology("v5e:2x1"), RATES, jax.devices()[:2])


def test_plans_are_json():
    import json

    plan = planning.training(CONFIG, planning.topology("h100:8"), RATES, budget=1e9)
    found = json.loads(json.dumps(planning.to_json(plan), allow_nan=False))
    assert found["times"]["least"] == plan.times.least
    assert {(one["kind"], one["type"]) for one in found["sent"]} == set(plan.sent)
