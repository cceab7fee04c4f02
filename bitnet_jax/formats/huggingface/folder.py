"""The files of a checkpoint's folder: found, held inside it, and never larger than they may be."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.errors import UserError
from bitnet_jax.formats import safetensors

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON_BYTES = 1 << 20
"""Largest JSON file but the tokenizer and the index."""
INDEX_BYTES, TOKENIZER_BYTES = 1 << 24, 1 << 26
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_SHARDS = 10_000
_BUFFER = re.compile(r"model\.(layers\.\d{1,5}\.self_attn\.)?rotary_emb\.inv_freq")
"""Frequencies of the rotary embedding, which old checkpoints hold though they follow from the configuration."""


class Folder:
    """A folder and what may be read of it: its own files, and those that links of a hub cache's folder lead to in that cache.

    The cache keeps `snapshots/<revision>/<file>` as links to `blobs/<hash>` beside `snapshots`.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError where `path` is no folder."""
        self.path = path
        try:
            if not path.is_dir():
                raise UserError(f"{path} is no folder")
            root = path.resolve()
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read: {error}") from None
        cache = root.parent.parent
        self._root = cache if root.parent.name == "snapshots" and (cache / "blobs").is_dir() else root

    def file(self, name: str) -> Path | None:
        """The file `name`, or None where there is none. Raises UserError where a link leads out of the folder."""
        path = self.path / name
        try:
            if not path.exists():
                if path.is_symlink():
                    raise UserError(f"{path} is a link to nothing")
                return None
            inside = path.resolve().is_relative_to(self._root)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if not inside:
            raise UserError(f"{path} is a link that leaves the folder")
        return path

    def text(self, name: str, limit: int = JSON_BYTES) -> str | None:
        """The text of a file of at most `limit` bytes, or None where there is none. Raises UserError where it is larger or no UTF-8."""
        path = self.file(name)
        if path is None:
            return None
        try:
            if not path.is_file():
                raise UserError(f"{path} is no plain file")
            with open(path, "rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if len(data) > limit:
            raise UserError(f"{path} must be at most {limit} bytes")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from None

    def json(self, name: str, limit: int = JSON_BYTES) -> dict[str, Any] | None:
        """The object in a JSON file, or None where there is no such file. Raises UserError where it is anything else."""
        text = self.text(name, limit)
        if text is None:
            return None
        try:
            value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path / name} is not JSON: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(value, dict):
            raise UserError(f"{self.path / name} must hold an object")
        return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


class Tensors:
    """The tensors of a checkpoint, of one file or several.

    Attributes:
        info: type, shape and place of each, without the rotary frequencies.
    """

    def __init__(self, folder: Folder) -> None:
        """Checks names and headers; no tensor is looked at.

        Raises:
            UserError: there is none but pickled weights; a file is damaged; the index and its files disagree, or it names a file that is
                not in the folder.
        """
        self.where = str(folder.path)
        single, index = folder.file(SINGLE), folder.file(INDEX)
        if single is not None:  # transformers prefers it too
            files = [safetensors.File(single)]
        elif index is not None:
            files = self._shards(folder)
        else:
            raise UserError(f"{folder.path} has {_pickles(folder.path)}: must have {SINGLE} or {INDEX}")
        self._files = files
        self._place = {name: file for file in files for name in file.tensors}
        self.info = {name: file.tensors[name] for name, file in self._place.items() if not _BUFFER.fullmatch(name)}

    def _shards(self, folder: Folder) -> list[safetensors.File]:
        where = folder.path / INDEX
        places = (folder.json(INDEX, INDEX_BYTES) or {}).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{where}: weight_map must be an object that names a file for each tensor")
        named: dict[str, set[str]] = {}
        for tensor, name in places.items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors", name):
                raise UserError(f"{where}: file {str(name)[:80]!r} must be the name of a .safetensors file in the folder")
            named.setdefault(name, set()).add(tensor)
        if len(named) > _MAX_SHARDS:
            raise UserError(f"{where} names {len(named)} files: must be at most {_MAX_SHARDS}")
        files = []
        for name in sorted(named):
            path = folder.file(name)
            if path is None:
                raise UserError(f"{folder.path / name} does not exist, but {INDEX} names it")
            file = safetensors.File(path)
            for tensor in sorted(named[name] ^ file.tensors.keys()):
                told = "holds" if tensor in file.tensors else "lacks"
                other = "does not place it there" if tensor in file.tensors else "places it there"
                raise UserError(f"{path} {told} tensor {tensor[:80]}, but {INDEX} {other}")
            files.append(file)
        return files

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, mapped; its values are not checked."""
        return self._place[name].read(name)

    def release(self) -> None:
        """Gives back the memory that reading has taken."""
        for file in self._files:
            file.release()


def _pickles(path: Path) -> str:
    found = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    return f"weights only as pickles ({found[0]}), which are never opened" if found else "no weights"
