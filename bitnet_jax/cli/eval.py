"""bitnet-jax eval MODEL TEXT: perplexity over all tokens of a text, and bits per byte."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from bitnet_jax.cli import arguments
from bitnet_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Perplexity of a model over all tokens of a text, and bits per byte, by which models with other tokenizers compare."""

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
    batch_size: int | None = None
    """Windows computed at a time; None fits them to the memory. It changes the time, not the result."""
    implementation: str | None = None
    """Kernel for packed weights; None chooses."""
    json: bool = False
    """Print one JSON object instead of lines."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parsed = arguments.parse(Args, args, "eval")
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
    begun = models.load_provenance(path).get("starts", [{}])[0].get("data")
    if begun is not None and begun["corpus"]["fingerprint"] != found.provenance["corpus"]["fingerprint"]:
        raise UserError(
            f"source={config.data.source!r} has changed since {path} was begun: its held-out text must be the same; name a text"
        )
    return found.validation
