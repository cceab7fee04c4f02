"""The result does not depend on how text is cut into pieces, and is what a search in the whole text finds."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitnet_jax.errors import UserError
from bitnet_jax.inference.stops import StopStrings

letters = st.text("abc", max_size=30)


def run(pieces, strings):
    stops = StopStrings(strings)
    return "".join(stops.push(piece) for piece in pieces) + stops.flush(), stops.found


@example("abc", ["abc", "b"], [])
@given(letters, st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.lists(st.integers(0, 30)))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text, strings, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(string) for string in strings)]
    if ends:
        found = max((string for string in strings if text[: ends[0]].endswith(string)), key=len)
        expected = text[: ends[0] - len(found)], found
    else:
        expected = text, None
    assert run(pieces, strings) == expected


def test_only_what_may_begin_a_stop_string_is_held_back():
    stops = StopStrings(["<end>", "\n\n"])
    assert [stops.push(piece) for piece in ("one <", "e", "x two\n", "three <en")] == ["one ", "", "<ex two", "\nthree "]
    assert stops.push("d> four") == ""
    assert stops.found == "<end>"
    assert stops.push("five") + stops.flush() == ""


def test_wrong_stop_strings_are_named():
    with pytest.raises(UserError, match="empty string"):
        StopStrings(["a", ""])
    with pytest.raises(UserError, match="'stop' must be a list"):
        StopStrings("stop")
