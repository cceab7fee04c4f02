"""The command `bitnet-jax`: one file a command, and one line for each error.

Exit codes: 0 done, or stopped by SIGTERM with everything saved; 1 a run that could not go on; 2 a wrong input; 130 interrupted.
"""

import importlib
import io
import os
import sys
from collections.abc import Sequence

from bitnet_jax.compilation import keep_programs
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.memory import keep_freed_memory

COMMANDS = {
    "quickstart": "train a small ternary model and its full-precision twin, pack it, prove it, generate from it",
    "train": "train a model from a preset or a configuration file; an interrupted run goes on where it was",
    "eval": "perplexity and bits per byte of a model on a text, or scores in tasks of lm-evaluation-harness",
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "pack": "write a model as one file, with 2 or 1.6 bits a ternary weight",
    "convert": "any model that is read here to Hugging Face, GGUF, StableHLO, orbax or a packed file, proved the same",
    "info": "say what a run or a model file is",
    "plan": "what a run needs and takes at the best on a TPU pod, GPUs or a CPU, before there is one",
    "bench": "measure prefill, decode, memory and start on this CPU, beside other programs",
}

_REPEATING = ("quickstart", "train", "eval")
"""Commands that allocate the same large buffers in every step."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. With BITNET_JAX_TRACEBACK=1 an error keeps its traceback."""
    args = list(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model writes what a terminal may have no letters for
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if args else 2
    if args[0] == "--version":
        from bitnet_jax import __version__

        print(f"bitnet-jax {__version__}")
        return 0
    try:
        if args[0] not in COMMANDS:
            raise UserError(f"command {args[0]!r} is unknown: must be one of {', '.join(COMMANDS)}")
        keep_programs()
        if args[0] in _REPEATING:
            keep_freed_memory()
        return importlib.import_module(f"bitnet_jax.cli.{args[0]}").run(args[1:])
    except (UserError, RuntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
        expected = isinstance(error, UserError | RunError | NotImplementedError | OSError | MemoryError | KeyboardInterrupt)
        if not expected and type(error).__name__ != "JaxRuntimeError":  # which is how a device says that its memory is full
            raise
        if os.environ.get("BITNET_JAX_TRACEBACK") == "1":
            raise
        if isinstance(error, BrokenPipeError):  # the reader of our output is gone, as with `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if isinstance(error, KeyboardInterrupt):
            print("bitnet-jax: interrupted", file=sys.stderr)
            return _leave(130)
        print(f"bitnet-jax: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return _leave(2 if isinstance(error, UserError | NotImplementedError) else 1)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # which a tokenizer's core raises, and which is no Exception
            raise
        print(f"bitnet-jax: error: the tokenizer fails: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _leave(code: int) -> int:
    """`code`; a process of several ends here, for the others may wait for it, and it would wait for them."""
    distributed = sys.modules.get("bitnet_jax.training.distributed")
    if distributed is not None and distributed.joined():
        distributed.leave(code)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return f"usage: bitnet-jax COMMAND [FLAGS]\n\n{rows}\n\nbitnet-jax COMMAND --help lists a command's flags."
