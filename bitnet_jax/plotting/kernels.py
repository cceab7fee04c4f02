"""Pictures of kernels on chips: what memory and matrix unit allow, and what the kernels choose."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitnet_jax.plotting.figures import figure as new_figure
from kernels_pallas.arg_specs import CHIPS, DECODE_ROWS, PREFILL_ROWS, ArgSpec, cost, floor_us
from kernels_pallas.block_config import tpu_blocks, tpu_vmem_bytes
from kernels_pallas.mosaic_gpu.blocks import SHARED_MEMORY, GpuConfig, shared_memory
from kernels_pallas.mosaic_gpu.blocks import blocks as gpu_blocks

ROWS = DECODE_ROWS + PREFILL_ROWS
_HOPPER = ("h100", "h200")


def roofline(calls: Mapping[str, ArgSpec], chips: Sequence[str]) -> Any:
    """Operations a second that chips allow at most, against the operations that a call has for each byte it moves.

    A roof rises with the bandwidth of the memory and ends at the rate of int8 products (of bfloat16 where there are none); its corner is
    where a call stops waiting for the one and waits for the other (Williams, Waterman and Patterson, 2009). A point is a call at its
    floor, `arg_specs.floor_us`.

    Args:
        calls: label → call; such labels are short.
        chips: names in `arg_specs.CHIPS`.
    """
    figure = new_figure(8, 4.5, "What memory and matrix unit allow")
    axes = figure.subplots()
    intensities = [cost(spec).operations / cost(spec).bytes for spec in calls.values()]
    for chip in chips:
        peak = CHIPS[chip]
        top = peak.int8 or peak.bf16
        corner = top / peak.bandwidth
        ends = np.array([min(*intensities, corner) / 2, corner, max(*intensities, corner) * 2])
        (roof,) = axes.plot(ends, np.minimum(ends * peak.bandwidth, top), linewidth=1.2, label=chip)
        rates = [cost(spec).operations / floor_us(spec, chip) * 1e6 for spec in calls.values()]
        axes.plot(intensities, rates, "o", markersize=4, color=roof.get_color())
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte moved", ylabel="operations a second")
    for label, intensity in zip(calls, intensities, strict=True):
        axes.axvline(intensity, linewidth=0.5, color="0.7", zorder=0)
        axes.annotate(
            label, (intensity, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize="x-small", ha="right", va="bottom"
        )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def floors(matrices: Mapping[str, tuple[int, int]], chips: Sequence[str], rows: Sequence[int] = ROWS) -> Any:
    """The least time of a product on each chip over the rows of activations (M): packed weights solid, bfloat16 weights dashed.

    A filled point is a call whose operations take longer than its bytes. The dashed calls have activations in bfloat16 as well.

    Args:
        matrices: label → (K, N), as `arg_specs.MATRICES`; a panel each.
        chips: names in `arg_specs.CHIPS`.
        rows: values of M.
    """
    figure = new_figure(1 + 3 * len(matrices), 3.6, "Floors: packed weights (solid), bfloat16 weights (dashed)")
    panels = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for axes, (label, (k, n)) in zip(panels, matrices.items(), strict=True):
        for i, chip in enumerate(chips):
            peak, color = CHIPS[chip], f"C{i}"
            calls = [ArgSpec(m=m, k=k, n=n) for m in rows]
            packed = np.array([floor_us(call, chip) for call in calls])
            axes.plot(rows, packed, color=color, linewidth=1.2, label=chip)
            busy = packed > [1e6 * cost(call).bytes / peak.bandwidth * (1 + 1e-9) for call in calls]
            axes.scatter(rows, packed, s=14, color=color, facecolors=[color if full else "white" for full in busy], zorder=3)
            moved = np.array([2 * (k * n + m * k + m * n) for m in rows])
            dense = 1e6 * np.maximum(moved / peak.bandwidth, [cost(call).operations / peak.bf16 for call in calls])
            axes.plot(rows, dense, "--", color=color, linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="rows of activations (M)", title=f"{label}: {k} x {n}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("microseconds")
    panels[0].legend(fontsize="small")
    return figure


def blocks(matrices: Mapping[str, tuple[int, int]], chips: Sequence[str], rows: Sequence[int] = ROWS) -> Any:
    """What the Pallas kernels choose on each chip over the rows of activations (M): size of a block, and the fast memory that it takes.

    Fast memory is vector memory on a TPU and the shared memory of a block of threads on a GPU; the dashed line is all there is. On a TPU
    the figure is the upper bound by which a call is refused.

    Args:
        matrices: label → (K, N), as `arg_specs.MATRICES`; a line each.
        chips: names in `arg_specs.CHIPS`; a column of panels each.
        rows: values of M.

    Raises:
        ValueError: there is no kernel for a chip.
    """
    figure = new_figure(1 + 3 * len(chips), 7)
    panels = figure.subplots(3, len(chips), squeeze=False, sharex=True, sharey="row")
    for column, chip in zip(panels.T, chips, strict=True):
        limit = (CHIPS[chip].vmem or 0) if CHIPS[chip].platform == "tpu" else SHARED_MEMORY
        for label, (k, n) in matrices.items():
            taken = [_block(ArgSpec(m=m, k=k, n=n, platform=CHIPS[chip].platform, chip=chip)) for m in rows]
            for axes, values in zip(column, zip(*taken, strict=True), strict=True):
                axes.plot(rows, values, ".-", linewidth=1, label=label)
        column[2].axhline(limit / 2**20, linestyle="--", linewidth=0.8, color="0.4")
        column[0].set_title(f"{chip}: {'vector' if CHIPS[chip].platform == 'tpu' else 'shared'} memory")
        column[2].set_xlabel("rows of activations (M)")
        for axes in column:
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3)
    for axes, what in zip(panels[:, 0], ("rows in a block", "outputs in a block", "fast memory, MiB"), strict=True):
        axes.set_ylabel(what)
    panels[0, 0].legend(fontsize="small")
    return figure


def _block(spec: ArgSpec) -> tuple[int, int, float]:
    """Rows, outputs and MiB of fast memory of a call's block."""
    if spec.platform == "tpu":
        chosen = tpu_blocks(spec)
        return chosen.rows, chosen.outputs, tpu_vmem_bytes(spec, chosen) / 2**20
    if spec.chip not in _HOPPER:
        raise ValueError(f"chip={spec.chip!r} must be a TPU or one of {', '.join(_HOPPER)}, which there are kernels for")
    config = gpu_blocks(spec, GpuConfig(chip=spec.chip))
    return config.rows, config.outputs, shared_memory(config, spec.k, spec.out_dtype) / 2**20
