"""A run from its configuration alone is the run of its parts."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitnet_jax.config import DataConfig, TrainConfig
from bitnet_jax.data import Batches, prepare
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.evaluation import evaluator
from bitnet_jax.training import logs, loop, run, run_directory
from bitnet_jax.training.run import prepare_run, rehearse, train_run
from tests.training.runs import TIME, Recorder, losses, small_config

VOCAB = 300


@pytest.fixture(name="config")
def a_config(tmp_path: Path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} is followed by {number + 1}.\n" for number in range(400)))
    config = small_config(steps=4, output_eval_every=2, output_eval_windows=3)
    data = DataConfig(source=str(text), tokenizer="bytes", seq_len=TIME, cache_dir=str(tmp_path / "cache"))
    return replace(config, model=replace(config.model, vocab_size=VOCAB), data=data)


@pytest.mark.slow
def test_it_is_the_run_of_its_parts(config: TrainConfig, tmp_path: Path) -> None:
    data = prepare(config.data, vocab_size=VOCAB)
    ids = data.validation.ids
    held_out = evaluator(config.model, ids, window=TIME, text_bytes=data.validation.text_bytes, max_tokens=3 * TIME + 1)
    batches = Batches(data.train.ids, seq_len=TIME, batch_size=config.batch_size, seed=config.seed)
    loop.train(config, tmp_path / "parts", batches, evaluate=held_out)
    batches.close()
    summary = train_run(config, tmp_path / "whole")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    evaluations = [
        [line for line in logs.read(tmp_path / name / run_directory.METRICS) if line["kind"] == "evaluation"] for name in ("whole", "parts")
    ]
    assert evaluations[0] == evaluations[1]
    assert [line["step"] for line in evaluations[0]] == [2, 4]
    assert summary.evaluation["validation_loss"] == evaluations[0][-1]["validation_loss"]
    assert (tmp_path / "whole" / "tokenizer.json").read_text() == data.tokenizer.to_json()


def test_what_is_measured_is_logged_beside_the_held_out_text(config: TrainConfig, tmp_path: Path) -> None:
    seen: list[Any] = []

    def measure(params: Any) -> dict[str, float]:
        seen.append(params["embed"])
        return {"looked": float(len(seen))}

    summary = train_run(config, tmp_path / "run", data=prepare_run(config, tmp_path / "run"), measure=measure)
    lines = [line for line in logs.read(tmp_path / "run" / run_directory.METRICS) if line["kind"] == "evaluation"]
    assert [line["looked"] for line in lines] == [1, 2]
    assert summary.evaluation["looked"] == 2
    assert "validation_loss" in lines[0]


def test_a_run_goes_on_with_its_own_tokenizer(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, data=replace(config.data, tokenizer="bpe"))
    train_run(config, tmp_path / "run")
    kept = tmp_path / "run" / "tokenizer.json"
    text = kept.read_text()
    assert prepare_run(config, tmp_path / "run").tokenizer.to_json() == text
    assert train_run(config, tmp_path / "run").first_step == config.steps
    kept.write_text(prepare(replace(config.data, tokenizer="bytes"), vocab_size=VOCAB).tokenizer.to_json())
    assert prepare_run(config, tmp_path / "run").tokenizer.to_json() != text
    with pytest.raises(UserError, match="holds a run already"):
        train_run(config, tmp_path / "run", resume=False)


# --- rehearsals ------------------------------------------------------------------------------------------------------


def test_a_rehearsal_does_everything_and_leaves_nothing(config: TrainConfig, tmp_path: Path) -> None:
    recorder = Recorder()
    summary = rehearse(replace(config, steps=50), tmp_path / "runs" / "mine", reporter=recorder)
    assert (summary.step, summary.first_step) == (2, 0)
    assert "validation_loss" in summary.evaluation
    assert recorder.of("saving") == [2]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_rehearsal_finds_a_disk_that_is_too_full(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: SimpleNamespace(free=9000))
    with pytest.raises(RunError, match=r"has 0.0 GB free: must be at least .* for 3 checkpoints of .* \(keep_checkpoints=2, and one being"):
        rehearse(config, tmp_path / "mine")
    assert not (tmp_path / "mine.rehearsal").exists()


def test_a_rehearsal_keeps_its_hands_off_a_folder_that_is_there(config: TrainConfig, tmp_path: Path) -> None:
    place = tmp_path / "mine.rehearsal"
    place.mkdir()
    (place / "notes.txt").write_text("kept")
    with pytest.raises(UserError, match=r"mine.rehearsal exists: must not"):
        rehearse(config, tmp_path / "mine")
    assert (place / "notes.txt").read_text() == "kept"


def test_a_signal_ends_a_rehearsal(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Path] = []
    monkeypatch.setattr(run, "train_run", lambda config, place, **given: starts.append(place) or train_run(config, place, **given))

    class Stopping(Recorder):
        def compiled(self, seconds: float, memory: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    summary = rehearse(config, tmp_path / "mine", reporter=Stopping())
    assert summary.stopped_by == "SIGTERM"
    assert len(starts) == 1
    assert not (tmp_path / "mine.rehearsal").exists()


def test_a_rehearsal_finds_a_folder_that_the_run_would_be_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("Dear Sir")
    train_run(config, tmp_path / "other")
    for name, changed, message in (
        ("file", config, "is not a folder"),
        ("letters", config, "is not a run and not empty"),
        ("other", replace(config, seed=config.seed + 1), "was begun with another configuration: seed"),
    ):
        with pytest.raises(UserError, match=message):
            rehearse(changed, tmp_path / name)
    with pytest.raises(UserError, match="holds a run already"):
        rehearse(config, tmp_path / "other", resume=False)


def test_steps_that_are_not_done_are_not_traced_without_a_word(config: TrainConfig, tmp_path: Path) -> None:
    recorder = Recorder()
    train_run(config, tmp_path / "run", profile=range(900, 905), reporter=recorder)
    assert [line for line in recorder.of("warned") if line.startswith("no trace: profile=900:905 has none of this start's steps 1 to ")]
    assert not (tmp_path / "run" / run_directory.PROFILE).exists()


def test_a_log_that_lost_its_checkpoints_is_not_begun_anew_without_a_word(config: TrainConfig, tmp_path: Path) -> None:
    train_run(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    recorder = Recorder()
    train_run(config, tmp_path / "run", reporter=recorder)
    assert [line for line in recorder.of("warned") if "has a log and no checkpoint: the run begins anew at step 0" in line]


def test_single_steps_are_traced(config: TrainConfig, tmp_path: Path) -> None:
    train_run(config, tmp_path / "run", profile=range(2, 4))
    assert list((tmp_path / "run" / run_directory.PROFILE).rglob("*.xplane.pb"))
