"""Losses, gradients and transfers of one batch on several meshes of eight simulated devices, as JSON: python -m tests.training.mesh."""

import json
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from bitnet_jax.config import (
    ActivationQuantizer,
    DataConfig,
    Gather,
    Layers,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    QuantConfig,
    TrainConfig,
)
from bitnet_jax.training import loop, sharding
from bitnet_jax.training.collectives import collectives
from bitnet_jax.training.optimizer import make_optimizer
from bitnet_jax.training.step import compile_step

MESHES = {"8,1": (1, 8, 1, 1), "4,2": (1, 4, 2, 1), "2,2,2": (2, 2, 2, 1), "sequence": (1, 2, 2, 2)}
"""Name → devices along data, fsdp, tensor, sequence."""
MODEL = ModelConfig(vocab_size=64, hidden_size=32, ffn_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=16)
WEIGHTS = replace(MODEL, quant=QuantConfig(activation=ActivationQuantizer.NONE))
"""Another rounding of a sum can put an activation on another code, a difference of a whole step; here nothing but rounding is left."""
SHARDS = replace(MODEL, quant=QuantConfig(activation=ActivationQuantizer.NONE, weight_shards=2))
CASES: dict[str, tuple[ModelConfig, dict[str, tuple[Gather, ...]]]] = {
    "bitnet": (MODEL, {"8,1": tuple(Gather), "2,2,2": tuple(Gather)}),
    "weights": (WEIGHTS, dict.fromkeys(MESHES, (Gather.LATENT,))),
    "twin": (replace(MODEL.twin, tie_embeddings=False), {"2,2,2": (Gather.LATENT,)}),
    "loop": (replace(WEIGHTS, layers=Layers.LOOP), {"2,2,2": (Gather.LATENT,)}),
    "shards": (SHARDS, {"2,2,2": (Gather.LATENT, Gather.TWO_BIT)}),
    "warming": (WEIGHTS, {"2,2,2": (Gather.LATENT,)}),
}
"""Name → model, and the meshes it is computed on with what is gathered; the first of a mesh is held to one device, others to the first."""


def run(config: TrainConfig, devices: list[jax.Device]) -> dict[str, Any]:
    """Two steps from the seed's parameters: the first's loss, gradient norm and moments, all parameters after both, what was sent."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check(config, sharding.sizes(config.mesh, len(devices)))
    random = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, config.batch_size, config.data.seq_len + 1), np.int32)
    with sharding.inside(mesh):
        target = sharding.place(jax.eval_shape(lambda: loop.init_run(config, optimizer)), mesh)
        places = None if mesh is None else sharding.shardings(target)
        state = jax.jit(lambda: loop.init_run(config, optimizer), out_shardings=places)()
        warming = config.optimizer.quant_warmup_steps > 0
        step = compile_step(config, loop.model_apply(config), optimizer, state, loop.batch_spec(config, mesh), warming=warming)
        batches = [sharding.place_batch({"tokens": ids[:, :-1], "targets": ids[:, 1:]}, mesh, sharding.Rows(0, 1)) for ids in random]
        state, metrics = step(state, batches[0])
        moments = jax.device_get(state.opt_state)
        state, _ = step(state, batches[1])
    return {
        "loss": float(metrics.loss),
        "grad_norm": float(metrics.grad_norm),
        "moments": [np.asarray(leaf) for leaf in jax.tree.leaves(moments)],
        "params": [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state.params))],
        "bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)),
        "sent": {f"{kind} {dtype}": traffic for (kind, dtype), traffic in collectives(step.as_text()).items()},
    }


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """How far a run is from another."""
    pairs = [(a, b) for a, b in zip(found["moments"], expected["moments"], strict=True) if a.ndim]
    return {
        "loss": abs(found["loss"] - expected["loss"]),
        "grad_norm": abs(found["grad_norm"] / expected["grad_norm"] - 1),
        "moments": max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs),
        "same": all(np.array_equal(a, b) for a, b in zip(found["params"], expected["params"], strict=True)),
        "bytes": found["bytes"] / expected["bytes"],
        "sent": found["sent"],
    }


def main() -> None:
    """Prints {model: {mesh: {gather: comparison}}}."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    results: dict[str, Any] = {}
    for name, (model, meshes) in CASES.items():
        optimizer = OptimizerConfig(warmup_steps=0)
        if name == "warming":
            optimizer = replace(optimizer, quant_warmup_steps=4, ema_decay=0.5)
        config = TrainConfig(model=model, data=DataConfig(seq_len=16), optimizer=optimizer, steps=4, batch_size=16, accumulation=2)
        expected = run(config, jax.devices()[:1])
        results[name] = {}
        for label, gathers in meshes.items():
            data, fsdp, tensor, sequence = MESHES[label]
            reference = expected
            results[name][label] = {}
            for gather in gathers:
                mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence, gather=gather)
                found = run(replace(config, mesh=mesh), jax.devices())
                results[name][label][gather.value] = compare(found, reference)
                reference = found if reference is expected else reference
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
