"""Block sizes: what a config refuses, the rule, and measured ones before the rule."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kernels_pallas import block_config
from kernels_pallas.arg_specs import CHIPS, ArgSpec, named
from kernels_pallas.block_config import TpuBlocks, TpuConfig, file_name, tpu_blocks, tpu_vmem_bytes, tuned

TPUS = [name for name, chip in CHIPS.items() if chip.platform == "tpu"]
CALL = ArgSpec(m=16, k=2560, n=6912, platform="tpu", chip="v6e")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(block_config, "TUNED", tmp_path)
    return tmp_path


def entry(m: int, **change: Any) -> dict[str, Any]:
    return {"m": m, "k": 2560, "n": 6912, "x_dtype": "int8", "blocks": {"rows": 32 * m, "outputs": 256}, **change}


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 40}, "rows=40 must be a positive multiple of 32"),
        ({"rows": 0}, "rows=0 must be a positive multiple of 32"),
        ({"outputs": 192}, "outputs=192 must be a positive multiple of 128"),
        ({"chip": "v3"}, "chip='v3' must be one of v4, v5e, v5p, v6e, 7x"),
        ({"chip": "h200"}, "chip='h200' must be one of"),
    ],
)
def test_wrong_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TpuConfig(**fields)


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", TPUS)
def test_blocks_are_whole_tiles_or_whole_arrays(chip: str) -> None:
    for name, spec in named((1, 3, 32, 33, 100, 512, 4096)):
        blocks = tpu_blocks(dataclasses.replace(spec, platform="tpu", chip=chip))
        assert blocks.outputs % 128 == 0, name
        assert blocks.rows % 32 == 0 or blocks.rows == spec.m, name
        assert blocks.outputs < spec.n + 128, name


def test_a_config_comes_before_the_rule_and_fills_in_what_it_leaves_out() -> None:
    rule = tpu_blocks(CALL)
    assert tpu_blocks(CALL, TpuConfig(outputs=128)) == TpuBlocks(rows=rule.rows, outputs=128)
    many = dataclasses.replace(CALL, m=512)
    assert tpu_blocks(many, TpuConfig(rows=64)).rows == 64


def test_vector_memory_by_hand() -> None:
    # x 32 x 512, codes 128 x 256, result 32 x 256 in bfloat16, a tile's lanes of steps: twice. Quantised rows and steps, sums, slack.
    spec = ArgSpec(m=32, k=512, n=256, platform="tpu", chip="v6e")
    loaded = 32 * 512 + 128 * 256 + 32 * 256 * 2 + 32 * 128 * 4
    assert tpu_vmem_bytes(spec, TpuBlocks(rows=32, outputs=256)) == 2 * loaded + 32 * 512 + 32 * 128 * 4 + 2 * 32 * 256 * 4 + 2**20


# --- measured blocks -------------------------------------------------------------------------------------------------


def write(folder: Path, kind: str, text: str) -> None:
    block_config._entries.cache_clear()
    (folder / f"{file_name(kind)}.json").write_text(text, encoding="utf-8")


def test_measured_blocks_serve_every_m_up_to_their_own(folder: Path) -> None:
    write(folder, "TPU v6 lite", json.dumps({"jax": "0", "mosaic_tpu": [entry(32), entry(8)], "other": [entry(64)]}))
    found = {m: tuned("mosaic_tpu", dataclasses.replace(CALL, m=m), "TPU v6 lite", TpuConfig) for m in (1, 8, 9, 32, 33)}
    assert {m: config and config.rows for m, config in found.items()} == {1: 256, 8: 256, 9: 1024, 32: 1024, 33: None}
    assert tuned("mosaic_tpu", dataclasses.replace(CALL, n=640), "TPU v6 lite", TpuConfig) is None
    assert tuned("mosaic_tpu", dataclasses.replace(CALL, x_dtype="bfloat16"), "TPU v6 lite", TpuConfig) is None
    assert tuned("mosaic_tpu", CALL, "TPU v5", TpuConfig) is None
    assert tpu_blocks(CALL) == TpuBlocks(rows=16, outputs=256)
    assert tpu_blocks(CALL, TpuConfig(outputs=512)).outputs == 512


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a file of tuned blocks"),
        ("[]", "is not a file of tuned blocks"),
        ('{"mosaic_tpu": [{"m": 1}]}', "an entry must have m, k, n, x_dtype and blocks"),
        ('{"mosaic_tpu": 5}', "is not a file of tuned blocks"),
        ('{"mosaic_tpu": [7]}', "is not a file of tuned blocks"),
        (json.dumps({"mosaic_tpu": [{**entry(16), "m": "x"}]}), "m must be a whole number"),
        (json.dumps({"mosaic_tpu": [entry(16, blocks={"rows": 7})]}), "rows=7 must be a positive multiple of 32"),
        (json.dumps({"mosaic_tpu": [entry(16, blocks={"columns": 128})]}), r"columns must be of \['outputs', 'rows'\]"),
    ],
)
def test_a_file_that_is_wrong_is_an_error(folder: Path, text: str, message: str) -> None:
    write(folder, "TPU v6 lite", text)
    with pytest.raises(ValueError, match=message):
        tpu_blocks(CALL)


def test_every_file_that_is_shipped_can_be_read() -> None:
    kinds = {file_name(kind) for chip in CHIPS.values() for kind in chip.kinds}
    for path in block_config.TUNED.glob("*.json"):
        assert path.stem in kinds or any(path.stem.startswith(kind) for kind in kinds)
        for entries in json.loads(path.read_text(encoding="utf-8")).values():
            assert isinstance(entries, str) or all({"m", "k", "n", "x_dtype", "blocks"} <= set(e) for e in entries)
