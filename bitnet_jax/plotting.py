"""Pictures of runs and of kernels, one call each. Every function returns a matplotlib Figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.training import logs, run_directory
from kernels_pallas.arg_specs import CHIPS, DECODE_ROWS, PREFILL_ROWS, ArgSpec, cost, floor_us
from kernels_pallas.block_config import tpu_blocks, tpu_vmem_bytes
from kernels_pallas.mosaic_gpu.blocks import SHARED_MEMORY, GpuConfig, shared_memory
from kernels_pallas.mosaic_gpu.blocks import blocks as gpu_blocks

ROWS = DECODE_ROWS + PREFILL_ROWS
_HOPPER = ("h100", "h200")


def _figure(width: float, height: float, title: str = "") -> Any:
    """A Figure that pyplot knows nothing of, so that nothing is left in memory when it is dropped."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


# --- runs ------------------------------------------------------------------------------------------------------------


def loss_curves(runs: Mapping[str, Path], title: str = "") -> Any:
    """Training loss against step for each run, with its evaluations as points.

    Args:
        runs: label → folder of a run.
        title: stands above the picture.
    """
    figure = _figure(7, 4)
    axes = figure.subplots()
    for label, directory in runs.items():
        lines = logs.read(directory / run_directory.METRICS)
        training = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        (drawn,) = axes.plot(*zip(*training, strict=True), label=f"{label}, training", linewidth=1.2)
        held_out = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss") is not None]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o--", color=drawn.get_color(), markersize=4, linewidth=0.8, label=f"{label}, held-out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


# --- numbers ---------------------------------------------------------------------------------------------------------


def bars(table: Mapping[str, Mapping[str, float | Sequence[float]]], unit: str, title: str = "", scale: str = "linear") -> Any:
    """Bars side by side, in groups. A sequence is drawn as its median, with its quartiles as an error bar.

    Args:
        table: group → name → number, or several measurements of it. A group may lack names.
        unit: what the numbers are; it stands beside the axis.
        title: stands above the picture.
        scale: linear or log.
    """
    names = list(dict.fromkeys(name for group in table.values() for name in group))
    figure = _figure(max(6, 1.5 + 0.3 * len(table) * (len(names) + 1)), 4)
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        places = [place for place, group in enumerate(table.values()) if name in group]
        numbers = [np.atleast_1d(np.asarray(group[name], np.float64)) for group in table.values() if name in group]
        low, middle, high = np.array([np.percentile(values, (25, 50, 75)) for values in numbers]).T
        errors = [middle - low, high - middle] if any(values.size > 1 for values in numbers) else None
        axes.bar(np.array(places) + (i + 0.5) * width - 0.4, middle, width, yerr=errors, capsize=2, label=name)
    axes.set_xticks(range(len(table)), list(table))
    axes.set(ylabel=unit, title=title, yscale=scale)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def against(expected: Any, found: Mapping[str, Any], title: str = "") -> Any:
    """Every number of several results against the one that it should be, a panel each, with how many differ.

    Args:
        expected: the right result.
        found: label → result of the same shape.
        title: stands above the picture.
    """
    figure = _figure(2.4 * len(found), 2.9, title)
    right = np.asarray(expected).reshape(-1)
    ends = [right.min(), right.max()]
    for axes, (label, result) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        values = np.asarray(result).reshape(-1)
        axes.plot(ends, ends, linewidth=0.8, color="0.6")
        axes.plot(right, values, ".", markersize=3)
        axes.set_title(f"{label}\n{np.count_nonzero(values != right):,} of {right.size:,} differ", fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.set_aspect("equal", "datalim")
    figure.supxlabel("expected", fontsize="small")
    figure.supylabel("found", fontsize="small")
    return figure


# --- kernels ---------------------------------------------------------------------------------------------------------


def roofline(calls: Mapping[str, ArgSpec], chips: Sequence[str]) -> Any:
    """Operations a second that chips allow at most, against the operations that a call has for each byte it moves.

    A roof rises with the bandwidth of the memory and ends at the rate of int8 products (of bfloat16 where there are none); its corner is
    where a call stops waiting for the one and waits for the other (Williams, Waterman and Patterson, 2009). A point is a call at its
    floor, `arg_specs.floor_us`.

    Args:
        calls: label → call; such labels are short.
        chips: names in `arg_specs.CHIPS`.
    """
    figure = _figure(8, 4.5, "What memory and matrix unit allow")
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
    figure = _figure(1 + 3 * len(matrices), 3.6, "Floors: packed weights (solid), bfloat16 weights (dashed)")
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
    figure = _figure(1 + 3 * len(chips), 7)
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
