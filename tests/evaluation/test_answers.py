"""Answers outlive a program that is killed, and belong to one model."""

import jax.numpy as jnp
import pytest

from bitnet_jax.errors import UserError
from bitnet_jax.evaluation.answers import Answers, fingerprint

REQUESTS = [("loglikelihood", ("a", " b")), ("loglikelihood", ("a", " été")), ("generate_until", ("a", {"until": ["\n"]}))]


def test_answers_are_found_again_by_kind_and_arguments(tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    first = Answers(file, "m")
    for number, request in enumerate(REQUESTS):
        assert first.get(*request) is None
        first.put(*request, [-float(number), False])
    again = Answers(file, "m")
    assert [again.get(*request) for request in REQUESTS] == [[0.0, False], [-1.0, False], [-2.0, False]]
    assert again.get("generate_until", ("a", " b")) is None
    assert len(again) == 3


def test_a_file_cut_off_anywhere_keeps_its_whole_lines(tmp_path):
    file = tmp_path / "answers.jsonl"
    first = Answers(file, "m")
    for request in REQUESTS:
        first.put(*request, "text")
    data = file.read_bytes()
    for size in range(len(data)):
        file.write_bytes(data[:size])
        cut = Answers(file, "m")
        assert len(cut) == max(0, data[:size].count(b"\n") - 1)
        for request in REQUESTS:
            cut.put(*request, "text")
        assert len(Answers(file, "m")) == 3


@pytest.mark.parametrize("text", ["something else\n", "something else", "[1]\n", '{"model": "m"}\n', "\x00\xff"])
def test_another_file_is_neither_used_nor_changed(tmp_path, text):
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match="is no file of answers"):
        Answers(file, "m")
    assert file.read_text() == text


def test_another_models_answers_are_refused(tmp_path):
    file = tmp_path / "answers.jsonl"
    Answers(file, "m").put(*REQUESTS[0], 1.0)
    with pytest.raises(UserError, match="answers of another model"):
        Answers(file, "n")
    with pytest.raises(UserError, match="cannot be used"):
        Answers(tmp_path, "m")


def test_the_fingerprint_is_of_every_bit():
    tree = {"a": jnp.zeros(3), "b": {"c": jnp.ones(2, jnp.int8)}}
    others = [
        {"a": jnp.zeros(3).at[1].set(-0.0), "b": tree["b"]},
        {"a": jnp.zeros((3, 1)), "b": tree["b"]},
        {"a": tree["a"], "b": {"d": tree["b"]["c"]}},
    ]
    assert fingerprint(tree, 1) == fingerprint({"b": dict(tree["b"]), "a": tree["a"] + 0}, 1)
    assert len({fingerprint(tree, 1), fingerprint(tree, 2), *(fingerprint(other, 1) for other in others)}) == 5
