"""The training step and the decode step compiled for TPUs on a machine that has none, by libtpu (extra `tpu-aot`). Nothing is allocated.

The programs are those that `bitnet-jax train` and `generate` run: `training.step.compile_step` and `inference.decoding.decode`.
"""

import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from bitnet_jax import params as trees
from bitnet_jax import partition
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import ModelConfig, TrainConfig
from bitnet_jax.errors import UserError
from bitnet_jax.inference import decoding
from bitnet_jax.inference.sampling import GREEDY, Controls
from bitnet_jax.planning.formulas import tree_bytes
from bitnet_jax.planning.hardware import Topology
from bitnet_jax.training import loop, sharding
from bitnet_jax.training.collectives import Traffic, collectives
from bitnet_jax.training.optimizer import make_optimizer
from bitnet_jax.training.step import compile_step
from bitnet_jax.transformer import KVCache, Transformer, parameter_shapes
from kernels_pallas import Encoding, PackedTernary, bytes_per_row

# What a virtual machine with a TPU would tell; and several processes may compile at a time.
_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Of buffers that were placed, and of those that XLA sees beforehand cannot be ("HLO temporaries", arguments included).
_EXHAUSTED = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler says of a program, for one device.

    Attributes:
        arguments: bytes of what goes in, by kind.
        temporary: bytes beside arguments and results while it runs; None where it does not fit.
        output: bytes of results that do not take the place of arguments; None where it does not fit.
        total: bytes in all, those that it would need where it does not fit.
        fits: whether the compiler found room.
        message: what it said where it did not.
        counted: operations and bytes by XLA's own count, in which the body of a loop counts once, however often it runs.
        sent: (kind, element type) → transfers of one run.
        seconds: of compiling.
        compiler: its name and version.
    """

    arguments: dict[str, int]
    temporary: int | None = None
    output: int | None = None
    total: int
    fits: bool
    message: str | None = None
    counted: dict[str, float] = field(default_factory=dict)
    sent: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    seconds: float
    compiler: str


def devices(topology: Topology) -> list[Any]:
    """The devices of a TPU topology, as libtpu describes them.

    Raises:
        UserError: libtpu is not there, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"plans for {topology.name} need libtpu: pip install 'bitnet-jax[tpu-aot]', or --no-compile plans by formula")
    try:
        found = described(topology.libtpu_name)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"libtpu knows no topology {topology.name}: {' '.join(str(error).split())[:200]}") from None
    if len(found) != topology.devices:
        raise UserError(f"topology {topology.name} has {len(found)} devices for libtpu: must be {topology.devices}, as its shape says")
    return found


def described(name: str) -> list[Any]:
    """The devices of what libtpu calls `name`; raises what libtpu does where it knows none."""
    from jax.experimental import topologies

    for setting, value in _SETTINGS.items():
        os.environ.setdefault(setting, value)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def make_mesh(config: TrainConfig, devices: list[Any]) -> Mesh | None:
    """`sharding.make_mesh`; where JAX has no way to lay such a mesh into the links of the chips, the devices in libtpu's order."""
    try:
        return sharding.make_mesh(config.mesh, devices)
    except (NotImplementedError, ValueError, AssertionError):
        shape = sharding.sizes(config.mesh, len(devices))
        array = np.array(devices, dtype=object).reshape(tuple(shape.values()))
        return Mesh(array, partition.AXES, axis_types=(AxisType.Auto,) * len(shape))


def train(config: TrainConfig, devices: list[Any]) -> Program:
    """The training step of a run on these devices.

    Raises:
        UserError: the mesh does not fit the devices or the run.
    """
    sharding.check(config, sharding.sizes(config.mesh, len(devices)))
    mesh = make_mesh(config, devices)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with sharding.inside(mesh):
        state = sharding.place(jax.eval_shape(lambda: loop.init_run(config, optimizer)), mesh)
        batch: Any = loop.batch_spec(config, mesh)
        if mesh is None:
            state, batch = _on(devices[0], (state, batch))
        kinds = {"parameters": tree_bytes(state.params), "moments": tree_bytes(state.opt_state)}
        kinds["batch and counters"] = tree_bytes((state, batch)) - sum(kinds.values())
        return _program(lambda: compile_step(config, loop.model_apply(config), optimizer, state, batch), kinds, devices[0])


def decode(config: ModelConfig, device: Any, batch: int, context: int) -> Program:
    """The decode step on one device, with packed weights, of `batch` rows with room for `context` tokens; greedy.

    Products of packed weights are those of the implementation "xla".
    """
    config = config.for_inference
    model = Transformer(config, implementation="xla")
    params = packed_shapes(config)

    def ids(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = jax.eval_shape(lambda: KVCache.empty(config, batch, context))
    state = decoding.State(cache, ids(batch, context), ids(), ids(batch, dtype=jnp.bool_), ids(dtype=jnp.bool_), None)
    plan = decoding.Plan(ids(batch, dtype=jnp.uint32), ids(batch, dtype=jnp.uint32), Controls.of([GREEDY]), ids(1), ids())
    params, state, plan, limit = _on(device, (params, state, plan, ids()))
    kinds = {"packed matrices": 0, "embedding, head and norms": 0}
    for path, leaf in trees.leaves(params):
        kinds["packed matrices" if trees.is_bitlinear(path) else "embedding, head and norms"] += tree_bytes(leaf)
    kinds |= {"keys and values": tree_bytes((state.cache.k, state.cache.v))}

    def compiled() -> Any:
        step = jax.jit(functools.partial(decoding.decode, model), donate_argnums=2)
        return step.trace(params, None, state, plan, limit).lower(lowering_platforms=(device.platform,)).compile()

    return _program(compiled, kinds, device)


def packed_shapes(config: ModelConfig, encoding: Encoding = Encoding.TWO_BIT) -> trees.Params:
    """The tree that `params.pack` makes of a model, as shapes and types; that of the parameters where they are not ternary."""

    def one(path: tuple[str, ...], leaf: Any) -> Any:
        if not (is_ternary(config) and trees.is_bitlinear(path)):
            return leaf
        *layers, k, n = leaf.shape
        scales = config.quant.scale_shape(k, n, partition.cut_axis("/".join(path), config.quant))
        codes = jax.ShapeDtypeStruct((*layers, n, bytes_per_row(k, encoding)), jnp.uint8)
        scale = jax.ShapeDtypeStruct((*layers, *scales), jnp.float32)
        return PackedTernary(codes, scale, k=k, encoding=encoding)  # pyright: ignore[reportArgumentType]

    return trees.map_leaves(one, parameter_shapes(config))


def _on(device: Any, tree: Any) -> Any:
    here = SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)


def _program(compile_: Callable[[], Any], arguments: dict[str, int], device: Any) -> Program:
    begun = time.perf_counter()
    compiler = (f"libtpu {version('libtpu')}, " if device.platform == "tpu" else "") + f"jax {jax.__version__}"
    try:
        compiled = compile_()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _without_room(str(error), arguments, time.perf_counter() - begun, compiler)
    seconds = time.perf_counter() - begun
    found, counted = compiled.memory_analysis(), compiled.cost_analysis() or {}
    output = found.output_size_in_bytes - found.alias_size_in_bytes
    filling = found.argument_size_in_bytes - sum(arguments.values())
    return Program(
        arguments=arguments | {"filling and small things": filling},
        temporary=found.temp_size_in_bytes,
        output=output,
        total=found.argument_size_in_bytes + output + found.temp_size_in_bytes,
        fits=True,
        counted={name: counted[name] for name in ("flops", "bytes accessed") if name in counted},
        sent=collectives(compiled.as_text()),
        seconds=seconds,
        compiler=compiler,
    )


def _without_room(message: str, arguments: dict[str, int], seconds: float, compiler: str) -> Program:
    """What a program would need that the compiler found no room for: its message has the bytes."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used = next((found for pattern in _EXHAUSTED if (found := pattern.search(message))), None)
    said = f"needs {used[1]}{used[2]}iB of {used[3]}{used[4]}iB" if used else " ".join(message.split())[:200]
    total = int(float(used[1]) * units[used[2]]) if used else sum(arguments.values())
    return Program(arguments=arguments, total=total, fits=False, message=f"does not fit: {said}", seconds=seconds, compiler=compiler)
