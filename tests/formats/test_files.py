"""Files appear whole or not at all, whatever happens while they are written."""

import os
from pathlib import Path

import pytest

from bitnet_jax.errors import RunError, UserError
from bitnet_jax.formats.files import Mapped, file_size, whole_directory, whole_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a") as file:
        file.write(b"123")
        assert "a" not in names(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"123"
    assert names(tmp_path) == ["a"]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()  # an empty one may be there
    with whole_directory(tmp_path / "a") as folder:
        (folder / "part").write_bytes(b"1")
        assert names(tmp_path / "a") == []
    assert names(tmp_path / "a") == ["part"]
    assert names(tmp_path) == ["a"]
    assert file_size(tmp_path / "a") == 1


@pytest.mark.parametrize("error", [UserError("wrong"), KeyboardInterrupt()])
def test_nothing_is_left_where_writing_stops(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_bytes(b"before")

    def half_a_file() -> None:
        with whole_file(tmp_path / "a") as file:
            file.write(b"half")
            raise error

    def half_a_folder() -> None:
        with whole_directory(tmp_path / "b") as folder:
            (folder / "part").write_bytes(b"1")
            raise error

    for write in (half_a_file, half_a_folder):
        with pytest.raises(type(error)):
            write()
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_errors_of_the_system_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="cannot be written: No such file"), whole_file(tmp_path / "no" / "a"):
        pass
    with pytest.raises(UserError, match="exists and is no empty folder"), whole_directory(tmp_path / "full"):
        pass
    with pytest.raises(UserError, match="exists and is no empty folder"), whole_directory(tmp_path / "full" / "x"):
        pass
    with pytest.raises(RunError, match="could not be written: No space left"), whole_file(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="cannot be read"):
        Mapped(Path("a\0b"))


def test_mapped_bytes_stay_readable_after_their_memory_was_given_back(tmp_path: Path) -> None:
    data = os.urandom(10_000)
    (tmp_path / "a").write_bytes(data)
    mapped = Mapped(tmp_path / "a")
    assert mapped.data.tobytes() == data
    mapped.release()
    assert mapped.data.tobytes() == data
