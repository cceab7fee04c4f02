"""The file of results: what is done is not done again, and one file holds one model."""

import json

import pytest

from bitnet_jax.benchmark import results
from bitnet_jax.errors import UserError

MODEL = {"name": "m", "bytes": 7, "storage": "two_bit", "config": {"vocab_size": 5}}
RUN = {"subject": "bitnet-jax", "command": "", "threads": 1, "prompt": 2, "generate": 3, "repeat": 0, "source": "a"}


def test_a_run_is_done_when_all_that_names_it_is_the_same(tmp_path):
    path = tmp_path / "r.json"
    results.add(results.opened(path, MODEL), RUN | {"decode_tokens_per_second": 5.0}, path)
    found = results.opened(path, MODEL)
    assert results.is_done(found, RUN)
    for name, value in RUN.items():
        assert not results.is_done(found, RUN | {name: f"another {value}"})


def test_a_failure_is_tried_again_and_replaced(tmp_path):
    path = tmp_path / "r.json"
    found = results.opened(path, MODEL)
    results.add(found, RUN | {"failed": "why"}, path)
    assert not results.is_done(results.read(path), RUN)
    results.add(found, RUN | {"decode_tokens_per_second": 5.0}, path)
    assert results.is_done(results.read(path), RUN)
    assert len(results.read(path)["runs"]) == 1


def test_results_of_another_model_are_refused_and_kept(tmp_path):
    path = tmp_path / "r.json"
    results.add(results.opened(path, MODEL), RUN, path)
    before = path.read_bytes()
    for change in ({"name": "n"}, {"bytes": 8}, {"config": {"vocab_size": 6}}):
        with pytest.raises(UserError, match=rf"r.json holds results of another model: its {next(iter(change))} differs"):
            results.opened(path, MODEL | change)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "bitnet-jax-bench-1"}', '{"format": "bitnet-jax-bench-2"}', "\xff"])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"r\.json"):
        results.read(path)
    with pytest.raises(UserError, match=r"r\.json"):
        results.opened(path, MODEL)


def test_the_digest_is_of_the_code_that_makes_text(monkeypatch, tmp_path):
    others, sources = (
        ("bitnet_jax/cli/a.py", "bitnet_jax/benchmark/t.py"),
        ("bitnet_jax/dot.py", "bitnet_jax/cpu/x.h", "kernels_pallas/api.py"),
    )
    for name in (*others, *sources):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(results, "_PACKAGES", tmp_path)
    digests = [results.source_digest()]
    for name in (*others, *sources):
        (tmp_path / name).write_text("2")
        digests.append(results.source_digest())
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests[2:])) == 4


def test_a_file_is_plain_json(tmp_path):
    path = tmp_path / "r.json"
    results.add(results.opened(None, MODEL), RUN, path)
    assert json.loads(path.read_text()) == {"format": results.FORMAT, "model": MODEL, "sessions": [], "runs": [RUN]}
