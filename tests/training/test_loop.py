import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.config import NonFinite, TrainConfig
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.training import logs, loop
from bitnet_jax.training.checkpoints import read_params
from bitnet_jax.training.loop import Summary, init_run, last_state, train
from bitnet_jax.training.optimizer import averaged, make_optimizer
from tests.training.runs import BATCH, TIME, VOCAB, Batches, Recorder, losses, same, small_config


def parameters(folder: Path, config: TrainConfig) -> tuple[Any, int]:
    target = jax.eval_shape(lambda: init_run(config, make_optimizer(config.optimizer, config.steps)).params)
    return read_params(folder / "checkpoints", target, pytest.fail)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """A run never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(small_config(), folder, Batches())


class Crash(Exception):
    pass


def crash_at(number: int) -> Callable[[int], None]:
    def at(batch: int) -> None:
        if batch == number:
            raise Crash

    return at


def kill_at(number: int, which: signal.Signals) -> Callable[[int], None]:
    return lambda batch: os.kill(os.getpid(), which) if batch == number else None


class Broken(Batches):
    """Batches of which those with the given numbers have a target outside the vocabulary, whose loss is NaN."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.broken = numbers

    def __next__(self) -> dict[str, np.ndarray]:
        number, batch = self.number, super().__next__()
        if number in self.broken:
            batch["targets"] = np.full_like(batch["targets"], VOCAB + 1)
        return batch


def test_run_ends_with_its_checkpoints_log_and_summary(whole: tuple[Path, Summary]) -> None:
    folder, summary = whole
    assert (summary.step, summary.first_step, summary.stopped_by, summary.non_finite) == (8, 0, None, 0)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["6", "8"]
    lines = logs.read(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert summary.loss == lines[-1]["loss"]
    assert lines[0]["perplexity"] == pytest.approx(np.exp(lines[0]["loss"]))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["tokens"] == BATCH * TIME
    assert summary.tokens_per_second is not None
    assert summary.tokens_per_second > 0
    assert lines[0]["model_flop_utilisation"] is None  # nobody knows the peak of a CPU
    for line in lines:
        assert sum(line["ternary"]["all"].values()) == pytest.approx(1.0)
        assert set(line["ternary"]) == {"all", "q", "k", "v", "o", "gate", "up", "down"}
    assert sum(line["flips"] for line in lines) > 0


@pytest.mark.parametrize("crash", [4, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 3, 7))])
def test_crashed_and_resumed_run_is_bitwise_the_one_never_stopped(crash: int, whole: tuple[Path, Summary], tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(small_config(), tmp_path, Batches(crash_at(crash)))
    summary = train(small_config(), tmp_path, Batches())
    assert summary.first_step == crash // 3 * 3
    assert losses(tmp_path) == losses(whole[0])
    assert same(parameters(tmp_path, small_config()), parameters(whole[0], small_config()))


@pytest.mark.parametrize("which", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_ends_the_run_after_the_step_under_way_with_a_checkpoint(
    which: signal.Signals, whole: tuple[Path, Summary], tmp_path: Path
) -> None:
    recorder, before = Recorder(), signal.getsignal(which)
    summary = train(small_config(), tmp_path, Batches(kill_at(4, which)), reporter=recorder)
    assert (summary.step, summary.stopped_by) == (5, which.name)
    assert parameters(tmp_path, small_config())[1] == 5
    assert any(which.name in warning for warning in recorder.of("warned"))
    assert signal.getsignal(which) == before
    assert train(small_config(), tmp_path, Batches()).stopped_by is None
    assert losses(tmp_path) == losses(whole[0])
    assert same(parameters(tmp_path, small_config()), parameters(whole[0], small_config()))


def test_finished_run_is_left_as_it_is(whole: tuple[Path, Summary]) -> None:
    before = losses(whole[0])
    summary = train(small_config(), whole[0], Batches(crash_at(0)))
    assert (summary.step, summary.first_step, summary.loss) == (8, 8, None)
    assert losses(whole[0]) == before


def test_damaged_newest_checkpoint_is_warned_of_and_the_run_ends_as_if_nothing_were(whole: tuple[Path, Summary], tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(small_config(), tmp_path, Batches(crash_at(7)))
    shutil.rmtree(tmp_path / "checkpoints" / "6" / "optimizer")
    recorder = Recorder()
    assert train(small_config(), tmp_path, Batches(), reporter=recorder).first_step == 3
    assert len(recorder.of("warned")) == 1
    assert "checkpoints/6 is damaged" in recorder.of("warned")[0]
    assert losses(tmp_path) == losses(whole[0])


def test_another_configuration_is_refused_before_anything_changes(whole: tuple[Path, Summary]) -> None:
    before = losses(whole[0])
    with pytest.raises(UserError, match="seed: 0 → 5"):
        train(replace(small_config(), seed=5), whole[0], Batches())
    assert losses(whole[0]) == before


def test_sparser_logs_change_no_number(whole: tuple[Path, Summary], tmp_path: Path) -> None:
    config = small_config(output_log_every=3, output_checkpoint_every=4)
    train(config, tmp_path, Batches())
    lines, every = logs.read(tmp_path / "metrics.jsonl"), logs.read(whole[0] / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert [line["loss"] for line in lines] == [every[step - 1]["loss"] for step in (3, 6, 8)]
    assert same(parameters(tmp_path, config), parameters(whole[0], config))


def test_flips_are_null_where_the_codes_of_the_last_log_are_gone(tmp_path: Path) -> None:
    config = small_config(output_log_every=2, output_checkpoint_every=3)
    with pytest.raises(Crash):
        train(config, tmp_path, Batches(crash_at(3)))
    train(config, tmp_path, Batches())
    assert [(line["step"], line["flips"] is None) for line in logs.read(tmp_path / "metrics.jsonl")] == [
        (2, False),
        (4, True),
        (6, False),
        (8, False),
    ]


@pytest.mark.slow
def test_full_precision_twin_trains_without_ternary_statistics(tmp_path: Path) -> None:
    config = small_config()
    train(replace(config, model=config.model.twin), tmp_path, Batches())
    assert {line["ternary"] for line in logs.read(tmp_path / "metrics.jsonl")} == {None}
    assert {line["flips"] for line in logs.read(tmp_path / "metrics.jsonl")} == {None}


def test_evaluation_happens_on_time_and_at_the_end_and_is_logged(tmp_path: Path) -> None:
    calls: list[int] = []

    def evaluate(params: Any) -> dict[str, float]:
        calls.append(len(jax.tree.leaves(params)))
        return {"validation_loss": float(len(calls))}

    summary = train(small_config(output_eval_every=3), tmp_path, Batches(), evaluate=evaluate)
    lines = [line for line in logs.read(tmp_path / "metrics.jsonl") if line["kind"] == "evaluation"]
    assert [(line["step"], line["validation_loss"]) for line in lines] == [(3, 1.0), (6, 2.0), (8, 3.0)]
    assert summary.evaluation == {"validation_loss": 3.0}


def test_non_finite_steps_are_skipped_named_and_counted(tmp_path: Path) -> None:
    recorder = Recorder()
    summary = train(small_config(), tmp_path, Broken(2, 3), reporter=recorder)
    lines = logs.read(tmp_path / "metrics.jsonl")
    assert summary.non_finite == 2
    assert [line["non_finite"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False, False, False]
    assert [line["flips"] for line in lines[2:4]] == [0, 0]
    assert [warning.split(":")[0] for warning in recorder.of("warned")] == ["step 3", "step 4"]


@pytest.mark.parametrize(
    ("changes", "step"), [({"non_finite": NonFinite.STOP}, 5), ({"non_finite_limit": 2}, 6)], ids=["stop at the first", "limit in a row"]
)
def test_run_stops_at_the_policy_s_limit_and_keeps_its_last_good_checkpoint(changes: dict[str, Any], step: int, tmp_path: Path) -> None:
    config = small_config(**changes)
    with pytest.raises(RunError, match=rf"step {step}: loss nan .* the last good checkpoint is 3 in") as error:
        train(config, tmp_path, Broken(4, 5, 6))
    assert "\n" not in str(error.value)
    params, kept = parameters(tmp_path, config)
    assert kept == 3
    assert all(bool(np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(params))


def test_data_that_ends_is_an_error_that_names_the_step(tmp_path: Path) -> None:
    def end(number: int) -> None:
        if number == 2:
            raise StopIteration

    with pytest.raises(RunError, match="the data ended after step 2 of 8"):
        train(small_config(), tmp_path, Batches(end))


def test_batch_of_another_shape_is_an_error_that_names_both(tmp_path: Path) -> None:
    class Short(Batches):
        def __next__(self) -> dict[str, np.ndarray]:
            return {name: rows[:2] for name, rows in super().__next__().items()}

    with pytest.raises(UserError, match=r"tokens of batch 1 is int32 \(2, 8\): must be int32 \(4, 8\), \(batch_size, seq_len\)"):
        train(small_config(), tmp_path, Short())


@pytest.mark.slow
def test_accumulated_run_follows_the_plain_one(whole: tuple[Path, Summary], tmp_path: Path) -> None:
    train(replace(small_config(), accumulation=2), tmp_path, Batches())
    one, other = (logs.read(folder / "metrics.jsonl") for folder in (whole[0], tmp_path))
    assert other[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    # Rounding moves a ternary weight across its threshold now and then, so later losses agree less closely.
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-2)


def test_reporter_is_told_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    train(small_config(), tmp_path, Batches(), reporter=recorder)
    names = [event[0] for event in recorder.events]
    begin, middle = ["started", "compiled", "advanced", "advanced", "logged"], ["advanced", "logged", "logged", "saving"]
    assert names == [*begin, *middle, "advanced", "advanced", "logged", *middle, "advanced", *middle, "closed"]
    assert recorder.of("started")[0].parameters == 2376
    assert recorder.of("advanced") == list(range(1, 9))


def test_a_signal_during_the_last_evaluation_is_told(tmp_path: Path) -> None:
    """Whoever sent it wants nothing begun after this run."""

    def interrupted(params: object) -> dict[str, float]:
        del params
        os.kill(os.getpid(), signal.SIGTERM)
        return {"validation_loss": 1.0}

    summary = train(small_config(), tmp_path, Batches(), evaluate=interrupted)
    assert (summary.step, summary.stopped_by) == (small_config().steps, "SIGTERM")
    assert parameters(tmp_path, small_config())[1] == small_config().steps


def test_a_run_too_large_for_the_machine_is_refused(tmp_path: Path) -> None:
    large = replace(small_config(), model=replace(small_config().model, vocab_size=2_000_000_000))
    with pytest.raises(UserError, match=r"parameters need .* GB to train"):
        train(large, tmp_path, Batches())


def test_a_run_with_warm_up_and_average_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """The crash is in the warm-up; checkpoints stand in it and after it."""
    config = small_config(optimizer_quant_warmup_steps=6, optimizer_ema_decay=0.5)
    train(config, tmp_path / "whole", Batches())
    with pytest.raises(Crash):
        train(config, tmp_path / "parts", Batches(crash_at(4)))
    assert train(config, tmp_path / "parts", Batches()).first_step == 3
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ends = [last_state(config, tmp_path / name) for name in ("parts", "whole")]
    assert same(*ends)
    assert not same(averaged(ends[0].opt_state), ends[0].params)


def test_steps_from_the_end_of_the_warm_up_on_are_those_of_a_run_without_it(
    whole: tuple[Path, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[bool] = []
    compile_step = loop.compile_step

    class Recorded:
        def __init__(self, *args: Any, warming: bool = False) -> None:
            self.step, self.warming = compile_step(*args, warming=warming), warming
            self.memory_analysis = self.step.memory_analysis

        def __call__(self, *inputs: Any) -> Any:
            done.append(self.warming)
            return self.step(*inputs)

    monkeypatch.setattr(loop, "compile_step", Recorded)
    train(small_config(optimizer_quant_warmup_steps=4), tmp_path / "warm", Batches())
    assert done == [True] * 3 + [False] * 5
    assert losses(tmp_path / "warm")[1] != losses(whole[0])[1]
    done.clear()
    config = small_config(optimizer_quant_warmup_steps=1)  # in full at the first step
    train(config, tmp_path / "one", Batches())
    assert done == [False] * 8
    assert losses(tmp_path / "one") == losses(whole[0])
    assert same(parameters(tmp_path / "one", config), parameters(whole[0], config))


def test_the_average_changes_no_parameter(whole: tuple[Path, Summary], tmp_path: Path) -> None:
    config = small_config(optimizer_ema_decay=0.9)
    train(config, tmp_path, Batches())
    for found, expected in zip(jax.tree.leaves(parameters(tmp_path, config)), jax.tree.leaves(parameters(whole[0], config)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
