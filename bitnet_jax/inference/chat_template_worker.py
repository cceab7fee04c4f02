"""The program that renders one chat template, started by `chat_template.render` in a process of its own.

A template is a program by a stranger. It runs in Jinja's sandbox, and around that in a process that is short of time and memory and
holds nothing of its parent: this file imports the standard library and jinja2 alone.

    arguments          folders where jinja2 and what it needs are found
    standard input     {"template", "variables", "limits": {"seconds", "bytes", "characters"}}
    standard output    {"text"} or {"error"}
"""

import json
import math
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any


def limit(seconds: int, size: int) -> None:
    """Bounds what this process may still use: processor time, address space, files. Nothing is bounded where the platform cannot."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = math.ceil(time.process_time())
    bounds = {
        "RLIMIT_CPU": (used + seconds, used + seconds + 1),
        "RLIMIT_AS": (size, size),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_FSIZE": (0, 0),
        "RLIMIT_NPROC": (0, 0),
    }
    for name, bound in bounds.items():
        try:
            resource.setrlimit(getattr(resource, name), bound)
        except (AttributeError, ValueError, OSError):  # not every platform has each of them
            continue


def renderer() -> Callable[[str, dict[str, Any], int], str]:
    """Imports jinja2 and returns `render(template, variables, characters)`, with what transformers offers to a template."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a model wrote, for training; the text is what stands inside."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}

    def render(template: str, variables: dict[str, Any], characters: int) -> str:
        pieces, size = [], 0
        for piece in environment.from_string(template).generate(variables):
            size += len(piece)
            if size > characters:
                raise jinja2.TemplateError(f"its text has more than {characters} characters")
            pieces.append(piece)
        return "".join(pieces)

    return render


def main() -> None:
    """Answers one request."""
    request = json.load(sys.stdin)
    sys.path += sys.argv[1:]
    render = renderer()
    limits = request["limits"]
    limit(limits["seconds"], limits["bytes"])
    try:
        answer = {"text": render(request["template"], request["variables"], limits["characters"])}
    except MemoryError:
        answer = {"error": "it needs too much memory"}
    except RecursionError:
        answer = {"error": "it is nested too deeply, or calls itself without end"}
    except Exception as error:  # noqa: BLE001 (a template can raise anything)
        line = getattr(error, "lineno", None)
        message = str(getattr(error, "message", None) or error) or type(error).__name__
        answer = {"error": message[:1000] + (f" (line {line})" if line else "")}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
