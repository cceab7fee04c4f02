"""Losses of a language model. Sums over tokens are returned, not means, so that adding over microbatches and devices is exact."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bitnet_jax.array_types import Array, Float, Float32, Int32

IGNORED = -1
"""Target of a position that has no loss, such as padding."""


class LossSums(NamedTuple):
    """Sums over the positions that have a target.

    Attributes:
        cross_entropy: sum of -log p(target), in nats.
        z: sum of (log Z)^2, Z the normaliser of the softmax.
        tokens: how many positions were summed, int32.
    """

    cross_entropy: Float32[Array, ""]
    z: Float32[Array, ""]
    tokens: Int32[Array, ""]


def loss_sums(logits: Float[Array, "*batch V"], targets: Int32[Array, "*batch"]) -> LossSums:
    """Cross entropy and z-loss of `logits` [..., V] against `targets` [...], where `IGNORED` targets count for nothing.

        log Z = logsumexp(logits);   cross entropy = log Z - logits[target]

    in float32 whatever the type of the logits.
    """
    logits = logits.astype(jnp.float32)
    counted = targets != IGNORED
    log_z = jax.nn.logsumexp(logits, -1)
    picked = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], -1)[..., 0]
    return LossSums(
        cross_entropy=jnp.sum(jnp.where(counted, log_z - picked, 0.0)),
        z=jnp.sum(jnp.where(counted, jnp.square(log_z), 0.0)),
        tokens=count(targets),
    )


def count(targets: Int32[Array, "*batch"]) -> Int32[Array, ""]:
    """How many targets have a loss."""
    return jnp.sum(targets != IGNORED, dtype=jnp.int32)
