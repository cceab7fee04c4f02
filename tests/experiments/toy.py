"""A tiny experiment, and a process that can be told to die: python -m tests.experiments.toy FOLDER [STEP]

With STEP, the process kills itself as soon as the checkpoint of that step is on disk.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from bitnet_jax.config import Linear
from experiments import run
from experiments.cells import Cell, Results, smoke
from experiments.configs import scaling


def cell(name: str, linear: Linear = Linear.BIT, seed: int = 0) -> Cell:
    base = scaling.SIZES["0.1m"] if linear is Linear.BIT else scaling.SIZES["0.1m"].twin
    also = {} if linear is Linear.BIT else {"ternarised": scaling.SIZES["0.1m"]}
    config = scaling.train_config(base, 6e-3, seed)
    if linear is Linear.BIT:
        config = replace(config, optimizer=replace(config.optimizer, ema_decay=0.5))
    return smoke(Cell(name=name, config=config, also=also))


def cells(results: Results) -> list[Cell]:
    """The second cell is not known before the first is finished."""
    return [cell("first"), *([cell("second", Linear.FULL, seed=1)] if "first" in results else [])]


def experiment(folder: Path, only: str = "*") -> run.Experiment:
    sys.modules["experiments.configs.toy"] = SimpleNamespace(cells=cells)
    return run.Experiment("toy", folder / "runs", folder / "results", only)


def die_after(step: int) -> None:
    from bitnet_jax.training.checkpoints import Checkpoints

    save = Checkpoints.save

    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.wait()
        if self.steps[-1] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = save_and_die


if __name__ == "__main__":
    if len(sys.argv) > 2:
        die_after(int(sys.argv[2]))
    sys.exit(experiment(Path(sys.argv[1]), "first").run())
