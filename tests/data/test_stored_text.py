"""Kept text is read as it was written, or not at all."""

import json
import logging
from pathlib import Path

import pytest

from bitnet_jax.data import stored_text
from bitnet_jax.errors import RunError

DOCUMENTS = [("one", "Grüße\n"), ("two", "世界")]


def test_documents_come_back_and_the_manifest_describes_them(tmp_path: Path) -> None:
    stored_text.write(tmp_path / "kept", iter(DOCUMENTS), {"licence": "none"})
    corpus = stored_text.read(tmp_path / "kept", "name")
    assert corpus is not None
    assert [piece.text for piece in corpus.read()] == [text for _, text in DOCUMENTS]
    assert all(piece.ends for piece in corpus.read())
    assert corpus.total_bytes == 14
    assert corpus.provenance == {"licence": "none", "sha256": corpus.provenance["sha256"], "bytes": 14}
    manifest = json.loads((tmp_path / "kept" / "manifest.json").read_text())
    assert manifest["documents"] == [{"name": "one", "bytes": 8}, {"name": "two", "bytes": 6}]


def test_what_is_absent_is_none_and_not_called_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert stored_text.read(tmp_path / "kept", "name") is None
    assert caplog.text == ""


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "sizes", "missing"])
def test_a_damaged_text_is_logged_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    folder = tmp_path / "kept"
    stored_text.write(folder, iter(DOCUMENTS), {})
    text, manifest = folder / "text.txt", folder / "manifest.json"
    if damage == "flip":
        text.write_bytes(text.read_bytes().replace(b"G", b"g"))
    elif damage == "cut":
        text.write_bytes(text.read_bytes()[:-3])
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "sizes":
        manifest.write_text(manifest.read_text().replace('"bytes": 8', '"bytes": 5'))
    else:
        text.unlink()
    with caplog.at_level(logging.WARNING):
        assert stored_text.read(folder, "name") is None
    assert "is damaged and is made again" in caplog.text
    assert not folder.exists()
    with pytest.raises(RunError, match="just written"):
        stored_text.just_written(folder, "name")


def test_text_with_another_hash_than_the_pinned_one_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"and not {'0' * 64} as it should"):
        stored_text.write(tmp_path / "kept", iter(DOCUMENTS), {}, "0" * 64)
    assert list(tmp_path.iterdir()) == []
    stored_text.write(tmp_path / "kept", iter(DOCUMENTS), {})
    assert stored_text.read(tmp_path / "kept", "name", "0" * 64) is None
