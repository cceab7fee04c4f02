"""The machines that plans are made for: how many devices of which kind, and how fast each computes, reads, and sends to the others."""

import math
import os
import re
from dataclasses import dataclass

from bitnet_jax.errors import UserError
from kernels_pallas.arg_specs import CHIPS

TPUS = {name: name if name != "7x" else "tpu7x" for name, chip in CHIPS.items() if chip.platform == "tpu"}
"""Names of TPUs in `CHIPS` → in libtpu."""
GPUS = tuple(name for name, chip in CHIPS.items() if chip.platform == "gpu")
HOST = ("cpu", "none")

# Bytes a second that a device can send, over all its links together. TPU: half of the bidirectional figures (400, 1200 and 800 GB/s a chip)
# of Google's pages on v5e, v5p and v6e; those of v4 and 7x were not looked up. GPU: half of what NVIDIA's data sheets say of NVLink, from
# memory; between the machines of a cluster one port of 400 Gbit/s for each GPU (200 for the A100), as in NVIDIA's DGX.
_LINKS = {"v5e": 2e11, "v5p": 6e11, "v6e": 4e11, "a100": 3e11, "h100": 4.5e11, "h200": 4.5e11, "b200": 9e11}
_NETWORK = {"a100": 2.5e10, "h100": 5e10, "h200": 5e10, "b200": 5e10}


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Which devices: `v5p:8x8x8`, `h200:8x4` (8 in each of 4 machines), `cpu`.

    Attributes:
        name: as it was given.
        platform: tpu, gpu or cpu.
        chip: name in `CHIPS`; None for a CPU.
        devices: what JAX calls devices: chips, but halves of them of 7x.
        hosts: machines, as far as it matters how they are connected: 1 for TPUs, whose links do not end with a machine.
    """

    name: str
    platform: str
    chip: str | None
    devices: int
    hosts: int = 1

    @property
    def libtpu_name(self) -> str:
        """What libtpu calls it."""
        assert self.chip is not None
        return f"{TPUS[self.chip]}:{self.name.split(':')[1]}"


def topology(name: str) -> Topology:
    """The machines called `name`.

    Raises:
        UserError: the name is not understood.
    """
    if name in HOST:
        return Topology(name="cpu", platform="cpu", chip=None, devices=1)
    chip, _, shape = name.partition(":")
    chip = "7x" if chip == TPUS["7x"] else chip
    if chip not in CHIPS:
        raise UserError(f"topology {name!r} is unknown: must be cpu, or one of {', '.join(CHIPS)} with its shape, as v5p:8x8x8 or h200:8x4")
    platform = CHIPS[chip].platform
    wanted = (2, 3) if platform == "tpu" else (1, 2)
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", shape) or shape.count("x") + 1 not in wanted:
        example = {"tpu": "v6e:16x16 or v5p:8x8x8", "gpu": "h100:8, or h200:8x4 for 8 in each of 4 machines"}[platform]
        raise UserError(f"topology {name!r} must have a shape of {wanted[0]} or {wanted[1]} numbers, as {example}")
    sizes = [int(size) for size in shape.split("x")]
    if platform == "gpu":
        return Topology(name=name, platform="gpu", chip=chip, devices=math.prod(sizes), hosts=math.prod(sizes[1:]))
    devices = math.prod(sizes) * (2 if chip == "7x" else 1)
    return Topology(name=f"{chip}:{shape}", platform="tpu", chip=chip, devices=devices)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device; None is not known.

    Attributes:
        flops: operations a second of bfloat16 products.
        memory: bytes a second from memory.
        link: bytes a second that it sends to other devices.
        capacity: bytes of memory.
        source: where the figures are from.
    """

    flops: float | None
    memory: float
    link: float | None
    capacity: float
    source: str


def rates(topology: Topology, *, link: float | None = None, memory: float | None = None) -> Rates:
    """Peak rates of a device of `topology`; `link` and `memory`, in bytes a second, stand in for those of the tables.

    Of a CPU the bandwidth is measured on this machine, if it is not given.

    Raises:
        UserError: a rate is not positive.
        NotImplementedError: the native library that measures cannot be made here.
    """
    for name, value in (("link", link), ("memory", memory)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}={value} bytes a second must be positive and finite")
    if topology.chip is None:
        if memory is None:
            from bitnet_jax.cpu import read_bandwidth

            memory, source = 1e9 * read_bandwidth(), "bandwidth measured on this machine now"
        else:
            source = "bandwidth as given"
        capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.nan
        return Rates(flops=None, memory=memory, link=link, capacity=capacity, source=source)
    chip = CHIPS[topology.chip]
    between = _LINKS.get(topology.chip) if topology.hosts == 1 else _NETWORK[topology.chip]
    source = "JAX's table, links by Google's pages" if topology.platform == "tpu" else "NVIDIA's data sheets"
    changed = [name for name, value in (("link", link), ("memory", memory)) if value is not None]
    return Rates(
        flops=chip.bf16,
        memory=memory or chip.bandwidth,
        link=link or between,
        capacity=chip.hbm,
        source=source + (f"; {' and '.join(changed)} as given" if changed else ""),
    )
