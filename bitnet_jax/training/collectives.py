"""What a compiled program sends between devices, read from its text (HLO)."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

_BYTES = {"pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")
_HEAD = re.compile(r"^\s*(ENTRY\s+)?%?([\w.\-]+)\s*(\(.*)?\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERATION = re.compile(rf"=\s+(\(?[^=]*?)\s*\b({'|'.join(_KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Traffic(NamedTuple):
    """Transfers of one kind and type in one run of a program.

    Attributes:
        count: how often, loops counted as often as they go round.
        bytes: what each device sends by the best known way (a ring), summed over them.
    """

    count: int
    bytes: float


def collectives(text: str) -> dict[tuple[str, str], Traffic]:
    """(kind, element type) → transfers in one run of the program with this HLO text, `jax.stages.Compiled.as_text()`.

    A group of n devices that has an array of S bytes in the end sends S (n - 1) / n each in an all-gather, twice that in an all-reduce, the
    same of what goes in in a reduce-scatter and an all-to-all, and S in a permutation. A loop whose length is not written counts once.
    """
    computations, entry = _computations(text)
    devices = math.prod(int(found[1]) for name in ("num_partitions", "replica_count") if (found := re.search(rf"{name}=(\d+)", text)))
    times: dict[str, int] = defaultdict(int)
    pending = [(entry, 1)]
    while pending:
        name, count = pending.pop()
        times[name] += count
        for line in computations.get(name, ()):
            trips = int(found[1]) if (found := _TRIPS.search(line)) else 1
            called = [*_CALLED.findall(line)]
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            pending += [(other, count * trips) for other in called]
    totals: dict[tuple[str, str], Traffic] = {}
    for name, lines in computations.items():
        for line in lines:
            if times[name] and (operation := _OPERATION.search(line)):
                for key, size in _sent(operation[1], operation[2], bool(operation[3]), _group(line, devices)):
                    before = totals.get(key, Traffic(0, 0.0))
                    totals[key] = Traffic(before.count + times[name], before.bytes + times[name] * size)
    return totals


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by its name, and the name of the first that runs."""
    found: dict[str, list[str]] = {}
    entry, here = "", ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = head[2]
            found[here] = []
            entry = here if head[1] else entry
        elif here:
            found[here].append(line)
    return found, entry


def _sent(shapes: str, kind: str, started: bool, group: int) -> list[tuple[tuple[str, str], float]]:
    """(kind, type) and bytes sent by a device, for each array of an operation."""
    arrays = [(dtype, _size(dtype, dims)) for dtype, dims in _ARRAY.findall(shapes) if dtype in _BYTES]
    if started and kind != "all-reduce":  # what begins a transfer gives operands and results, and on some platforms counters
        arrays = [array for array in arrays if array[1] > 4]
        arrays = arrays[len(arrays) // 2 :]
    share = (group - 1) / group
    ways = {"all-gather": share, "all-reduce": 2 * share, "reduce-scatter": group - 1.0, "all-to-all": share}
    return [((kind, dtype), size * ways.get(kind, 1.0)) for dtype, size in arrays]


def _size(dtype: str, dims: str) -> float:
    size = _BYTES[dtype]
    for dim in dims.split(","):
        size *= int(dim) if dim else 1
    return size


def _group(line: str, devices: int) -> int:
    """Devices that take part in one transfer: from replica_groups={{0,1},{2,3}} or [2,2]<=[4]; all where none are named."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    return devices
