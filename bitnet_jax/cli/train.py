"""bitnet-jax train [PRESET | --config FILE] --out RUN: trains a model, or goes on with a run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bitnet_jax import config as configs
from bitnet_jax.cli import arguments
from bitnet_jax.config import TrainConfig
from bitnet_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Trains a model from a preset, the first word, or from --config FILE (.json of a run, or .py that defines `config`).

    A run that was interrupted goes on where it was: give the same command again.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run."""
    out: Path
    """Folder of the run; a new or empty one, or that of the run to go on with."""
    resume: bool = True
    """Go on with the run in the folder; --no-resume refuses a folder that holds one."""
    dry_run: bool = False
    """Print the configuration that would be trained, and stop."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    base, rest = arguments.starting_point(args, "train")
    if not any(flag == "--out" or flag.startswith("--out=") for flag in rest) and not {"-h", "--help"} & set(rest):
        raise UserError("--out is missing: must be the folder of the run")
    parsed = arguments.parse(Args, rest, "train", Args(config=base, out=Path("runs/run")))
    print(configs.to_json(parsed.config), end="", flush=True)
    if parsed.dry_run:
        return 0
    summary = train(parsed.config, parsed.out, resume=parsed.resume)
    if summary.stopped_by is not None:
        done = f"step {summary.step} of {parsed.config.steps}"
        print(f"stopped by {summary.stopped_by} after {done}, saved in {parsed.out}; the same command goes on with it")
        return 130 if summary.stopped_by == "SIGINT" else 0
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in summary.evaluation.items())
    pace = f"  {summary.tokens_per_second:,.0f} tokens/s" if summary.tokens_per_second else ""
    print(f"{parsed.out}: {summary.step} steps done in {summary.seconds:.0f} s{pace}  {numbers}")
    return 0


def train(config: TrainConfig, out: Path, *, resume: bool = True):
    """`train_run` with a bar on a terminal, lines elsewhere."""
    from bitnet_jax.cli.progress import stages
    from bitnet_jax.training.report import reporter_for
    from bitnet_jax.training.run import prepare_run, train_run

    with stages() as progress:
        data = prepare_run(config, out, progress)
    return train_run(config, out, data=data, reporter=reporter_for(sys.stderr), resume=resume)
