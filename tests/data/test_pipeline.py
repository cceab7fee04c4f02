"""The order of the data: a pure function of seed and step, shared without gaps, and taken up again exactly."""

import json
import threading

import numpy as np
import pytest

from bitnet_jax.data.pipeline import Batches, window_indices, windows
from bitnet_jax.errors import UserError

T, B = 4, 6
W = 100
IDS = np.arange(T * W + 3, dtype=np.uint16)  # W windows, and two tokens too few for one more


def stream(seed: int = 0, **options: int) -> Batches:
    return Batches(IDS, **{"seq_len": T, "batch_size": B, "seed": seed, **options})


def take(batches: Batches, count: int) -> np.ndarray:
    """Tokens of the next steps, [count, B, T]."""
    return np.array([next(batches)["tokens"] for _ in range(count)])


def test_windows_cover_every_token_once_as_input_and_share_one_with_the_next() -> None:
    found = windows(IDS, T)
    assert found.shape == (W, T + 1)
    np.testing.assert_array_equal(found[:, :-1].reshape(-1), IDS[: T * W])
    np.testing.assert_array_equal(found[:, 1:].reshape(-1), IDS[1 : T * W + 1])
    assert np.shares_memory(found, IDS)
    assert windows(IDS[: T + 1], T).shape == (1, T + 1)


def test_a_batch_is_int32_and_targets_are_the_next_tokens() -> None:
    batch = next(stream())
    assert set(batch) == {"tokens", "targets"}
    for array in batch.values():
        assert array.shape == (B, T)
        assert array.dtype == np.int32
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)


def test_the_stream_follows_the_rule() -> None:
    batches = stream(seed=7)
    for step in range(18):
        rows = windows(IDS, T)[window_indices(7, step, batch_size=B, num_windows=W)]
        batch = next(batches)
        np.testing.assert_array_equal(batch["tokens"], rows[:, :-1])
        np.testing.assert_array_equal(batch["targets"], rows[:, 1:])


def test_every_epoch_sees_every_window_once_in_a_new_order() -> None:
    epochs = np.concatenate([window_indices(3, step, batch_size=B, num_windows=W) for step in range(50)]).reshape(3, W)
    for epoch in epochs:
        assert sorted(epoch) == list(range(W))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_give_different_orders_and_the_same_seed_the_same() -> None:
    np.testing.assert_array_equal(take(stream(1), 7), take(stream(1), 7))
    assert not np.array_equal(take(stream(1), 7), take(stream(2), 7))


def test_the_order_is_the_one_that_earlier_versions_gave() -> None:
    found = [window_indices(0, step, batch_size=4, num_windows=10).tolist() for step in (0, 1, 2, 1_000_000)]
    assert found == GOLDEN


GOLDEN = [[1, 2, 4, 5], [9, 7, 8, 6], [0, 3, 9, 6], [0, 5, 4, 1]]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_blocks_of_all_processes_join_to_the_batch_of_one(count: int) -> None:
    shards = [take(stream(5, process_index=index, process_count=count), 7) for index in range(count)]
    assert all(shard.shape == (7, B // count, T) for shard in shards)
    np.testing.assert_array_equal(np.concatenate(shards, axis=1), take(stream(5), 7))


@pytest.mark.parametrize("step", [0, 1, 4, 14])
def test_a_stream_set_to_a_step_goes_on_as_if_never_stopped(step: int) -> None:
    whole = stream(9)
    take(whole, step)
    state = json.loads(json.dumps(whole.get_state()))
    rest = take(whole, 5)
    fresh, used = stream(9), stream(9)
    take(used, 3)
    for batches in (fresh, used):
        batches.set_state(state)
        assert batches.get_state() == state
        np.testing.assert_array_equal(take(batches, 5), rest)


def test_a_state_fits_another_number_of_processes() -> None:
    whole = stream(9)
    take(whole, 3)
    half = stream(9, process_index=1, process_count=2)
    half.set_state(whole.get_state())
    np.testing.assert_array_equal(take(half, 4), take(whole, 4)[:, B // 2 :])


def test_prefetching_does_not_run_ahead_of_the_state() -> None:
    batches = stream()
    for step in range(4):
        assert batches.get_state()["step"] == step
        next(batches)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("seed", stream(1)),
        ("batch_size", stream(batch_size=2)),
        ("seq_len", stream(seq_len=3)),
        ("windows", Batches(IDS[: T * W], seq_len=T, batch_size=B, seed=0)),
        ("sample_crc32", Batches(IDS[::-1], seq_len=T, batch_size=B, seed=0)),
    ],
)
def test_a_state_of_another_order_is_refused_by_name(name: str, other: Batches) -> None:
    with pytest.raises(UserError, match=f"the data state has {name}="):
        stream().set_state(other.get_state())


@pytest.mark.parametrize("broken", [None, [], {}, {"step": 1}])
def test_what_is_no_state_is_refused(broken: object) -> None:
    with pytest.raises(UserError, match="the data state"):
        stream().set_state(broken)


@pytest.mark.parametrize("step", [-1, 1.5, "1", None, True])
def test_a_state_without_a_step_is_refused(step: object) -> None:
    with pytest.raises(UserError, match="must be a number of steps"):
        stream().set_state({**stream().get_state(), "step": step})


def test_a_closed_stream_ends_with_its_thread_and_can_be_started_again() -> None:
    before = set(threading.enumerate())
    batches = stream()
    state, first = batches.get_state(), take(batches, 2)
    workers = set(threading.enumerate()) - before
    assert workers
    batches.close()
    batches.close()
    assert list(batches) == []
    for worker in workers:
        worker.join(timeout=30)
        assert not worker.is_alive()
    batches.set_state(state)
    np.testing.assert_array_equal(take(batches, 2), first)


def test_a_text_shorter_than_a_window_is_refused_with_both_sizes() -> None:
    with pytest.raises(UserError, match=r"the text has 4 tokens, but must have at least 5 \(one window: seq_len=4 and one more\)"):
        Batches(IDS[:4], seq_len=4, batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "process_count": 2}, "batch_size=5 must be a positive multiple of process_count=2"),
        ({"batch_size": 0}, "batch_size=0 must be a positive multiple"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 must be from 0 to 1"),
        ({"seed": -1}, "seed=-1 must be from 0"),
        ({"seed": 1 << 32}, "seed=4294967296 must be from 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream(**options)


def test_the_largest_seed_works() -> None:
    assert take(stream((1 << 32) - 1), 4).shape == (4, B, T)
