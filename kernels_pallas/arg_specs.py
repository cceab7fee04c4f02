"""What a call of `ternary_matmul` looks like, the named shapes that tests, benchmarks and tuning share, and how fast a call can be.

The floor of a call is the larger of two times: its bytes at the bandwidth of a chip's memory, and its operations at the peak rate of
the chip's matrix unit. Nothing that is computed on that chip can take less.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from kernels_pallas.packing import Encoding, bytes_per_row


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One call, x [M, K] times w [K, N], as far as an implementation needs to know it to say whether it can run."""

    m: int
    """Rows of activations (M), leading axes flattened."""
    k: int
    """Input features (K)."""
    n: int
    """Outputs (N)."""
    x_dtype: str = "int8"
    """Type of the activations: int8, or float32, bfloat16 or float16 where only the weights are quantised."""
    out_dtype: str = "bfloat16"
    """Type of the result."""
    encoding: Encoding = Encoding.TWO_BIT
    """How the weights are packed."""
    group: int | None = None
    """Input features that share a weight scale; None is one scale per matrix."""
    platform: str = "cpu"
    """Where the call is to run: cpu, gpu or tpu. That of JAX's default device, unless a config names a chip."""
    chip: str | None = None
    """Name in `CHIPS` of what it is to run on; None where that is not known."""


MATRICES: dict[str, tuple[int, int]] = {
    f"{model}/{matrix}": shape
    for model, hidden, ffn, kv in (  # hidden size, feed-forward size, key (and value) features
        ("700m", 1536, 4096, 1536),  # FAQ of b1.58, table of model shapes
        ("1.3b", 2048, 5460, 2048),
        ("3b", 3200, 8640, 3200),
        ("2b4t", 2560, 6912, 640),  # 2B4T, released configuration
        ("7b", 4096, 11008, 4096),  # a4.8, table of model shapes
    )
    for matrix, shape in (
        ("qkv", (hidden, hidden + 2 * kv)),
        ("o", (hidden, hidden)),
        ("gate_up", (hidden, 2 * ffn)),
        ("down", (ffn, hidden)),
    )
}
"""(K, N) of the linear layers of published models, 'model/matrix'; q, k, v are one product, and so are gate and up."""

DECODE_ROWS = (1, 2, 4, 8, 16, 32)
"""Values of M when every sequence of a batch adds one token."""

PREFILL_ROWS = (128, 512, 4096)
"""Values of M when prompts are read."""


def named(rows: tuple[int, ...] = DECODE_ROWS + PREFILL_ROWS) -> Iterator[tuple[str, ArgSpec]]:
    """Every matrix with every M in `rows`, as ('model/matrix/M', spec)."""
    for name, (k, n) in MATRICES.items():
        for m in rows:
            yield f"{name}/{m}", ArgSpec(m=m, k=k, n=n)


# --- floors ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates of what JAX calls one device. Those of 7x are of half a chip, which is two devices; of v4 and v5p of two cores."""

    platform: str
    """tpu or gpu."""
    kinds: tuple[str, ...]
    """Values of `jax.Device.device_kind`, or their beginnings."""
    bandwidth: float
    """Bytes a second between memory (HBM) and chip."""
    bf16: float
    """Operations a second of bfloat16 products, dense; a multiplication and an addition are two."""
    int8: float | None
    """The same of int8 products; None where the matrix unit has none, so that int8 is multiplied as bfloat16."""
    hbm: float
    """Bytes of memory (HBM)."""
    vmem: int | None = None
    """Bytes of a TPU core's vector memory."""
    cores: int = 1
    """TPU cores that share a program's grid."""


_MIB = 2**20
# TPU: JAX's own table, `jax.experimental.pallas.tpu.get_tpu_info_for_chip` (a test holds this one to it).
# GPU: NVIDIA's data sheets of the SXM modules, without sparsity, from memory; of the A100 the one with 80 GB.
CHIPS: dict[str, Chip] = {
    "v4": Chip(platform="tpu", kinds=("TPU v4",), bandwidth=1.23e12, bf16=2.75e14, int8=None, hbm=3.44e10, vmem=16 * _MIB, cores=2),
    "v5e": Chip(
        platform="tpu", kinds=("TPU v5 lite", "TPU v5e"), bandwidth=8.2e11, bf16=1.97e14, int8=3.94e14, hbm=1.72e10, vmem=128 * _MIB
    ),
    "v5p": Chip(
        platform="tpu", kinds=("TPU v5", "TPU v5p"), bandwidth=2.46e12, bf16=4.59e14, int8=9.18e14, hbm=1.03e11, vmem=64 * _MIB, cores=2
    ),
    "v6e": Chip(
        platform="tpu", kinds=("TPU v6 lite", "TPU v6e"), bandwidth=1.64e12, bf16=9.2e14, int8=1.84e15, hbm=3.44e10, vmem=128 * _MIB
    ),
    "7x": Chip(platform="tpu", kinds=("TPU7x",), bandwidth=3.7e12, bf16=1.155e15, int8=None, hbm=1.03e11, vmem=64 * _MIB),
    "a100": Chip(platform="gpu", kinds=("NVIDIA A100",), bandwidth=2.039e12, bf16=3.12e14, int8=6.24e14, hbm=8e10),
    "h100": Chip(platform="gpu", kinds=("NVIDIA H100",), bandwidth=3.35e12, bf16=9.89e14, int8=1.979e15, hbm=8e10),
    "h200": Chip(platform="gpu", kinds=("NVIDIA H200",), bandwidth=4.8e12, bf16=9.89e14, int8=1.979e15, hbm=1.41e11),
    "b200": Chip(platform="gpu", kinds=("NVIDIA B200",), bandwidth=8e12, bf16=2.25e15, int8=4.5e15, hbm=1.8e11),
}
"""By the name that configs and results use."""


def default_device() -> Any:
    """The device that a computation is compiled for where its arrays do not say: that of `jax.default_device`, else the first."""
    chosen: Any = jax.config.jax_default_device  # a device, or the name of a platform
    return chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]


def chip_name(kind: str) -> str | None:
    """Name in `CHIPS` of a device from its `jax.Device.device_kind`; None where it has no row."""
    for name, chip in CHIPS.items():
        # A GPU's kind goes on with its form and memory ("NVIDIA H100 80GB HBM3"); that of a TPU is the whole name.
        if kind in chip.kinds or (chip.platform == "gpu" and kind.startswith(chip.kinds)):
            return name
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes that must cross memory once, by kind, and operations of the product."""

    weights: int
    """Packed codes and scales."""
    activations: int
    """x, and the step of each of its rows."""
    outputs: int
    """The result."""
    operations: int
    """2 M K N."""

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weights + self.activations + self.outputs


SIZES = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a value, by the types' names in `ArgSpec`."""


def cost(spec: ArgSpec) -> Cost:
    """What `spec` has to read, to write and to compute, however it is implemented."""
    scales = spec.n * (spec.k // spec.group) if spec.group else 1
    return Cost(
        weights=spec.n * bytes_per_row(spec.k, spec.encoding) + 4 * scales,
        activations=spec.m * spec.k * SIZES[spec.x_dtype] + (4 * spec.m if spec.x_dtype == "int8" else 0),
        outputs=spec.m * spec.n * SIZES[spec.out_dtype],
        operations=2 * spec.m * spec.k * spec.n,
    )


def floor_us(spec: ArgSpec, chip: str) -> float:
    """Microseconds below which no implementation of `spec` can be on `CHIPS[chip]`; the launch is not counted."""
    peak, found = CHIPS[chip], cost(spec)
    rate = (peak.int8 if spec.x_dtype == "int8" else None) or peak.bf16
    return 1e6 * max(found.bytes / peak.bandwidth, found.operations / rate)
