"""bitnet-jax bench MODEL | --shape SHAPE: speed of text generation on this CPU, beside other programs."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bitnet_jax.cli import arguments
from bitnet_jax.errors import UserError

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "cpu"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measures prefill, decode, peak memory and the time to the first token, every figure in processes of their own on so many cores.

    With --json an interrupted benchmark goes on where it was: give the same command again.
    """

    model: tyro.conf.Positional[str | None] = None
    """A model file (.safetensors, .gguf) or folder; or use --shape."""
    shape: str | None = None
    """2b4t, 700m or a preset: a random model of that shape, written once to the user's cache."""
    encoding: Literal["two_bit", "base3"] = "two_bit"
    """Of the random model: 4 weights a byte, or 5."""
    threads: tuple[int, ...] | None = None
    """Numbers of cores; unset, 1 and all."""
    prompt: tuple[int, ...] = (128, 512)
    """Tokens of the prompt."""
    generate: tuple[int, ...] = (64, 256)
    """New tokens, made greedily. The shortest is streamed as well."""
    repeats: int = 3
    """Processes for each figure; programs take turns."""
    implementation: str | None = None
    """Kernel for packed weights; None chooses."""
    peer: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Another program, NAME=COMMAND with {prompt}, {generate} and {threads} in the command. It prints llama-bench's JSON, or an object with
    prefill_tokens_per_second and decode_tokens_per_second. May be given again."""
    twin: tuple[Literal["bfloat16", "float32"], ...] = ()
    """Measure the full-precision twin as well, with random weights of these types; it must fit in memory."""
    start: bool = True
    """Measure the time to the first token."""
    seed: int = 0
    """Seed of the prompt."""
    json: Path | None = None
    """File that keeps every figure; what it has of this code and these settings is not measured again."""
    table: tuple[Path, ...] | None = None
    """Measure nothing: show what these files keep; without a file, what the checkout's experiments/results/cpu keeps."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parsed = arguments.parse(Args, args, "bench")
    from bitnet_jax.benchmark import results, session, settings

    if parsed.table is not None:
        files = parsed.table or tuple(sorted(RESULTS.glob("*.json")))
        if not files:
            raise UserError("--table needs a file: nothing was measured in this checkout")
        for found in [results.read(path) for path in files]:
            show(found)
        return 0
    if (parsed.model is None) == (parsed.shape is None):
        raise UserError("a model file or --shape must be given, and not both")
    if parsed.model is not None and not Path(parsed.model).exists():
        raise UserError(f"{parsed.model} does not exist: must be a model file or folder")
    if parsed.json is not None:
        settings.check_output(parsed.json)
    preset = None if parsed.shape is None else settings.preset_of(parsed.shape)
    available = len(session.processes.cores())
    wanted = settings.Settings(
        threads=tuple(dict.fromkeys((1, available))) if parsed.threads is None else parsed.threads,
        prompt=parsed.prompt,
        generate=parsed.generate,
        repeats=parsed.repeats,
        implementation=parsed.implementation,
        peers=tuple(map(settings.read_peer, parsed.peer)),
        twin=parsed.twin,
        start=parsed.start,
        seed=parsed.seed,
    )

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that the process that measures ends with this one
    try:
        if preset is None:
            assert parsed.model is not None
            name, path = Path(parsed.model).name, Path(parsed.model)
        else:
            from bitnet_jax.config import ModelConfig

            wanted.check_lengths(ModelConfig.preset(preset))
            name, path = f"{parsed.shape} {parsed.encoding}", session.random_model(preset, parsed.encoding, report)
        show(session.measure(name, path, wanted, parsed.json, report))
    except KeyboardInterrupt:
        kept = f"what was measured is in {parsed.json}; the same command goes on" if parsed.json else "without --json nothing is kept"
        print(f"bitnet-jax: interrupted: {kept}", file=sys.stderr)
        return 130
    return 0


def show(found: dict[str, Any]) -> None:
    """Prints the tables of a file of results."""
    from rich.console import Console
    from rich.table import Table

    from bitnet_jax.benchmark import table

    console = Console(width=None if sys.stdout.isatty() else 160)
    for one in table.tables(found):
        shown = Table(*one.columns, title=one.title, title_justify="left")
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in one.rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(table.machine(found), highlight=False)
