"""The GPU kernels compiled to Hopper's machine code without a GPU: needs the extra `gpu-aot` (`make test-gpu-aot`)."""

from typing import Any

import pytest

from experiments import kernels_gpu
from kernels_pallas.arg_specs import named
from kernels_pallas.mosaic_gpu.blocks import SHARED_MEMORY

pytestmark = pytest.mark.gpu_aot

CALLS: dict[str, dict[str, Any]] = {
    name: {"m": spec.m, "k": spec.k, "n": spec.n}
    for name, spec in named()
    if name in ("2b4t/qkv/1", "2b4t/down/16", "1.3b/down/32", "2b4t/o/128", "3b/gate_up/512", "7b/down/4096")
}
CALLS["tall tiles"] = {**CALLS["7b/down/4096"], "blocks": {"rows": 256, "outputs": 128, "stages": 2}}
CALLS["long steps"] = {**CALLS["7b/down/4096"], "blocks": {"rows": 128, "outputs": 128, "inputs": 512, "stages": 2}}
CALLS["whole"] = {**CALLS["2b4t/qkv/1"], "blocks": {"rows": 8, "outputs": 64, "splits": 1}}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    return dict(zip(CALLS, kernels_gpu.compiled(list(CALLS.values())), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_kernels_compile_without_spills_within_shared_memory(name: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[name]
    assert report["architecture"] == "sm_90a"
    assert report["kernel"].startswith("ternary_matmul_mosaic_gpu_" + ("pipelined" if report["blocks"]["splits"] is None else "split"))
    assert (report["stack_bytes"], report["spill_bytes"]) == (0, 0)
    assert report["instructions"]["LDL"] == report["instructions"]["STL"] == 0
    assert report["warnings"] == []  # such as products that wait for one another for want of registers
    assert report["shared_memory"] == report["blocks"]["shared_memory"] <= SHARED_MEMORY - 1024


@pytest.mark.parametrize("name", CALLS)
def test_tensor_cores_multiply_what_the_copy_engine_brought(name: str, reports: dict[str, dict[str, Any]]) -> None:
    counts, blocks = reports[name]["instructions"], reports[name]["blocks"]
    heights = max(1, blocks["outputs"] // 128) if blocks["splits"] is None else 1
    assert counts["IGMMA"] % (heights * 4 * blocks["inputs"] // 128) == 0  # 4 planes, 32 bytes of each an instruction
    assert counts["IGMMA"] > 0
    assert counts["UTMALDG"] >= 2
    assert counts["UTMASTG"] == 1
    # Unpacking 16 codes of a thread takes an exclusive or, four masks and three shifts; the assembler has little else to do with masks.
    assert 5 * counts["IGMMA"] <= counts["LOP3"] <= 5 * counts["IGMMA"] + 60


@pytest.mark.parametrize("name", CALLS)
def test_nothing_large_is_done_around_the_kernel(name: str, reports: dict[str, dict[str, Any]]) -> None:
    operations = reports[name]["operations"]
    assert operations.count("custom-call") == 1
    assert set(operations) == {"custom-call", "fusion"}
    assert len(operations) <= 4
