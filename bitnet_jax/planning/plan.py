"""A plan: the memory of a training step or of serving, and what the machine's peak rates allow at the best.

Estimates are rooflines, which no run was held to. A step takes at least the longest of three times, of computing, of memory and of links,
if they overlap wholly, and about their sum if they do not overlap at all; a run lies between, or above where its products miss the peak.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from bitnet_jax import costs
from bitnet_jax.benchmark.traffic import traffic
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import ModelConfig, TrainConfig
from bitnet_jax.errors import UserError
from bitnet_jax.planning import compiled, formulas
from bitnet_jax.planning.hardware import Rates, Topology
from bitnet_jax.training import sharding
from bitnet_jax.training.collectives import Traffic

FORMULA = "by formula, not compiled"
_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one step on each device; None where a rate is not known.

    Attributes:
        compute: operations at the peak rate of bfloat16 products.
        memory: bytes at the bandwidth of memory.
        links: bytes sent over all links at once.
    """

    compute: float | None
    memory: float | None
    links: float | None

    @property
    def least(self) -> float | None:
        """The longest of them: everything overlaps. None where one is not known."""
        return None if None in (self.compute, self.memory, self.links) else max(self._known)

    @property
    def most(self) -> float | None:
        """Their sum: nothing overlaps."""
        return None if None in (self.compute, self.memory, self.links) else sum(self._known)

    @property
    def _known(self) -> list[float]:
        return [time for time in (self.compute, self.memory, self.links) if time is not None]


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory of a program on one device.

    Attributes:
        source: how memory, and what a program sends, was found: by which compiler, or by formula.
        memory: bytes by kind.
        total: bytes in all.
        capacity: bytes of memory there are.
        fits: whether they are enough.
        message: what the compiler said where they are not.
        compile_seconds: None where nothing was compiled.
    """

    source: str
    memory: dict[str, int]
    total: int
    capacity: float
    fits: bool
    message: str | None
    compile_seconds: float | None


def _room(by_formula: dict[str, int], program: compiled.Program | None, temporaries: str, rates: Rates) -> Room:
    """As the compiler says of `program`, or the formula where nothing was compiled; `temporaries` is what to call those."""
    if program is None:
        total = sum(by_formula.values())
        return Room(
            source=FORMULA,
            memory=by_formula,
            total=total,
            capacity=rates.capacity,
            fits=total <= rates.capacity,
            message=None,
            compile_seconds=None,
        )
    memory = program.arguments
    if program.temporary is not None and program.output is not None:
        memory = memory | {temporaries: program.temporary, "results": program.output}
    return Room(
        source=f"compiled ahead of time, {program.compiler}",
        memory=memory,
        total=program.total,
        capacity=rates.capacity,
        fits=program.fits,
        message=program.message,
        compile_seconds=program.seconds,
    )


@dataclass(frozen=True, kw_only=True)
class Training(Room):
    """A training step on a machine; everything but `tokens_per_second`, `mfu` and `days` is of one device.

    Attributes:
        flops: operations of a step, by formula.
        bytes: read and written in memory in a step, by formula.
        counted: operations and bytes by XLA's count, in which the body of a loop counts once.
        sent: (kind, element type) → transfers in a step.
        times: seconds of a step.
        tokens_per_second: of the whole machine, if nothing overlaps and if everything does.
        mfu: model FLOP utilisation, likewise.
        days: for the tokens asked for, likewise; None where none were.
    """

    flops: formulas.Flops
    bytes: float
    counted: dict[str, float]
    sent: dict[tuple[str, str], Traffic]
    times: Times
    tokens_per_second: tuple[float, float] | None
    mfu: tuple[float, float] | None
    days: tuple[float, float] | None


def training(
    config: TrainConfig, topology: Topology, rates: Rates, devices: list[Any] | None = None, budget: float | None = None
) -> Training:
    """The plan of a training step.

    Args:
        config: the run.
        topology: the machine.
        rates: of one device of it.
        devices: to compile for (`compiled.devices`); None is by formula.
        budget: tokens of the whole run, for `days`.

    Raises:
        UserError: the mesh does not fit the machine or the run, or the budget is not positive.
    """
    if budget is not None and not 0 < budget < math.inf:
        raise UserError(f"tokens={budget} must be positive and finite")
    shape = sharding.sizes(config.mesh, topology.devices)
    sharding.check(config, shape)
    by_formula, flops, moved = formulas.memory(config, shape), formulas.flops(config, topology.devices), formulas.step_bytes(config, shape)
    program = None if devices is None else compiled.train(config, devices)
    sent = program.sent if program is not None and program.fits else formulas.collectives(config, shape)
    room = _room(dataclasses.asdict(by_formula), program, "gradients, activations and other temporaries", rates)
    bytes_sent = sum(one.bytes for one in sent.values())
    times = Times(
        compute=None if rates.flops is None else flops.computed / rates.flops,
        memory=moved / rates.memory,
        links=0.0 if not bytes_sent else None if rates.link is None else bytes_sent / rates.link,
    )
    tokens, pace = formulas.tokens(config), None
    if times.least is not None and times.most is not None and room.fits:
        pace = tokens / times.most, tokens / times.least
    each = flops.model / tokens
    return Training(
        **vars(room),
        flops=flops,
        bytes=moved,
        counted={} if program is None else program.counted,
        sent=sent,
        times=times,
        tokens_per_second=pace,
        mfu=None if pace is None or rates.flops is None else (pace[0] * each / rates.flops, pace[1] * each / rates.flops),
        days=None if pace is None or budget is None else (budget / pace[0] / _DAY, budget / pace[1] / _DAY),
    )


@dataclass(frozen=True, kw_only=True)
class Serving(Room):
    """One decode step of packed weights on one device.

    Attributes:
        batch: rows that each get a token.
        context: tokens there is room for.
        bytes: read in a step: every weight once, and a full cache of keys and values.
        flops: operations of a step.
        times: seconds of a step.
        tokens_per_second: of all rows, at the most.
    """

    batch: int
    context: int
    bytes: int
    flops: float
    times: Times
    tokens_per_second: float | None


def serving(config: ModelConfig, rates: Rates, batch: int, context: int, device: Any | None = None, table: str = "float32") -> Serving:
    """The plan of a decode step on one device, with weights of 2 bits, or float32 where they are not ternary.

    Args:
        config: the model's configuration.
        rates: of the device.
        batch: rows that each get a token.
        context: tokens there is room for.
        device: to compile for; None is by formula, where memory is weights and cache alone.
        table: what the vocabulary's product reads: "float32", as packed models keep it, or "int8", the copy that native products on a
            CPU make of it (`cpu.quantize_table`), which is in memory beside it.

    Raises:
        UserError: `batch` or `context` is below 1.
    """
    if batch < 1 or context < 1:
        raise UserError(f"decode_batch={batch} and context={context} must be at least 1")
    storage = costs.Storage.TWO_BIT if is_ternary(config) else costs.Storage.FLOAT32
    parts = costs.bytes_by_part(config, storage)
    cache = costs.kv_cache_bytes(config, batch, context)
    one = traffic(config, storage, table, context, 0)
    program = None if device is None else compiled.decode(config, device, batch, context)
    by_formula = {"matrices": parts.linear, "embedding, head and norms": parts.total - parts.linear, "keys and values": cache}
    if table != "float32":
        by_formula["table of the first pass"] = one.head
    room = _room(by_formula, program, "temporaries", rates)
    moved = one.linear + one.head + batch * one.cache
    flops = float(batch * costs.forward_flops(config, context))
    # A CPU's peak is not in the tables: a step of few rows waits for memory there.
    times = Times(compute=0.0 if rates.flops is None else flops / rates.flops, memory=moved / rates.memory, links=0.0)
    return Serving(
        **vars(room),
        batch=batch,
        context=context,
        bytes=moved,
        flops=flops,
        times=times,
        tokens_per_second=batch / times.least if times.least and room.fits else None,
    )


def to_json(value: Any) -> Any:
    """A plan as JSON values: transfers as a list, times with `least` and `most`."""
    if isinstance(value, Times):
        return dataclasses.asdict(value) | {"least": value.least, "most": value.most}
    if dataclasses.is_dataclass(value):
        return {part.name: to_json(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, dict) and any(isinstance(one, Traffic) for one in value.values()):
        return [{"kind": kind, "type": dtype, **one._asdict()} for (kind, dtype), one in sorted(value.items())]
    if isinstance(value, float) and math.isnan(value):
        return None
    return list(value) if isinstance(value, tuple) else value
