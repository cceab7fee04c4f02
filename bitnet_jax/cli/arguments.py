"""Flags from dataclasses: every field is a flag with its docstring as help, and a wrong one is a single line."""

import contextlib
import io
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from bitnet_jax import config as configs
from bitnet_jax.config import ModelConfig, TrainConfig
from bitnet_jax.errors import UserError
from bitnet_jax.presets import presets, recipe

Args = TypeVar("Args")


def parse(kind: type[Args], args: Sequence[str], command: str, default: Args | None = None) -> Args:
    """`args` as a value of the dataclass `kind`, whose fields are flags; unset ones come from `default`.

    Raises:
        UserError: a flag is unknown, or its value is wrong.
        SystemExit: help was asked for and printed.
    """
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            choices = (tyro.conf.EnumChoicesFromValues,)
            return cast(Args, tyro.cli(kind, args=list(args), prog=f"bitnet-jax {command}", default=default, config=choices))
    except SystemExit as error:
        if error.code in (0, None):
            sys.stderr.write(box.getvalue())
            raise
        raise UserError(f"{_one_line(box.getvalue())} (bitnet-jax {command} --help lists the flags)") from None


def _one_line(box: str) -> str:
    """What stands in tyro's box between its title and its first rule, and the flag that was probably meant.

    The box is drawn with lines, or with hyphens and no sides where the terminal knows nothing better; then the title has its own rule.
    """
    drawn = box.lstrip().startswith("╭")
    parts: list[list[str]] = [[]]
    for line in (line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))):
        if line and not line.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(line)
    texts = [text for text in (" ".join(part).strip() for part in parts) if text][0 if drawn else 1 :]
    meant = re.search(r"Perhaps you meant: (--\S+)", " ".join(texts))
    message = re.sub(r"^Error parsing \w+: ", "", texts[0] if texts else "the flags are wrong").rstrip(".")
    return message + (f"; perhaps {meant[1]} was meant" if meant else "")


def starting_point(args: Sequence[str], command: str) -> tuple[TrainConfig, list[str]]:
    """The configuration that flags change, and the flags that are left.

    It is named by a preset in the first place (`ladder-1m`), or by `--config FILE`, a .json file that a run wrote or a .py file that
    defines `config`, a TrainConfig. Without either it is `ladder-1m`.

    Raises:
        UserError: the preset is unknown, the file is missing or defines no configuration, or both are given.
    """
    rest = list(args)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else None
    file = None
    for i, flag in enumerate(rest):
        if flag == "--config" or flag.startswith("--config="):
            if flag == "--config" and i + 1 == len(rest):
                raise UserError("--config needs a file: a .json that a run wrote, or a .py that defines `config`")
            file = rest[i + 1] if flag == "--config" else flag.removeprefix("--config=")
            del rest[i : i + (2 if flag == "--config" else 1)]
            break
    late = [word for word in rest if word in presets()]
    if late and name is None:
        raise UserError(f"preset {late[0]!r} must come first: bitnet-jax {command} {late[0]} …")
    if name is not None and file is not None:
        raise UserError(f"preset {name!r} and --config {file} are both given: bitnet-jax {command} starts from one of them")
    if file is not None:
        return from_file(Path(file)), rest
    return from_preset(name or "ladder-1m"), rest


def from_preset(name: str) -> TrainConfig:
    """A run of the preset `name`: its published optimiser where there is one, the defaults otherwise."""
    model = ModelConfig.preset(name)
    data = (
        configs.DataConfig(seq_len=min(256, model.max_seq_len))
        if name.startswith("ladder")
        else configs.DataConfig(seq_len=model.max_seq_len)
    )
    try:
        return TrainConfig(model=model, data=data, optimizer=recipe(name))
    except UserError:  # not every preset's training was published
        return TrainConfig(model=model, data=data, optimizer=configs.OptimizerConfig(warmup_steps=20))


def from_file(path: Path) -> TrainConfig:
    """The configuration in a .json file that a run wrote, or the value `config` of a .py file."""
    if path.suffix == ".json":
        return configs.read(TrainConfig, path)
    if path.suffix != ".py":
        raise UserError(f"--config {path} must be a .json or a .py file")
    if not path.is_file():
        raise UserError(f"--config {path} does not exist")
    try:
        found: Any = runpy.run_path(str(path)).get("config")
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"--config {path} fails with {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(found, TrainConfig):
        raise UserError(f"--config {path} must define `config`, a bitnet_jax.TrainConfig, not {type(found).__name__}")
    return found
