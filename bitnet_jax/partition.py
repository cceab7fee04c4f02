"""How arrays are cut up over a mesh of devices: its axes, one table for parameters, and what passes between the parts of a step.

A mesh has the axes `data` (the batch), `fsdp` (the batch, and parameters with their gradients and moments), `tensor` (the features of a
layer, as in Megatron) and `sequence` (positions of the residual stream). JAX cuts the program up by itself (GSPMD); the functions here say
where what lies. They act inside `jax.set_mesh` of such a mesh, and otherwise return what they are given.

`training/sharding.py` makes the mesh and places a run's state on it.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from bitnet_jax.array_types import Array, Float, Int8, Shaped
from bitnet_jax.config import Gather, QuantConfig
from bitnet_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = ("data", "fsdp")
"""The axes that share the rows of a batch."""

RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"head/kernel", P("fsdp", "tensor")),
    (r"(q|k|v|up|gate)/kernel", P("fsdp", "tensor")),  # each device of `tensor` computes some of the heads, or features
    (r"(o|down)/kernel", P("tensor", "fsdp")),  # and adds them up to the residual stream
    (r"\w*norm/scale", P(None)),
)
"""End of a parameter's path → how its last axes are cut up; the axis of stacked layers never is. The first that fits counts."""


class Placement(NamedTuple):
    """Where a kernel [K, N] lies, and how it comes to the devices that multiply by it.

    Attributes:
        gather: what travels.
        stored: how it is cut up in memory.
        whole: how it is cut up where it is multiplied: as `stored`, without fsdp.
    """

    gather: Gather
    stored: P
    whole: P


def spec(path: str, ndim: int) -> P:
    """How the parameter at `path`, names joined by '/', of `ndim` axes is cut up.

    Raises:
        UserError: no rule fits the path, or the parameter has fewer axes than its rule.
    """
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", path):
            if ndim < len(axes):
                raise UserError(f"parameter {path} has {ndim} axes: must have at least {len(axes)}, as its rule {axes} says")
            return P(*[None] * (ndim - len(axes)), *axes)
    raise UserError(f"parameter {path} fits no rule of how parameters are cut up: partition.RULES has {[p for p, _ in RULES]}")


def cut_axis(path: str, quant: QuantConfig) -> int | None:
    """The axis of the matrix at `path` along which `quant.weight_shards` cut it: that which devices of `tensor` share, -2, its inputs, or
    -1, its outputs; None where they do not cut.

    Raises:
        UserError: no rule fits the path.
    """
    return None if quant.weight_shards == 1 else list(spec(path, 2)).index("tensor") - 2


def active() -> bool:
    """Whether the surrounding mesh is one of these, whose program JAX cuts up by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.axis_names == AXES and all(kind is AxisType.Auto for kind in mesh.axis_types)


def placement(path: str, gather: Gather = Gather.LATENT) -> Placement | None:
    """Of the matrix at `path`; None where there is no mesh."""
    if not active():
        return None
    stored = spec(path, 2)
    return Placement(gather, stored, P(*[None if axis == "fsdp" else axis for axis in stored]))


# --- what passes between the parts -----------------------------------------------------------------------------------


def hidden(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The residual stream at a block's edge: rows over the batch's axes, positions over `sequence`."""
    return constrained(x, P(BATCH, "sequence", None)) if active() else x


def logits(x: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
    """Logits: as `hidden`, and the vocabulary over `tensor`."""
    return constrained(x, P(BATCH, "sequence", "tensor")) if active() else x


def everywhere(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """An array that every device, and so every process, is to have whole."""
    return constrained(x, P(*[None] * x.ndim)) if active() else x


def gathered_table(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """An embedding on every device of `fsdp`."""
    return constrained(table, P("tensor", None)) if active() else table


def stored(kernel: Float[Array, "K N"], placement: Placement | None) -> Float[Array, "K N"]:
    """A kernel or its gradient, cut up as in memory."""
    return kernel if placement is None else constrained(kernel, placement.stored)


def gathered(kernel: Float[Array, "K N"], placement: Placement | None) -> Float[Array, "K N"]:
    """A matrix on every device of `fsdp`, by sending it as it is."""
    return kernel if placement is None else constrained(constrained(kernel, placement.stored), placement.whole)


def gathered_codes(codes: Int8[Array, "K N"], placement: Placement | None) -> Int8[Array, "K N"]:
    """Ternary codes on every device of `fsdp`, by sending a byte for each, or for four (`Gather.TWO_BIT`)."""
    if placement is None or placement.gather is not Gather.TWO_BIT:
        return gathered(codes, placement)
    axis = 1 - list(placement.stored).index("fsdp")  # bytes hold codes along the axis that is not gathered: nothing is laid out anew
    moved = jnp.moveaxis(codes, axis, -1)
    four = (moved + jnp.int8(1)).astype(jnp.uint8).reshape(*moved.shape[:-1], -1, 4)
    shifts = jnp.array([0, 2, 4, 6], jnp.uint8)
    packed = jnp.sum(four << shifts[None, None], -1, dtype=jnp.uint8)
    packed = jnp.moveaxis(gathered(jnp.moveaxis(packed, -1, axis), placement), axis, -1)
    unpacked = ((packed[..., None] >> shifts[None, None]) & jnp.uint8(3)).astype(jnp.int8) - jnp.int8(1)
    return jnp.moveaxis(unpacked.reshape(moved.shape), -1, axis)


def constrained(x: Shaped[Array, "..."], spec: P) -> Shaped[Array, "..."]:
    """`x`, cut up as `spec` says; an axis that its size is no multiple of is left out."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, fitting(spec, x.shape, dict(mesh.shape)))


def fitting(spec: P, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """`spec` without the axes of which an array's sizes are no multiples."""

    def fits(axes: str | tuple[str, ...] | None, size: int) -> bool:
        count = 1
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            count *= sizes[axis]
        return size % count == 0

    return P(*[axes if fits(axes, size) else None for axes, size in zip(spec, shape, strict=True)])
