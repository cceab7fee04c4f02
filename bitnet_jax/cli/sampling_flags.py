"""How tokens are chosen where flags, the model's authors and this project each have a say, in this order."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from bitnet_jax import inference
from bitnet_jax.cli import arguments
from bitnet_jax.cpu import RoughTable
from bitnet_jax.errors import UserError
from bitnet_jax.inference.sampling import Sampling

if TYPE_CHECKING:
    from bitnet_jax.models import Model

DEFAULT = Sampling(temperature=0.8)
"""Where neither a flag nor the model says anything."""

_STATED = ("temperature", "top_k", "top_p", "repetition_penalty")


class _Args(Protocol):
    @property
    def sampling(self) -> Sampling: ...


Args = TypeVar("Args", bound=_Args)


def with_stated(parsed: Args, args: Sequence[str], command: str, stated: Mapping[str, float]) -> Args:
    """`parsed` with what the model's authors state in place of the defaults; what is used of it is said on standard error.

    Args:
        parsed: the command's flags.
        args: the words they were parsed from, which are parsed again: only they tell a flag that was given from a default.
        command: its name.
        stated: the model's `sampling`.

    Raises:
        UserError: what is stated is out of range.
    """
    if not stated:
        return parsed
    default: Any = replace(parsed, sampling=from_stated(stated))  # pyright: ignore[reportArgumentType] (a protocol cannot say: dataclass)
    found = arguments.parse(type(parsed), args, command, default)
    used = {name: value for name, value in asdict(found.sampling).items() if name in stated and value == getattr(default.sampling, name)}
    if used:
        print(f"as the model's authors state: {', '.join(f'{name} {value}' for name, value in used.items())}", file=sys.stderr)
    return found


def first_pass(model: "Model", sampling: Sampling, new_tokens: int, implementation: str | None) -> RoughTable | None:
    """`inference.first_pass` where it saves more than it costs: making it reads the table about as often as fifty tokens do."""
    bounded = (sampling.temperature == 0 or sampling.top_k is not None) and sampling.repetition_penalty == 1
    if not bounded or new_tokens < inference.WORTHWHILE_TOKENS or model.config.vocab_size < inference.WORTHWHILE_VOCABULARY:
        return None
    return inference.first_pass(model.params, model.config, model.release, implementation)


def from_stated(stated: Mapping[str, float]) -> Sampling:
    """`DEFAULT` with the values that a model's authors state; top_k 0 is no limit, as in transformers."""
    values: dict[str, Any] = {name: value for name, value in stated.items() if name in _STATED}
    if "top_k" in values:
        values["top_k"] = int(values["top_k"]) or None
    try:
        return replace(DEFAULT, **values)
    except UserError as error:
        raise UserError(f"the model states a sampling that cannot be: {error}") from None
