"""Token arrays: the same ids as encoding by hand, kept once, checked when read, never half there."""

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.data import corpora, splits, tokens
from bitnet_jax.data.corpora import Corpus, cut
from bitnet_jax.data.splits import Part, Split
from bitnet_jax.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from bitnet_jax.errors import RunError, UserError

TEXTS = [f"Document {number}: naïve 世界.\n" * (number + 1) for number in range(8)]
BYTES = byte_tokenizer()


def corpus_of(texts: Sequence[str]) -> Corpus:
    return Corpus(name="test", read=lambda: (piece for text in texts for piece in cut([text])))


def prepared(texts: Sequence[str], fraction: float = 0.25) -> tuple[Corpus, Split]:
    corpus = corpus_of(texts)
    return corpus, splits.split(splits.scan(corpus), fraction)


def by_hand(tokenizer: Tokenizer, corpus: Corpus, split: Split, part: Part) -> list[int]:
    ids: list[int] = []
    for where, piece in splits.parts(corpus, split):
        if where is part:
            ids += [*tokenizer.encode(piece.text).tolist(), *([tokenizer.eos_id] if piece.ends else [])]
    return ids


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0])
@pytest.mark.parametrize("batch", [1, 100, 1 << 21])
def test_tokens_are_those_of_every_document_with_an_end_of_text_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float, batch: int
) -> None:
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", batch)
    monkeypatch.setattr(corpora, "PIECE_CHARACTERS", 50)
    tokenizer = train_bpe(TEXTS, 280)
    corpus, split = prepared(TEXTS, fraction)
    found = tokens.tokenise(corpus, tokenizer, split, tmp_path)
    for part, array in found.items():
        np.testing.assert_array_equal(array.ids, by_hand(tokenizer, corpus, split, part))
        assert np.count_nonzero(array.ids == tokenizer.eos_id) == array.documents
        assert len(tokenizer.decode(array.ids).encode()) == array.text_bytes
    assert sum(array.text_bytes for array in found.values()) == split.scan.total_bytes


def test_arrays_are_made_once_and_are_read_only_maps_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, split = prepared(TEXTS)
    first = tokens.tokenise(corpus, BYTES, split, tmp_path)

    def unexpected(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(tokens, "_build", unexpected)
    again = tokens.tokenise(corpus, BYTES, split, tmp_path)
    for part in Part:
        np.testing.assert_array_equal(again[part].ids, first[part].ids)
        assert isinstance(again[part].ids, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            again[part].ids[0] = 0


def test_whatever_decides_the_tokens_is_in_the_key(tmp_path: Path) -> None:
    splits_to_tell_apart = [prepared(TEXTS)[1], prepared(TEXTS[1:])[1], prepared(TEXTS, 0.5)[1]]
    keys = {tokens.key(tokenizer, split) for tokenizer in (BYTES, train_bpe(TEXTS, 280)) for split in splits_to_tell_apart}
    assert len(keys) == 6
    assert tokens.key(byte_tokenizer(), prepared(list(TEXTS))[1]) in keys


@pytest.mark.parametrize(("last_id", "dtype"), [((1 << 16) - 1, np.uint16), (1 << 16, np.uint32)])
def test_ids_take_two_bytes_as_long_as_they_fit(tmp_path: Path, last_id: int, dtype: type) -> None:
    definition = json.loads(BYTES.to_json())
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 257, "content": "unused"})
    small = Tokenizer(json.dumps(definition))
    small.vocab_size = last_id + 1
    small.eos_id = last_id
    corpus, split = prepared(TEXTS)
    found = tokens.tokenise(corpus, small, split, tmp_path)[Part.TRAIN]
    assert found.ids.dtype == dtype
    assert found.ids.max() == last_id


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("flip", "train.bin does not have its checksum"),
        ("cut", "train.bin has "),
        ("longer", "train.bin has "),
        ("meta", "JSONDecodeError"),
        ("no meta", "FileNotFoundError"),
        ("dtype", "dtype uint32 is not uint16"),
        ("format", "format 0 is not 1"),
        ("missing", "FileNotFoundError"),
    ],
)
def test_a_damaged_array_is_made_again_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str, reason: str) -> None:
    corpus, split = prepared(TEXTS)
    good = tokens.tokenise(corpus, BYTES, split, tmp_path)[Part.TRAIN].ids.copy()
    folder = tmp_path / "tokens" / tokens.key(BYTES, split)
    file, meta = folder / "train.bin", folder / "meta.json"
    data = file.read_bytes()
    if damage == "flip":
        file.write_bytes(data[:10] + bytes([data[10] ^ 1]) + data[11:])
    elif damage == "cut":
        file.write_bytes(data[:-2])
    elif damage == "longer":
        file.write_bytes(data + data[:2])
    elif damage == "meta":
        meta.write_text("{")
    elif damage == "no meta":
        meta.unlink()
    elif damage == "missing":
        file.unlink()
    elif damage == "dtype":
        meta.write_text(meta.read_text().replace("uint16", "uint32"))
    else:
        meta.write_text(meta.read_text().replace('"format": 1', '"format": 0'))
    found, said = tokens.load(folder, BYTES.vocab_size)
    assert found is None
    assert said.startswith(reason)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(tokens.tokenise(corpus, BYTES, split, tmp_path)[Part.TRAIN].ids, good)
    assert "is damaged" in caplog.text
    assert tokens.load(folder, BYTES.vocab_size)[0] is not None


def test_an_id_outside_the_vocabulary_is_found_whatever_the_checksum_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, split = prepared(TEXTS)
    tokens.tokenise(corpus, BYTES, split, tmp_path)
    monkeypatch.setattr(tokens, "_CHECK_IDS", 16)
    found, reason = tokens.load(tmp_path / "tokens" / tokens.key(BYTES, split), 256)
    assert found is None
    assert reason == "train.bin holds id 256, outside the vocabulary of 256"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(tokens, "_open", lambda path: full.open("wb"))
    corpus, split = prepared(TEXTS)
    with pytest.raises(RunError, match="cannot be written: no space left on its disk") as caught:
        tokens.tokenise(corpus, BYTES, split, tmp_path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_corpus_that_breaks_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    texts = list(TEXTS)
    corpus, split = prepared(texts)
    texts.pop()
    with pytest.raises(RunError, match="changed while it was being read"):
        tokens.tokenise(corpus, BYTES, split, tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_builders_at_the_same_time_all_get_the_whole_array(tmp_path: Path) -> None:
    corpus, split = prepared(TEXTS)
    start, found = threading.Barrier(4), []

    def build() -> None:
        start.wait()
        found.append(tokens.tokenise(corpus, BYTES, split, tmp_path)[Part.TRAIN].ids)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for ids in found:
        np.testing.assert_array_equal(ids, found[0])
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_documents_need_an_end_of_text_between_them(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_id = None
    corpus, split = prepared(TEXTS)
    with pytest.raises(UserError, match="no end-of-text token to separate the 8 documents of source='test'"):
        tokens.tokenise(corpus, tokenizer, split, tmp_path)
    corpus, split = prepared(TEXTS[:1], 0)
    assert tokenizer.decode(tokens.tokenise(corpus, tokenizer, split, tmp_path)[Part.TRAIN].ids) == TEXTS[0]


def test_progress_ends_at_the_whole_text(tmp_path: Path) -> None:
    corpus, split = prepared(TEXTS)
    seen: list[tuple[str, int, int | None]] = []
    tokens.tokenise(corpus, BYTES, split, tmp_path, lambda *what: seen.append(what))
    assert seen[-1] == ("tokenise", split.scan.total_bytes, split.scan.total_bytes)
