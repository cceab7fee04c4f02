"""The devices of a run: the mesh they form, and where on it a run's state and batches lie. Which parameter is cut up how: `partition`."""

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bitnet_jax import partition
from bitnet_jax.config import Gather, MeshConfig, TrainConfig
from bitnet_jax.errors import UserError
from bitnet_jax.transformer import parameter_shapes

Tree = Any


def sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each axis of the mesh, all together `devices`.

    Raises:
        UserError: the axes do not multiply to that.
    """
    named = {"data": config.data, "tensor": config.tensor, "sequence": config.sequence}
    others = math.prod(named.values())
    text = " * ".join(f"{name}={size}" for name, size in named.items())
    if config.fsdp is None and devices % others:
        raise UserError(f"mesh {text} needs a multiple of {others} devices: there are {devices}")
    fsdp = devices // others if config.fsdp is None else config.fsdp
    if fsdp * others != devices:
        raise UserError(f"mesh {text} * fsdp={fsdp} is {fsdp * others} devices: must be the {devices} there are")
    return {axis: (named | {"fsdp": fsdp})[axis] for axis in partition.AXES}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of `devices`, all there are where they are not given; None for a single one, which needs none.

    Neighbours along `sequence` and `tensor` are neighbours among the devices, so that these axes stay within a host as long as they can.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = sizes(config, len(devices))
    if len(devices) == 1:
        return None
    kinds = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), partition.AXES, axis_types=kinds, devices=devices)


def inside(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """What programs of this mesh are traced in."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def check(config: TrainConfig, shape: dict[str, int]) -> None:
    """Holds a run to the mesh whose axes have these sizes.

    Raises:
        UserError: batch, window or a size of the model is no multiple of the devices that share it.
    """
    _check_rows(config.batch_size, config.accumulation, shape)
    if config.data.seq_len % shape["sequence"]:
        raise UserError(f"seq_len={config.data.seq_len} must be a multiple of sequence={shape['sequence']}")
    for path, leaf in _leaves(parameter_shapes(config.model)):
        spec = partition.spec(path, leaf.ndim)
        for axis, size in zip(spec, leaf.shape, strict=True):
            if axis == "tensor" and size % shape["tensor"]:
                raise UserError(f"parameter {path} has shape {leaf.shape}: {size} must be a multiple of tensor={shape['tensor']}")
            four = config.mesh.gather is Gather.TWO_BIT and axis == "tensor" and "fsdp" in spec and path.startswith("block")
            if four and size % (4 * shape["tensor"]):
                raise UserError(
                    f"gather=two_bit sends four codes a byte: {size} of {path} must be a multiple of 4 * tensor={shape['tensor']}"
                )


def place(tree: Tree, mesh: Mesh | None) -> Tree:
    """Shapes and types of a run's state with the places where it lies: parameters by `partition.RULES`, moments as their parameters.

    A size that is no multiple of `fsdp` is not cut up, so that such a parameter lies whole on every device.

    Raises:
        UserError: no rule fits a parameter.
    """
    if mesh is None:
        return tree

    def one(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        axes = partition.spec(_name(path), leaf.ndim) if leaf.ndim else P()
        spec = partition.fitting(axes, leaf.shape, dict(mesh.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(one, tree)


def uncut(tree: Tree, mesh: Mesh) -> list[str]:
    """Paths of the parameters that a rule would cut up over `fsdp`, and that lie whole since no size is a multiple of it."""
    return [
        path
        for path, leaf in _leaves(tree)
        if mesh.shape["fsdp"] > 1 and "fsdp" in partition.spec(path, leaf.ndim) and "fsdp" not in leaf.sharding.spec
    ]


def shardings(tree: Tree) -> Tree:
    """The places of a tree that `place` made; None where there is no mesh."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


# --- batches ---------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Which rows of a batch this process reads: part `index` of `count` equal parts."""

    index: int
    count: int


def rows(mesh: Mesh | None, batch_size: int) -> Rows:
    """The rows whose devices this process has.

    Raises:
        UserError: the devices cannot share the rows, or those of this process are not one of equal parts of the batch.
    """
    if mesh is None:
        return Rows(0, 1)
    _check_rows(batch_size, 1, mesh.shape)
    if jax.process_count() == 1:
        return Rows(0, 1)
    places = NamedSharding(mesh, P(partition.BATCH)).addressable_devices_indices_map((batch_size,))
    spans = sorted({index[0].indices(batch_size)[:2] for index in places.values() if index is not None})
    start, stop = spans[0][0], spans[-1][1]
    size = stop - start
    if any(before[1] != after[0] for before, after in itertools.pairwise(spans)) or start % size or batch_size % size:
        raise UserError(f"the devices of process {jax.process_index()} hold rows {spans} of {batch_size}: must be one of equal parts")
    return Rows(start // size, batch_size // size)


def _check_rows(batch_size: int, accumulation: int, shape: Mapping[str, int]) -> None:
    if batch_size // accumulation % (shape["data"] * shape["fsdp"]):
        of = f"batch_size={batch_size}" + (f" / accumulation={accumulation}" if accumulation > 1 else "")
        raise UserError(f"{of} must be a multiple of data={shape['data']} * fsdp={shape['fsdp']}: these devices share the rows")


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh | None, part: Rows) -> dict[str, jax.Array]:
    """A batch on the devices, from the rows [B / count, T] that this process has read."""
    if mesh is None:
        return jax.device_put(batch)
    sharding = batch_sharding(mesh)

    def one(local: np.ndarray) -> jax.Array:
        first = part.index * local.shape[0]

        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(part.count * local.shape[0])
            return local[start - first : stop - first, index[1]]

        return jax.make_array_from_callback((part.count * local.shape[0], *local.shape[1:]), sharding, piece)

    return {name: one(local) for name, local in batch.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch [B, T] lies."""
    return NamedSharding(mesh, P(partition.BATCH, "sequence"))


def _leaves(tree: Tree) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
