"""bitnet-jax eval MODEL TEXT: perplexity over all tokens of a text, and bits per byte. With --tasks: tasks of lm-evaluation-harness."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from bitnet_jax.cli import arguments
from bitnet_jax.errors import UserError

if TYPE_CHECKING:
    from bitnet_jax.evaluation.tasks import Score


@dataclass(frozen=True, kw_only=True)
class Args:
    """Perplexity of a model over all tokens of a text, and bits per byte, by which models with other tokenizers compare.

    With --tasks, the scores of a model in tasks of lm-evaluation-harness (extra lm-eval).
    """

    model: tyro.conf.Positional[str]
    """A run's folder, a model in any format that `convert` reads, or owner/model on the hub."""
    text: tyro.conf.Positional[str | None] = None
    """A file, folder or glob of .txt, .jsonl, .jsonl.zst or .parquet; without it, the held-out text of the run."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet records."""
    window: int | None = None
    """Tokens fed at a time; None is the longest sequence that the model is meant for."""
    stride: int | None = None
    """Tokens from one window to the next; every window but the first counts its last `stride` tokens. None is the window."""
    tasks: str | None = None
    """Tasks, groups or patterns of lm-evaluation-harness, with commas between them: arc_easy,hellaswag."""
    limit: int | None = None
    """Examples of each task at most; None is all."""
    num_fewshot: int | None = None
    """Examples before each question; None is what a task says."""
    include_path: Path | None = None
    """Folder with tasks of your own."""
    chat: bool = False
    """Put the model's chat template around the questions."""
    cache: Path | None = None
    """File that keeps every answer: an interrupted evaluation goes on where it was, and what was answered is not computed again."""
    batch_size: int | None = None
    """Windows, or requests of tasks, computed at a time; None fits them to the memory. It changes the time, not the result."""
    implementation: str | None = None
    """Kernel for packed weights; None chooses."""
    json: bool = False
    """Print one JSON object instead of lines."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parsed = arguments.parse(Args, args, "eval")
    _check_together(parsed)
    if parsed.tasks is not None:
        return _run_tasks(parsed)
    import numpy as np

    from bitnet_jax import models
    from bitnet_jax.cli.progress import stages
    from bitnet_jax.data import read_tokens
    from bitnet_jax.evaluation import perplexity

    model = models.load(parsed.model)
    tokenizer = model.need_tokenizer()
    with stages() as progress:
        if parsed.text is not None:
            tokens = read_tokens(parsed.text, tokenizer, text_field=parsed.text_field, progress=progress)
        else:
            tokens = held_out(Path(parsed.model), progress)
        found = perplexity(
            model.params,
            model.config,
            np.concatenate((np.array(model.prefix, tokens.ids.dtype), tokens.ids)),
            window=parsed.window,
            stride=parsed.stride,
            batch_size=parsed.batch_size,
            text_bytes=tokens.text_bytes,
            implementation=parsed.implementation,
            progress=lambda done, total: progress("evaluate", done, total),
        )
    facts = {
        "model": parsed.model,
        "text": parsed.text or "held-out text of the run",
        "perplexity": found.perplexity,
        "loss_nats_per_token": found.loss,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": tokens.text_bytes,
        "window": found.window,
        "stride": found.stride,
        "seconds": found.seconds,
    }
    if parsed.json:
        print(json.dumps(facts, indent=2))
    else:
        print(
            f"perplexity {found.perplexity:.4f}  bits per byte {found.bits_per_byte:.4f}  loss {found.loss:.4f} nats per token\n"
            f"{found.tokens:,} tokens of {facts['text']}, window {found.window}, stride {found.stride}, {found.seconds:.1f} s"
        )
    return 0


_OF_TASKS = ("limit", "num_fewshot", "include_path", "chat", "cache")
_OF_TEXTS = ("text", "text_field", "window", "stride")


def _check_together(parsed: Args) -> None:
    """Raises UserError where an option of texts meets --tasks, or one of tasks has none."""
    default = Args(model="")
    for name in _OF_TASKS if parsed.tasks is None else _OF_TEXTS:
        if getattr(parsed, name) != getattr(default, name):
            shown = "a text" if name == "text" else f"--{name.replace('_', '-')}"
            raise UserError(f"{shown} goes with {'--tasks alone' if parsed.tasks is None else 'perplexity, and not with --tasks'}")


def _run_tasks(parsed: Args) -> int:
    import time

    from bitnet_jax import models
    from bitnet_jax.cli.progress import stages
    from bitnet_jax.evaluation import harness, tasks

    if not sys.stderr.isatty():  # as our own, the bars of the harness and of what it reads with are for terminals
        os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    harness.need()
    assert parsed.tasks is not None
    begun = time.perf_counter()
    model = models.load(parsed.model, pack=True)
    with stages() as progress:
        found = tasks.evaluate(
            harness.harness_model(
                model.params,
                model.config,
                model.need_tokenizer(),
                prefix=model.prefix,
                stop_tokens=model.stop_tokens,
                chat_template=model.chat_template,
                batch_size=parsed.batch_size,
                implementation=parsed.implementation,
                cache=parsed.cache,
                progress=progress,
            ),
            [name for name in map(str.strip, parsed.tasks.split(",")) if name],
            limit=parsed.limit,
            num_fewshot=parsed.num_fewshot,
            include_path=parsed.include_path,
            chat=parsed.chat,
        )
    scores = tasks.table(found)
    seconds = time.perf_counter() - begun
    if parsed.json:
        facts = {
            "model": parsed.model,
            "scores": [asdict(score) for score in scores],
            "versions": found["versions"],
            "lm_eval": found["lm_eval_version"],
            "limit": parsed.limit,
            "chat": parsed.chat,
            "seconds": seconds,
        }
        print(json.dumps(facts, indent=2))
    else:
        _show(parsed.model, scores, seconds)
    return 0


def _show(model: str, scores: "Sequence[Score]", seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table("task", "shots", "examples", "metric", "value", "standard error", title=model, title_justify="left")
    for name in ("shots", "examples", "value", "standard error"):
        next(column for column in shown.columns if column.header == name).justify = "right"
    for score in scores:
        stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
        counts = ("" if count is None else f"{count:,}" for count in (score.shots, score.examples))
        metric = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
        shown.add_row(score.task, *counts, metric, f"{score.value:,.4f}", stderr)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(shown)
    console.print(f"{seconds:.1f} s", highlight=False)


def held_out(path: Path, progress):
    """The held-out tokens of the run at `path`; raises UserError where it is no run or its corpus has changed."""
    from bitnet_jax import config as configs
    from bitnet_jax import models
    from bitnet_jax.config import TrainConfig
    from bitnet_jax.data import Tokenizer, prepare
    from bitnet_jax.training import run_directory

    if not path.is_dir():
        raise UserError(f"{path} is a file: eval needs a text, since only a run knows its held-out text")
    config = configs.read(TrainConfig, path / run_directory.CONFIG)
    tokenizer = Tokenizer.read(path / "tokenizer.json")
    found = prepare(config.data, vocab_size=config.model.vocab_size, tokenizer=tokenizer, progress=progress)
    starts = models.load_provenance(path).get("starts")
    try:
        begun = starts[0].get("data") if starts else None
        same = begun is None or begun["corpus"]["fingerprint"] == found.provenance["corpus"]["fingerprint"]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path / run_directory.PROVENANCE} is not the provenance of a run: name a text") from None
    if not same:
        raise UserError(
            f"source={config.data.source!r} has changed since {path} was begun: its held-out text must be the same; name a text"
        )
    return found.validation
