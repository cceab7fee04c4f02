"""bitnet-jax train [PRESET | --config FILE] --out RUN: trains a model, or goes on with a run."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """Do two steps, an evaluation and a checkpoint, read it again, and remove it all: what would fail at hour 20 fails now."""
    show_config: bool = False
    """Print the configuration that would be trained, and stop."""
    profile: str | None = None
    """START:STOP writes a trace of steps START to STOP - 1 to the folder `profile` of the run, for xprof or TensorBoard."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes train together and neither SLURM, a TPU pod nor Open MPI started them."""
    processes: int | None = None
    """How many processes there are; with --coordinator."""
    process: int | None = None
    """Index of this process, from 0; with --coordinator."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    base, rest = arguments.starting_point(args, "train")
    if not any(flag == "--out" or flag.startswith("--out=") for flag in rest) and not {"-h", "--help"} & set(rest):
        raise UserError("--out is missing: must be the folder of the run")
    parsed = arguments.parse(Args, rest, "train", Args(config=rehearsed(base, rest), out=Path("runs/run")))
    profile = steps_of(parsed.profile)
    if parsed.dry_run and profile is not None:
        raise UserError(f"--profile {parsed.profile} with --dry-run: a rehearsal leaves nothing, no trace either")
    if parsed.show_config:
        print(configs.to_json(parsed.config), end="", flush=True)
        return 0
    from bitnet_jax.training import distributed

    distributed.join(parsed.coordinator, parsed.processes, parsed.process)
    if distributed.leads():
        print(configs.to_json(parsed.config), end="", flush=True)
    if parsed.dry_run:
        summary = train(parsed.config, parsed.out, resume=parsed.resume, dry=True)
        if summary.stopped_by is not None:
            if distributed.leads():
                print(f"stopped by {summary.stopped_by} before the rehearsal was through; nothing of it is left")
            return 130 if summary.stopped_by == "SIGINT" else 1
        if distributed.leads():
            done = f"{summary.step} steps, an evaluation, a checkpoint and a second start"
            print(f"{done} went well in {summary.seconds:.0f} s; nothing of it is left")
        return 0
    summary = train(parsed.config, parsed.out, resume=parsed.resume, profile=profile)
    if not distributed.leads():
        return 130 if summary.stopped_by == "SIGINT" else 0
    if summary.stopped_by is not None:
        done = f"step {summary.step} of {parsed.config.steps}, saved in {parsed.out}" if summary.step else "nothing"
        print(f"stopped by {summary.stopped_by} after {done}; the same command goes on with it")
        return 130 if summary.stopped_by == "SIGINT" else 0
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in summary.evaluation.items())
    pace = f"  {summary.tokens_per_second:,.0f} tokens/s" if summary.tokens_per_second else ""
    print(f"{parsed.out}: {summary.step} steps done in {summary.seconds:.0f} s{pace}  {numbers}")
    return 0


def rehearsed(base: TrainConfig, args: Sequence[str]) -> TrainConfig:
    """`base` with warm-ups that fit into the few steps of `--steps 2 --dry-run`."""
    words = [part for word in args for part in word.split("=", 1)]
    after = dict(itertools.pairwise(words)).get("--steps", "")
    steps = int(after) if after.isdecimal() else base.steps
    if "--dry-run" not in args or steps < 1:
        return base
    warmup, quant = min(base.optimizer.warmup_steps, steps - 1), min(base.optimizer.quant_warmup_steps, steps)
    return replace(base, optimizer=replace(base.optimizer, warmup_steps=warmup, quant_warmup_steps=quant))


def train(config: TrainConfig, out: Path, *, resume: bool = True, dry: bool = False, profile: range | None = None):
    """`train_run`, or with `dry` its rehearsal, with a bar on a terminal, lines elsewhere, and nothing from processes that do not lead."""
    from bitnet_jax.cli.progress import stages
    from bitnet_jax.training import distributed
    from bitnet_jax.training.report import Quiet, reporter_for
    from bitnet_jax.training.run import prepare_run, rehearse, train_run

    with stages() as progress:
        data = prepare_run(config, out, progress)
    reporter = reporter_for(sys.stderr) if distributed.leads() else Quiet()
    if dry:
        return rehearse(config, out, data=data, reporter=reporter, resume=resume)
    return train_run(config, out, data=data, reporter=reporter, resume=resume, profile=profile)


def steps_of(text: str | None) -> range | None:
    """The steps that START:STOP names.

    Raises:
        UserError: it does not.
    """
    if text is None:
        return None
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and 1 <= int(start) < int(stop)):
        raise UserError(f"--profile {text} must be START:STOP, numbers of steps with 1 <= START < STOP")
    return range(int(start), int(stop))
