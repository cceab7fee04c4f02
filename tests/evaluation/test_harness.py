"""The adapter gives the harness what the harness's own rules ask for: likelihoods of the right tokens, windows, texts, and errors."""

import functools
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import generate
from bitnet_jax import params as trees
from bitnet_jax.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from bitnet_jax.errors import UserError
from bitnet_jax.evaluation import likelihood, tasks
from bitnet_jax.evaluation.harness import harness_model
from bitnet_jax.transformer import Transformer
from tests.shapes import tiny

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the package lm-eval")
CONFIG = tiny(vocab_size=300, init_std=0.3)
END = 256


@functools.cache
def latent():
    return jax.jit(lambda: Transformer(CONFIG).init(jax.random.key(4), jnp.zeros((1, 2), jnp.int32))["params"])()


@functools.cache
def packed():
    return trees.pack(latent(), CONFIG)


def model(params=latent, tokenizer=None, **options):
    return harness_model(params(), CONFIG, byte_tokenizer() if tokenizer is None else tokenizer, **options)


def request(kind: str, *args: Any):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


@functools.cache
def forward():
    tree = latent()
    return jax.jit(lambda ids: Transformer(CONFIG).apply({"params": tree}, ids).logits)


def direct(before: list[int], after: list[int]) -> tuple[float, bool]:
    """By all logits of one row, in float64."""
    ids = [*before, *after][-65:-1]
    logits = np.asarray(forward()(np.array([ids + [0] * (64 - len(ids))], np.int32))[0, len(ids) - len(after) : len(ids)], np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(logs[np.arange(len(after)), after].sum()), bool((logits[:, :257].argmax(-1) == after).all())


def ids(text: str) -> list[int]:
    return list(text.encode())


def close(found, expected):
    np.testing.assert_allclose([one[0] for one in found], [one[0] for one in expected], rtol=5e-6)
    assert [one[1] for one in found] == [one[1] for one in expected]


CASES = [
    (("the cat", " sat"), (ids("the cat"), ids(" sat"))),
    (("the cat ", "sat"), (ids("the cat"), ids(" sat"))),  # spaces at the end of a context belong to the continuation
    (("the cat \n", "sat"), (ids("the cat"), ids(" \nsat"))),
    (("", "alone"), ([END], ids("alone"))),
    (("  ", "spaces"), ([END], ids("  spaces"))),
    (("Straße", " größer 日本 🙂"), (ids("Straße"), ids(" größer 日本 🙂"))),
    (("the cat", " sat"), (ids("the cat"), ids(" sat"))),
    (("x" * 90, " long"), (ids("x" * 90), ids(" long"))),
    (("a<|endoftext|>b", "c"), ([97, END, 98], [99])),  # as templates spell special tokens
    (("yes or no?", "y"), (ids("yes or no?"), [121])),
    (("yes or no?", "n"), (ids("yes or no?"), [110])),
]


@needs_lm_eval
@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("params", [latent, packed], ids=["latent", "packed"])
def test_likelihoods_are_those_of_direct_computation_in_any_order(params, batch_size):
    expected = [direct(*tokens) for _, tokens in CASES]
    requests = [request("loglikelihood", *args) for args, _ in CASES]
    close(model(params, batch_size=batch_size).loglikelihood(requests), expected)
    close(model(params, batch_size=batch_size).loglikelihood(requests[::-1]), expected[::-1])


@needs_lm_eval
def test_too_long_a_context_is_cut_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="bitnet_jax"):
        model().loglikelihood([request("loglikelihood", *args) for args, _ in CASES])
    assert "1 of 11 requests are longer than max_seq_len=64" in caplog.text


@needs_lm_eval
def test_the_boundary_is_where_the_tokens_of_the_context_end():
    """Whole text and context are encoded, each as a text; the continuation is what the whole has beyond the context's number of tokens."""
    merging = train_bpe(["abab cd " * 50], 262)
    assert len(merging.encode("ab")) == 1
    whole, context = merging.encode("xab cd").tolist(), merging.encode("xa").tolist()
    assert whole[: len(context)] != context  # a token spans the boundary
    found = model(tokenizer=merging).loglikelihood([request("loglikelihood", "xa", "b cd")])
    assert found[0][0] == pytest.approx(direct(context, whole[len(context) :])[0], rel=5e-6)
    with pytest.raises(UserError, match=r"'b' behind 'a' has no tokens of its own"):
        model(tokenizer=merging).loglikelihood([request("loglikelihood", "a", "b")])
    with pytest.raises(UserError, match="the continuation of 'a' is empty"):
        model().loglikelihood([request("loglikelihood", "a", "")])


@needs_lm_eval
def test_the_prefix_stands_before_contexts_once_and_alone_before_what_has_none():
    prefixed = model(prefix=(7,))
    cases = [(("the cat", " sat"), ([7, *ids("the cat")], ids(" sat"))), (("", "alone"), ([7], ids("alone")))]
    cases.append((("\x07the cat", " sat"), ([7, *ids("the cat")], ids(" sat"))))  # written out already
    close(prefixed.loglikelihood([request("loglikelihood", *args) for args, _ in cases]), [direct(*tokens) for _, tokens in cases])


@needs_lm_eval
@pytest.mark.parametrize("params", [latent, packed], ids=["latent", "packed"])
def test_rolling_scores_each_token_once_with_the_harness_s_windows(params):
    texts = ["short", "", "ten bytes " * 15, "short", "é" * 32]
    expected = []
    for text in texts:
        tokens, total = ids(text), 0.0
        for end in range(0, len(tokens), 64):
            if end + 64 <= len(tokens) or end == 0:
                window = tokens[end : end + 64]
                before = [END] if end == 0 else [tokens[end - 1]]
            else:  # the last window reaches back to be full
                window, before = tokens[end:], tokens[-65 : -(len(tokens) - end)]
            total += direct(before, window)[0]
        expected.append(total)
    for batch_size in (1, 7):
        found = model(params, batch_size=batch_size).loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts])
        np.testing.assert_allclose(found, expected, rtol=5e-6)


@needs_lm_eval
@pytest.mark.parametrize("params", [latent, packed], ids=["latent", "packed"])
def test_generated_texts_are_those_of_generate(params):
    contexts = ["the", "the cat sat", "", "a longer context than the others", "the"]
    found = model(params, batch_size=2).generate_until(
        [request("generate_until", text, {"until": [], "max_gen_toks": 12}) for text in contexts]
    )
    prompts = [ids(text) or [END] for text in contexts]
    rows = generate(params(), CONFIG, prompts, max_new_tokens=12, tokenizer=byte_tokenizer()).rows
    assert found == [row.text for row in rows]
    stop = found[1][4]
    again = model(params).generate_until([request("generate_until", contexts[1], {"until": ["", stop], "max_gen_toks": 12})])
    assert again == [found[1][: found[1].index(stop)]]


@needs_lm_eval
def test_a_greedy_text_is_greedy_as_a_continuation():
    text = model().generate_until([request("generate_until", "the cat", {"max_gen_toks": 3, "temperature": 0.0})])[0]
    letters = [letter for letter in text if letter != "\N{REPLACEMENT CHARACTER}"]
    assert letters  # a random model writes bytes that are no UTF-8; the first of them that are stand for all
    if text.startswith(letters[0]):
        assert model().loglikelihood([request("loglikelihood", "the cat", letters[0])])[0][1]


@needs_lm_eval
def test_a_context_without_room_for_the_new_tokens_is_cut_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="bitnet_jax"):
        found = model().generate_until([request("generate_until", "y" * 70, {"max_gen_toks": 14})])
    assert "1 of 1 contexts leave no room for new tokens within max_seq_len=64 and lose their beginning, up to 20" in caplog.text
    assert found == [generate(latent(), CONFIG, [ids("y" * 50)], max_new_tokens=14, tokenizer=byte_tokenizer()).rows[0].text]


@needs_lm_eval
def test_draws_follow_from_the_seed_and_not_from_the_batch():
    draws = [request("generate_until", "the", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})] * 3
    one, two, three = model(batch_size=3, seed=5).generate_until(draws)
    assert len({one, two, three}) == 3
    assert model(batch_size=2, seed=5).generate_until(draws) == [one, two, three]
    assert model(batch_size=2, seed=6).generate_until(draws[:2]) == [two, three]


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_gen_toks": 64}, "max_gen_toks=64 of a task must be from 1 to 63, below max_seq_len=64"),
        ({"do_sample": True}, "do_sample of a task needs a temperature above 0"),
        ({"num_beams": 4}, "num_beams=4 of a task must be 1"),
        ({"length_penalty": 2}, "the generation argument 'length_penalty' of a task is unknown here"),
    ],
)
def test_what_a_task_asks_for_and_is_not_there_is_an_error(arguments, message):
    with pytest.raises(UserError, match=message):
        model().generate_until([request("generate_until", "the", arguments)])


@needs_lm_eval
def test_answers_of_the_file_are_not_computed_again_and_draws_are_not_kept(tmp_path, monkeypatch):
    likely = [request("loglikelihood", *args) for args, _ in CASES]
    rolling = [request("loglikelihood_rolling", "text")]
    greedy = [request("generate_until", "the", {"max_gen_toks": 4})]
    drawn = [request("generate_until", "the", {"max_gen_toks": 4, "temperature": 1.0})]
    first = model(cache=tmp_path / "answers.jsonl")
    found = first.loglikelihood(likely), first.loglikelihood_rolling(rolling), first.generate_until(greedy)
    first.generate_until(drawn)

    again = model(cache=tmp_path / "answers.jsonl")
    monkeypatch.setattr(likelihood, "_arrays", None)
    monkeypatch.setattr("bitnet_jax.evaluation.harness.generate", None)
    assert (again.loglikelihood(likely), again.loglikelihood_rolling(rolling), again.generate_until(greedy)) == found
    with pytest.raises(TypeError):
        again.generate_until(drawn)
    with pytest.raises(UserError, match="another model"):
        model(packed, cache=tmp_path / "answers.jsonl")


@needs_lm_eval
def test_the_harness_s_own_cache_is_filled(tmp_path):
    from lm_eval.api.model import CachingLM

    caching = CachingLM(model(), str(tmp_path / "lm_eval.db"))
    requests = [request("loglikelihood", *args) for args, _ in CASES[:3]]
    try:
        assert caching.loglikelihood(requests) == caching.loglikelihood(requests) == model().loglikelihood(requests)
        assert len(caching.dbdict) == 3
    finally:
        caching.dbdict.close()


@needs_lm_eval
def test_chats_are_rendered_by_the_model_s_template():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    history = [{"role": "user", "content": "hi"}]
    assert model(chat_template=template).apply_chat_template(history) == "user: hi<|endoftext|>A:"
    with pytest.raises(UserError, match="no chat template"):
        model().apply_chat_template(history)
    assert model().tokenizer_name != model(chat_template=template).tokenizer_name


@needs_lm_eval
def test_a_tokenizer_that_names_no_beginning_is_an_error():
    core = json.loads(byte_tokenizer().to_json())
    core["added_tokens"] = []
    with pytest.raises(UserError, match="neither a beginning nor an end of text"):
        model(tokenizer=Tokenizer(json.dumps(core)))


# --- tasks -----------------------------------------------------------------------------------------------------------

QUESTIONS = [{"question": f"{number} and one is", "choices": ["two", "three or", "été"], "answer": number % 3} for number in range(7)]


def write_task(folder: Path, name: str, kind: str, records: list[dict[str, Any]], **fields: Any) -> None:
    """A task as a YAML file, which JSON is as well, and its documents beside it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"test": str(folder / f"{name}.jsonl")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": data}, "test_split": "test", "output_type": kind}
    (folder / f"{name}.yaml").write_text(json.dumps(task | fields))


def metric(name: str, aggregation: str = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": True}


@pytest.fixture
def folder(tmp_path):
    choice = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "fewshot_split": "test"}
    write_task(tmp_path, "choose", "multiple_choice", QUESTIONS, metric_list=[metric("acc")], **choice)
    write_task(tmp_path, "fixed", "multiple_choice", QUESTIONS, metric_list=[metric("acc")], num_fewshot=0, **choice)
    texts = [{"text": "one text"}, {"text": "another " * 12}]
    bits = [metric("bits_per_byte", "bits_per_byte")]
    write_task(tmp_path, "read", "loglikelihood_rolling", texts, metric_list=bits, doc_to_text="", doc_to_target="{{text}}")
    wanted = [
        {"start": "the cat", "end": generate(latent(), CONFIG, [ids("the cat")], max_new_tokens=5, tokenizer=byte_tokenizer()).rows[0].text}
    ]
    wanted.append({"start": "the dog", "end": "something else"})
    go_on = {"doc_to_text": "{{start}}", "doc_to_target": "{{end}}", "generation_kwargs": {"until": ["<|never|>"], "max_gen_toks": 5}}
    write_task(tmp_path, "go_on", "generate_until", wanted, metric_list=[metric("exact_match")], **go_on)
    return tmp_path


@needs_lm_eval
@pytest.mark.parametrize("params", [latent, packed], ids=["latent", "packed"])
def test_local_tasks_of_every_kind_are_scored(folder, params):
    found = tasks.evaluate(model(params), ["choose", "read", "go_on"], include_path=folder)
    scores = {score.task: score for score in tasks.table(found)}
    right = []
    for one in QUESTIONS:
        likely = [direct(ids(one["question"]), ids(" " + choice))[0] for choice in one["choices"]]
        right.append(int(np.argmax(likely)) == one["answer"])
    assert scores["choose"].value == pytest.approx(np.mean(right))
    assert scores["choose"].stderr == pytest.approx(np.std(right, ddof=1) / np.sqrt(7))
    assert (scores["choose"].metric, scores["choose"].shots, scores["choose"].examples) == ("acc", 0, 7)
    text = "another " * 12
    nats = direct([END], ids("one text"))[0] + direct([END], ids(text[:64]))[0] + direct(ids(text[31:64]), ids(text[64:]))[0]
    assert scores["read"].value == pytest.approx(-nats / (8 + 96) / np.log(2), rel=5e-6)
    assert scores["go_on"].value == 0.5


@needs_lm_eval
def test_limits_and_examples_before_a_question(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="bitnet_jax"):
        found = tasks.evaluate(model(), ["choose", "fixed"], include_path=folder, limit=3, num_fewshot=1)
    scores = {score.task: score for score in tasks.table(found)}
    assert (scores["choose"].shots, scores["choose"].examples) == (1, 3)
    assert (scores["fixed"].shots, scores["fixed"].examples) == (0, 3)
    assert "fixed has 0 examples before each question, as it says itself, and not 1" in caplog.text


@needs_lm_eval
def test_a_chat_stands_around_questions_and_examples(folder, monkeypatch):
    from bitnet_jax.inference import chat_template

    monkeypatch.setattr(chat_template, "render", lambda template, messages, **_: "|".join(one["content"] for one in messages))
    asked = []
    chatting = model(chat_template="any")
    monkeypatch.setattr(type(chatting), "_pair", lambda self, context, continuation: asked.append(context) or ([1], [2]))
    tasks.evaluate(chatting, ["choose"], include_path=folder, limit=1, num_fewshot=1, chat=True)
    assert asked == [asked[0]] * 3
    example, answer, question = asked[0].split("|")
    assert (example, answer) in {(one["question"], one["choices"][one["answer"]]) for one in QUESTIONS}
    assert question == QUESTIONS[0]["question"]


@needs_lm_eval
def test_a_task_may_be_a_file_or_a_pattern(folder):
    for name in (str(folder / "choose.yaml"), "ch*"):
        assert [score.task for score in tasks.table(tasks.evaluate(model(), [name], include_path=folder, limit=1))] == ["choose"]


@needs_lm_eval
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
        ({"num_fewshot": 20}, "the requests of task choose cannot be made: Sample larger than population"),
        ({"tasks": []}, "tasks is empty"),
        ({"include_path": Path("no-such-folder")}, "include_path=no-such-folder must be a folder"),
        ({"chat": True}, "the requests of task choose cannot be made|the model has no chat template"),
    ],
)
def test_a_wrong_option_is_an_error(folder, options, message):
    options = {"tasks": ["choose"], "include_path": folder} | options
    with pytest.raises(UserError, match=message):
        tasks.evaluate(model(), options.pop("tasks"), **options)


@needs_lm_eval
def test_a_task_whose_data_cannot_be_read_is_one_line(folder):
    (folder / "choose.jsonl").unlink()
    with pytest.raises(UserError, match=r"a task of choose cannot be loaded: .*choose\.jsonl"):
        tasks.evaluate(model(), ["choose"], include_path=folder)
    (folder / "choose.yaml").write_text("task: choose\ndataset_path: nobody/no-such-data\noutput_type: multiple_choice\ntest_split: test\n")
    with pytest.raises(UserError, match=r"a task of choose cannot be loaded: .*nobody/no-such-data"):
        tasks.evaluate(model(), ["choose"], include_path=folder)


@needs_lm_eval
def test_a_task_that_runs_programs_of_the_model_is_refused(folder):
    text = (folder / "choose.yaml").read_text()
    (folder / "choose.yaml").write_text(json.dumps(json.loads(text) | {"unsafe_code": True}))
    with pytest.raises(UserError, match="task choose runs programs that the model writes"):
        tasks.evaluate(model(), ["choose"], include_path=folder)


@pytest.mark.slow
@needs_lm_eval
def test_an_unknown_task_is_an_error_that_names_its_neighbours(folder):
    with pytest.raises(UserError, match=r"task 'arc_eazy' is unknown: .*near it are .*arc_easy"):
        tasks.evaluate(model(), ["choose", "arc_eazy"], include_path=folder)


def test_without_the_package_an_error_names_the_extra(monkeypatch):
    from bitnet_jax.evaluation import harness

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    harness._model_class.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'bitnet-jax\[lm-eval\]'"):
        model()
    with pytest.raises(UserError, match=r"pip install 'bitnet-jax\[lm-eval\]'"):
        tasks.evaluate(None, ["choose"])
