"""The file of a benchmark: every figure of every process, and what it must be read with.

    format     "bitnet-jax-bench-1"
    model      name, kind, bytes, storage, config
    sessions   of each start of the program: time, commit, versions, processor, settings, command
    runs       of each process: subject, command, threads, prompt, generate, repeat, source, session, and its figures, or `failed`

`source` is a digest of this project's code: figures of ours are of one state of it. Other programs have none.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from bitnet_jax.data.cache import write_file
from bitnet_jax.errors import UserError

FORMAT = "bitnet-jax-bench-1"
_KEY = ("subject", "command", "threads", "prompt", "generate", "seed", "repeat", "source")
_PACKAGES = Path(__file__).parents[2]


def read(path: Path) -> dict[str, Any]:
    """The results in a file. Raises UserError where it is missing or no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} is no file of bitnet-jax bench: its format must be {FORMAT!r}")
    if not all(isinstance(found.get(name), kind) for name, kind in (("model", dict), ("sessions", list), ("runs", list))):
        raise UserError(f"{path} must have a model, sessions and runs")
    return found


def opened(path: Path | None, model: dict[str, Any]) -> dict[str, Any]:
    """The results so far of the file `path`, or none. Raises UserError where they are another model's."""
    if path is None or not path.exists():
        return {"format": FORMAT, "model": model, "sessions": [], "runs": []}
    found = read(path)
    for name, value in model.items():
        if found["model"].get(name) != value:
            raise UserError(f"{path} holds results of another model: its {name} differs; choose another file")
    return found


def is_done(found: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether the file has the figures of such a run."""
    return any("failed" not in one and _key(one) == _key(run) for one in found["runs"])


def add(found: dict[str, Any], run: dict[str, Any], path: Path | None) -> None:
    """Adds a run, in place of one like it, and writes the file."""
    found["runs"] = [one for one in found["runs"] if _key(one) != _key(run)] + [run]
    if path is not None:
        write_file(path, json.dumps(found, indent=1) + "\n")


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run.get(name) for name in _KEY)


def source_digest() -> str:
    """Digest of the code that makes text: both packages, but for this program's own."""
    total = hashlib.sha256()
    for package in ("bitnet_jax", "kernels_pallas"):
        for path in sorted((_PACKAGES / package).rglob("*")):
            if path.suffix in (".py", ".cc", ".h", ".inc") and "benchmark" not in path.parts and "cli" not in path.parts:
                total.update(str(path.relative_to(_PACKAGES)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
