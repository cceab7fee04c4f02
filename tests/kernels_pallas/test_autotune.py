"""Tuning: candidates that fit, a file that grows call by call, and what is said where nothing can be tuned."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import ArgSpec, PackedLayer, autotune, bench, block_config
from kernels_pallas.api import IMPLEMENTATIONS
from kernels_pallas.arg_specs import named
from kernels_pallas.mosaic_gpu.blocks import SHARED_MEMORY, GpuConfig, rule, shared_memory


def entry(m: int, **blocks: Any) -> dict[str, Any]:
    return {"m": m, "k": 128, "n": 64, "x_dtype": "int8", "blocks": blocks, "microseconds": 1.0}


def test_candidates_fit_and_begin_with_those_by_rule() -> None:
    for name, spec in named((1, 16, 128, 512, 4096)):
        candidates = autotune.gpu_candidates(spec)
        assert candidates[0] == rule(spec), name
        assert len(candidates) == len(set(candidates)) > 10, name
        assert all(shared_memory(c, spec.k, spec.out_dtype) < SHARED_MEMORY for c in candidates), name
        blocks = autotune.tpu_candidates(spec)
        assert len(blocks) == len(set(blocks)) > 3, name
        assert len({c.outputs for c in blocks}) > 3, name
        assert all(c.rows and c.outputs and c.outputs < spec.n + 128 for c in blocks), name


def test_what_was_measured_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_config, "TUNED", tmp_path)
    block_config._entries.cache_clear()
    path = tmp_path / f"{block_config.file_name('NVIDIA H200')}.json"
    first, second = (
        {"rows": 8, "outputs": 64, "inputs": 256, "splits": 4, "stages": 2},
        {"rows": 16, "outputs": 128, "inputs": 512, "splits": 2},
    )
    autotune.record(path, "mosaic_gpu", entry(1, **first))
    autotune.record(path, "mosaic_gpu", entry(16, rows=8, splits=1))
    autotune.record(path, "mosaic_gpu", entry(16, **second))  # in place of the one before
    autotune.record(path, "mosaic_tpu", entry(1, rows=32))
    spec = ArgSpec(m=9, k=128, n=64)
    assert block_config.tuned("mosaic_gpu", spec, "NVIDIA H200", GpuConfig) == GpuConfig(**second)
    assert block_config.tuned("mosaic_gpu", ArgSpec(m=1, k=128, n=64), "NVIDIA H200", GpuConfig) == GpuConfig(**first)
    assert block_config.tuned("mosaic_gpu", ArgSpec(m=17, k=128, n=64), "NVIDIA H200", GpuConfig) is None
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["jax"] == jax.__version__
    assert len(content["mosaic_gpu"]) == 2
    assert not list(tmp_path.glob("*.tmp"))
    block_config._entries.cache_clear()


def test_a_run_goes_on_where_it_was_unless_jax_is_another(tmp_path: Path) -> None:
    path, spec = tmp_path / "gpu.json", ArgSpec(m=1, k=128, n=64)
    assert not autotune.has(path, "mosaic_gpu", spec)
    autotune.record(path, "mosaic_gpu", entry(1, rows=8))
    assert autotune.has(path, "mosaic_gpu", spec)
    assert not autotune.has(path, "mosaic_gpu", ArgSpec(m=2, k=128, n=64))
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "jax": "0.1"}), encoding="utf-8")
    assert not autotune.has(path, "mosaic_gpu", spec)
    autotune.record(path, "mosaic_gpu", entry(2, rows=8))
    assert [e["m"] for e in json.loads(path.read_text(encoding="utf-8"))["mosaic_gpu"]] == [2]


def test_the_fastest_right_candidate_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast, wrong = GpuConfig(rows=8, splits=1), GpuConfig(rows=16, splits=1), GpuConfig(rows=32, splits=1)
    monkeypatch.setattr(bench, "operands", lambda spec: {})
    monkeypatch.setattr(bench, "checked", lambda data: None)
    monkeypatch.setattr(bench, "ours", lambda implementation, config: config)
    monkeypatch.setattr(bench, "agrees", lambda function, data, expected: function is not wrong)
    cost = {slow: 2e-6, fast: 1e-6, wrong: 1e-9}
    monkeypatch.setattr(bench, "seconds", lambda functions, data, repeats: {name: cost[f] for name, f in functions.items()})
    found = autotune.measure(ArgSpec(m=1, k=128, n=64), "mosaic_gpu", [slow, wrong, fast])
    assert found is not None
    assert GpuConfig(**found["blocks"]) == fast
    assert found["microseconds"] == 1.0
    assert "left out: wrong sums" in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="for machines without an accelerator")
def test_a_machine_without_an_accelerator_is_told_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert autotune.main([]) == 2
    assert bench.main(["--json", str(tmp_path / "out.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "error"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [autotune.main, bench.main])
def test_no_rows_are_refused(program: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program(["--rows", "4", "0", *(["--smoke", "--json", str(tmp_path / "out.json")] if program is bench.main else [])])
    assert "--rows 0: must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_works_and_says_that_a_smoke_run_means_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu.json"
    assert bench.main(["--smoke", "--json", str(path)]) == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["status"].startswith("smoke run")
    assert set(content["calls"]) == {"smoke/1", "smoke/16"}
    for found in content["calls"].values():
        assert found["exact"]
        assert found["ours"] == ("native" if "native" in IMPLEMENTATIONS else "xla")  # of bitnet_jax, where another test has imported it
        assert set(found["microseconds"]) == {"ours", "xla", "bf16", "int8"}


def test_matrices_apart_are_the_layers_of_the_stack() -> None:
    data = bench.operands(ArgSpec(m=2, k=96, n=24), cache=3000)
    x, x_scale, stack, out_dtype = (data[name] for name in ("x", "x_scale", "stack", "out_dtype"))
    assert stack.codes.shape[0] == 6
    for layer, w in enumerate(bench.apart(stack, None, 3000)):
        expected = np.asarray(bench.ours("reference")(x, x_scale, PackedLayer(stack, jnp.int32(layer)), out_dtype))
        assert np.array_equal(np.asarray(bench.ours("xla")(x, x_scale, w, out_dtype)), expected)
        for dtype in (jnp.int8, jnp.bfloat16):
            out = bench.dense(x, x_scale, bench.apart(stack, dtype, 3000)[min(layer, 1)], out_dtype) if layer < 2 else expected
            assert np.array_equal(np.asarray(out), expected)
