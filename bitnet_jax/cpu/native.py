"""How the native functions are called: their attributes, checked before XLA sees them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bitnet_jax.cpu import build
from bitnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CpuConfig:
    """How a native kernel runs. Results do not depend on it."""

    threads: int | None = None
    """At most so many threads of XLA's pool; None is all of them."""
    isa: str | None = None
    """Instruction set, one of `build.load()`; None is the fastest that the machine has."""

    def __post_init__(self) -> None:
        """Raises UserError where `threads` is below 1."""
        if self.threads is not None and not 1 <= self.threads < 2**31:
            raise UserError(f"threads={self.threads} must be from 1 to {2**31 - 1}, or None for all")

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of a native function that say this."""
        return {"threads": np.int64(-1 if self.threads is None else self.threads), "isa": self.isa or ""}


def runs(implementation: str | None) -> bool:
    """Whether the native library computes what an inference program has beside its packed products: where the program runs on a CPU, the
    library is there, and `implementation`, None or the name of one of `ternary_matmul`, does not speak against it."""
    return implementation in (None, "native") and jax.default_backend() == "cpu" and build.unavailable() is None


def call(
    target: str, results: Sequence[jax.ShapeDtypeStruct], *operands: Any, config: CpuConfig | None, **attributes: Any
) -> list[jax.Array]:
    """Calls a function of the native library, which is compiled first where that was never done.

    Raises:
        RunError: there is no library and none can be made.
        UserError: `config` names an instruction set that this machine or library lacks.
    """
    isas, config = build.load(), config or CpuConfig()
    if config.isa is not None and config.isa not in isas:
        raise UserError(f"isa={config.isa!r} is not an instruction set of this machine: must be one of {', '.join(isas)}")
    return list(jax.ffi.ffi_call(target, list(results), vmap_method="sequential")(*operands, **attributes, **config.attributes))
