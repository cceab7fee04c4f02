"""Two small tasks for `bitnet-jax eval --tasks`, made from the plays that models trained on the default corpus have not seen.

    python -m experiments.shakespeare_tasks

shakespeare_next_line   which of four lines goes on after four lines of a speech; the other three are of other speeches in the same play
shakespeare_speeches    the likelihood of whole speeches

Writes experiments/tasks/*.jsonl beside the .yaml files, which are the tasks as lm-evaluation-harness reads them; paths in those are from
the root of the repository. The corpus is in the public domain (`bitnet_jax.data.shakespeare`). Cost: seconds. A guess is right once in
four times.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_jax.config import DataConfig
from bitnet_jax.data import cache, splits
from bitnet_jax.data.corpora import open_corpus
from bitnet_jax.data.splits import Part

TASKS = Path(__file__).parent / "tasks"
CONTEXT = 4
"""Lines before the one that is asked for."""
CHOICES = 4
QUESTIONS = 200
SPEECHES = 40

Speech = tuple[str, list[str]]
"""Who speaks, and the lines."""


def main() -> None:
    """Writes both files."""
    plays = [speeches(text) for text in held_out()]
    draw = random.Random(0)
    each = QUESTIONS // len(plays)
    write("shakespeare_next_line", [question for play in plays for question in questions(play, each, draw)])
    long = [f"{speaker}\n" + "\n".join(lines) for play in plays for speaker, lines in play if 8 <= len(lines) <= 24]
    write("shakespeare_speeches", [{"text": text} for text in draw.sample(long, SPEECHES)])


def held_out() -> list[str]:
    """The plays that `DataConfig()` holds out."""
    config = DataConfig()
    corpus = open_corpus(config.source, text_field=config.text_field, cache=cache.cache_folder(config.cache_dir))
    division = splits.split(splits.scan(corpus), config.validation_fraction)
    return [piece.text for part, piece in splits.parts(corpus, division) if part is Part.VALIDATION]


def speeches(text: str) -> list[Speech]:
    """The speeches of a play: the paragraphs that begin with a name in capitals. Stage directions end one."""
    found = []
    for paragraph in text.split("\n\n"):
        speaker, *lines = paragraph.strip().splitlines() or [""]
        if speaker.isupper() and not speaker.startswith(("ACT ", "SCENE ", "[")) and lines:
            end = next((number for number, line in enumerate(lines) if "[" in line or "]" in line), len(lines))
            found.append((speaker, lines[:end]))
    return found


def questions(play: Sequence[Speech], count: int, draw: random.Random) -> list[dict[str, Any]]:
    """`count` questions about a play, no two about one line; the place of the right line is drawn."""
    places = [
        (number, line) for number, (_, lines) in enumerate(play) for line in range(CONTEXT, len(lines)) if 25 <= len(lines[line]) <= 60
    ]
    found = []
    for number, line in sorted(draw.sample(places, count)):
        speaker, lines = play[number]
        others = sorted({play[other][1][at] for other, at in places if other != number} - {lines[line]})
        choices = [lines[line], *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        context = "\n".join([speaker, *lines[line - CONTEXT : line]])
        found.append({"context": context, "choices": choices, "answer": choices.index(lines[line])})
    return found


def write(name: str, records: Sequence[dict[str, Any]]) -> None:
    """Writes the documents of a task, a line of JSON each."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (TASKS / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{name}: {len(records)} documents")


if __name__ == "__main__":
    main()
