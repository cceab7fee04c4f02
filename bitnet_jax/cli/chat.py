"""bitnet-jax chat MODEL: a conversation."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bitnet_jax.cli import arguments, sampling_flags
from bitnet_jax.cli.terminal import Interrupt, harmless
from bitnet_jax.errors import UserError
from bitnet_jax.inference.sampling import Sampling

if TYPE_CHECKING:
    from bitnet_jax.inference.chat import Chat

HELP = "/reset forgets what was said; /quit or Ctrl-D ends; Ctrl-C ends a reply, or at the prompt the program"


@dataclass(frozen=True, kw_only=True)
class Args:
    """A conversation with a model. Standard input that is no terminal is read line by line, each line a message."""

    model: tyro.conf.Positional[str]
    """A run's folder, a model file, a folder of Hugging Face's, or the name of a model on the hub."""
    system: str | None = None
    """A message before all others, where the model's template knows one."""
    template: str | None = None
    """A file with a Jinja template, or `bitnet` for that of BitNet b1.58 2B4T; unset, the model's own."""
    max_new_tokens: int = 512
    """Tokens of a reply at most."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=lambda: sampling_flags.DEFAULT)
    """How the next token is chosen; what is not given is as the model's authors state it, where they do."""
    seed: int = 0
    """Seed of the draws."""
    implementation: str | None = None
    """Kernel for packed weights; None chooses."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parsed = arguments.parse(Args, args, "chat")
    from bitnet_jax import models
    from bitnet_jax.inference.chat import Chat

    given = None if parsed.template is None else read_template(parsed.template)
    model = models.load(parsed.model, revision=parsed.revision, pack=True)
    template = model.chat_template if given is None else given
    if template is None:
        raise UserError(
            f"{parsed.model} has no chat template: --template must name a file with one, or be `bitnet` for that of BitNet b1.58 2B4T"
        )
    parsed = sampling_flags.with_stated(parsed, args, "chat", model.sampling)
    chat = Chat(
        model.params,
        model.config,
        model.need_tokenizer(),
        template,
        system=parsed.system,
        prefix=model.prefix,
        stop_tokens=model.stop_tokens,
        sampling=parsed.sampling,
        max_new_tokens=parsed.max_new_tokens,
        seed=parsed.seed,
        implementation=parsed.implementation,
        first_pass=sampling_flags.first_pass(model, parsed.sampling, parsed.max_new_tokens, parsed.implementation),
    )
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    for line in lines(interactive):
        match line.strip():
            case "":
                pass
            case "/quit":
                break
            case "/reset":
                chat.reset()
            case "/help":
                print(HELP, file=sys.stderr)
            case _:
                try:
                    answer(chat, line, interactive)
                except UserError as error:
                    if not interactive:
                        raise
                    print(f"bitnet-jax: error: {error}", file=sys.stderr)
    return 0


def read_template(name: str) -> str:
    """The template `bitnet`, or the text of the file `name`; raises UserError where it cannot be read."""
    from bitnet_jax.inference import chat_template

    if name == "bitnet":
        return chat_template.BITNET
    try:
        with Path(name).open(encoding="utf-8") as file:
            # One character more than it may have is enough to refuse it.
            return file.read(chat_template.TEMPLATE_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template {name} cannot be read: {error}") from None


def lines(interactive: bool) -> Iterator[str]:
    """The messages on standard input, behind a prompt where a person writes them."""
    if interactive:
        import contextlib

        with contextlib.suppress(ImportError):  # Windows has none; its terminal edits lines itself
            import readline  # noqa: F401 (`input` then edits lines and remembers them)
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
            line.encode()  # in the C locale, bytes that are no UTF-8 become surrogates, and only here an error
        except EOFError:
            print()
            return
        except UnicodeError as error:
            raise UserError(f"standard input is not UTF-8: {error}") from None
        if not interactive and not line:
            return
        yield line.rstrip("\n")


def answer(chat: "Chat", text: str, interactive: bool) -> None:
    """Shows the reply to `text` as it is made, and then its pace. Ctrl-C ends the reply; where nobody sits there, the program too."""
    finish, begun = None, False
    with Interrupt() as interrupt:
        reply = chat.reply(text)
        if reply.dropped:
            print(f"the context is full: forgetting the oldest {reply.dropped} of the turns so far", file=sys.stderr)
        while finish is None and not interrupt.noted:
            piece = next(reply)
            finish, begun = piece.finish, True
            print(harmless(piece.text), end="", flush=True)
    print(flush=True)
    if begun:
        timing = reply.result().timing
        pace = f", {timing.decode_tokens_per_second:,.1f} tokens/s" if timing.decode_tokens_per_second else ""
        compiling = f"; compiled in {timing.compile_seconds:.1f} s" if timing.compile_seconds >= 0.1 else ""
        reason = "interrupted" if finish is None else finish.value
        print(f"[{timing.new_tokens} tokens ({reason}){pace}{compiling}]", file=sys.stderr)
    if interrupt.noted and not interactive:
        raise KeyboardInterrupt
