"""Runs of several real processes: the numbers of one process, whoever is stopped, killed or added in between."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bitnet_jax.errors import RunError, UserError
from bitnet_jax.training import distributed
from tests.training import runs

STEPS = 16
ROOT = Path(__file__).parents[2]


def start(folder: Path, processes: int, devices: int = 1, pause: float = 0.0, **changes: Any) -> list[subprocess.Popen[str]]:
    """The processes of a run, the leading one first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"RUN_PAUSE": str(pause), "RUN_CHANGES": json.dumps(changes)}
    command = [sys.executable, "-W", "error", "-m", "tests.training.process", str(folder), str(STEPS), str(devices)]
    together = [[]] if processes == 1 else [[f"127.0.0.1:{port}", str(processes), str(i)] for i in range(processes)]
    return [
        subprocess.Popen([*command, *others], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for others in together
    ]


def finish(processes: Sequence[subprocess.Popen[str]], code: int = 0) -> list[tuple[str, str]]:
    """What they wrote, once all have ended with this exit code."""
    ended = [process.communicate(timeout=240) for process in processes]
    for process, (out, err) in zip(processes, ended, strict=True):
        assert process.returncode == code, out + err
        assert "Traceback" not in err
    return ended


def wait_for_lines(processes: Sequence[subprocess.Popen[str]], folder: Path, count: int) -> None:
    metrics = folder / "metrics.jsonl"
    while all(process.poll() is None for process in processes) and not (metrics.exists() and metrics.read_text().count("\n") >= count):
        time.sleep(0.01)


def losses(folder: Path) -> np.ndarray:
    """Loss of every step."""
    lines = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert list(found) == list(range(1, STEPS + 1))
    return np.array(list(found.values()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with two devices, never stopped."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(start(folder, 1, devices=2))
    return folder


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one_and_a_killed_one_costs_nothing(alone: Path, tmp_path: Path) -> None:
    processes = start(tmp_path, 2, pause=0.1)
    wait_for_lines(processes, tmp_path, 5)
    processes[1].kill()
    begun = time.monotonic()
    _, err = processes[0].communicate(timeout=240)
    assert processes[0].returncode == 2
    assert "another process of this run ended or cannot be reached" in err.splitlines()[-1]
    assert time.monotonic() - begun < 60
    processes[1].communicate()
    (out, _), _ = finish(start(tmp_path, 2))
    assert "resuming at step" in out
    assert runs.losses(tmp_path) == runs.losses(alone)  # bit for bit: two devices add two numbers in one way
    text = [(folder / "metrics.jsonl").read_text().splitlines()[-1] for folder in (alone, tmp_path)]
    assert text[0] == text[1]
    assert "validation_loss" in text[0]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_others_than_they_were_go_on(alone: Path, tmp_path: Path) -> None:
    for processes, lines in ((2, 3), (4, 8)):
        started = start(tmp_path, processes, pause=0.1)
        wait_for_lines(started, tmp_path, lines)
        started[-1].send_signal(signal.SIGTERM)
        begun = time.monotonic()
        (out, _), *_ = finish(started, 143)
        assert time.monotonic() - begun < 60
        assert "SIGTERM: stopping after step" in out
    finish(start(tmp_path, 1))
    assert np.allclose(losses(tmp_path), losses(alone), rtol=2e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["bit", "end"])
def test_a_damaged_checkpoint_is_found_by_all_processes(alone: Path, tmp_path: Path, damage: str) -> None:
    started = start(tmp_path, 2, pause=0.1)
    wait_for_lines(started, tmp_path, 10)
    started[0].send_signal(signal.SIGTERM)
    finish(started, 143)
    newest = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    data = max((tmp_path / "checkpoints" / str(newest) / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 4
    else:
        del content[len(content) // 2 :]
    data.write_bytes(content)
    (out, _), _ = finish(start(tmp_path, 2))
    assert f"{newest} is damaged" in out
    assert runs.losses(tmp_path) == runs.losses(alone)


@pytest.mark.slow
def test_every_process_says_why_the_run_cannot_begin_or_go_on(tmp_path: Path) -> None:
    nothing, taken = tmp_path / "run", tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("Dear Sir")
    for folder, changes, message in (
        (nothing, {"mesh": {"data": 4}}, "mesh data=4 * tensor=1 * sequence=1 needs a multiple of 4 devices: there are 2"),
        (taken, {}, f"{taken} is not a run and not empty"),
        (nothing, {"optimizer_learning_rate": 1e38, "optimizer_clip_norm": None, "non_finite": "stop"}, "non_finite=stop says"),
    ):
        for _, err in finish(start(folder, 2, **changes), 2):
            assert message in err.splitlines()[-1]


def test_what_is_said_of_other_processes_must_be_whole() -> None:
    for wrong, message in (
        ({"coordinator": "host:1"}, "coordinator must come with processes and process"),
        ({"processes": 2, "process": 0}, "process and processes must come with coordinator"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "coordinator='host' must be HOST:PORT"),
        ({"coordinator": "host:0", "processes": 2, "process": 0}, "coordinator='host:0' must be HOST:PORT"),
        ({"coordinator": "host:²", "processes": 2, "process": 0}, "coordinator='host:²' must be HOST:PORT"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "process=2 of processes=2 must be from 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            distributed.join(**wrong)


def test_no_signal_is_left_to_jax_which_would_swallow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = jax.config.jax_enable_preemption_service
    seen = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: seen.append(jax.config.jax_enable_preemption_service))
    try:
        distributed.join("127.0.0.1:1234", 2, 0)
    finally:
        jax.config.update("jax_enable_preemption_service", before)
    assert seen == [False]


def test_a_leader_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", 0.5)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with pytest.raises(RunError, match=rf"process 0 of this run does not answer at 127.0.0.1:{port} in 0 s: .*refused"):
            distributed.join(f"127.0.0.1:{port}", 2, 1)


def test_a_run_of_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    distributed.join()
    distributed.join("127.0.0.1:1234", 1, 0)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    distributed.join()
    assert distributed.leads()
    seen = []
    distributed.led(lambda: seen.append(1))
    assert seen == [1]
