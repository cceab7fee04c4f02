"""The runner: stages, skipping, resuming, and what a cell leaves."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_jax import config as configs
from bitnet_jax.config import TrainConfig
from bitnet_jax.errors import UserError
from experiments import run
from experiments.cells import read_results
from tests.experiments import toy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    assert toy.experiment(folder).run() == 0
    return folder


def test_cells_that_depend_on_others_are_run_after_them(finished: Path) -> None:
    assert set(read_results(finished / "results")) == {"first", "second"}


def test_a_result_says_what_was_run_with_what_and_what_came_of_it(finished: Path) -> None:
    found = read_results(finished / "results")
    for name, result in found.items():
        config = configs.from_dict(TrainConfig, result["config"])
        assert (result["experiment"], result["cell"]) == ("toy", name)
        assert result["tokens"] == config.steps * config.batch_size * config.data.seq_len == 4 * 2 * 16
        assert 0 < result["validation"]["loss"] < 10
        assert set(result["validation"]) == {"loss", "perplexity", "bits_per_byte"}
        (start,) = result["starts"]
        assert start["seed"] == config.seed
        assert {"commit", "packages", "device", "cores", "time", "data"} <= set(start)
        assert result["curve"]["step"] == [1, 2, 3, 4]
        assert all(len(values) == 4 for values in result["curve"].values())
        assert result["train_loss"] == pytest.approx(result["curve"]["loss"][-1], rel=1e-4)
        assert result["training_seconds"] > 0
    assert found["first"]["ternary_parameters"] > 0 == found["second"]["ternary_parameters"]
    # The twin's weights as ternary ones are another model, evaluated on the same text.
    ternarised = found["second"]["also"]["ternarised"]
    assert ternarised["loss"] != found["second"]["validation"]["loss"]
    assert set(found["first"]["also"]) == {"ema"}
    assert found["first"]["also"]["ema"]["loss"] != found["first"]["validation"]["loss"]
    assert (finished / "results" / "first.json").stat().st_size < 30_000


def test_a_pattern_that_fits_no_cell_is_no_success(finished: Path) -> None:
    with pytest.raises(UserError, match=r"--only thrid\* fits none of the 2 cells of toy"):
        toy.experiment(finished, "thrid*").run()


def test_finished_cells_are_not_run_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "train_cell", lambda *_: pytest.fail("a finished cell was run"))
    assert toy.experiment(finished).run() == 0


def test_a_stopped_cell_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "train_cell", lambda *_: None)
    assert toy.experiment(tmp_path).run() == 130
    assert read_results(tmp_path / "results") == {}


def test_a_pattern_chooses_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "train_cell", lambda *_: pytest.fail("a cell was run that was not asked for"))
    with pytest.raises(UserError, match=r"--only second\* fits none of the 1 cells of toy that are known so far"):
        toy.experiment(tmp_path, only="second*").run()


def test_the_list_says_what_is_done_and_begun(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.experiment(finished).show()
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["first", "done"], ["second", "done"]]
    (tmp_path / "runs" / "first").mkdir(parents=True)
    toy.experiment(tmp_path).show()
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["first", "begun"]]


def test_a_result_of_another_configuration_is_refused(finished: Path, tmp_path: Path) -> None:
    result = json.loads((finished / "results" / "first.json").read_text())
    result["config"]["optimizer"]["learning_rate"] = 1.0
    result["config"]["output"]["log_every"] = 77  # changes no number
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "first.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"first.json was made with another configuration: optimizer.learning_rate: 1.0 → 0.006; remove"):
        toy.experiment(tmp_path).run()


@pytest.mark.parametrize("text", ["{", "{}", '{"validation": 1}'])
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cell.json").write_text(text)
    with pytest.raises(UserError, match=r"cell.json is not the result of a cell"):
        read_results(tmp_path)


@pytest.mark.slow
def test_a_cell_that_is_killed_goes_on_and_ends_as_one_never_stopped(tmp_path: Path) -> None:
    def start(*step: str) -> int:
        command = [sys.executable, "-W", "error", "-m", "tests.experiments.toy", str(tmp_path), *step]
        return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=False).returncode

    for step in ("2", "4"):  # in the middle, and between the last checkpoint and the result
        assert start(step) == -signal.SIGKILL
        assert read_results(tmp_path / "results") == {}
    assert start() == 0
    resumed = read_results(tmp_path / "results")["first"]
    assert [one["step"] for one in resumed["starts"]] == [0, 2, 4]
    whole = subprocess.run(
        [sys.executable, "-m", "tests.experiments.toy", str(tmp_path / "whole")], cwd=ROOT, capture_output=True, timeout=300, check=False
    )
    assert whole.returncode == 0, whole.stderr
    expected = read_results(tmp_path / "whole" / "results")["first"]
    assert resumed["validation"] == expected["validation"]
    for name in ("step", "loss", "grad_norm", "zero"):
        assert resumed["curve"][name] == expected["curve"][name]


@pytest.mark.slow
def test_smoke_runs_the_real_experiment_small_and_beside_its_results(tmp_path: Path) -> None:
    arguments = ["ablations", "--smoke", "--only", "*twin-seed0", "--runs", str(tmp_path)]
    assert run.main(arguments) == 0
    assert set(read_results(tmp_path / "smoke" / "results" / "ablations")) == {"twin-seed0"}
