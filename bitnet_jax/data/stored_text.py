"""Text that was fetched once and is kept in the cache folder: one UTF-8 file, and a manifest that says what it is.

<folder>/text.txt        the documents, one after the other, nothing between them
<folder>/manifest.json   facts (package, version, licence, …), sha256 and bytes of the text, and the bytes of each document
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bitnet_jax.data import cache
from bitnet_jax.data.corpora import Corpus, Piece, cut, reading
from bitnet_jax.errors import RunError

logger = logging.getLogger(__name__)


def write(folder: Path, documents: Iterable[tuple[str, str]], facts: dict[str, Any], expected_sha256: str | None = None) -> None:
    """Writes `documents` (name, text) and their manifest into the new folder `folder`, whole or not at all.

    Raises:
        RunError: the disk is full, or the text does not have the sha256 that was expected.
        UserError: the folder may not be written to.
    """
    sha256, rows = hashlib.sha256(), []
    with cache.new_folder(folder) as temporary:
        with cache.writing(folder), (temporary / "text.txt").open("wb") as file:
            for name, text in documents:
                data = text.encode("utf-8")
                sha256.update(data)
                rows.append({"name": name, "bytes": len(data)})
                file.write(data)
        if expected_sha256 not in (None, sha256.hexdigest()):
            raise RunError(f"{folder.name}: the text has sha256 {sha256.hexdigest()} and not {expected_sha256} as it should")
        manifest = facts | {"sha256": sha256.hexdigest(), "bytes": sum(row["bytes"] for row in rows), "documents": rows}
        cache.write_file(temporary / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def read(folder: Path, name: str, expected_sha256: str | None = None) -> Corpus | None:
    """The corpus kept in `folder`; None where there is none. A damaged one is logged and removed."""
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        with (folder / "text.txt").open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        sizes = [row["bytes"] for row in manifest["documents"]]
        sound = sha256 == (expected_sha256 or manifest["sha256"]) and sum(sizes) == (folder / "text.txt").stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        sound, manifest, sizes = False, {}, []
    if not sound:
        logger.warning("%s is damaged and is made again", folder)
        cache.discard(folder)
        return None
    facts = {key: value for key, value in manifest.items() if key != "documents"}
    return Corpus(name=name, read=lambda: _pieces(folder / "text.txt", sizes), total_bytes=sum(sizes), provenance=facts)


def just_written(folder: Path, name: str, expected_sha256: str | None = None) -> Corpus:
    """`read` of a folder that must be sound.

    Raises:
        RunError: it is not.
    """
    corpus = read(folder, name, expected_sha256)
    if corpus is None:
        raise RunError(f"{folder} is damaged though it was just written")
    return corpus


def _pieces(path: Path, sizes: list[int]) -> Iterator[Piece]:
    with reading(path) as file:
        for size in sizes:
            yield from cut([file.read(size).decode("utf-8")])
