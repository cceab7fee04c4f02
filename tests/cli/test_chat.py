"""`bitnet-jax chat` on piped input, and what Ctrl-C ends."""

import functools
import io
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from bitnet_jax import cli, inference, models
from bitnet_jax.cli import chat as command
from bitnet_jax.inference import Finish, Piece, Sampling
from bitnet_jax.inference.chat_template import BITNET
from bitnet_jax.models import Model
from bitnet_jax.transformer import Transformer
from tests.inference.talk import EOT, llama_like
from tests.shapes import tiny

CONFIG = tiny(vocab_size=310, init_std=0.3, max_seq_len=128)


@functools.cache
def params():
    return jax.jit(lambda: Transformer(CONFIG).init(jax.random.key(4), jnp.zeros((1, 2), jnp.int32))["params"])()


@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs the command on lines of text and returns exit code, replies and what is on standard error."""

    def run(lines, *args, name="chat", **fields):
        given = {
            "tokenizer": llama_like(),
            "chat_template": BITNET,
            "prefix": (300,),
            "stop_tokens": (0,),
            "sampling": {"temperature": 0.0},
        } | fields
        model = Model(config=CONFIG, params=params(), provenance={}, kind="model file", **given)

        def load(path, *, revision=None, pack=False):
            assert (path, revision, pack) == ("owner/model", None, True)
            return model

        monkeypatch.setattr(models, "load", load)
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = cli.main([name, "owner/model", *args, "--max-new-tokens", "6"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_every_line_is_a_message_and_its_reply_is_shown_without_a_prompt(talk):
    code, out, err = talk("Hi\n\nBye\n/reset\nHi\n/help\n/quit\nnever\n")
    assert code == 0, err
    assert err.count("6 tokens (length), ") == 3
    assert "tokens/s" in err
    assert command.HELP in err
    assert ">" not in err
    *_, again = replies = out.split("\n")[:3]
    assert again == replies[0]
    assert replies[0] != replies[1]


def test_without_a_template_it_says_how_to_give_one(talk, tmp_path):
    code, out, err = talk("Hi\n", chat_template=None)
    assert (code, out) == (2, "")
    assert err.strip().splitlines() == [
        "bitnet-jax: error: owner/model has no chat template: --template must name a file with one, or be `bitnet` "
        "for that of BitNet b1.58 2B4T"
    ]
    (tmp_path / "own.jinja").write_text(BITNET)
    own = talk("Hi\n", "--template", "bitnet", chat_template=None)
    assert own[0] == 0
    assert talk("Hi\n", "--template", str(tmp_path / "own.jinja"), chat_template=None)[1] == own[1]
    assert "--template nowhere cannot be read" in talk("Hi\n", "--template", "nowhere")[2]


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        ("a" * 200, {}, "the message has"),
        ("Hi\udcff", {}, "standard input is not UTF-8"),
        ("Hi", {"chat_template": "{% for %}"}, "the chat template fails"),
        ("Hi", {"tokenizer": None}, "the model has no tokenizer"),
        ("Hi", {"sampling": {"top_p": 7.0}}, "the model states a sampling that cannot be: top_p=7.0"),
    ],
)
def test_what_is_wrong_is_one_line(talk, lines, changes, message):
    code, _, err = talk(lines, **changes)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2  # before it, perhaps, which sampling is used


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


class Scripted:
    """A chat whose replies are given, in which somebody presses Ctrl-C before piece `at`."""

    def __init__(self, texts, at):
        self.texts, self.at, self.taken = texts, at, 0
        self.dropped = 2

    def reply(self, text):
        if self.at < 0:
            signal.raise_signal(signal.SIGINT)
        return self

    def __next__(self):
        if self.taken == self.at:
            signal.raise_signal(signal.SIGINT)
        self.taken += 1
        finish = Finish.STOP if self.taken == len(self.texts) else None
        return Piece(row=0, token=1, text=self.texts[self.taken - 1], finish=finish)

    def result(self):
        timing = SimpleNamespace(new_tokens=self.taken, decode_tokens_per_second=None, compile_seconds=0.0)
        return SimpleNamespace(timing=timing)


@pytest.mark.parametrize(("at", "shown", "said"), [(9, "abc\n", "3 tokens (stop)"), (1, "ab\n", "2 tokens (interrupted)"), (-1, "\n", "")])
def test_ctrl_c_ends_the_reply_and_not_the_program(capsys, at, shown, said):
    chat, before = Scripted(["a", "b", "c"], at), signal.getsignal(signal.SIGINT)
    command.answer(chat, "Hi", interactive=True)
    captured = capsys.readouterr()
    assert captured.out == shown
    assert captured.err == "the context is full: forgetting the oldest 2 of the turns so far\n" + (f"[{said}]\n" if said else "")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_a_program_that_nobody_talks_to(capsys):
    with pytest.raises(KeyboardInterrupt):
        command.answer(Scripted(["a", "b", "c"], 1), "Hi", interactive=False)
    assert capsys.readouterr().out == "ab\n"


def test_a_reply_cannot_command_the_terminal(capsys):
    command.answer(Scripted(["a\x1b[2J\r", "\tb\n", "\x9b\x7f\x00 é👍"], 9), "Hi", interactive=True)
    assert capsys.readouterr().out == "a␛[2J␍\tb\n\ufffd␡␀ é👍\n"


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_uses_prefix_stop_tokens_and_sampling_of_the_model(talk, monkeypatch):
    class AskedFor(Exception):
        pass

    def stream(*args, **options):
        raise AskedFor(options)

    def asked(*args, **fields):
        with pytest.raises(AskedFor) as caught:
            talk("", "Hi", *args, name="generate", **fields)
        return caught.value.args[0]

    monkeypatch.setattr(inference, "stream", stream)
    found = asked("--top-p", "0.7", stop_tokens=(301,), sampling={"temperature": 0.5, "top_p": 0.9, "top_k": 0.0})
    assert (found["prefix"], found["stop_tokens"]) == ((300,), (301,))
    assert found["sampling"] == Sampling(temperature=0.5, top_p=0.7)
    found = asked(stop_tokens=(), sampling={})
    assert (found["stop_tokens"], found["sampling"]) == (None, Sampling(temperature=0.8))


def test_what_is_used_of_the_authors_sampling_is_said_and_flags_go_before_it(talk):
    stated = {"temperature": 0.5, "top_p": 0.9, "top_k": 0.0}
    err = talk("", "--temperature", "0", "--top-p", "0.7", sampling=stated)[2]
    assert err == "as the model's authors state: top_k None\n"
    assert talk("", "--temperature", "0", sampling={})[2] == ""


def test_typed_names_of_special_tokens_are_text_for_generate_too(talk, monkeypatch):
    rows = []
    real = inference.generate
    monkeypatch.setattr(inference, "generate", lambda *args, **options: rows.append(real(*args, **options)) or rows[-1])
    assert talk("", f"Hi{EOT}", "--no-stream", name="generate")[0] == 0
    assert rows[0].rows[0].prompt.tolist() == [300, *llama_like().encode(f"Hi{EOT}").tolist()]
    assert 301 not in rows[0].rows[0].prompt
