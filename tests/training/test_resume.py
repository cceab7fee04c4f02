"""Real processes, killed: what is resumed must be bit for bit what was never stopped."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.runs import losses, same, small_config
from tests.training.test_loop import parameters

STEPS = 40
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def start(folder: Path, *arguments: str, pause: str = "0.03") -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.training.driver", str(folder), str(STEPS), *arguments]
    environment = os.environ | {"DRIVER_PAUSE": pause}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out


def wait_for_lines(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= count):
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(folder))
    return folder


def check(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    assert len(losses(folder)) == STEPS
    config = small_config(steps=STEPS)
    assert same(parameters(folder, config), parameters(whole, config))


def test_run_killed_at_random_moments_again_and_again_ends_as_the_one_never_stopped(whole: Path, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"random moments of seed {seed}")  # noqa: T201 - shown where the test fails
    moments = random.Random(seed)
    for lines in (0, 4, 12, 24, 33):
        process = start(tmp_path)
        wait_for_lines(process, tmp_path, lines)
        time.sleep(moments.uniform(0, 0.4 if lines else 4.0))
        process.kill()
        finish(process, -signal.SIGKILL)
    assert "resuming at step" in finish(start(tmp_path))
    check(tmp_path, whole)


def test_run_killed_while_it_saves_ends_as_the_one_never_stopped(whole: Path, tmp_path: Path) -> None:
    for step in (3, 12, 40):
        finish(start(tmp_path, "kill-in-save", str(step)), -signal.SIGKILL)
    finish(start(tmp_path))
    check(tmp_path, whole)


def test_terminated_process_saves_and_says_so(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_lines(process, tmp_path, 7)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopping after step" in finish(process, 143)
    reached = max(losses(tmp_path))
    assert f"resuming at step {reached} " in finish(start(tmp_path))
    check(tmp_path, whole)


def test_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, pause="5")  # of which the first signal may not cut anything off, and the second all
    wait_for_lines(process, tmp_path, 1)
    for _ in range(2):
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.poll() == -signal.SIGINT
    process.communicate()
