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
_CONDITION = re.compile(r"\bwhile\(.*condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"=\s+s32\[\]\S*\s+constant\((\d+)\)")
_COMMENT = re.compile(r"/\*.*?\*/")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")


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

    For TPUs, a transfer that goes on beside other work is written in each fusion that it goes beside, under one channel, and counts once;
    an all-reduce of which each device keeps its part is a reduce-scatter; and the length of a loop is a constant of its condition.
    """
    computations, entry = _computations(_COMMENT.sub("", text))
    devices = math.prod(int(found[1]) for name in ("num_partitions", "replica_count") if (found := re.search(rf"{name}=(\d+)", text)))
    times: dict[str, int] = defaultdict(int)
    pending = [(entry, 1)]
    while pending:
        name, count = pending.pop()
        times[name] += count
        for line in computations.get(name, ()):
            trips = _trips(line, computations)
            called = [*_CALLED.findall(line)]
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            pending += [(other, count * trips) for other in called]
    totals: dict[tuple[str, str], Traffic] = {}
    under_way: set[str] = set()
    for name, lines in computations.items():
        for line in lines:
            if times[name] and (operation := _OPERATION.search(line)):
                if name.startswith(("async_collective_fusion", "fused_computation")) and (channel := _CHANNEL.search(line)):
                    if channel[1] in under_way:
                        continue
                    under_way.add(channel[1])
                group = _group(line, devices)
                for key, size in _sent(operation[1], operation[2], bool(operation[3]), group):
                    if name.startswith("all-reduce-scatter"):
                        key, size = ("reduce-scatter", key[1]), size / 2
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


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop goes round: as it says, or as the one constant says that its condition compares its counter with."""
    if found := _TRIPS.search(line):
        return int(found[1])
    if found := _CONDITION.search(line):
        condition = computations.get(found[1], [])
        constants = [constant[1] for other in condition if (constant := _CONSTANT.search(other))]
        if len(constants) == 1 and any("ROOT" in other and "direction=LT" in other for other in condition):
            return int(constants[0])
    return 1


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
    """Devices that take part in one transfer: from replica_groups={{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'a'}; all where none are
    named."""
    if found := _MESH.search(line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # an axis, or a part of one: 'a':(1)2
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    return devices
