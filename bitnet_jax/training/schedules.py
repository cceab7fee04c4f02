"""Learning rate and weight decay over a run, as pure functions of the number of the update.

`t` counts updates from 1 to `steps` (T): the first update already moves the parameters, and the last one uses the final rate.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bitnet_jax.config import OptimizerConfig, Schedule

Step = int | jax.Array
Rate = Callable[[Step], jax.Array]
"""Number of the update, from 1, as a Python or traced integer → float32 scalar."""

TWO_STAGES = (Schedule.TWO_STAGE_LINEAR, Schedule.TWO_STAGE_COSINE)


def learning_rate(config: OptimizerConfig, steps: int) -> Rate:
    """The learning rate of update t of `steps` = T updates.

    With P the peak, F the final rate, W the warm-up and d = (t - W) / (T - W) the share of the run after warm-up:

        t < W             P * t / W
        LINEAR            F + (P - F) * (1 - d)
        COSINE            F + (P - F) * (1 + cos(pi * d)) / 2
        CONSTANT          P
        TWO_STAGE_LINEAR  as LINEAR; P is the first peak while t < `stage_switch` * T and the second afterwards, so that the rate
                          jumps down from one line to the other (FAQ, Table 2 and Figure 1c)
        TWO_STAGE_COSINE  as COSINE while t < s = `stage_switch` * T, then F + (P2 - F) * (1 + cos(pi * (t - s) / (T - s))) / 2
                          with P2 the second peak (2B4T, section on pre-training)

    2B4T publishes two cosines with an abrupt fall about half-way and a much lower second peak, but neither the peaks nor where the first
    cosine would end. Here it is drawn over the whole run and cut at the switch, so that the fall is abrupt.
    """
    first, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps
    second = first if config.second_learning_rate is None else config.second_learning_rate
    switch = _update_at(config.stage_switch, steps)

    def rate(step: Step) -> jax.Array:
        t = _update(step, steps)
        peak = jnp.where(t < switch, first, second) if config.schedule is Schedule.TWO_STAGE_LINEAR else jnp.float32(first)
        done = (t - warmup) / (steps - warmup)
        match config.schedule:
            case Schedule.TWO_STAGE_LINEAR | Schedule.LINEAR:
                decayed = final + (peak - final) * (1.0 - done)
            case Schedule.COSINE:
                decayed = _cosine(peak, final, done)
            case Schedule.TWO_STAGE_COSINE:
                cooldown = _cosine(jnp.float32(second), final, (t - switch) / max(steps - switch, 1))
                decayed = jnp.where(t < switch, _cosine(peak, final, done), cooldown)
            case Schedule.CONSTANT:
                decayed = peak
        return jnp.where(t < warmup, peak * t / max(warmup, 1), decayed).astype(jnp.float32)

    return rate


def weight_decay(config: OptimizerConfig, steps: int) -> Rate:
    """The decoupled weight decay of update t of `steps` = T updates.

    With w = `weight_decay` and s = `weight_decay_switch` * T (`stage_switch` where that is none; TriLM: 2/3):

        TWO_STAGE_LINEAR  w while t < s, then 0 (FAQ, Table 2)
        TWO_STAGE_COSINE  w * (1 + cos(pi * t / s)) / 2 while t < s, then 0
        others            w

    2B4T publishes "a cosine schedule peaking at 0.1" in stage one and zero in stage two, but not the cosine's ends: here it
    falls from w at the start to zero at the switch.
    """
    value = config.weight_decay
    switch = _update_at(config.stage_switch if config.weight_decay_switch is None else config.weight_decay_switch, steps)

    def rate(step: Step) -> jax.Array:
        t = _update(step, steps)
        if config.schedule not in TWO_STAGES:
            return jnp.full_like(t, value)
        linear = config.schedule is Schedule.TWO_STAGE_LINEAR
        stage_one = jnp.full_like(t, value) if linear else _cosine(jnp.float32(value), 0.0, t / max(switch, 1))
        return jnp.where(t < switch, stage_one, 0.0).astype(jnp.float32)

    return rate


def quant_strength(config: OptimizerConfig) -> Rate:
    """How far a BitLinear is quantised at update t: min(t / W, 1) with W = `quant_warmup_steps`, which must be positive.

    Hugging Face's blog on 1.58 bits, which calls it lambda and tried W = T / 2 and 1000 of 5000; exponential and sigmoid ramps were worse
    there, and are not here.
    """
    return lambda step: jnp.minimum(jnp.asarray(step).astype(jnp.float32) / config.quant_warmup_steps, 1.0)


def _update(step: Step, steps: int) -> jax.Array:
    return jnp.clip(jnp.asarray(step), 0, steps).astype(jnp.float32)


def _update_at(share: float, steps: int) -> int:
    """First update of the part of the run that begins at `share`; rounded first, so that 2/3 of 300 is 200 in spite of binary fractions."""
    return math.ceil(round(share * steps, 6))


def _cosine(peak: jax.Array, final: float, done: jax.Array) -> jax.Array:
    return final + (peak - final) * (1.0 + jnp.cos(jnp.pi * done)) / 2.0
