"""Pictures of kernels agree with the floors and blocks of the calls."""

from typing import Any

import numpy as np
import pytest

from bitnet_jax import plotting
from kernels_pallas.arg_specs import CHIPS, MATRICES, ArgSpec, cost, floor_us
from kernels_pallas.block_config import tpu_blocks, tpu_vmem_bytes
from kernels_pallas.mosaic_gpu.blocks import GpuConfig, rule, shared_memory
from tests.plotting.drawing import drawn, labels

SHAPES = {name: MATRICES[name] for name in ("2b4t/o", "2b4t/down")}


def test_calls_stand_on_the_roofs() -> None:
    calls = {f"M={m}": ArgSpec(m=m, k=2560, n=6912) for m in (1, 4096)}
    (axes,) = drawn(plotting.roofline(calls, ["v4", "v6e"])).axes
    assert labels(axes) == ["v4", "v6e"]
    assert [text.get_text() for text in axes.texts] == ["M=1", "M=4096"]
    roofs, points = axes.lines[0:4:2], axes.lines[1:4:2]
    for chip, roof, dots in zip(("v4", "v6e"), roofs, points, strict=True):
        peak, x = CHIPS[chip], [cost(spec).operations / cost(spec).bytes for spec in calls.values()]
        np.testing.assert_allclose(dots.get_xdata(), x)
        np.testing.assert_allclose(dots.get_ydata(), [cost(s).operations / (floor_us(s, chip) / 1e6) for s in calls.values()])
        assert dots.get_ydata()[0] == pytest.approx(x[0] * peak.bandwidth)  # memory decides
        assert dots.get_ydata()[1] == pytest.approx(peak.int8 or peak.bf16)
        np.testing.assert_allclose(np.interp(np.log(x), np.log(roof.get_xdata()), np.log(roof.get_ydata())), np.log(dots.get_ydata()))


def test_floors_are_those_of_the_calls() -> None:
    rows = (1, 32, 4096)
    figure = drawn(plotting.floors(SHAPES, ["v5e", "h200"], rows))
    assert labels(figure.axes[0]) == ["v5e", "h200"]
    for axes, (name, (k, n)) in zip(figure.axes, SHAPES.items(), strict=True):
        assert axes.get_title() == f"{name}: {k} x {n}"
        for chip, line in zip(("v5e", "h200"), axes.lines[::2], strict=True):
            np.testing.assert_allclose(line.get_ydata(), [floor_us(ArgSpec(m=m, k=k, n=n), chip) for m in rows])
        for chip, line in zip(("v5e", "h200"), axes.lines[1::2], strict=True):
            np.testing.assert_allclose(line.get_ydata()[0], 2e6 * (k * n + k + n) / CHIPS[chip].bandwidth)
            np.testing.assert_allclose(line.get_ydata()[-1], 2e6 * 4096 * k * n / CHIPS[chip].bf16)
    filled = [tuple(color) != (1, 1, 1, 1) for color in figure.axes[0].collections[0].get_facecolors()]
    assert filled == [False, False, True]  # 32 rows wait for memory, 4096 for the matrix unit


def test_blocks_are_those_that_the_kernels_choose() -> None:
    rows = (1, 33, 512)
    figure = drawn(plotting.blocks(SHAPES, ["v6e", "h200"], rows))
    panels = np.array(figure.axes).reshape(3, 2)
    assert labels(panels[0, 0]) == list(SHAPES)
    for i, (k, n) in enumerate(SHAPES.values()):
        tpu = [ArgSpec(m=m, k=k, n=n, platform="tpu", chip="v6e") for m in rows]
        chosen = [tpu_blocks(spec) for spec in tpu]
        memory = [tpu_vmem_bytes(spec, blocks) / 2**20 for spec, blocks in zip(tpu, chosen, strict=True)]
        expected: list[Any] = [[b.rows for b in chosen], [b.outputs for b in chosen], memory]
        assert [list(axes.lines[i].get_ydata()) for axes in panels[:, 0]] == expected
        configs: list[GpuConfig] = [rule(ArgSpec(m=m, k=k, n=n)) for m in rows]
        expected = [[c.rows for c in configs], [c.outputs for c in configs], [shared_memory(c, k, "bfloat16") / 2**20 for c in configs]]
        assert [list(axes.lines[i].get_ydata()) for axes in panels[:, 1]] == expected
    assert panels[2, 0].lines[-1].get_ydata()[0] == 128


def test_a_chip_without_a_kernel_has_no_blocks() -> None:
    with pytest.raises(ValueError, match="chip='a100' must be a TPU or one of h100, h200, which there are kernels for"):
        plotting.blocks(SHAPES, ["a100"])
