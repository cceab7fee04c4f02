"""Things in the cache folder are whole or absent."""

import errno
import os
from pathlib import Path

import pytest

from bitnet_jax.data import cache
from bitnet_jax.errors import RunError, UserError


def test_a_new_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "thing"
    with cache.new_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert list(target.parent.iterdir()) == [target]


def test_a_builder_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "thing"

    def build() -> None:
        with cache.new_folder(target) as folder:
            (folder / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build()
    assert list(tmp_path.iterdir()) == []


def test_of_two_builders_at_once_the_first_to_finish_stays(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with cache.new_folder(target) as late:
        (late / "file").write_text("late")
        with cache.new_folder(target) as early:
            (early / "file").write_text("early")
    assert (target / "file").read_text() == "early"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    cache.write_file(target, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=f"{target} cannot be written: no space left"):
        cache.write_file(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cache_dir"), cache.new_folder(tmp_path / "file" / "thing"):
        pass


def test_discarding_what_is_absent_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "file").write_text("x")
    for _ in range(2):
        cache.discard(tmp_path / "thing")
        assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_is_the_users_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_folder() == Path("/somewhere/bitnet-jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "bitnet-jax"
    assert cache.cache_folder("/elsewhere") == Path("/elsewhere")
