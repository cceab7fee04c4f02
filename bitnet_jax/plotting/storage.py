"""Pictures of how a model is stored: the codes in its bytes, the tensors in a file, the parts in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax import costs
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import DType, ModelConfig
from bitnet_jax.errors import UserError
from bitnet_jax.formats import safetensors
from bitnet_jax.plotting.figures import CODES
from bitnet_jax.plotting.figures import figure as new_figure
from kernels_pallas import Encoding, PackedTernary
from kernels_pallas.packing import block_bytes, planes

_KINDS = ("header", "embedding", "head", "packed weights", "weights", "scales", "norms")


def packed_block(packed: PackedTernary, output: int = 0, block: int = 0, title: str = "") -> Any:
    """One block of a packed column: a byte stands on the x axis with its value, and above it the weights that it holds, with their k.

    The planes of a block are consecutive k, so that a shift and a mask (or a division) take out neighbours together. Of rows in base 3,
    which are one block, the first 32 bytes are drawn. Bars mark padding.

    Args:
        packed: one matrix, without leading axes.
        output: the column n of the matrix.
        block: which block of 128 codes; base 3 has block 0 alone.
        title: stands above the picture.

    Raises:
        UserError: there is no such output or block, or `packed` is a stack.
    """
    size = block_bytes(packed.k, packed.encoding)
    codes = np.asarray(packed.codes)
    if codes.ndim != 2:
        raise UserError(f"packed has shape {packed.shape}: must be one matrix [K, N]")
    if not (0 <= output < codes.shape[0] and 0 <= block < codes.shape[1] // size):
        raise UserError(f"output={output}, block={block}: must be below {codes.shape[0]} and {codes.shape[1] // size}")
    row = codes[output, block * size : (block + 1) * size]
    weights = np.stack(planes(row, packed.encoding)).astype(np.int8) - 1
    k = (block * len(weights) + np.arange(len(weights))[:, None]) * size + np.arange(size)
    shown = min(size, 32)
    figure = new_figure(12, 1.5 + 0.45 * len(weights), title)
    axes = figure.subplots()
    for plane, place in np.ndindex(len(weights), shown):
        weight, number = int(weights[plane, place]), int(k[plane, place])
        hatch = "///" if number >= packed.k else None
        axes.add_patch(_square(place, plane, CODES[weight + 1], hatch))
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": "white" if weight else "black"}
        axes.text(place, plane - 0.1, f"{weight:+d}" if weight else "0", fontsize="small", **style)
        axes.text(place, plane + 0.32, str(number), fontsize=6, **style)
    two_bit = packed.encoding is Encoding.TWO_BIT
    names = [f"bits {7 - 2 * p}, {6 - 2 * p}" if two_bit else f"times {3 ** (4 - p)}" for p in range(len(weights))]
    axes.set_yticks(range(len(weights)), names)
    axes.set_xticks(range(shown), [f"{byte:02x}" for byte in row[:shown]], fontsize="x-small", family="monospace")
    axes.set(xlim=(-0.5, shown - 0.5), ylim=(len(weights) - 0.5, -0.5), xlabel="bytes, in base 16, in the order in which they are stored")
    axes.tick_params(length=0)
    return figure


def _square(x: float, y: float, color: str, hatch: str | None) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white", linewidth=1, hatch=hatch)


def file_layout(path: Path, title: str = "") -> Any:
    """A safetensors file from its first byte to its last, by kind of tensor, as its header says; the tensors' values are not read.

    Args:
        path: a model file of this project or of Hugging Face's.
        title: stands above the picture.

    Raises:
        UserError: the file is missing, or no safetensors file.
    """
    file = safetensors.File(path)
    first = min((info.start for info in file.tensors.values()), default=path.stat().st_size)
    spans = [("header", 0, first)]
    spans += [
        (_kind(name, info.dtype), info.start, info.stop) for name, info in sorted(file.tensors.items(), key=lambda item: item[1].start)
    ]
    unit, word = (1e6, "MB") if path.stat().st_size >= 1e6 else (1e3, "kB")
    figure = new_figure(11, 2.1, title)
    axes = figure.subplots()
    for i, kind in enumerate(_KINDS):
        of = [(start / unit, (stop - start) / unit) for name, start, stop in spans if name == kind and stop > start]
        if of:
            label = f"{kind}: {sum(size for _, size in of):,.4g} {word}"
            axes.broken_barh(of, (0, 1), facecolors=f"C{i}", edgecolor="white", linewidth=0.2, label=label)
    axes.set(xlabel=f"place in the file, {word}", xlim=(0, path.stat().st_size / unit), ylim=(0, 1), yticks=[])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure


def _kind(name: str, dtype: str) -> str:
    """What a tensor is, by the names of this project and of Hugging Face's."""
    last = name.replace("/", ".").split(".")[-1]
    if "norm" in name:
        return "norms"
    if last == "weight_scale" or name.endswith("kernel.scale"):
        return "scales"
    if "embed" in name:
        return "embedding"
    if "head" in name:
        return "head"
    return "packed weights" if dtype == "U8" else "weights"


def memory(config: ModelConfig, title: str = "", rest: DType = DType.BFLOAT16) -> Any:
    """Bytes of a model's parts in every form that its linear layers can be stored in, as `costs.bytes_by_part` counts them.

    Args:
        config: the model.
        title: stands above the picture.
        rest: type of embedding, head and norms beside packed layers.
    """
    forms = [form for form in costs.Storage if is_ternary(config) or form in (costs.Storage.FLOAT32, costs.Storage.BFLOAT16)]
    parts: Mapping[str, Sequence[int]] = {
        field.name: [getattr(costs.bytes_by_part(config, form, rest), field.name) for form in forms] for field in fields(costs.Parts)
    }
    totals = np.sum(list(parts.values()), 0)
    unit, word = (1e9, "GB") if totals.max() >= 1e9 else (1e6, "MB")
    figure = new_figure(8, 3.2, title)
    axes = figure.subplots()
    left = np.zeros(len(forms))
    for name, sizes in parts.items():
        if any(sizes):
            axes.barh(range(len(forms)), np.array(sizes) / unit, left=left / unit, label=name)
            left += sizes
    for place, total in enumerate(totals):
        axes.annotate(f" {total / unit:,.2f} {word}", (total / unit, place), va="center", fontsize="small")
    names = {costs.Storage.TWO_BIT: "2 bits a weight", costs.Storage.BASE3: "1.6 bits a weight"}
    axes.set_yticks(range(len(forms)), [names.get(form, form.value) for form in forms])
    axes.set(xlabel=word, xlim=(0, 1.15 * totals.max() / unit))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    return figure
