"""AdamW as an optax chain whose learning rate and weight decay follow the number of the update, and which parameters decay."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bitnet_jax.config import OptimizerConfig
from bitnet_jax.training import schedules

Params = Any
NOT_DECAYED = ("scale", "embed")
"""Names in a parameter's path that take it out of weight decay: the gains of norms, and the embedding."""


class Average(NamedTuple):
    """State of the link that averages the parameters; as the path of a leaf ends as its parameter's, both are cut up over devices alike."""

    average: Params


class Optimizer(NamedTuple):
    """A gradient transformation, and the schedules that it follows.

    Attributes:
        transform: optax transformation; its `update` takes the keyword `step`, the number of the update from 1.
        learning_rate: number of the update → learning rate.
        weight_decay: number of the update → weight decay.
    """

    transform: optax.GradientTransformationExtraArgs
    learning_rate: schedules.Rate
    weight_decay: schedules.Rate


def make_optimizer(config: OptimizerConfig, steps: int) -> Optimizer:
    """AdamW for a run of `steps` updates: gradients clipped to a global norm, Adam's direction, decoupled weight decay, learning rate.

        g ← g * min(1, clip_norm / |g|);   p ← p - lr(t) * (m / (sqrt(v) + eps) + wd(t) * p * decays(p))

    with bias-corrected m and v (b1.58 FAQ, Table 2: betas (0.9, 0.95)). The schedules are read at the number of the update that the
    caller passes, not at a counter of their own, so that a skipped step does not shift them against the data.
    The moments are float32, as the parameters are. With `ema_decay` = d the state also holds a ← d * a + (1 - d) * p of the new parameters,
    from the first ones on (`averaged`).
    """
    rate, decay = schedules.learning_rate(config, steps), schedules.weight_decay(config, steps)
    links = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    links.append(optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=jnp.float32))
    links.append(_decay_and_scale(rate, decay))
    if config.ema_decay is not None:
        links.append(_average(config.ema_decay))
    return Optimizer(optax.with_extra_args_support(optax.chain(*links)), rate, decay)


def copies(config: OptimizerConfig) -> int:
    """Trees of the parameters' size and type in a run's state: the parameters, two moments, and their average if one is kept."""
    return 3 if config.ema_decay is None else 4


def averaged(state: Any) -> Params:
    """The moving average of the parameters that the state of an optimizer with `ema_decay` holds."""
    return next(leaf for leaf in jax.tree.leaves(state, is_leaf=_is_average) if _is_average(leaf)).average


def decays(params: Params) -> Any:
    """A tree like `params` of booleans: whether weight decay acts on that parameter.

    Decayed are the matrices: every linear layer, and an untied `head`, which is a product like the others and which nothing else
    bounds. Not decayed are the gains of norms (`scale`) and the embedding (`embed`), tied or not. The papers do not say; leaving
    both out is common practice.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: not any(_name(key) in NOT_DECAYED for key in path), params)


def _is_average(leaf: Any) -> bool:
    return isinstance(leaf, Average)


def _average(decay: float) -> optax.GradientTransformationExtraArgs:
    """The last link of a chain: passes the updates on, and averages the parameters that they lead to."""

    def init(params: Params) -> Average:
        return Average(jax.tree.map(jnp.copy, params))  # a buffer of its own, as donation needs

    def update(updates: Any, state: Any, params: Params = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        new = optax.apply_updates(params, updates)
        return updates, Average(jax.tree.map(lambda mean, param: decay * mean + (1.0 - decay) * param, state.average, new))

    return optax.GradientTransformationExtraArgs(init, update)


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", key)))


def _decay_and_scale(rate: schedules.Rate, decay: schedules.Rate) -> optax.GradientTransformationExtraArgs:
    def init(params: Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Params = None, **extra: Any) -> tuple[Any, Any]:
        step = extra["step"]
        lr, wd = rate(step), decay(step)

        def scaled(direction: jax.Array, param: jax.Array, decayed: bool) -> jax.Array:
            return -lr * (direction + wd * param if decayed else direction)

        return jax.tree.map(scaled, updates, params, decays(params)), state

    return optax.GradientTransformationExtraArgs(init, update)
