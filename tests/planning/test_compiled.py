"""A small model compiled for real TPUs on a machine that has none (`make test-tpu-aot`; needs libtpu, the extra `tpu-aot`)."""

from dataclasses import replace

import pytest

from bitnet_jax import planning
from bitnet_jax.cli.arguments import from_preset
from bitnet_jax.config import DType, Gather, MeshConfig, Remat
from bitnet_jax.errors import UserError
from bitnet_jax.planning import compiled, formulas

pytestmark = pytest.mark.tpu_aot
BASE = from_preset("ladder-1m")
CONFIG = replace(BASE, model=replace(BASE.model, dtype=DType.BFLOAT16, remat=Remat.FULL), batch_size=8)


@pytest.fixture(scope="module")
def devices():
    return compiled.devices(planning.topology("v5e:2x2"))


@pytest.mark.parametrize("gather", [Gather.LATENT, pytest.param(Gather.INT8, marks=pytest.mark.slow), Gather.TWO_BIT])
def test_the_training_step_compiles_and_holds_the_state_cut_up(gather, devices):
    config = replace(CONFIG, mesh=MeshConfig(fsdp=2, tensor=2, gather=gather))
    program = compiled.train(config, devices)
    shape = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 1}
    assert program.fits
    assert program.arguments["parameters"] == formulas.parameter_bytes(config.model, shape)
    assert 0 <= program.arguments["filling and small things"] < 2**21  # tiles of 8 x 128 of so small a model are half empty
    assert program.sent


def test_the_decode_step_compiles_for_one_chip(devices):
    program = compiled.decode(CONFIG.model, devices[0], 4, 256)
    assert program.fits
    assert program.total < 2**26


def test_what_does_not_fit_is_a_result(devices):
    program = compiled.decode(from_preset("dummy-100b").model, devices[0], 1, 128)
    assert not program.fits
    assert "does not fit: needs " in (program.message or "")
    assert program.total > 16e9


def test_a_shape_that_libtpu_does_not_have_is_one_line():
    with pytest.raises(UserError, match="libtpu knows no topology v5e:7x3"):
        compiled.devices(planning.topology("v5e:7x3"))
