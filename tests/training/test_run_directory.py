import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bitnet_jax import config as configs
from bitnet_jax.config import NonFinite, TrainConfig
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.training import run_directory
from tests.training.runs import small_config

CONFIG = small_config()


def enter(folder: Path, config: TrainConfig = CONFIG, files: dict[str, str] | None = None, resume: bool = True) -> None:
    with run_directory.claim(folder):
        run_directory.enter(folder, config, files or {}, resume)


def test_new_folder_becomes_a_run_with_its_configuration_and_files(tmp_path: Path) -> None:
    enter(tmp_path / "a" / "run", files={"tokenizer.json": "{}"})
    assert run_directory.is_run(tmp_path / "a" / "run")
    assert configs.read(TrainConfig, tmp_path / "a" / "run" / "config.json") == CONFIG
    assert (tmp_path / "a" / "run" / "tokenizer.json").read_text() == "{}"


def test_folder_left_by_a_process_killed_in_its_first_moments_is_taken_as_new(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / "config.json.tmp").write_text('{"mod')
    enter(tmp_path)
    assert configs.read(TrainConfig, tmp_path / "config.json") == CONFIG


def test_folder_with_something_else_in_it_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not a run and not empty \(it holds thesis\.txt\)"):
        enter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        enter(tmp_path / "run")


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((RunError, UserError), match="file"):
        enter(tmp_path / "file" / "run")


def test_second_claim_is_refused_while_the_first_is_held(tmp_path: Path) -> None:
    with run_directory.claim(tmp_path), pytest.raises(UserError, match=r"is in use by process [0-9]+: only one may train in it"):
        enter(tmp_path)
    enter(tmp_path)


def test_another_process_is_refused_while_the_folder_is_held(tmp_path: Path) -> None:
    program = f"from pathlib import Path; from bitnet_jax.training.run_directory import claim\nwith claim(Path({str(tmp_path)!r})): pass"
    with run_directory.claim(tmp_path):
        refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "is in use by process" in refused.stderr


def test_resuming_with_another_configuration_names_every_field_that_differs(tmp_path: Path) -> None:
    enter(tmp_path)
    with pytest.raises(UserError, match=r"optimizer\.beta2: 0\.95 → 0\.98; seed: 0 → 1") as error:
        enter(tmp_path, replace(CONFIG, seed=1, optimizer=replace(CONFIG.optimizer, beta2=0.98)))
    assert "\n" not in str(error.value)
    assert configs.read(TrainConfig, tmp_path / "config.json") == CONFIG


def test_what_a_run_shows_and_keeps_may_change(tmp_path: Path) -> None:
    enter(tmp_path)
    data = replace(CONFIG.data, cache_dir="elsewhere")
    changed = replace(CONFIG, output=replace(CONFIG.output, log_every=7), data=data, non_finite=NonFinite.STOP, non_finite_limit=99)
    enter(tmp_path, changed)
    assert configs.read(TrainConfig, tmp_path / "config.json") == changed


def test_run_that_exists_is_refused_where_a_new_one_is_asked_for(tmp_path: Path) -> None:
    enter(tmp_path, resume=False)
    with pytest.raises(UserError, match="holds a run already"):
        enter(tmp_path, resume=False)


def test_file_that_differs_from_the_one_the_run_was_begun_with_is_named(tmp_path: Path) -> None:
    enter(tmp_path, files={"tokenizer.json": "old"})
    enter(tmp_path, files={"tokenizer.json": "old"})
    with pytest.raises(UserError, match=r"tokenizer\.json is not what this run was begun with"):
        enter(tmp_path, files={"tokenizer.json": "new"})
    assert (tmp_path / "tokenizer.json").read_text() == "old"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"starts": 5}'])
def test_a_provenance_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    enter(tmp_path)
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(UserError, match=r"provenance\.json is not the provenance of a run"):
        run_directory.record_start(tmp_path, CONFIG, 0, {})


def test_provenance_keeps_every_start(tmp_path: Path) -> None:
    enter(tmp_path)
    run_directory.record_start(tmp_path, CONFIG, 0, {"data": {"sha256": "ab"}})
    run_directory.record_start(tmp_path, CONFIG, 30, {})
    first, second = json.loads((tmp_path / "provenance.json").read_text())["starts"]
    assert (first["step"], second["step"]) == (0, 30)
    assert first["data"] == {"sha256": "ab"}
    assert first["seed"] == 0
    assert first["packages"]["jax"]
    assert first["device"]["platform"] == "cpu"


def test_interrupted_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    run_directory.write(path, "old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory.os, "fsync", no_space)
    with pytest.raises(RunError, match=r"config\.json cannot be written: No space left on device"):
        run_directory.write(path, "new")
    assert path.read_text() == "old"
