import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax.config import to_dict
from bitnet_jax.errors import RunError, UserError
from bitnet_jax.training.checkpoints import Checkpoints, Restored, read_params
from bitnet_jax.training.optimizer import make_optimizer
from bitnet_jax.training.step import TrainState, init_state
from tests.training.runs import same, small_config

CONFIG = small_config()


def state(step: int, size: int = 300) -> TrainState:
    random = np.random.default_rng(step)
    params = {"q": {"kernel": jnp.asarray(random.standard_normal((size, 40), np.float32))}, "norm": {"scale": jnp.ones((7,), jnp.float32)}}
    made = init_state(params, make_optimizer(CONFIG.optimizer, CONFIG.steps))
    return made._replace(step=jnp.int32(step), non_finite=jnp.int32(3))


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(state(step), {"position": [step, 7]}, CONFIG)


def restore(folder: Path) -> tuple[Restored | None, list[str], list[int]]:
    warnings: list[str] = []
    with Checkpoints(folder, 2) as checkpoints:
        return checkpoints.restore(jax.eval_shape(lambda: state(0)), warnings.append), warnings, checkpoints.steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints 4 and 6, to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, 2, 4, 6)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def largest_file(checkpoint: Path) -> Path:
    """Where the data of the arrays lies."""
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated data": truncate,
    "a flipped bit in the data": lambda checkpoint: flip_bit(largest_file(checkpoint)),
    "deleted data": lambda checkpoint: largest_file(checkpoint).unlink(),
    "deleted optimizer": lambda checkpoint: shutil.rmtree(checkpoint / "optimizer"),
    "deleted meta": lambda checkpoint: shutil.rmtree(checkpoint / "meta"),
    "changed data state": lambda checkpoint: (checkpoint / "meta" / "metadata").write_text(
        (checkpoint / "meta" / "metadata").read_text().replace('"position": [6,', '"position": [5,')
    ),
    "emptied folder": lambda checkpoint: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in list(checkpoint.iterdir())],
}


def test_restored_checkpoint_is_the_saved_one_bit_for_bit(folder: Path) -> None:
    restored, warnings, steps = restore(folder)
    assert restored is not None
    assert same(restored.state, state(6))
    assert (restored.step, restored.data, restored.config) == (6, {"position": [6, 7]}, to_dict(CONFIG))
    assert not warnings
    assert steps == [4, 6]


def test_only_the_newest_are_kept(folder: Path) -> None:
    save(folder, 8, 10, keep=3)
    assert restore(folder)[2] == [6, 8, 10]


def test_folder_without_checkpoints_restores_nothing(tmp_path: Path) -> None:
    assert restore(tmp_path / "new")[0] is None


def test_saved_state_may_be_donated_at_once(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    with Checkpoints(tmp_path, 2) as checkpoints:
        given = state(1)
        checkpoints.save(given, None, CONFIG)
        overwrite(given)
    restored = restore(tmp_path)[0]
    assert restored is not None
    assert same(restored.state, state(1))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_newest_checkpoint_is_named_and_put_aside_for_the_one_before(folder: Path, damage: Callable[[Path], Any]) -> None:
    damage(folder / "6")
    restored, warnings, steps = restore(folder)
    assert restored is not None
    assert same(restored.state, state(4))
    assert len(warnings) == 1
    assert str(folder / "6") in warnings[0]
    assert "continuing from checkpoint 4" in warnings[0]
    assert "\n" not in warnings[0]
    assert steps == [4]
    assert (folder.parent / "damaged" / "6").is_dir()
    save(folder, 6)  # its step can be written again
    again = restore(folder)[0]
    assert again is not None
    assert same(again.state, state(6))


def test_every_checkpoint_damaged_is_an_error_in_one_line_and_none_is_touched(folder: Path) -> None:
    for step in ("4", "6"):
        flip_bit(largest_file(folder / step))
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(6, 4\)") as error:
        restore(folder)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "6"]


def test_a_lost_process_or_a_full_device_is_not_taken_for_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")

    monkeypatch.setattr("bitnet_jax.training.checkpoints.checksums", lost)
    with pytest.raises(jax.errors.JaxRuntimeError, match="closed by peer"):
        restore(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "6"]


def test_remains_of_an_interrupted_save_are_no_checkpoint_and_are_removed(folder: Path) -> None:
    shutil.copytree(folder / "6", folder / "8.orbax-checkpoint-tmp")
    restored, warnings, _ = restore(folder)
    assert restored is not None
    assert (restored.step, warnings) == (6, [])
    assert not (folder / "8.orbax-checkpoint-tmp").exists()


def test_parameters_alone_are_read_and_nothing_on_disk_changes(folder: Path) -> None:
    shutil.copytree(folder / "6", folder / "8.orbax-checkpoint-tmp")  # as if another process were saving
    flip_bit(largest_file(folder / "6" / "params"))
    before = sorted(folder.rglob("*"))
    warnings: list[str] = []
    params, step = read_params(folder, jax.eval_shape(lambda: state(0).params), warnings.append)
    assert same(params, state(4).params)
    assert step == 4
    assert str(folder / "6") in warnings[0]
    assert sorted(folder.rglob("*")) == before


def test_reading_parameters_where_there_are_none_is_an_error(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="holds no checkpoint"):
            read_params(place, state(0).params, pytest.fail)
    assert not (tmp_path / "missing").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], check=False).returncode == 0
    )
    if not mounted:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_is_named_and_the_last_good_checkpoint_is_kept(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    save(folder, 2)
    (small_disk / "filler").write_bytes(os.urandom(3_700_000))

    def overfill() -> None:
        with Checkpoints(folder, 2) as checkpoints:
            checkpoints.save(state(4, size=20_000), None, CONFIG)
            checkpoints.wait()

    with pytest.raises(RunError, match=r"could not be written to .*disk/checkpoints") as error:
        overfill()
    assert "last good checkpoint is 2" in str(error.value)
    assert "\n" not in str(error.value)
    restored, warnings, steps = restore(folder)
    assert restored is not None
    assert (restored.step, warnings, steps) == (2, [], [2])
    assert same(restored.state, state(2))


def test_only_writes_that_outlived_their_failed_save_are_silenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(str(unraisable.exc_value)))
    for name in ("first", "second"):
        with Checkpoints(tmp_path / name, 2):
            pass
    for text in ("Event loop is closed", "something else"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))  # pyright: ignore[reportArgumentType]
    assert heard == ["something else"]
