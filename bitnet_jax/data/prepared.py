"""From a `DataConfig` to tokens: the one entry point of training and evaluation."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers as tokenizers_package

from bitnet_jax.config import DataConfig
from bitnet_jax.data import cache, splits, tokens
from bitnet_jax.data.cache import Progress, silent
from bitnet_jax.data.corpora import Corpus, open_corpus, open_files
from bitnet_jax.data.splits import Part, Split
from bitnet_jax.data.tokenizers import Tokenizer, byte_tokenizer, train_bpe
from bitnet_jax.data.tokens import TokenArray
from bitnet_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A corpus that is ready for training."""

    train: TokenArray
    validation: TokenArray
    """The held-out text."""
    tokenizer: Tokenizer
    provenance: dict[str, Any]
    """Where the text comes from, its sha256 and sizes, as plain JSON values: for a run's records."""


def prepare(config: DataConfig, *, vocab_size: int, tokenizer: Tokenizer | None = None, progress: Progress = silent) -> Prepared:
    """Reads, splits and tokenises the corpus that `config` names, or finds it in the cache.

    The same text and configuration give the same tokens.

    `vocab_size` is the model's. A run that is resumed passes its own `tokenizer`, which then takes the place of `config.tokenizer`.

    Raises:
        UserError: the source is missing, empty, binary or otherwise unfit; the vocabulary is larger than the model's; the text is too
            short.
        RunError: no space left on the disk.
    """
    folder = cache.cache_folder(config.cache_dir)
    if tokenizer is None and config.tokenizer != "bpe":
        tokenizer = byte_tokenizer() if config.tokenizer == "bytes" else Tokenizer.read(Path(config.tokenizer).expanduser())
    if tokenizer is not None:
        check_vocabulary(tokenizer, vocab_size)
    corpus = open_corpus(config.source, text_field=config.text_field, cache=folder, progress=progress)
    split = splits.split(splits.scan(corpus, progress), config.validation_fraction)
    if tokenizer is None:
        tokenizer = _trained_bpe(corpus, split, vocab_size, folder, progress)
    found = tokens.tokenise(corpus, tokenizer, split, folder, progress)
    for part, array in found.items():
        if len(array) < config.seq_len + 1:
            raise UserError(
                f"source={config.source!r}: the {part.value} part has {len(array)} tokens, but must have at least {config.seq_len + 1}"
                f" (one window: seq_len={config.seq_len} and one more)"
            )
    return Prepared(
        train=found[Part.TRAIN],
        validation=found[Part.VALIDATION],
        tokenizer=tokenizer,
        provenance=_provenance(corpus, split, tokenizer, found),
    )


def read_tokens(
    source: str, tokenizer: Tokenizer, *, text_field: str = "text", cache_dir: str | None = None, progress: Progress = silent
) -> TokenArray:
    """All tokens of the file, folder or glob `source`, nothing held out: for evaluation. Kept in the cache as well.

    Raises:
        UserError: the source is missing, empty, binary or otherwise unfit.
        RunError: no space left on the disk.
    """
    corpus = open_files(source, text_field)
    whole = splits.split(splits.scan(corpus, progress), 0)
    return tokens.tokenise(corpus, tokenizer, whole, cache.cache_folder(cache_dir), progress)[Part.TRAIN]


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises UserError where the tokenizer has more ids than the model has rows for. Fewer are fine: the other rows are never used."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size={vocab_size}: must be at least as large")


def _trained_bpe(corpus: Corpus, split: Split, vocab_size: int, folder: Path, progress: Progress) -> Tokenizer:
    """The BPE of the training part, from the cache or newly trained."""
    parts = [tokens.FORMAT_VERSION, split.scan.fingerprint, split.fraction, vocab_size, tokenizers_package.__version__]
    path = folder / "tokenizers" / f"{hashlib.sha256(json.dumps(parts).encode('utf-8')).hexdigest()[:32]}.json"
    if path.is_file():
        try:
            return Tokenizer.read(path)
        except UserError:
            tokens.logger.warning("%s is damaged and is made again", path)
    done = 0

    def texts():
        nonlocal done
        for part, piece in splits.parts(corpus, split):
            done += len(piece.text.encode("utf-8"))
            progress("train tokenizer", done, split.scan.total_bytes)
            if part is Part.TRAIN:
                yield piece.text

    tokenizer = train_bpe(texts(), vocab_size)
    cache.write_file(path, tokenizer.to_json())
    return tokenizer


def _provenance(corpus: Corpus, split: Split, tokenizer: Tokenizer, found: dict[Part, TokenArray]) -> dict[str, Any]:
    sizes = {part.value: {"tokens": len(array), "bytes": array.text_bytes, "documents": array.documents} for part, array in found.items()}
    return {
        "corpus": corpus.provenance
        | {"name": corpus.name, "fingerprint": split.scan.fingerprint, "bytes": split.scan.total_bytes, "documents": len(split.scan.sizes)},
        "parts": sizes,
        "validation_fraction": split.fraction,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": hashlib.sha256(tokenizer.to_json().encode("utf-8")).hexdigest()},
        "dtype": found[Part.TRAIN].ids.dtype.name,
    }
