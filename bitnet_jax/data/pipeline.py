"""Token arrays as an endless stream of training batches.

**The rule, (seed, step) → windows.** An array of n tokens holds W = (n - 1) // T windows of T + 1 tokens; window w is tokens
[w * T, w * T + T], so each token but the last of the array is an input once and neighbours share one token. The run is a sequence
of samples i = 0, 1, 2, …: sample i is window π_e(i mod W) where e = i // W counts the epochs and π_0, π_1, … are permutations that
grain draws from the seed, a new one for every epoch. Step s consists of samples s * B to s * B + B - 1; of these process p of P
takes the p-th block of B / P. So a step's batch depends on seed, s and B alone, and joining the processes' blocks in order gives
the batch of a single process. `window_indices` computes this rule, and the stream below is made of the same code.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bitnet_jax.errors import UserError

_PREFETCH = 4
"""Batches that are made ready in the background."""
_SAMPLES = 1 << 60
"""Samples of a run that never ends."""
_SAMPLE = 256
"""Windows by which another text is told apart when a run is resumed."""


def windows(ids: np.ndarray, seq_len: int) -> np.ndarray:
    """All windows of `ids` in order, [W, seq_len + 1]: a view that copies nothing.

    Raises:
        UserError: `ids` is shorter than one window.
    """
    if len(ids) < seq_len + 1:
        raise UserError(
            f"the text has {len(ids)} tokens, but must have at least {seq_len + 1} (one window: seq_len={seq_len} and one more)"
        )
    return np.lib.stride_tricks.sliding_window_view(ids, seq_len + 1)[::seq_len]


def window_indices(seed: int, step: int, *, batch_size: int, num_windows: int) -> np.ndarray:
    """The windows of step `step`, int64 [batch_size], by the rule above."""
    return _batches_of_indices(seed, num_windows, batch_size)[step]


class Batches:
    """Endless batches {"tokens": int32 [B, T], "targets": int32 [B, T]} of this process; targets are the tokens one further on.

    `get_state` before step s, `set_state` in another process, and the batches of steps s, s + 1, … follow.
    """

    def __init__(
        self, ids: np.ndarray, *, seq_len: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        """`batch_size` is that of all processes together.

        Raises:
            UserError: `ids` is shorter than one window, the batch cannot be shared among the processes, or the seed is out of range.
        """
        if not 0 <= process_index < process_count:
            raise UserError(f"process_index={process_index} must be from 0 to {process_count - 1}")
        if batch_size < 1 or batch_size % process_count:
            raise UserError(f"batch_size={batch_size} must be a positive multiple of process_count={process_count}")
        if not 0 <= seed < 1 << 32:
            raise UserError(f"seed={seed} must be from 0 to {(1 << 32) - 1}")
        self._windows = windows(ids, seq_len)
        # What decides the order: a state is of no use to a stream in which one of these differs.
        count = len(self._windows)
        some = self._windows[np.linspace(0, count - 1, min(count, _SAMPLE), dtype=np.int64)]
        self._order = {"seed": seed, "batch_size": batch_size, "seq_len": seq_len, "windows": count, "sample_crc32": zlib.crc32(some)}
        blocks = _batches_of_indices(seed, count, batch_size // process_count)
        self._dataset = blocks[process_index::process_count].map(self._gather)
        self._start(0)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Plain JSON values: the next step, and what the order of the data depends on. The same in every process."""
        return {"step": self._step, **self._order}

    def set_state(self, state: Any) -> None:
        """Goes to where `get_state` was called. The number of processes may be another one.

        Raises:
            UserError: the state is of a stream with another order, or is none.
        """
        if not isinstance(state, dict):
            raise UserError(f"the data state is {state!r}: must be an object")
        for name, value in self._order.items():
            if state.get(name) != value:
                raise UserError(
                    f"the data state has {name}={state.get(name)!r}, but this run has {name}={value}: the order of the data would differ"
                )
        step = state.get("step")
        if type(step) is not int or step < 0:
            raise UserError(f"the data state has step={step!r}: must be a number of steps")
        self.close()
        self._start(step)

    def close(self) -> None:
        """Ends the background thread. The stream yields nothing afterwards, unless `set_state` starts it again."""
        self._iterator.close()
        self._iterator = _Ended()

    def _start(self, step: int) -> None:
        import grain

        self._step = step
        self._iterator: Any = iter(self._dataset[step:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)))

    def _gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = self._windows[indices].astype(np.int32)
        return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


class _Ended:
    """The iterator of a closed stream."""

    def __next__(self) -> dict[str, np.ndarray]:
        raise StopIteration

    def close(self) -> None:
        pass


def _batches_of_indices(seed: int, num_windows: int, batch_size: int) -> Any:
    """grain's endless data set of window indices: element n holds samples n * batch_size to (n + 1) * batch_size - 1."""
    import grain  # takes a second, and imports jax where that is installed

    # Not repeat() for ever: the length that it stands for overflows in batches of one window.
    return grain.MapDataset.range(num_windows).seed(seed).shuffle().repeat(_SAMPLES // num_windows).batch(batch_size)
