"""Meshes: the numbers of one device on eight, what is sent between them, and what does not fit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bitnet_jax import dot, partition
from bitnet_jax.config import ActivationQuantizer, Gather, MeshConfig, QuantConfig, WeightQuantizer
from bitnet_jax.errors import UserError
from bitnet_jax.params import LINEAR
from bitnet_jax.training import loop, sharding
from bitnet_jax.training.collectives import collectives
from bitnet_jax.training.optimizer import make_optimizer
from bitnet_jax.training.sharding import Rows
from tests.training.runs import small_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `mesh.py` says."""
    command = [sys.executable, "-W", "error", "-m", "tests.training.mesh"]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_one_device(found: dict[str, Any]) -> None:
    for name, meshes in found.items():
        for label, gathers in meshes.items():
            first = gathers["latent"]
            where = f"{name} {label}: {first}"
            codes = name == "bitnet"  # an activation on another code is a step, not a rounding
            assert first["loss"] < (2e-5 if codes else 2e-6), where
            assert first["grad_norm"] < (1e-4 if codes else 5e-6), where
            assert first["moments"] < (1e-2 if codes else 5e-5), where
    assert set(found["weights"]) == {"8,1", "4,2", "2,2,2", "sequence"}


@pytest.mark.slow
def test_parameters_and_moments_are_cut_up(found: dict[str, Any]) -> None:
    assert found["weights"]["8,1"]["latent"]["bytes"] < 0.15  # an eighth, and gains that lie whole
    assert found["weights"]["2,2,2"]["latent"]["bytes"] < 0.27


@pytest.mark.slow
def test_codes_travel_in_place_of_latent_weights_when_asked_and_change_nothing(found: dict[str, Any]) -> None:
    for meshes in found["bitnet"].values():
        for gather in ("int8", "two_bit"):
            assert meshes[gather]["same"]
            assert meshes[gather]["loss"] == 0
    sent = found["bitnet"]["8,1"]
    matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)  # weights of both blocks
    each = matrices * 2 * 7 / 8  # in two microbatches, to the other seven
    assert sent["int8"]["sent"]["all-gather s8"][1] == 2 * each  # forward and backward, a byte a weight
    assert sent["two_bit"]["sent"]["all-gather u8"][1] == 2 * each / 4
    table = sent["int8"]["sent"]["all-gather f32"][1]
    assert sent["latent"]["sent"]["all-gather f32"][1] >= table + 4 * each  # four bytes a weight forward


@pytest.mark.slow
def test_a_step_on_shards_sends_fewer_sums(found: dict[str, Any]) -> None:
    """Of the two models that differ in nothing else; what is left is of activations, gradients and the batch."""
    whole, cut = (found[name]["2,2,2"]["latent"]["sent"]["all-reduce f32"] for name in ("weights", "shards"))
    assert cut[0] < whole[0]
    assert found["shards"]["2,2,2"]["two_bit"]["loss"] == 0
    assert found["shards"]["2,2,2"]["two_bit"]["same"]


@pytest.mark.parametrize(
    ("weight", "gather"), [*((WeightQuantizer.ABSMEAN, gather) for gather in Gather), (WeightQuantizer.SIGN, Gather.LATENT)]
)
@pytest.mark.parametrize(("path", "sums"), [("blocks/attn/q/kernel", 0), ("blocks/ffn/down/kernel", 1)])
def test_the_scales_of_shards_are_computed_where_their_weights_lie(weight: WeightQuantizer, path: str, sums: int, gather: Gather) -> None:
    """Nothing is sent for a product on two devices of `tensor` but the sum over its inputs, where these are cut; four parts are as good."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=1, tensor=2))
    assert mesh is not None
    x, kernel = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32), np.zeros((24, 16), np.float32)
    kernel[:] = np.random.default_rng(1).normal(size=kernel.shape) * np.linspace(0.1, 3, 16)

    def compiled(shards: int) -> tuple[int, np.ndarray]:
        config = QuantConfig(weight=weight, weight_shards=shards, activation=ActivationQuantizer.NONE)
        axis = partition.cut_axis(path, config)
        alone = dot.quantized(jnp.asarray(x), jnp.asarray(kernel), config, axis=axis)
        with sharding.inside(mesh):
            place = partition.placement(path, gather)
            spec = partition.spec(path, 2)
            places = NamedSharding(mesh, P(None, spec[0] if sums else None)), NamedSharding(mesh, spec)
            product = jax.jit(lambda x, w: dot.quantized(x, w, config, place, axis=axis), in_shardings=places)
            y = product(*jax.device_put((x, kernel), places))
            text = product.lower(x, kernel).compile().as_text()
        np.testing.assert_allclose(y, alone, rtol=1e-5, atol=1e-5)
        return sum(traffic.count for traffic in collectives(text).values()), np.asarray(y)

    whole, two, four = compiled(1), compiled(2), compiled(4)
    assert whole[0] > sums
    assert (two[0], four[0]) == (sums, sums)
    assert not np.allclose(two[1], four[1])


# --- the mesh --------------------------------------------------------------------------------------------------------


def test_fsdp_takes_the_devices_that_are_left() -> None:
    assert sharding.sizes(MeshConfig(), 8) == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    assert sharding.sizes(MeshConfig(tensor=2, sequence=2), 8) == {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
    assert list(sharding.sizes(MeshConfig(data=2, fsdp=4), 8).values()) == [2, 4, 1, 1]
    assert sharding.make_mesh(MeshConfig(), jax.devices()[:1]) is None


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (MeshConfig(tensor=3), 8, "mesh data=1 . tensor=3 . sequence=1 needs a multiple of 3 devices: there are 8"),
        (MeshConfig(fsdp=4), 8, "fsdp=4 is 4 devices: must be the 8 there are"),
        (MeshConfig(data=2), 1, "needs a multiple of 2 devices: there are 1"),
    ],
)
def test_axes_that_do_not_fit_the_devices_are_named(mesh: MeshConfig, devices: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sharding.sizes(mesh, devices)


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((1, 8, 1, 1), {}, "batch_size=4 must be a multiple of data=1 . fsdp=8"),
        ((2, 1, 1, 1), {"accumulation": 4}, "batch_size=4 / accumulation=4 must be a multiple of data=2 . fsdp=1"),
        ((1, 1, 1, 3), {}, "seq_len=8 must be a multiple of sequence=3"),
        ((1, 1, 5, 1), {}, r"blocks/attn/k/kernel has shape \(1, 16, 8\): 8 must be a multiple of tensor=5"),
        ((1, 2, 1, 1), {"mesh": MeshConfig(gather=Gather.TWO_BIT)}, None),
    ],
)
def test_what_does_not_fit_the_mesh_is_named(shape: tuple[int, ...], changes: dict, message: str | None) -> None:
    named = dict(zip(partition.AXES, shape, strict=True))
    if message is None:
        sharding.check(small_config(**changes), named)
        return
    with pytest.raises(UserError, match=message):
        sharding.check(small_config(**changes), named)


def test_codes_can_travel_only_where_weights_are_ternary() -> None:
    config = small_config()
    with pytest.raises(UserError, match="gather=int8 sends the codes of ternary weights: must be latent for linear=full"):
        replace(config, model=config.model.twin, mesh=MeshConfig(gather=Gather.INT8))


# --- places ----------------------------------------------------------------------------------------------------------


def test_codes_cannot_travel_while_quantisation_is_warmed_up() -> None:
    config = small_config(optimizer_quant_warmup_steps=2)
    for gather in (Gather.INT8, Gather.TWO_BIT):
        with pytest.raises(UserError, match=rf"gather={gather.value} sends codes, and quant_warmup_steps=2 needs latent weights"):
            replace(config, mesh=MeshConfig(gather=gather))


def test_shards_cut_what_tensor_devices_share() -> None:
    two = QuantConfig(weight_shards=2)
    names = {name: partition.cut_axis(f"block_0/attn/{name}/kernel", two) for name in LINEAR}
    assert names == {"q": -1, "k": -1, "v": -1, "o": -2, "gate": -1, "up": -1, "down": -2}
    assert partition.cut_axis("my/layer/kernel", QuantConfig()) is None
    with pytest.raises(UserError, match="parameter my/layer/kernel fits no rule"):
        partition.cut_axis("my/layer/kernel", two)


def test_every_parameter_has_a_rule_and_an_unknown_one_is_an_error() -> None:
    assert partition.spec("blocks/attn/q/kernel", 3) == P(None, "fsdp", "tensor")
    assert partition.spec("opt_state/0/mu/block_3/ffn/down/kernel", 2) == P("tensor", "fsdp")
    assert partition.spec("blocks/attn/sub_norm/scale", 2) == P(None, None)
    for path in ("blocks/attn/lora/kernel", "embed/table", "scale", "xembed/embedding"):
        with pytest.raises(UserError, match=f"parameter {path} fits no rule"):
            partition.spec(path, 2)
    with pytest.raises(UserError, match="head/kernel has 1 axes: must have at least 2"):
        partition.spec("head/kernel", 1)


def test_moments_lie_where_their_parameters_do_and_what_cannot_be_cut_is_named() -> None:
    config = small_config(optimizer_ema_decay=0.9)
    mesh = sharding.make_mesh(MeshConfig())
    assert mesh is not None
    assert mesh.shape["fsdp"] == 2
    state = sharding.place(jax.eval_shape(lambda: loop.init_run(config, make_optimizer(config.optimizer, 4))), mesh)
    places = {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    of = {name: [spec for path, spec in places.items() if path.endswith(f"{name}']['kernel']")] for name in ("q", "down")}
    assert of == {"q": [P(None, "fsdp", "tensor")] * 4, "down": [P(None, "tensor", "fsdp")] * 4}  # and two moments and the average
    assert sharding.uncut(state.params, mesh) == []
    odd = replace(config, model=replace(config.model, hidden_size=15))
    state = sharding.place(jax.eval_shape(lambda: loop.init_run(odd, make_optimizer(odd.optimizer, 4))), mesh)
    assert "embed/embedding" in sharding.uncut(state.params, mesh)


def test_a_batch_is_put_where_it_belongs() -> None:
    mesh = sharding.make_mesh(MeshConfig())
    batch = {"tokens": np.arange(12, dtype=np.int32).reshape(4, 3)}
    placed = sharding.place_batch(batch, mesh, Rows(0, 1))["tokens"]
    assert placed.sharding.spec == P(("data", "fsdp"), "sequence")
    assert np.array_equal(np.asarray(placed), batch["tokens"])
    assert sharding.rows(mesh, 4) == Rows(0, 1)
    with pytest.raises(UserError, match=r"batch_size=3 must be a multiple of data=1 \* fsdp=2"):
        sharding.rows(mesh, 3)


def test_another_mesh_is_left_alone() -> None:
    x = np.zeros((2, 2, 2), np.float32)
    assert partition.hidden(x) is x
    with jax.set_mesh(jax.make_mesh((2,), ("mine",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert partition.hidden(x) is x
        assert partition.placement("blocks/attn/q/kernel") is None
