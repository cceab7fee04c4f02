"""A run in a process of its own, for tests that kill it: python -m tests.training.driver FOLDER STEPS [kill-in-save STEP]."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from bitnet_jax.training.loop import train
from bitnet_jax.training.report import Plain
from tests.training.runs import Batches, small_config


def kill_in_save(folder: Path, step: str) -> None:
    """Ends this process as soon as the unfinished checkpoint `step` is seen."""
    while not any(path.name != step for path in folder.glob(f"checkpoints/{step}*")):
        time.sleep(0.0002)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if len(sys.argv) > 3:
        threading.Thread(target=kill_in_save, args=(folder, sys.argv[4]), daemon=True).start()
    pause = float(os.environ.get("DRIVER_PAUSE", "0"))  # so that a signal can hit a certain part of a quick run
    summary = train(small_config(steps=int(sys.argv[2])), folder, Batches(lambda _: time.sleep(pause)), reporter=Plain(sys.stdout))
    sys.exit(143 if summary.stopped_by == "SIGTERM" else 0)
