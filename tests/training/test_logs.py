import json
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bitnet_jax.errors import UserError
from bitnet_jax.training import logs
from bitnet_jax.training.logs import Logs
from tests.training.runs import small_config


def line(step: int, **values: Any) -> logs.Line:
    return {"kind": "train", "step": step, "loss": 1.5, **values}


def write(folder: Path, done: int, *lines: logs.Line, tensorboard: bool = False, project: str | None = None) -> None:
    with Logs(folder, small_config(output_tensorboard=tensorboard, output_wandb_project=project), done) as sinks:
        for each in lines:
            sinks.write(each)


def events(folder: Path) -> list[Any]:
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content, offset = path.read_bytes(), 0
        while offset < len(content):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", content, offset)
            found.append(event_pb2.Event.FromString(content[offset + 12 : offset + 12 + length]))
            offset += length + 16
    return found


def test_lines_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path, 0, line(1), line(2, ternary={"zero": 0.3}, flips=None))
    assert logs.read(tmp_path / "metrics.jsonl") == [line(1), line(2, ternary={"zero": 0.3}, flips=None)]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    write(tmp_path, 0, line(1, grad_norm=float("inf"), ternary={"zero": float("nan")}))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert logs.read(tmp_path / "metrics.jsonl") == [line(1, grad_norm=None, ternary={"zero": None})]


def test_lines_past_the_restored_step_are_dropped_so_that_each_step_stands_once(tmp_path: Path) -> None:
    write(tmp_path, 0, *(line(step) for step in (1, 2, 3, 4)))
    write(tmp_path, 2, line(3, loss=9.0))
    assert logs.read(tmp_path / "metrics.jsonl") == [line(1), line(2), line(3, loss=9.0)]


def test_last_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, line(1), line(2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    write(tmp_path, 1, line(2))
    assert logs.read(path) == [line(1), line(2)]


@pytest.mark.parametrize("row", ["nonsense", "[1, 2]", '{"loss": 1.0}'])
def test_a_line_that_is_no_log_line_is_an_error_with_its_number(tmp_path: Path, row: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n" + row + "\n" + json.dumps(line(2)) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is not a log line"):
        write(tmp_path, 5)


def test_tensorboard_gets_every_number_under_its_kind(tmp_path: Path) -> None:
    write(tmp_path, 0, line(3, ternary={"q": {"zero": 0.25}}, flips=None), tensorboard=True)
    event = next(event for event in events(tmp_path / "tensorboard") if event.summary.value)
    assert event.step == 3
    assert {value.tag: value.simple_value for value in event.summary.value} == {"train/loss": 1.5, "train/ternary/q/zero": 0.25}


def test_tensorboard_is_told_to_forget_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    write(tmp_path, 7, tensorboard=True)
    starts = [event.step for event in events(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert starts == [8]


def test_no_event_files_where_tensorboard_is_off(tmp_path: Path) -> None:
    write(tmp_path, 0, line(1))
    assert not (tmp_path / "tensorboard").exists()


def test_weights_and_biases_that_is_not_installed_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"install bitnet-jax\[wandb\]"):
        write(tmp_path, 0, project="mine")


def test_weights_and_biases_gets_the_numbers_under_one_identity_for_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    run = types.SimpleNamespace(
        define_metric=lambda *names, **settings: None,
        log=lambda row: calls.append(("log", row)),
        finish=lambda: calls.append(("finish", None)),
    )
    module = types.SimpleNamespace(
        util=types.SimpleNamespace(generate_id=lambda: f"id{len(calls)}"), init=lambda **settings: calls.append(("init", settings)) or run
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    write(tmp_path, 0, line(1), project="mine")
    write(tmp_path, 1, line(2), project="mine")
    identities = [settings["id"] for name, settings in calls if name == "init"]
    assert identities == ["id0", "id0"]
    assert [row for name, row in calls if name == "log"] == [{"step": 1, "train/loss": 1.5}, {"step": 2, "train/loss": 1.5}]
    assert [name for name, _ in calls].count("finish") == 2
