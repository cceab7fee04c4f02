"""Answers of one model to requests, kept in a file as they are made, so that an interrupted evaluation goes on where it was.

The file is text, a line of JSON for each answer, and its first line says which model's answers they are. A line that was half written
when its program was killed is dropped.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitnet_jax.errors import UserError

_FORMAT = 1


class Answers:
    """Answers by the kind and arguments of their request."""

    def __init__(self, path: Path, model: str) -> None:
        """Opens the file `path`, or makes it, for the answers of the model with the fingerprint `model`.

        Raises:
            UserError: the file holds something else, or another model's answers, or cannot be read or written.
        """
        self._path = path
        self._found: dict[str, Any] = {}
        head = {"bitnet-jax answers": _FORMAT, "model": model}
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            if data and not whole and not json.dumps(head).encode().startswith(data[:20]):
                raise UserError(f"cache {path} is no file of answers")
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines and not (isinstance(lines[0], dict) and lines[0].keys() == head.keys()):
                raise UserError(f"cache {path} is no file of answers")
            if lines and lines[0] != head:
                raise UserError(f"cache {path} holds the answers of another model or version: name another file, or remove it")
            self._found = {line["request"]: line["answer"] for line in lines[1:]}
            path.parent.mkdir(parents=True, exist_ok=True)
            if whole != data:
                path.write_bytes(whole)
            if not lines:
                self._append(head)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"cache {path} is no file of answers: {error}") from None
        except OSError as error:
            raise UserError(f"cache {path} cannot be used: {error}") from None

    def __len__(self) -> int:
        return len(self._found)

    def get(self, kind: str, args: Sequence[Any]) -> Any | None:
        """The answer to a request; None where there is none yet."""
        return self._found.get(_key(kind, args))

    def put(self, kind: str, args: Sequence[Any], answer: Any) -> None:
        """Keeps an answer, a JSON value other than null."""
        self._found[_key(kind, args)] = answer
        self._append({"request": _key(kind, args), "answer": answer})

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def fingerprint(params: Any, *facts: Any) -> str:
    """A hash of every byte of the parameters and of `facts`, by their `repr`."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(facts).encode("utf-8"))
    leaves, structure = jax.tree.flatten(params)
    digest.update(str(structure).encode("utf-8"))
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _key(kind: str, args: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps([kind, *args]).encode("utf-8"), digest_size=16).hexdigest()
