"""Local text sources: what is read, in which order, and what is refused."""

import itertools
import json
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_jax.data import corpora
from bitnet_jax.data.corpora import Corpus, Piece, cut, open_corpus, open_files
from bitnet_jax.errors import UserError

TEXTS = ["Grüße, 世界\n", "second\r\ntext", "👍"]


def documents(corpus: Corpus) -> list[str]:
    """The documents of `corpus`, put together again."""
    found, open_text = [], ""
    for piece in corpus.read():
        open_text += piece.text
        if piece.ends:
            found.append(open_text)
            open_text = ""
    assert not open_text
    return found


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_zst(path: Path, records: list[object]) -> Path:
    zstandard = pytest.importorskip("zstandard")
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    frames = [zstandard.compress(lines[0]), zstandard.compress(b"".join(lines[1:]))]  # two frames, as `cat a.zst b.zst` makes
    path.write_bytes(b"".join(frames))
    return path


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({column: pyarrow.array(texts, pyarrow.string()), "other": list(range(len(texts)))}), path)
    return path


# --- pieces ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@example(text="a" * 14, borders=[7, 8])
@given(text=st.text(alphabet="ab\n€", max_size=60), borders=st.lists(st.integers(0, 60), max_size=5))
def test_pieces_depend_on_the_text_and_not_on_how_it_was_read(text: str, borders: list[int]) -> None:
    ends = [0, *sorted(border for border in borders if border <= len(text)), len(text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE_CHARACTERS", 7)
        whole = list(cut([text]))
        assert list(cut(text[start:end] for start, end in itertools.pairwise(ends))) == whole
    assert "".join(piece.text for piece in whole) == text
    assert [piece.ends for piece in whole] == [False] * (len(whole) - 1) + [True] * bool(text)
    assert all(0 < len(piece.text) <= 7 for piece in whole)


def test_a_long_document_is_cut_after_a_line_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "PIECE_CHARACTERS", 9)
    assert list(cut(["one\ntwo\nthree"])) == [Piece("one\ntwo\n", False), Piece("three", True)]
    assert list(cut(["0123456789"])) == [Piece("012345678", False), Piece("9", True)]


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    records: list[object] = [{"text": text, "other": 1} for text in TEXTS]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_bytes(text.encode())
    sources = [
        folder,
        folder / "*.txt",
        write_jsonl(tmp_path / "a.jsonl", records),
        write_zst(tmp_path / "a.jsonl.zst", records),
        write_parquet(tmp_path / "a.parquet", list(TEXTS)),
    ]
    for source in sources:
        corpus = open_files(str(source))
        assert documents(corpus) == TEXTS, source
        assert documents(corpus) == TEXTS, f"{source}, read again"


def test_a_text_file_is_the_same_whatever_the_block_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes("".join(TEXTS).encode())
    for size in (1, 2, 3, 5, 1000):
        monkeypatch.setattr(corpora, "_BLOCK_BYTES", size)
        assert documents(open_files(str(tmp_path / "a.txt"))) == ["".join(TEXTS)]


def test_files_come_sorted_and_hidden_and_other_ones_are_passed_over(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a.txt", "notes.md", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(open_files(str(tmp_path))) == ["a/z.txt", "a.txt", "b.txt"]
    assert documents(open_files(str(tmp_path / "**" / "z.*"))) == ["a/z.txt"]
    assert documents(open_files(str(tmp_path / ".hidden.txt"))) == [".hidden.txt"]


def test_records_without_text_and_blank_lines_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": "x"}\n   \n')
    assert documents(open_files(str(tmp_path / "a.jsonl"))) == ["x"]


def test_the_text_field_can_be_chosen(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"content": "x"}])
    write_parquet(tmp_path / "b.parquet", ["y"], column="content")
    assert documents(open_files(str(tmp_path), text_field="content")) == ["x", "y"]


def test_the_standard_library_is_a_corpus_for_tests(tmp_path: Path) -> None:
    corpus = open_corpus("stdlib", cache=tmp_path)
    assert len(documents(corpus)) > 50
    assert documents(corpus) == documents(corpus)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\0def", r"a\.txt is not text: NUL byte at offset 3"),
        ("é€".encode()[:-1], r"a\.txt is not UTF-8 text: invalid byte at offset 2"),
        (b"a" * 10 + b"\xff" + b"b", r"a\.txt is not UTF-8 text: invalid byte at offset 10"),
        ("text".encode("utf-16"), r"a\.txt is not (UTF-8 )?text: .* at offset"),
    ],
)
@pytest.mark.parametrize("block", [1, 4, 1 << 20])
def test_a_binary_file_is_named_with_the_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str, block: int
) -> None:
    monkeypatch.setattr(corpora, "_BLOCK_BYTES", block)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents(open_files(str(tmp_path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", r"a\.jsonl, line 2 must be a JSON object, not list"),
        (b"{", r"a\.jsonl, line 2 is not JSON"),
        (b"1" * 5000, r"a\.jsonl, line 2 is not JSON"),
        (b"[" * 100_000, r"a\.jsonl, line 2 is not JSON"),
        (b'{"body": "x"}', r"a\.jsonl, line 2 lacks field 'text' \(text_field\): its fields are 'body'"),
        (b'{"text": null}', r"a\.jsonl, line 2: field 'text' must be text, not NoneType"),
        (b'{"text": "a\\ud800"}', r"a\.jsonl, line 2: field 'text' holds a lone surrogate at character 1"),
        (b'{"text": "\0"}', r"a\.jsonl is not text: NUL byte at offset 26 \(line 2\)"),
        (b'{"text": "\xff"}', r"a\.jsonl is not UTF-8 text: invalid byte at offset 26 \(line 2\)"),
    ],
)
def test_a_bad_record_is_named_with_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        documents(open_files(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_or_with_a_null_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks column 'text' \(text_field\): its columns are body, other"):
        documents(open_files(str(write_parquet(tmp_path / "a.parquet", ["x"], column="body"))))
    with pytest.raises(UserError, match=r"b\.parquet, row 2: field 'text' must be text, not NoneType"):
        documents(open_files(str(write_parquet(tmp_path / "b.parquet", ["x", None]))))


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_damaged_container_is_refused_and_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    pytest.importorskip(package)
    (tmp_path / name).write_bytes(b"not such a file")
    with pytest.raises(UserError, match=rf"{name} is not a (readable Parquet|whole Zstandard) file"):
        documents(open_files(str(tmp_path / name)))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install 'bitnet-jax\[text\]'"):
        documents(open_files(str(tmp_path / name)))


def test_a_truncated_zstandard_file_is_not_taken_for_a_short_one(tmp_path: Path) -> None:
    path = write_zst(tmp_path / "a.jsonl.zst", [{"text": "x" * 50}, {"text": "y" * 50}])
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst"):
        documents(open_files(str(path)))


def test_a_source_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source='.*nothing' matches nothing"):
        open_files(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="matches nothing"):
        open_files(str(tmp_path / "*.txt"))
    with pytest.raises(UserError, match=r"holds no file of kind \.txt, \.jsonl"):
        open_files(str(tmp_path))


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    for source in ("a.pdf", "*.pdf"):
        with pytest.raises(UserError, match=r"a\.pdf is of an unknown kind: must end in one of \.txt"):
            open_files(str(tmp_path / source))
