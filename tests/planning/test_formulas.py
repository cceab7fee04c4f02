"""Formulas against numbers worked out by hand, and against the training step's own shapes and transfers."""

from dataclasses import replace

import jax
import pytest

from bitnet_jax import costs
from bitnet_jax.config import DataConfig, DType, Gather, MeshConfig, ModelConfig, OptimizerConfig, Remat, TrainConfig
from bitnet_jax.planning import compiled, formulas

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, ffn_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=16, dtype=DType.BFLOAT16
)
CONFIG = TrainConfig(model=MODEL, data=DataConfig(seq_len=16), batch_size=8, optimizer=OptimizerConfig(warmup_steps=1))
ONE = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
# q and o [32, 32], k and v [32, 16], gate and up [32, 64], down [64, 32].
INPUTS, OUTPUTS, LINEAR = 32 * 6 + 64, 32 + 16 + 16 + 32 + 64 + 64 + 32, 2 * 1024 + 2 * 512 + 3 * 2048
NORMS = 32 + 32 + 32 + 64  # of one block


def with_remat(remat: Remat) -> TrainConfig:
    return replace(CONFIG, model=replace(MODEL, remat=remat))


def test_parameters_are_cut_up_by_fsdp_and_tensor_but_for_norms():
    norms = 2 * NORMS + 32
    assert formulas.parameter_bytes(MODEL, ONE) == 4 * costs.parameters(MODEL).total == 4 * (2 * LINEAR + 64 * 32 + norms)
    assert formulas.parameter_bytes(MODEL, ONE | {"fsdp": 4, "tensor": 2}) == 4 * ((2 * LINEAR + 64 * 32) // 8 + norms)
    assert formulas.parameter_bytes(MODEL, ONE | {"data": 8}) == formulas.parameter_bytes(MODEL, ONE)


@pytest.mark.parametrize(
    ("remat", "kept"),
    [(Remat.FULL, 32 * 2), (Remat.DOTS, 32 * 2 + 2 * OUTPUTS), (Remat.NONE, 32 * 2 + 2 * OUTPUTS + INPUTS + 6 * 4 * 16)],
)
def test_what_is_kept_follows_the_policy(remat, kept):
    found = formulas.memory(with_remat(remat), ONE)
    assert found.kept == 2 * 8 * 16 * kept  # layers, tokens
    assert found.moments == 2 * found.parameters == 2 * found.gradients
    assert found.total == 4 * found.parameters + found.kept + found.working
    shared = formulas.memory(with_remat(remat), ONE | {"fsdp": 2, "sequence": 2})
    assert shared.kept == found.kept // 4


def test_a_twin_keeps_its_inputs_whole():
    found = formulas.memory(replace(CONFIG, model=MODEL.twin), ONE).kept - formulas.memory(CONFIG, ONE).kept
    assert found == 2 * 8 * 16 * INPUTS  # two bytes for one


def test_operations_are_those_of_costs_and_what_is_computed_again():
    tokens = 8 * 16
    for remat, again in ((Remat.NONE, 0), (Remat.DOTS, 4 * 2 * 16 * 32), (Remat.FULL, 2 * 2 * LINEAR + 4 * 2 * 16 * 32)):
        found = formulas.flops(with_remat(remat), 4)
        assert found.model == tokens / 4 * costs.train_flops(MODEL, 16)
        assert found.computed - found.model == tokens / 4 * again


def test_transfers_by_hand():
    shape = ONE | {"fsdp": 4}
    table, linear = 64 * 32, 2 * LINEAR
    found = formulas.collectives(CONFIG, shape)
    assert found["all-gather", "f32"].bytes == 0.75 * 4 * linear
    assert found["all-gather", "s8"].bytes == 0.75 * linear
    assert found["all-gather", "bf16"].bytes == 0.75 * 2 * 2 * table
    assert found["reduce-scatter", "f32"].bytes == 0.75 * 4 * (linear + table)
    assert "all-reduce" not in {kind for kind, _ in found}
    again = formulas.collectives(with_remat(Remat.FULL), shape)
    assert again["all-gather", "f32"].bytes == 2 * found["all-gather", "f32"].bytes
    tensor = formulas.collectives(CONFIG, ONE | {"tensor": 2})
    assert set(tensor) == {("all-reduce", "bf16")}
    assert tensor["all-reduce", "bf16"].bytes == 2 * 2 * 2 * (8 * 16 * 32 * 2)  # layers, halves, both ways; (n - 1) / n twice is 1
    assert formulas.collectives(CONFIG, ONE) == {}


@pytest.mark.parametrize(("gather", "key", "each"), [(Gather.INT8, "s8", 1.0), (Gather.TWO_BIT, "u8", 0.25)])
def test_codes_are_sent_as_the_compiled_step_sends_them(gather, key, each):
    config = replace(CONFIG, mesh=MeshConfig(gather=gather))
    program = compiled.train(config, jax.devices()[:2])
    formula = formulas.collectives(config, ONE | {"fsdp": 2})
    assert program.sent["all-gather", key].bytes == formula["all-gather", key].bytes == 0.5 * 2 * each * 2 * LINEAR


def test_arguments_of_the_compiled_step_are_the_state_cut_up():
    program = compiled.train(CONFIG, jax.devices()[:2])
    parameters = formulas.parameter_bytes(MODEL, ONE | {"fsdp": 2})
    assert program.arguments["parameters"] == parameters
    assert program.arguments["moments"] == pytest.approx(2 * parameters, abs=16)  # and counters of the optimiser
    assert program.arguments["batch and counters"] == 2 * 4 * 4 * 16 + 3 * 4
    assert program.arguments["filling and small things"] == 0  # what the compiler counts is this and nothing else
    assert program.fits
    assert program.total > sum(program.arguments.values())
