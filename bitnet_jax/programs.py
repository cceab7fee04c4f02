"""Functions compiled ahead of time, so that the time to compile is measured apart from the time to run."""

import time
from collections.abc import Callable
from typing import Any

import jax
from jax.stages import Compiled


class Program:
    """A pure function, compiled once for every set of argument types and shapes; the results are kept as `jax.jit` keeps them."""

    def __init__(self, function: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> None:
        """`donate`: positions of arguments whose buffers the results may take over."""
        self._jitted = jax.jit(function, donate_argnums=donate)
        self._compiled: dict[Any, Compiled] = {}

    @property
    def compiled(self) -> int:
        """For how many sets of arguments the function has been compiled."""
        return len(self._compiled)

    def prepare(self, *args: Any) -> tuple[Compiled, float]:
        """The function compiled for arguments like these, and the seconds that took: next to nothing the second time."""
        begun = time.perf_counter()
        leaves, structure = jax.tree.flatten(args)
        key = (
            jax.sharding.get_abstract_mesh(),
            structure,
            tuple((jax.typeof(leaf), getattr(leaf, "format", None)) for leaf in leaves),
        )  # sharding and layout
        if key not in self._compiled:
            self._compiled[key] = self._jitted.lower(*args).compile()
        return self._compiled[key], time.perf_counter() - begun
