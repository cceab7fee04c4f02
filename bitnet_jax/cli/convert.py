"""bitnet-jax convert SRC DST --to FORMAT: any model that is read here to any format that is written, proved to be the same model."""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bitnet_jax.cli import arguments
from bitnet_jax.conversion import Format, Options
from bitnet_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Converts a model leaf by leaf, reads the result back, and compares weights, logits and greedy tokens before it is kept."""

    source: tyro.conf.Positional[str]
    """A run's folder, a model file (.safetensors, .gguf), a Hugging Face, StableHLO or orbax folder, or owner/model on the hub."""
    destination: tyro.conf.Positional[Path]
    """File or folder to write."""
    to: Format
    """The format."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    """What the format leaves to choose."""
    variant: Literal["trilm"] | None = None
    """trilm: the source is a Hugging Face folder with TriLM's weights, which its config.json cannot say."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace what is at the destination."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parsed = arguments.parse(Args, args, "convert")
    from bitnet_jax import models
    from bitnet_jax.cli.progress import stages
    from bitnet_jax.conversion import convert

    destination = parsed.destination
    if destination.exists() and not parsed.force and not (destination.is_dir() and not any(destination.iterdir())):
        raise UserError(f"{destination} exists: --force replaces it")
    if destination.exists() and Path(parsed.source).exists() and destination.resolve() == Path(parsed.source).resolve():
        raise UserError(f"{destination} is the source: must be another path")

    def warn(line: str) -> None:
        print(line, file=sys.stderr)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that no draft of gigabytes stays behind
    begun = time.monotonic()
    source, kind = models.open_weights(parsed.source, warn, variant=parsed.variant, revision=parsed.revision)
    with stages() as progress:
        converted = convert(source, destination, parsed.to, parsed.options, progress=progress)
    seconds = time.monotonic() - begun
    print(f"{destination}: {converted.size:,} bytes of {parsed.to.value}, from a {kind}, in {seconds:.1f} s")
    print(converted.proof)
    return 0
