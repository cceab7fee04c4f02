"""Which text is held out: nothing lost, nothing on both sides, and the same however the documents come."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_jax.data import corpora, splits
from bitnet_jax.data.corpora import Corpus, cut
from bitnet_jax.data.splits import Part
from bitnet_jax.errors import RunError, UserError


def corpus_of(texts: Sequence[str]) -> Corpus:
    return Corpus(name="test", read=lambda: (piece for text in texts for piece in cut([text])))


def divide(texts: Sequence[str], fraction: float) -> dict[Part, list[str]]:
    """The documents, or parts of documents, on either side."""
    corpus = corpus_of(texts)
    found: dict[Part, list[str]] = {part: [""] for part in Part}
    for part, piece in splits.parts(corpus, splits.split(splits.scan(corpus), fraction)):
        found[part][-1] += piece.text
        if piece.ends:
            found[part].append("")
    assert all(documents.pop() == "" for documents in found.values())
    return found


@settings(deadline=None, max_examples=50)
@example(texts=["01234567"], fraction=0.01)  # cut between two pieces
@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=30), fraction=st.sampled_from([0.01, 0.1, 0.5]))
def test_every_document_is_on_one_side_or_cut_in_two(texts: list[str], fraction: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE_CHARACTERS", 7)
        found = divide(texts, fraction)
        whole = splits.split(splits.scan(corpus_of(texts)), fraction).held_out is not None
    train, held_out = found[Part.TRAIN], found[Part.VALIDATION]
    if whole:
        assert sorted(train + held_out) == sorted(texts)
        assert not set(train) & set(held_out)
        assert len(set(held_out)) == round(fraction * len(set(texts)))
    else:
        heads = iter(train)
        joined = [(next(heads) if text != tail else "") + tail for text, tail in zip(texts, held_out, strict=True)]
        assert joined == texts


def test_the_order_of_the_documents_does_not_matter_and_copies_stay_together() -> None:
    texts = [f"document {number}" for number in range(40)]
    found = divide(texts, 0.1)
    assert len(found[Part.VALIDATION]) == 4
    again = divide([*reversed(texts), *texts], 0.1)
    assert sorted(again[Part.VALIDATION]) == sorted(found[Part.VALIDATION] * 2)


def test_the_choice_is_the_same_in_every_process_and_version() -> None:
    assert divide([f"document {number}" for number in range(20)], 0.1)[Part.VALIDATION] == GOLDEN


GOLDEN = ["document 17", "document 18"]


def test_the_end_of_a_single_document_is_held_out_after_a_line_end() -> None:
    lines = [f"line {number:02d}\n" for number in range(100)]
    found = divide(["".join(lines)], 0.052)  # 41 bytes: five lines and a byte
    assert found == {Part.TRAIN: ["".join(lines[:94])], Part.VALIDATION: ["".join(lines[94:])]}


def test_a_cut_never_moves_further_than_what_is_held_out_and_never_splits_a_character() -> None:
    found = divide(["title\n" + "é" * 100], 0.1)
    assert len(found[Part.VALIDATION][0].encode()) in (20, 21)
    assert "".join(found[Part.TRAIN] + found[Part.VALIDATION]) == "title\n" + "é" * 100


def test_a_fraction_of_zero_holds_nothing_out() -> None:
    assert divide(["one", "two"], 0) == {Part.TRAIN: ["one", "two"], Part.VALIDATION: []}


def test_the_fingerprint_tells_texts_and_their_borders_apart() -> None:
    corpora_to_tell_apart = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "d"]]
    assert len({splits.scan(corpus_of(texts)).fingerprint for texts in corpora_to_tell_apart}) == 5
    found = splits.scan(corpus_of(["é", "x"]))
    np.testing.assert_array_equal(found.sizes, [2, 1])
    assert found.total_bytes == 3


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(UserError, match="source='test' is empty: it holds no text"):
        splits.scan(corpus_of(["", ""]))


@pytest.mark.parametrize("later", [["one", "twx"], ["one", "two", "three"], ["one"], ["one", "two!"]])
def test_a_corpus_that_changes_while_it_is_read_is_noticed(later: list[str]) -> None:
    texts = ["one", "two"]
    corpus = corpus_of(texts)
    division = splits.split(splits.scan(corpus), 0.5)
    texts[:] = later
    with pytest.raises(RunError, match="source='test' changed while it was being read"):
        list(splits.parts(corpus, division))
