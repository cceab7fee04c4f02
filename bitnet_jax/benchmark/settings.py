"""What is measured. Everything that can be wrong is found before the first process starts."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from bitnet_jax.benchmark import processes
from bitnet_jax.config import DType, ModelConfig
from bitnet_jax.errors import UserError
from bitnet_jax.presets import presets

SHAPES = {"2b4t": "bitnet-b1.58-2b4t", "700m": "dummy-700m"}
"""Short names of presets."""
OURS, TWIN, BANDWIDTH, START = "bitnet-jax", "full precision in XLA", "read bandwidth", "start"


def twin_of(dtype: str) -> str:
    """What the full-precision twin with weights of type `dtype` is called."""
    return f"{TWIN}, {dtype}"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another program: its name, and its command with {prompt}, {generate} and {threads}."""

    name: str
    command: str

    def words(self, prompt: int, generate: int, threads: int) -> list[str]:
        """The command for one measurement."""
        values = {"prompt": prompt, "generate": generate, "threads": threads}
        return shlex.split(re.sub(r"\{(prompt|generate|threads)\}", lambda match: str(values[match[1]]), self.command))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        threads: numbers of cores.
        prompt: tokens of prompts.
        generate: new tokens.
        repeats: processes for each figure.
        implementation: of the packed products; None is what users get.
        peers: other programs.
        twin: types of the full-precision twin's weights; without one it is not measured.
        start: whether the time to the first token is.
        seed: of the prompt.
    """

    threads: tuple[int, ...]
    prompt: tuple[int, ...] = (128, 512)
    generate: tuple[int, ...] = (64, 256)
    repeats: int = 3
    implementation: str | None = None
    peers: tuple[Peer, ...] = ()
    twin: tuple[str, ...] = ()
    start: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError where a value is out of range or a peer's program does not exist."""
        available = len(processes.cores())
        for name in ("threads", "prompt", "generate"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: must have at least one number")
        for count in self.threads:
            if not 1 <= count <= available:
                raise UserError(f"threads={count} must be from 1 to {available}, the cores that this process may use")
        for count in self.prompt:
            if count < 1:
                raise UserError(f"prompt={count} must be at least 1")
        for count in self.generate:
            if count < 2:
                raise UserError(f"generate={count} must be at least 2: the first token is not decode's")
        if self.repeats < 1:
            raise UserError(f"repeats={self.repeats} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must be from 0 to 4294967295")
        names = [OURS, BANDWIDTH, START, *(twin_of(dtype.value) for dtype in DType)]
        for peer in self.peers:
            if peer.name in names:
                raise UserError(f"peer {peer.name!r} has a name that is taken: must be another one")
            names.append(peer.name)
            program = peer.words(1, 2, 1)[0]
            if shutil.which(program) is None:
                raise UserError(f"peer {peer.name!r}: {program} is no program that can be run")

    def check_lengths(self, config: ModelConfig) -> None:
        """Raises UserError where prompt and new tokens are more than the model's context."""
        total = max(self.prompt) + max(self.generate)
        if total > config.max_seq_len:
            raise UserError(
                f"prompt={max(self.prompt)} with generate={max(self.generate)} is {total} tokens: "
                f"must be at most max_seq_len={config.max_seq_len} of the model"
            )


def read_peer(text: str) -> Peer:
    """A peer from `NAME=COMMAND`. Raises UserError where it is not of that form."""
    name, equals, command = text.partition("=")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"peer {name!r}: its command cannot be split into words: {error}") from None
    if not equals or not name or not words:
        raise UserError(f"peer {text!r} must be NAME=COMMAND")
    return Peer(name=name, command=command)


def preset_of(shape: str) -> str:
    """The preset that a shape names. Raises UserError where there is none."""
    name = SHAPES.get(shape, shape)
    if name not in presets():
        raise UserError(f"shape {shape!r} is unknown: must be {', '.join(SHAPES)}, or a preset ({', '.join(presets())})")
    return name


def read_speeds(output: str) -> dict[str, float]:
    """Prefill and decode in tokens a second from what a peer printed.

    Either llama-bench's array, `-o json`, with one test of prompts and one of new tokens, or an object with the keys
    `prefill_tokens_per_second` and `decode_tokens_per_second`; other lines may stand before it.

    Raises:
        ValueError: it is neither, or a figure is no positive number.
    """
    found: dict[str, float] = {}
    for match in re.finditer(r"^\s*[\[{]", output, re.MULTILINE):
        try:
            value, _ = json.JSONDecoder().raw_decode(output[match.start() :].lstrip())
        except ValueError:
            continue
        if isinstance(value, dict):
            names = ("prefill_tokens_per_second", "decode_tokens_per_second")
            found = {name: value[name] for name in names if value.get(name) is not None}
        elif isinstance(value, list) and all(isinstance(test, dict) and "avg_ts" in test for test in value):
            for test in value:
                if not (test.get("n_prompt") and test.get("n_gen")):
                    found["decode_tokens_per_second" if test.get("n_gen") else "prefill_tokens_per_second"] = test["avg_ts"]
        if found:
            break
    if not found or not all(isinstance(pace, int | float) and 0 < pace < 1e12 for pace in found.values()):
        raise ValueError("it printed no speeds: must be llama-bench's JSON, or an object with prefill_ and decode_tokens_per_second")
    return {name: float(pace) for name, pace in found.items()}


def check_output(path: Path) -> None:
    """Raises UserError where results could not be written to `path`."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--json {path} must be a file in a folder that exists")
