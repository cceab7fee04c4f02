"""Questions about a play: the right line is the next one, the others are of other speeches, and each is asked once."""

import json
import random

from experiments import shakespeare_tasks
from experiments.shakespeare_tasks import TASKS, questions, speeches

PLAY = "\n\n".join(
    ["A Play", "ACT I", "SCENE I. A street.", "[Enter ALL]"]
    + [
        f"SPEAKER {name}\n" + "\n".join(f"Line {line} of the speech that {name} makes" for line in range(length)) + "\n[Exit]\nnot said"
        for name, length in (("ONE", 7), ("TWO", 4), ("THREE", 6), ("FOUR", 9))
    ]
)


def test_speeches_are_the_paragraphs_under_a_name_up_to_a_stage_direction():
    assert [(speaker, len(lines)) for speaker, lines in speeches(PLAY)] == [
        ("SPEAKER ONE", 7),
        ("SPEAKER TWO", 4),
        ("SPEAKER THREE", 6),
        ("SPEAKER FOUR", 9),
    ]


def test_the_answer_is_the_line_that_follows():
    found = questions(speeches(PLAY), 8, random.Random(0))
    assert len({(one["context"], one["choices"][one["answer"]]) for one in found}) == 8
    for one in found:
        right = one["choices"][one["answer"]]
        assert one["context"] + "\n" + right in PLAY or one["context"].split("\n", 1)[1] + "\n" + right in PLAY
        speaker = one["context"].splitlines()[0].removeprefix("SPEAKER ")
        assert [speaker in choice for choice in one["choices"]] == [choice == right for choice in one["choices"]]
        assert len(set(one["choices"])) == shakespeare_tasks.CHOICES
    assert questions(speeches(PLAY), 8, random.Random(0)) == found


def test_the_committed_questions_are_whole():
    text = (TASKS / "shakespeare_next_line.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    assert len(found) == shakespeare_tasks.QUESTIONS
    assert all(len(set(one["choices"])) == 4 and 0 <= one["answer"] < 4 and one["context"].count("\n") == 4 for one in found)
    assert {one["answer"] for one in found} == {0, 1, 2, 3}
    speeches_text = (TASKS / "shakespeare_speeches.jsonl").read_text(encoding="utf-8")
    assert len(speeches_text.splitlines()) == shakespeare_tasks.SPEECHES
