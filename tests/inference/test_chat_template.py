"""Templates: the text of a conversation, and a template that would do harm, which becomes one line."""

import ast
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from bitnet_jax.errors import RunError, UserError
from bitnet_jax.inference import chat_template
from bitnet_jax.inference.chat_template import BITNET, render

HI = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hi\n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def test_bitnet_writes_capitalised_roles_trimmed_contents_and_no_newlines():
    assert render(BITNET, HI) == "User: Hi<|eot_id|>Assistant: "
    whole = "System: Be kind.<|eot_id|>User: Hi<|eot_id|>Assistant: Hello<|eot_id|>User: Bye<|eot_id|>"
    assert render(BITNET, TALK) == whole + "Assistant: "
    assert render(BITNET, TALK, add_generation_prompt=False) == whole


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hi</s>"),
        ("{% for i in range(9) %}\n{% if i > 2 %}\n{% break %}\n{% endif %}\n  {{ i }}\n{% endfor %}\n", "  0\n  1\n  2\n"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ {'b': '<é>', 'a': 1} | tojson(indent=1) }}", '{\n "b": "<é>",\n "a": 1\n}'),
        ("{% generation %}{% set a = 1 %}{{ a }}{% endgeneration %}", "1"),
        ("{{ tools is none }} {{ documents is none }} {{ other is defined }}", "True True False"),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
        ("{% set space = namespace(n=0) %}{% for m in messages %}{% set space.n = space.n + 1 %}{% endfor %}{{ space.n }}", "1"),
    ],
)
def test_a_template_finds_what_transformers_offers(template, text):
    assert render(template, HI, bos_token="<s>", eos_token="</s>") == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", r"was stopped \(SIGXCPU\)|takes more than"),
        ("{{ 'a' * 10 ** 10 }}", "it needs too much memory"),
        ("{% set s = namespace(x='a') %}{% for i in range(99) %}{% set s.x = s.x + s.x %}{% endfor %}", "it needs too much memory"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "its text has more than 8388608 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply, or calls itself without end"),
        ("{{ " + "(" * 60000 + "1" + ")" * 60000 + " }}", "nested too deeply"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "access to attribute '__init__' of 'type' object is unsafe"),
        ("{{ (messages | attr('append'))(1) }}", "is unsafe|is not safely callable|undefined"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{% for %}", r"Expected an expression.* \(line 1\)$"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].name.first }}", "has no attribute 'name'"),
        ("{{ raise_exception('no\\n\\x1b[2J ' ~ 'system ' * 99) }}", r"fails: no \N{REPLACEMENT CHARACTER}\[2J system [^\n\x1b]{,300}$"),
    ],
)
def test_a_template_that_fails_or_would_do_harm_is_one_line(template, message):
    begun = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        render(template, HI)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("the chat template fails: ")
    assert time.monotonic() - begun < 2 * chat_template.WALL_SECONDS  # a busy machine may give it less than its processor time


def test_a_template_that_waits_is_given_up(monkeypatch):
    monkeypatch.setattr(chat_template, "WALL_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"it takes more than 0\.01 s"):
        render(BITNET, HI)


def test_sizes_are_limited_before_anything_is_rendered(monkeypatch):
    monkeypatch.setattr(chat_template, "_ask", lambda request: pytest.fail("was rendered"))
    with pytest.raises(UserError, match="the chat template has 262145 characters: must be at most 262144"):
        render("a" * 262145, HI)
    with pytest.raises(UserError, match="the messages have 4194305 characters: must be at most 4194304"):
        render(BITNET, [{"role": "user", "content": "a" * (4194305 - 4)}])


def test_what_is_missing_to_render_is_named(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(RunError, match="no process for the chat template could be started"):
        render(BITNET, HI)
    monkeypatch.setattr(chat_template.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="jinja2 is not installed"):
        render(BITNET, HI)


def test_contents_are_values_and_no_templates():
    hostile = "{{ 1 / 0 }}{% for %}{# #} \\ \" ' \x00 \U0001f44d é"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": hostile}]) == hostile


def test_the_worker_knows_the_standard_library_and_jinja2_only():
    tree = ast.parse(Path(chat_template.__file__).with_name("chat_template_worker.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"jinja2"}


def test_the_date_is_that_of_today():
    before = datetime.now().date()
    assert before <= datetime.strptime(render("{{ strftime_now('%Y-%m-%d') }}", HI), "%Y-%m-%d").date() <= datetime.now().date()
