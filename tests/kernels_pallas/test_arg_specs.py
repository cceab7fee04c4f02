"""The named shapes that tests, benchmarks and tuning share."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import Encoding, pack
from kernels_pallas.arg_specs import CHIPS, DECODE_ROWS, MATRICES, PREFILL_ROWS, ArgSpec, chip_name, cost, default_device, floor_us, named


@pytest.mark.parametrize(
    ("model", "layers", "parameters"),
    [
        ("700m", 24, 679_477_248),  # linear parameters 4 h^2 L + 3 h f L, FAQ of b1.58
        ("1.3b", 24, 1_207_762_944),
        ("3b", 26, 3_221_504_000),
        ("2b4t", 30, 30 * (2 * 2560 * (2560 + 640) + 3 * 2560 * 6912)),
        ("7b", 32, 32 * (4 * 4096**2 + 3 * 4096 * 11008)),
    ],
)
def test_the_matrices_of_a_model_hold_its_linear_parameters(model: str, layers: int, parameters: int) -> None:
    matrices = {name: k * n for name, (k, n) in MATRICES.items() if name.startswith(f"{model}/")}
    assert set(matrices) == {f"{model}/{matrix}" for matrix in ("qkv", "o", "gate_up", "down")}
    assert layers * sum(matrices.values()) == parameters


def test_every_matrix_comes_with_every_number_of_rows() -> None:
    specs = dict(named())
    assert len(specs) == len(MATRICES) * (len(DECODE_ROWS) + len(PREFILL_ROWS))
    spec = specs["2b4t/qkv/16"]
    assert (spec.m, spec.k, spec.n) == (16, 2560, 3840)
    assert {s.m for _, s in named(rows=(3,))} == {3}


# --- floors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "weights", "activations", "outputs"),
    [
        (ArgSpec(m=3, k=200, n=10), 10 * 64 + 4, 3 * 200 + 3 * 4, 3 * 10 * 2),  # two blocks of 32 bytes a row
        (ArgSpec(m=3, k=200, n=10, x_dtype="bfloat16", out_dtype="float32"), 10 * 64 + 4, 3 * 200 * 2, 3 * 10 * 4),
        (ArgSpec(m=1, k=200, n=10, group=50, encoding=Encoding.BASE3), 10 * 40 + 4 * 4 * 10, 200 + 4, 20),
    ],
)
def test_bytes_by_hand(spec: ArgSpec, weights: int, activations: int, outputs: int) -> None:
    found = cost(spec)
    assert (found.weights, found.activations, found.outputs) == (weights, activations, outputs)
    assert found.bytes == weights + activations + outputs
    assert found.operations == 2 * spec.m * 200 * 10


def test_the_weights_of_a_call_are_those_of_a_packed_matrix() -> None:
    packed = pack(np.zeros((300, 7), np.int8), np.ones((6, 7), np.float32))
    assert cost(ArgSpec(m=1, k=300, n=7, group=50)).weights == packed.nbytes


def test_the_floor_is_the_larger_of_two_times() -> None:
    specs = dict(named())
    few, many = specs["2b4t/o/1"], specs["2b4t/o/4096"]
    assert floor_us(few, "v6e") == pytest.approx(cost(few).bytes / 1.64e12 * 1e6)
    assert floor_us(many, "v6e") == pytest.approx(2 * 4096 * 2560**2 / 1.84e15 * 1e6)
    # Activations that are multiplied as bfloat16: where they come so, and where there are no int8 products.
    assert floor_us(dataclasses.replace(many, x_dtype="bfloat16"), "v6e") == pytest.approx(2 * 4096 * 2560**2 / 9.2e14 * 1e6)
    assert floor_us(many, "v4") == pytest.approx(2 * 4096 * 2560**2 / 2.75e14 * 1e6)


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.platform == "tpu"])
def test_rates_of_tpus_are_those_that_jax_has(name: str) -> None:
    chip = CHIPS[name]
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name), chip.cores)  # of one core
    assert chip.bandwidth == pytest.approx(info.mem_bw_bytes_per_second * chip.cores, rel=0.01)
    assert chip.bf16 == pytest.approx(info.bf16_ops_per_second * chip.cores, rel=0.01)
    assert (chip.int8 or 0) == pytest.approx(info.int8_ops_per_second * chip.cores, rel=0.01)
    assert chip.hbm == pytest.approx(info.hbm_capacity_bytes * chip.cores, rel=0.01)
    assert chip.vmem == info.vmem_capacity_bytes


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU7x", "7x"), ("NVIDIA H100 80GB HBM3", "h100"), ("TPU v9", None), ("cpu", None)],
)
def test_a_device_is_known_by_its_kind(kind: str, name: str | None) -> None:
    assert chip_name(kind) == name


def test_the_default_device_is_the_one_that_was_chosen() -> None:
    last = jax.devices()[-1]
    assert default_device() == jax.devices()[0]
    with jax.default_device(last):
        assert default_device() == last
    with jax.default_device("cpu"):
        assert default_device().platform == "cpu"
