"""A whole run from its configuration alone: the corpus is prepared, the model trained in a folder and evaluated on held-out text."""

from collections.abc import Mapping
from pathlib import Path

from bitnet_jax.config import TrainConfig
from bitnet_jax.data import Batches, Prepared, Progress, Tokenizer, prepare
from bitnet_jax.data.cache import silent
from bitnet_jax.evaluation import evaluator
from bitnet_jax.training import loop
from bitnet_jax.training.loop import Evaluate, Summary
from bitnet_jax.training.optimizer import Params
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

    batches = Batches(data.train.ids, seq_len=config.data.seq_len, batch_size=config.batch_size, seed=config.seed)
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
        )
    finally:
        batches.close()
