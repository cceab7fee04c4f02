"""A whole run from its configuration alone: the corpus is prepared, the model trained in a folder and evaluated on held-out text; and a
rehearsal of it."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bitnet_jax import costs
from bitnet_jax.config import TrainConfig
from bitnet_jax.data import Batches, Prepared, Progress, Tokenizer, prepare
from bitnet_jax.data.cache import silent
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.evaluation import evaluator
from bitnet_jax.training import distributed, loop, run_directory, sharding
from bitnet_jax.training.loop import Evaluate, Summary
from bitnet_jax.training.optimizer import Params, copies
from bitnet_jax.training.report import Reporter

_TOKENIZER = "tokenizer.json"


def prepare_run(config: TrainConfig, directory: Path, progress: Progress = silent) -> Prepared:
    """The corpus that `config.data` names, with the tokenizer of the run in `directory` if there is one.

    Raises:
        UserError: as `prepare`.
        RunError: as `prepare`.
    """
    kept = directory / _TOKENIZER
    tokenizer = Tokenizer.read(kept) if kept.exists() else None
    return prepare(config.data, vocab_size=config.model.vocab_size, tokenizer=tokenizer, progress=progress)


def train_run(
    config: TrainConfig,
    directory: Path,
    *,
    data: Prepared | None = None,
    measure: Evaluate | None = None,
    reporter: Reporter | None = None,
    resume: bool = True,
    last_step: int | None = None,
    profile: range | None = None,
) -> Summary:
    """`loop.train` on the corpus that `config.data` names, with the first `output.eval_windows` windows of its held-out text as evaluation.

    The tokenizer is kept in the folder, so that `load` finds a whole model there.

    Args:
        config: the run.
        directory: a new or empty folder, or that of the run to go on with.
        data: what `prepare_run` gave for this run; None prepares it.
        measure: called with the parameters at every evaluation; its numbers are logged beside those of the held-out text.
        reporter: is told what happens; None passes warnings to `logging`.
        resume: False refuses a folder that holds a run.
        last_step: as in `loop.train`.
        profile: as in `loop.train`.

    Raises:
        UserError: as `prepare` and `loop.train`.
        RunError: as `prepare` and `loop.train`.
    """
    data = prepare_run(config, directory) if data is None else data
    held_out = evaluator(
        config.model,
        data.validation.ids,
        window=config.data.seq_len,
        text_bytes=data.validation.text_bytes,
        max_tokens=config.output.eval_windows * config.data.seq_len + 1,
    )

    def evaluate(params: Params) -> Mapping[str, float]:
        return {**held_out(params), **(measure(params) if measure else {})}

    part = sharding.rows(sharding.make_mesh(config.mesh), config.batch_size)
    batches = Batches(
        data.train.ids,
        seq_len=config.data.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=part.index,
        process_count=part.count,
    )
    try:
        return loop.train(
            config,
            directory,
            batches,
            files={_TOKENIZER: data.tokenizer.to_json()},
            provenance={"data": data.provenance},
            evaluate=evaluate,
            reporter=reporter,
            resume=resume,
            last_step=last_step,
            profile=profile,
        )
    finally:
        batches.close()


def rehearse(
    config: TrainConfig, out: Path, *, data: Prepared | None = None, reporter: Reporter | None = None, resume: bool = True
) -> Summary:
    """Does all that a run does, in two steps: what would fail late fails now. Leaves nothing behind.

    In a folder beside `out`, for it must lie on the same disk: two steps, the evaluation and a checkpoint, and a second start that reads
    the checkpoint. Before that, `out` must be one that the run can begin or go on in, and the disk is held to the checkpoints that it will
    keep. A signal ends it as it ends a run, and is `stopped_by` of what is returned.

    Raises:
        UserError: as `train_run`, or the folder beside `out` exists: what is removed in the end must be the rehearsal's alone.
        RunError: as `train_run`, or the disk is too full for the checkpoints.
    """
    place = out.parent / f"{out.name}.rehearsal"
    steps = min(2, config.steps)
    distributed.led(lambda: run_directory.check(out, config, resume))
    distributed.led(lambda: _make(place))
    try:
        distributed.led(lambda: _check_disk(config, place))
        data = prepare_run(config, place) if data is None else data
        summary = train_run(config, place, data=data, reporter=reporter, last_step=steps)
        if summary.stopped_by is not None:
            return summary
        again = train_run(config, place, data=data, last_step=steps)
        if again.first_step != steps:
            raise RunError(f"the checkpoint of step {steps} in {place} was not found again: step {again.first_step} was")
        return replace(summary, stopped_by=again.stopped_by)
    finally:
        if distributed.leads():
            shutil.rmtree(place, ignore_errors=True)


def _make(place: Path) -> None:
    """Makes a folder that was not there; raises UserError or RunError where that cannot be."""
    try:
        place.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{place} exists: must not, for a rehearsal is done there and removed; remove it if it is left of one") from None
    except OSError as error:
        raise RunError(f"{place} cannot be made: {error.strerror or error}") from error


def _check_disk(config: TrainConfig, place: Path) -> None:
    """Raises RunError where the checkpoints that are kept, and one being written, have no room."""
    each = 4 * copies(config.optimizer) * costs.parameters(config.model).total
    count, free = config.output.keep_checkpoints + 1, shutil.disk_usage(place).free
    if count * each > free:
        raise RunError(
            f"{place.parent} has {free / 1e9:,.1f} GB free: must be at least {count * each / 1e9:,.1f} GB "
            f"for {count} checkpoints of {each / 1e9:,.1f} GB (keep_checkpoints={config.output.keep_checkpoints}, and one being written)"
        )
