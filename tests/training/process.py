"""One process of a run of several, for tests that compare and kill them:

    python -m tests.training.process FOLDER STEPS DEVICES [COORDINATOR PROCESSES PROCESS]

RUN_CHANGES is the JSON of changes to `runs.small_config`, RUN_PAUSE the seconds a batch takes. DEVICES are simulated on the CPU.
"""

import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax

from bitnet_jax import config as configs
from bitnet_jax.config import MeshConfig, NonFinite, TrainConfig
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.evaluation import evaluator
from bitnet_jax.training import distributed, sharding
from bitnet_jax.training.loop import train
from bitnet_jax.training.report import Plain, Quiet
from tests.training import runs


class Part(runs.Batches):
    """The rows of a batch that this process is to read."""

    def __init__(self, config: TrainConfig, pause: float) -> None:
        super().__init__(lambda _: time.sleep(pause))
        self.part = sharding.rows(sharding.make_mesh(config.mesh), config.batch_size)

    def __next__(self) -> dict[str, Any]:
        size = runs.BATCH // self.part.count
        here = slice(self.part.index * size, (self.part.index + 1) * size)
        return {name: rows[here] for name, rows in super().__next__().items()}


def changes() -> dict[str, Any]:
    """What `runs.small_config` is to do otherwise."""
    found = json.loads(os.environ.get("RUN_CHANGES", "{}"))
    if "mesh" in found:
        found["mesh"] = configs.from_dict(MeshConfig, found["mesh"])
    if "non_finite" in found:
        found["non_finite"] = NonFinite(found["non_finite"])
    return found


def main() -> int:
    """Trains, and prints what a reporter of the leading process is told."""
    faulthandler.enable()  # one ended by a segmentation fault once, and nobody knows where
    folder, steps, devices = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        if len(sys.argv) > 4:
            distributed.join(sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
        config = runs.small_config(steps=steps, **changes())
        data = Part(config, float(os.environ.get("RUN_PAUSE", "0")))
        held_out = runs.Batches()
        for _ in range(1000):
            text = next(held_out)["tokens"]
        evaluate = evaluator(config.model, text.reshape(-1), window=runs.TIME)
        reporter = Plain(sys.stdout) if distributed.leads() else Quiet()
        summary = train(config, folder, data, evaluate=evaluate, reporter=reporter)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        distributed.leave(2)
    return 143 if summary.stopped_by == "SIGTERM" else 0


if __name__ == "__main__":
    sys.exit(main())
