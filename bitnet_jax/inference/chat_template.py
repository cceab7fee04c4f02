"""Chat templates: a conversation as the one text that a model was trained on, rendered where a template can do no harm.

Templates come with model files, in Jinja, a language in which one can loop for ever, fill the memory and look for a way out. So each is
rendered by `chat_template_worker` in a process of its own, within the limits below; whatever a template does ends as one `UserError`.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitnet_jax.errors import RunError, UserError

BITNET = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""The template of microsoft/bitnet-b1.58-2B-4T: turns without newlines; the beginning of text comes from the tokenizer."""

TEMPLATE_CHARACTERS = 1 << 18
"""Characters of a template at most; the longest in common use have some ten thousand."""
INPUT_CHARACTERS = 1 << 22
"""Characters of all messages at most."""
OUTPUT_CHARACTERS = 1 << 23
"""Characters of the rendered text at most."""
PROCESSOR_SECONDS = 2
"""Processor time that a template may use. Starting the process does not count."""
WALL_SECONDS = 20
"""After so long a render is given up even where it uses no processor time, or the platform does not count it."""
MEMORY_BYTES = 1 << 29
"""Address space of the process, where the platform bounds it."""

_WORKER = Path(__file__).with_name("chat_template_worker.py")


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja source, as in tokenizer_config.json; sees what transformers gives to templates.
        messages: {"role", "content"} of each, the oldest first.
        bos_token: text of the token that begins a text, for templates that write it out.
        eos_token: text of the token that ends a text.
        add_generation_prompt: whether the text ends with the beginning of the model's next turn.

    Raises:
        UserError: the template is malformed, refuses the messages, or does what it may not: run on, fill the memory, nest without
            end, write without end, or reach for Python's inside.
        RunError: no process could be started.
    """
    if len(template) > TEMPLATE_CHARACTERS:
        raise UserError(f"the chat template has {len(template)} characters: must be at most {TEMPLATE_CHARACTERS}")
    size = sum(len(message["role"]) + len(message["content"]) for message in messages)
    if size > INPUT_CHARACTERS:
        raise UserError(f"the messages have {size} characters: must be at most {INPUT_CHARACTERS}")
    variables = {
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token,
        "eos_token": eos_token,
    }
    limits = {"seconds": PROCESSOR_SECONDS, "bytes": MEMORY_BYTES, "characters": OUTPUT_CHARACTERS}
    answer = _ask({"template": template, "variables": variables, "limits": limits})
    if "error" in answer:
        raise UserError(f"the chat template fails: {_printable(answer['error'])}")
    return answer["text"]


def _ask(request: Mapping[str, object]) -> dict[str, str]:
    """What the worker answers; a `UserError` where it ends without an answer, for only the template can be the reason."""
    command = [sys.executable, "-I", "-S", str(_WORKER), *_folders()]
    try:
        # Without a share in the terminal, so that Ctrl-C reaches this process alone.
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=WALL_SECONDS,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the chat template fails: it takes more than {WALL_SECONDS} s") from None
    except OSError as error:
        raise RunError(f"no process for the chat template could be started: {error}") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        cause = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        raise UserError(
            f"the chat template fails: it was stopped ({cause}); it may use {PROCESSOR_SECONDS} s of processor time "
            f"and {MEMORY_BYTES >> 20} MiB"
        ) from None
    if not isinstance(answer, dict) or not isinstance(answer.get("text", answer.get("error")), str):
        raise UserError("the chat template fails: its process gave no text")
    return answer


def _folders() -> list[str]:
    """Where jinja2 and markupsafe lie: an isolated Python without its site module knows the standard library only."""
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    origins = [spec.origin for spec in found if spec is not None and spec.origin is not None]
    if len(origins) < len(found):
        raise RunError("jinja2 is not installed: chat templates need it (pip install jinja2)")
    return sorted({os.path.dirname(os.path.dirname(origin)) for origin in origins})


def _printable(text: str) -> str:
    """One line without control characters, for it is shown on a terminal."""
    line = " ".join(text.split())[:300]
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
