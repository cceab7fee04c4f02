"""Hugging Face data sets by name. Needs the extra 'datasets' and, the first time, the network.

A data set is streamed once, up to `MAX_BYTES` of text, and kept in the cache folder: later runs read the same bytes without the
network, even where the data set changed meanwhile (remove the folder to fetch it anew). What was taken, and whether the limit cut
it off, stands in the corpus's provenance.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bitnet_jax.data import stored_text
from bitnet_jax.data.cache import Progress, silent
from bitnet_jax.data.corpora import Corpus, text_of
from bitnet_jax.errors import UserError

MAX_BYTES = 1 << 30
"""UTF-8 bytes of text taken from a data set: the documents up to the one that reaches this many."""


def open_dataset(source: str, text_field: str, cache_root: Path, progress: Progress = silent, max_bytes: int = MAX_BYTES) -> Corpus:
    """The split 'train' of the data set that `source` = 'hf:NAME' or 'hf:NAME:CONFIG' names.

    Raises:
        UserError: the name has another form, the package `datasets` is missing, the data set cannot be read or lacks the text field.
        RunError: no space left on the disk.
    """
    name, _, config = source.removeprefix("hf:").partition(":")
    if not name:
        raise UserError(f"source={source!r} must be 'hf:NAME' or 'hf:NAME:CONFIG'")
    key = hashlib.sha256(repr((name, config, text_field, max_bytes)).encode("utf-8")).hexdigest()[:12]
    folder = cache_root / "corpora" / f"hf-{key}"
    corpus = stored_text.read(folder, source)
    if corpus is None:
        records = _stream(source, name, config or None)
        facts: dict[str, Any] = {
            "source": source,
            "split": "train",
            "text_field": text_field,
            "limit_bytes": max_bytes,
            "licence": "the data set's own",
        }
        stored_text.write(folder, _documents(source, records, text_field, max_bytes, facts, progress), facts)
        corpus = stored_text.just_written(folder, source)
    return corpus


def _stream(source: str, name: str, config: str | None) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"source={source!r} needs the package datasets: pip install 'bitnet-jax[datasets]'") from None
    try:
        return datasets.load_dataset(name, config, split="train", streaming=True)
    except Exception as error:  # noqa: BLE001 (the package passes on the errors of every library that it reads with)
        raise _unreadable(source, error) from None


def _documents(
    source: str, records: Iterable[Any], text_field: str, max_bytes: int, facts: dict[str, Any], progress: Progress
) -> Iterator[tuple[str, str]]:
    """Name and text of each document. Sets `limit_reached` of `facts`."""
    taken = 0
    facts["limit_reached"] = False
    rows = enumerate(records)
    while True:
        try:
            number, record = next(rows)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 (as above)
            raise _unreadable(source, error) from None
        if taken >= max_bytes:
            facts["limit_reached"] = True
            return
        text = text_of(record, text_field, f"{source}, record {number}")
        taken += len(text.encode("utf-8"))
        progress("download", taken, max_bytes)
        yield str(number), text


def _unreadable(source: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"source={source!r} cannot be read: {reason}")
