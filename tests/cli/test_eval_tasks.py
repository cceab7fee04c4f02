"""`bitnet-jax eval --tasks`: a table or one JSON object, and one line for each wrong input."""

import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax import cli
from bitnet_jax.data.tokenizers import byte_tokenizer
from bitnet_jax.formats import model_file
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets
from bitnet_jax.transformer import Transformer
from tests.shapes import tiny

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the package lm-eval")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a random model that knows bytes, a task, and four questions."""
    monkeypatch.chdir(tmp_path)
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")  # which the command sets for the whole process
    config = tiny(vocab_size=257)
    params = jax.jit(lambda: Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])()
    assets = Assets(tokenizer=byte_tokenizer().to_json())
    model_file.write(tmp_path / "model.safetensors", leafwise.from_params(params, config, assets=assets))
    (tmp_path / "mine").mkdir()
    questions = [{"text": f"{number} and", "choices": ["one", "two"], "answer": number % 2} for number in range(4)]
    (tmp_path / "mine" / "choose.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = {
        "task": "choose",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "mine/choose.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "mine" / "choose.yaml").write_text(json.dumps(task))  # which is YAML, too
    return tmp_path


def fails(capsys, *args):
    assert cli.main(["eval", "model.safetensors", *args]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err.strip().splitlines()[-1].removeprefix("bitnet-jax: error: ")


@needs_lm_eval
def test_a_task_gives_a_table_and_the_same_numbers_as_json(here, capsys):
    command = ["eval", "model.safetensors", "--tasks", "choose", "--include-path", "mine", "--limit", "3", "--cache", "answers.jsonl"]
    assert cli.main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (score,) = facts["scores"]
    assert (score["task"], score["metric"], score["examples"], score["shots"]) == ("choose", "acc", 3, 0)
    assert facts["lm_eval"]
    kept = (here / "answers.jsonl").read_bytes()
    assert kept.count(b"\n") == 1 + 3 * 2
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("model.safetensors", "choose", "acc", f"{score['value']:.4f}", f"{score['stderr']:.4f}"))
    assert (here / "answers.jsonl").read_bytes() == kept


@needs_lm_eval
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tasks", "choose", "--include-path", "mine", "--limit", "0"), "limit=0 must be at least 1"),
        (("--tasks", "choose", "--include-path", "nowhere"), "include_path=nowhere must be a folder"),
        (("--tasks", ",", "--include-path", "mine"), "tasks is empty"),
        (("--tasks", "choose", "--include-path", "mine", "--batch-size", "0"), "batch_size=0 must be at least 1"),
        (("--tasks", "choose", "--include-path", "mine", "--chat"), "the model has no chat template"),
        (("--tasks", "choose", "--include-path", "mine", "--cache", "mine/choose.jsonl"), "is no file of answers"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_wrong_option_is_one_line(capsys, args, message):
    assert message in fails(capsys, *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("text.txt", "--tasks", "choose"), "a text goes with perplexity, and not with --tasks"),
        (("--tasks", "choose", "--window", "8"), "--window goes with perplexity, and not with --tasks"),
        (("--tasks", "choose", "--text-field", "body"), "--text-field goes with perplexity, and not with --tasks"),
        (("text.txt", "--limit", "8"), "--limit goes with --tasks alone"),
        (("text.txt", "--num-fewshot", "0"), "--num-fewshot goes with --tasks alone"),
        (("--cache", "file"), "--cache goes with --tasks alone"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(capsys, args, message):
    assert fails(capsys, *args) == message


@pytest.mark.usefixtures("here")
def test_without_the_package_an_error_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'bitnet-jax[lm-eval]'" in fails(capsys, "--tasks", "choose")
