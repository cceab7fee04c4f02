"""The TPU kernel compiled for real TPUs on a machine that has none (`make test-tpu-aot`; needs libtpu, the extra `tpu-aot`)."""

import dataclasses
import re

import pytest

from experiments.tpu_aot import TOPOLOGIES, compile_for, spec_of
from kernels_pallas import mosaic_tpu
from kernels_pallas.arg_specs import MATRICES, ArgSpec, cost, named

pytestmark = pytest.mark.tpu_aot
SPECS = dict(named())
each_chip = pytest.mark.parametrize("chip", TOPOLOGIES)
# Every matrix once, every number of rows once; the form with the quantiser where rows are few, which is what it is for.
QUICK = [
    *[(f"{matrix}/16", "int8") for matrix in MATRICES],
    *[(f"2b4t/qkv/{m}", "int8") for m in (1, 2, 4, 8, 32, 128, 512, 4096)],
    ("2b4t/down/1", "fused"),
    ("2b4t/qkv/32", "fused"),
    ("2b4t/down/16", "bf16 activations"),
]
ALL = [
    *[(name, "int8") for name in SPECS],
    *[(name, form) for name, spec in SPECS.items() for form in ("fused", "bf16 activations") if spec.m in (1, 16, 128, 512)],
]


def hold(chip: str, name: str, form: str) -> None:
    """Compiles a call, which fails if vector memory does not suffice, and holds what the compiler says of it to `arg_specs.cost`."""
    spec = spec_of(SPECS[name], chip, form)
    compiled = compile_for(chip, spec, form)
    memory, text, found = compiled.memory_analysis(), compiled.as_text(), cost(spec)
    kernel = "quantize" if form == "fused" else mosaic_tpu.operand_dtype(spec)
    assert set(re.findall(r"%(ternary_matmul_\w+?)(?:\.\d+)? = ", text)) == {f"ternary_matmul_tpu_{kernel}"}, name
    # Weights that lie as they are read are not copied in HBM. XLA may load them into another memory, S(n), beforehand.
    assert not re.search(rf"= [us]8\[{spec.n},[\d,]*\]{{(?![^}}]*S\()[^}}]*}} (?!bitcast|parameter)\w", text), name
    # Arguments and result take the bytes that the floor is computed from, but for tiles that are filled up: 8 x 128 words a matrix.
    rows, tile = -spec.m % 32, 8 * 128 * 4
    filling = rows * (spec.k * 2 + spec.n * 2) + (-spec.n % 128) * (found.weights // spec.n + 2 * spec.m) + 4 * tile
    assert 0 <= memory.argument_size_in_bytes + memory.output_size_in_bytes - found.bytes <= filling, name
    # Beside them memory holds the steps of the rows, and what is loaded beforehand of the arguments.
    assert memory.temp_size_in_bytes <= (spec.m + rows) * 128 * 4 + memory.argument_size_in_bytes, name


@each_chip
@pytest.mark.parametrize(("name", "form"), QUICK)
def test_representative_calls_compile(name: str, form: str, chip: str) -> None:
    hold(chip, name, form)


@pytest.mark.slow
@each_chip
@pytest.mark.parametrize(("name", "form"), [case for case in ALL if case not in QUICK])
def test_all_other_named_calls_compile(name: str, form: str, chip: str) -> None:
    hold(chip, name, form)


@pytest.mark.parametrize("name", ["2b4t/down/16", "7b/qkv/512"])
def test_operations_are_those_that_xla_counts(name: str) -> None:
    spec = SPECS[name]
    counted = compile_for("v6e", spec, "xla bf16").cost_analysis()["flops"]
    assert counted == pytest.approx(cost(spec).operations, rel=0.01)
    kernel = compile_for("v6e", spec_of(spec, "v6e", "int8"), "int8").cost_analysis()
    assert kernel["flops"] == pytest.approx(counted, rel=0.01)  # what XLA is told of the kernel, by which it schedules


def test_blocks_that_do_not_fit_are_refused_before_they_are_compiled() -> None:
    spec = dataclasses.replace(ArgSpec(m=16, k=200_000, n=256), platform="tpu", chip="v4")
    with pytest.raises(NotImplementedError, match="bytes of vector memory"):
        compile_for("v4", spec, "int8")
