"""Hugging Face data sets, with a stand-in for the package: what is asked of it, and what is done with what it gives."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitnet_jax.data import huggingface
from bitnet_jax.data.corpora import open_corpus
from bitnet_jax.errors import UserError


def stand_in(monkeypatch: pytest.MonkeyPatch, records: list[Any]) -> list[Any]:
    """Puts a package `datasets` in place that streams `records` (raising those that are exceptions) and notes its calls."""
    calls: list[Any] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Iterator[Any]:
        calls.append((name, config, options))

        def stream() -> Iterator[Any]:
            for record in records:
                if isinstance(record, Exception):
                    raise record
                yield record

        return stream()

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_data_set_is_streamed_once_and_then_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, [{"text": "one"}, {"text": "zwei ü"}])
    for _ in range(2):
        corpus = open_corpus("hf:owner/name:part", cache=tmp_path)
        assert [piece.text for piece in corpus.read()] == ["one", "zwei ü"]
        assert corpus.provenance["limit_reached"] is False
    assert calls == [("owner/name", "part", {"split": "train", "streaming": True})]
    open_corpus("hf:owner/name", cache=tmp_path)
    assert calls[1][:2] == ("owner/name", None)


def test_the_limit_ends_the_text_after_the_document_that_reaches_it_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, [{"text": "x" * 6}] * 5)
    for limit, documents, reached in ((6, 1, True), (7, 2, True), (29, 5, False), (30, 5, False), (24, 4, True)):
        corpus = huggingface.open_dataset("hf:name", "text", tmp_path, max_bytes=limit)
        assert len(list(corpus.read())) == documents
        assert corpus.provenance["limit_reached"] is reached
        assert corpus.provenance["limit_bytes"] == limit


def test_what_cannot_be_read_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [{"text": "one"}, ConnectionError("no\nnetwork")])
    with pytest.raises(UserError, match="source='hf:name' cannot be read: no network"):
        open_corpus("hf:name", cache=tmp_path)
    stand_in(monkeypatch, [{"body": "one"}])
    with pytest.raises(UserError, match="hf:name, record 0 lacks field 'text'"):
        open_corpus("hf:name", cache=tmp_path)
    assert list((tmp_path / "corpora").iterdir()) == []


def test_a_missing_package_or_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'bitnet-jax\[datasets\]'"):
        open_corpus("hf:name", cache=tmp_path)
    with pytest.raises(UserError, match="must be 'hf:NAME' or 'hf:NAME:CONFIG'"):
        open_corpus("hf:", cache=tmp_path)
