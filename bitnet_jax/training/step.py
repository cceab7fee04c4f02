"""One optimiser step as a pure function of state and batch, and the one place where it is compiled."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.stages import Compiled

from bitnet_jax import partition
from bitnet_jax.array_types import Array, Float32, Int32
from bitnet_jax.config import TrainConfig
from bitnet_jax.training import schedules
from bitnet_jax.training.losses import LossSums, count, loss_sums
from bitnet_jax.training.optimizer import Optimizer, Params

Apply = Callable[..., jax.Array]
"""Parameters and tokens [B, T] → logits [B, T, V]; while quantisation is warmed up, its strength is a third argument."""
Batch = Mapping[str, Any]
"""{"tokens", "targets"}: int32 [B, T], arrays or their shapes; targets of -1 have no loss."""


class TrainState(NamedTuple):
    """Everything that a step changes. With the configuration and the state of the data it determines the rest of the run: nothing
    else draws random numbers, so the seed and `step` are the whole random state.

    Attributes:
        step: optimiser steps done, skipped ones included.
        params: latent float32 parameters.
        opt_state: moments of Adam.
        non_finite: steps so far whose loss or gradient was not finite.
        non_finite_run: such steps in a row, up to the last one.
    """

    step: Int32[Array, ""]
    params: Params
    opt_state: Any
    non_finite: Int32[Array, ""]
    non_finite_run: Int32[Array, ""]


class StepMetrics(NamedTuple):
    """What one step measured; scalars on the device.

    Attributes:
        loss: mean cross entropy, in nats per token, without the z-loss.
        z_loss: mean (log Z)^2, before its weight.
        grad_norm: global norm of the gradient, before clipping.
        learning_rate: as used.
        weight_decay: as used.
        tokens: targets that had a loss.
        finite: whether loss and gradient were finite; the parameters were left alone where not.
        non_finite: non-finite steps so far.
        non_finite_run: non-finite steps in a row.
    """

    loss: Float32[Array, ""]
    z_loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    learning_rate: Float32[Array, ""]
    weight_decay: Float32[Array, ""]
    tokens: Int32[Array, ""]
    finite: Array
    non_finite: Int32[Array, ""]
    non_finite_run: Int32[Array, ""]


def init_state(params: Params, optimizer: Optimizer) -> TrainState:
    """The state before the first step. Each counter has a buffer of its own, as donation needs."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.transform.init(params),
        non_finite=jnp.zeros((), jnp.int32),
        non_finite_run=jnp.zeros((), jnp.int32),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    apply: Apply,
    optimizer: Optimizer,
    accumulation: int = 1,
    z_loss: float = 0.0,
    strength: schedules.Rate | None = None,
) -> tuple[TrainState, StepMetrics]:
    """One update of the parameters by the gradient of mean cross entropy + `z_loss` * mean (log Z)^2.

    The means are over all targets of the batch, whatever microbatch they fall in, so that `accumulation` changes rounding only.
    A step whose loss or gradient is not finite leaves parameters and moments as they were, and is counted.

    Args:
        state: donated by the compiled step.
        batch: "tokens" and "targets", int32 [B, T]; targets of -1 have no loss.
        apply: the model.
        optimizer: from `make_optimizer`.
        accumulation: microbatches that the batch is computed in; B must be a multiple of it.
        z_loss: weight of the z-loss.
        strength: number of the update → how far `apply` quantises; None leaves that to `apply`.
    """
    if strength is not None:
        apply = partial(_in_part, apply, strength(state.step + 1))
    tokens = jnp.maximum(count(batch["targets"]), 1).astype(jnp.float32)
    gradient = jax.value_and_grad(partial(_loss, apply=apply, z_loss=z_loss, total=tokens), has_aux=True)
    if accumulation == 1:
        (_, sums), grads = gradient(state.params, batch)
    else:
        sums, grads = _accumulate(gradient, state.params, batch, accumulation)

    loss = sums.cross_entropy / tokens
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    number = state.step + 1
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params, step=number)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state))

    new = TrainState(
        step=number,
        params=params,
        opt_state=opt_state,
        non_finite=state.non_finite + jnp.where(finite, 0, 1),
        non_finite_run=jnp.where(finite, 0, state.non_finite_run + 1),
    )
    metrics = StepMetrics(
        loss=loss,
        z_loss=sums.z / tokens,
        grad_norm=grad_norm,
        learning_rate=optimizer.learning_rate(number),
        weight_decay=optimizer.weight_decay(number),
        tokens=sums.tokens,
        finite=finite,
        non_finite=new.non_finite,
        non_finite_run=new.non_finite_run,
    )
    return new, metrics


def compile_step(
    config: TrainConfig, apply: Apply, optimizer: Optimizer, state: TrainState, batch: Batch, *, warming: bool = False
) -> Compiled:
    """`train_step` of this run, compiled for the shapes of `state` and `batch`; the state that goes in is donated.

    Compiled ahead of time, so that a changed shape raises where jit would compile again without a word. On a mesh, which surrounds the
    call, the new state lies where `state` does, and the metrics are on every device. With `warming` it is a step before
    `quant_warmup_steps`, a program of its own, so that the others are those of a run without it, bit for bit.
    """
    step = partial(
        train_step,
        apply=apply,
        optimizer=optimizer,
        accumulation=config.accumulation,
        z_loss=config.z_loss,
        strength=schedules.quant_strength(config.optimizer) if warming else None,
    )
    places: Any = None
    if partition.active():
        places = jax.tree.map(lambda leaf: leaf.sharding, state), PartitionSpec()
    return jax.jit(step, donate_argnums=0, out_shardings=places).lower(state, batch).compile()


class StepMemory(NamedTuple):
    """Memory of one device in a compiled step, as the compiler says.

    Attributes:
        state: bytes of parameters, moments and batch.
        temporary: bytes of gradients, activations and all else that a step makes and drops.
        limit: bytes that the device has, or the host; None where that is not known.
    """

    state: int
    temporary: int
    limit: int | None


def step_memory(step: Compiled) -> StepMemory | None:
    """What a compiled step needs; None where the compiler does not say."""
    found = step.memory_analysis()
    if found is None:
        return None
    state = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return StepMemory(state, found.temp_size_in_bytes, device_memory())


def device_memory() -> int | None:
    """Bytes of a device of this process, or of the host where that is the device; None where it is not known."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu" and hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit


def _in_part(apply: Apply, strength: jax.Array, params: Params, tokens: jax.Array) -> jax.Array:
    return apply(params, tokens, strength)


def _loss(params: Params, batch: Batch, *, apply: Apply, z_loss: float, total: jax.Array) -> tuple[jax.Array, LossSums]:
    sums = loss_sums(apply(params, batch["tokens"]), batch["targets"])
    objective = sums.cross_entropy + z_loss * sums.z if z_loss else sums.cross_entropy
    return objective / total, sums


def _accumulate(gradient: Callable[..., Any], params: Params, batch: Batch, accumulation: int) -> tuple[LossSums, Params]:
    # Microbatch i takes rows i, i + accumulation, …: where the batch is sharded over devices, every device keeps its own rows.
    micro = {name: jnp.swapaxes(x.reshape(-1, accumulation, *x.shape[1:]), 0, 1) for name, x in batch.items()}

    def add(carry: tuple[LossSums, Params], rows: Batch) -> tuple[tuple[LossSums, Params], None]:
        (_, sums), grads = gradient(params, rows)
        return jax.tree.map(jnp.add, carry, (sums, grads)), None

    start = LossSums(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, start, micro)[0]
