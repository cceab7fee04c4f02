"""bitnet-jax generate MODEL PROMPT…: continues prompts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from bitnet_jax.cli import arguments, sampling_flags
from bitnet_jax.cli.terminal import harmless
from bitnet_jax.errors import UserError
from bitnet_jax.inference.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Args:
    """Continues one or more prompts; one is shown as it is written, several are computed together and shown when they are done."""

    model: tyro.conf.Positional[str]
    """A run's folder, a model file, a folder of Hugging Face's, or the name of a model on the hub."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts; without one, standard input is the prompt."""
    max_new_tokens: int = 128
    """Tokens to make at most for each prompt."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=lambda: sampling_flags.DEFAULT)
    """How the next token is chosen; what is not given is as the model's authors state it, where they do."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not shown."""
    seed: int = 0
    """Seed of the draws."""
    stream: bool = True
    """Show the text as it is made, where there is one prompt."""
    implementation: str | None = None
    """Kernel for packed weights; None chooses."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parsed = arguments.parse(Args, args, "generate")
    from bitnet_jax import models
    from bitnet_jax.inference import generate, stream

    prompts = list(parsed.prompts)
    if not prompts:
        if sys.stdin.isatty():
            raise UserError("no prompt is given: must be an argument, or standard input")
        prompts = [sys.stdin.read().rstrip("\n")]
    model = models.load(parsed.model, revision=parsed.revision, pack=True)
    parsed = sampling_flags.with_stated(parsed, args, "generate", model.sampling)
    options: dict[str, Any] = {
        "max_new_tokens": parsed.max_new_tokens,
        "sampling": parsed.sampling,
        "tokenizer": model.need_tokenizer(),
        "stop_tokens": model.stop_tokens or None,
        "stop_strings": parsed.stop,
        "prefix": model.prefix,
        "seed": parsed.seed,
        "implementation": parsed.implementation,
        "first_pass": sampling_flags.first_pass(model, parsed.sampling, parsed.max_new_tokens * len(prompts), parsed.implementation),
    }
    # A terminal is not to be commanded by a model; a file or a program gets the text as it is.
    shown = harmless if sys.stdout.isatty() else str
    if len(prompts) == 1 and parsed.stream:
        pieces = stream(model.params, model.config, prompts, **options)
        print(prompts[0], end="", flush=True)
        for piece in pieces:
            print(shown(piece.text), end="", flush=True)
        print()
        result = pieces.result()
    else:
        result = generate(model.params, model.config, prompts, **options)
        for number, (prompt, row) in enumerate(zip(prompts, result.rows, strict=True), 1):
            print(f"{f'--- {number} ---' + chr(10) if len(prompts) > 1 else ''}{prompt}{shown(row.text or '')}")
    timing = result.timing
    pace = f", {timing.decode_tokens_per_second:,.1f} tokens/s" if timing.decode_tokens_per_second else ""
    reasons = ", ".join(row.finish.value for row in result.rows if row.finish is not None)
    print(f"{timing.new_tokens} tokens ({reasons}){pace}; compiled in {timing.compile_seconds:.1f} s", file=sys.stderr)
    return 0
