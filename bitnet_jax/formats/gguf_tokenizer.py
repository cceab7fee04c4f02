"""The tokenizer that a GGUF file holds in its metadata, as a tokenizer.json, and the other way round.

Two kinds of `tokenizer.ggml.model` are known, as `src/llama-vocab.cpp` of llama.cpp computes them:

    gpt2    byte-level BPE by `merges`; `tokenizer.ggml.pre` names the pattern that cuts text into pieces first
    llama   SentencePiece BPE by `scores`: of all neighbours whose union is a token, the one with the highest score is joined first;
            what is no token falls back to bytes; spaces are U+2581, and one stands before the text

A tokenizer.json can say more than these. What it says beyond them is refused, not dropped.
"""

import collections
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.errors import UserError
from bitnet_jax.formats.weights import Assets

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LONGEST_PIECE = 256  # characters of a token of SentencePiece; its own limit is 16 unless it is told otherwise
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_PRE = {
    "gpt-2": _byte_level(True),
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _byte_level(True)),
    "llama-bpe": _sequence(_split(_LLAMA3), _byte_level(False)),
    "default": _sequence(*map(_split, (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), _byte_level(False)),
}
"""Pre-tokenizers by the name that llama.cpp gives them."""
_ALIASES = {
    **dict.fromkeys(("olmo", "mpt", "phi-2", "jais"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), "llama-bpe"),
}
_WHOLE_PIECES = "llama-bpe"
"""The one for which a piece that is a token stays whole, whatever the merges say, and to which llama.cpp adds a beginning of text."""

_SAMPLING = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "penalty_repeat"}
"""Names under general.sampling (llama.cpp; the others pass over them)."""


# --- from a file -----------------------------------------------------------------------------------------------------


def read(metadata: dict[str, Any], vocab_size: int, where: str) -> Assets:
    """Tokenizer, template and special tokens of a file's metadata.

    Raises:
        UserError: a kind or pre-tokenizer that is not known, lists that do not fit each other or the vocabulary, ids outside it.
    """
    facts = _Facts(metadata, vocab_size, where)
    model = facts.text("model", "no_vocab")
    if model == "gpt2":
        core, adds_prefix = _byte_level_bpe(facts)
    elif model == "llama":
        core, adds_prefix = _sentencepiece(facts), True
    elif model in ("no_vocab", "none"):
        core, adds_prefix = None, False
    else:
        raise facts.wrong(f"tokenizer.ggml.model={model[:100]!r} is not known: must be gpt2 or llama")
    bos = facts.id("bos", 1 if model == "llama" else None)
    adds = metadata.get("tokenizer.ggml.add_bos_token", adds_prefix and bos is not None)
    if type(adds) is not bool or (adds and bos is None):
        raise facts.wrong("tokenizer.ggml.add_bos_token must be a boolean, with tokenizer.ggml.bos_token_id if it is true")
    stops = [facts.id(name, 2 if (model, name) == ("llama", "eos") else None) for name in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise facts.wrong("tokenizer.chat_template must be text")
    prefix = (bos,) if adds and bos is not None else ()
    if core is not None and prefix:
        core["post_processor"] = _before_text(facts.tokens[prefix[0]], prefix[0])
    return Assets(
        tokenizer=json.dumps(core, ensure_ascii=False) if core else None,
        chat_template=template,
        prefix=prefix,
        stop_tokens=tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
        sampling={name: facts.sampling(key) for name, key in _SAMPLING.items() if f"general.sampling.{key}" in metadata},
    )


class _Facts:
    """What the metadata say about the tokenizer, checked."""

    def __init__(self, metadata: dict[str, Any], vocab_size: int, where: str) -> None:
        self.metadata, self.vocab_size, self.where = metadata, vocab_size, where

    def wrong(self, text: str) -> UserError:
        return UserError(f"{self.where}: {text}")

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def text(self, name: str, default: str) -> str:
        found = self.get(name, default)
        if not isinstance(found, str):
            raise self.wrong(f"tokenizer.ggml.{name} must be text")
        return found

    def id(self, name: str, default: int | None) -> int | None:
        found = self.get(f"{name}_token_id", default)
        if found is not None and (type(found) is not int or not 0 <= found < self.vocab_size):
            raise self.wrong(f"tokenizer.ggml.{name}_token_id={str(found)[:100]!r} must be from 0 to {self.vocab_size - 1}")
        return found

    def sampling(self, key: str) -> float:
        found = self.metadata[f"general.sampling.{key}"]
        if type(found) not in (int, float) or not np.isfinite(found):
            raise self.wrong(f"general.sampling.{key} must be a finite number")
        return found if type(found) is int else float(str(np.float32(found)))

    @functools.cached_property
    def tokens(self) -> list[str]:
        found = self.get("tokens")
        if not isinstance(found, list) or len(found) != self.vocab_size:
            raise self.wrong(f"tokenizer.ggml.tokens must be {self.vocab_size} strings, as many as the embedding has rows")
        if len(set(found)) != len(found):
            twice = next(token for token, count in collections.Counter(found).items() if count > 1)
            raise self.wrong(f"tokenizer.ggml.tokens has {twice[:100]!r} twice")
        return found

    def numbers(self, name: str, kind: str, default: float | None = None) -> np.ndarray:
        found = self.get(name)
        if found is None and default is not None:
            return np.full(self.vocab_size, default)
        if not isinstance(found, np.ndarray) or found.dtype.kind != kind or len(found) != self.vocab_size:
            raise self.wrong(f"tokenizer.ggml.{name} must be {self.vocab_size} numbers, one for each token")
        return found

    @functools.cached_property
    def types(self) -> np.ndarray:
        found = self.numbers("token_type", "i", _NORMAL).astype(np.int64)
        if ((found < _NORMAL) | (found > _BYTE)).any():
            raise self.wrong(f"tokenizer.ggml.token_type holds {found[(found < _NORMAL) | (found > _BYTE)][0]}: must be from 1 to 6")
        return found

    def vocabulary(self) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """The model's vocabulary and the tokens beside it. Unused ones at the end, which only fill the embedding up, are left out."""
        used = np.flatnonzero(self.types != _UNUSED)
        size = int(used[-1]) + 1 if used.size else 0
        beside = np.isin(self.types, (_CONTROL, _USER))
        inside = np.flatnonzero(~beside[:size])
        last = int(inside[-1]) if inside.size else -1
        added = [
            {"id": int(i), "content": self.tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": bool(self.types[i] == _CONTROL)}
            for i in np.flatnonzero(beside[:size])
        ]
        return {self.tokens[i]: i for i in range(last + 1)}, added


def _byte_level_bpe(facts: _Facts) -> tuple[dict[str, Any], bool]:
    """The tokenizer.json, and whether a beginning of text is added where the file does not say."""
    name = facts.text("pre", "default")
    name = _ALIASES.get(name, name)
    if name not in _PRE:
        raise facts.wrong(f"tokenizer.ggml.pre={name[:100]!r} is not known: must be one of {', '.join((*_PRE, *_ALIASES))}")
    if facts.get("add_space_prefix", False) is not False:
        raise facts.wrong("tokenizer.ggml.add_space_prefix must be false for a byte-level tokenizer")
    merges = facts.get("merges")
    if not isinstance(merges, list):
        raise facts.wrong("tokenizer.ggml.merges must be strings")
    vocab, added = facts.vocabulary()
    pairs = [merge.split(" ") for merge in merges]
    for number, pair in enumerate(pairs):
        if len(pair) != 2 or pair[0] not in vocab or pair[1] not in vocab or pair[0] + pair[1] not in vocab:
            raise facts.wrong(f"merge {number} is {merges[number][:100]!r}: must be two tokens whose union is one")
    return _tokenizer(vocab, added, pairs, None, _PRE[name], _byte_level(True), ignore_merges=name == _WHOLE_PIECES), name == _WHOLE_PIECES


def _sentencepiece(facts: _Facts) -> dict[str, Any]:
    if facts.get("precompiled_charsmap") is not None or facts.get("remove_extra_whitespaces", False) is not False:
        raise facts.wrong("its tokenizer rewrites text before it cuts it (precompiled_charsmap, remove_extra_whitespaces): it is not read")
    scores = facts.numbers("scores", "f")
    if not np.isfinite(scores).all():
        raise facts.wrong("tokenizer.ggml.scores holds NaN or infinity")
    vocab, added = facts.vocabulary()
    longest = max(map(len, facts.tokens))
    if longest > _LONGEST_PIECE:  # the ways to cut a token in two are looked through, for all tokens
        raise facts.wrong(f"tokenizer.ggml.tokens has a token of {longest} characters: must be at most {_LONGEST_PIECE} for SentencePiece")
    if any(byte not in vocab for byte in _BYTES):
        raise facts.wrong(f"tokenizer.ggml.tokens lacks {next(byte for byte in _BYTES if byte not in vocab)}: must have all 256 bytes")
    unknown = facts.tokens[facts.id("unknown", 0) or 0]
    ranked = {token: float(scores[i]) for token, i in vocab.items() if facts.types[i] == _NORMAL}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    normalizers, decoders = [replace], [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if facts.get("add_space_prefix", True) is True:
        normalizers = [{"type": "Prepend", "prepend": _SPACE}, replace]
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    core = _tokenizer(vocab, added, _merges(ranked, vocab), {"type": "Sequence", "normalizers": normalizers}, None, {})
    core["model"] |= {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    return core | {"decoder": {"type": "Sequence", "decoders": decoders}}


def _merges(scores: dict[str, float], vocab: dict[str, int]) -> list[list[str]]:
    """All ways to make a token of two, the highest score first: the order in which SentencePiece joins."""
    found = []
    for token in scores:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in scores and token[i:] in scores]
        found += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return [list(pair) for pair in sorted(found, key=lambda pair: -scores[pair[0] + pair[1]])]


def _tokenizer(vocab: Any, added: Any, merges: Any, normalizer: Any, pre: Any, decoder: Any, ignore_merges: bool = False) -> dict[str, Any]:
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges}
    rest = {"normalizer": normalizer, "pre_tokenizer": pre, "post_processor": None, "decoder": decoder, "model": model}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **rest}


def _before_text(token: str, bos: int) -> dict[str, Any]:
    special, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    known = {token: {"id": token, "ids": [bos], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [special, text], "pair": [special, text, other], "special_tokens": known}


# --- to a file -------------------------------------------------------------------------------------------------------


def write(assets: Assets, vocab_size: int) -> dict[str, Any]:
    """The metadata for a tokenizer, template and special tokens, for a vocabulary of `vocab_size`; what the tokenizer lacks is filled up.

    Raises:
        UserError: they are not of the two kinds that GGUF knows, or do more than it can say.
    """
    if len(assets.prefix) > 1 or len(assets.stop_tokens) > 3:
        ids = f"prefix={list(assets.prefix)}, stop_tokens={list(assets.stop_tokens)}"
        raise UserError(f"{ids}: GGUF has place for one token before a text, and for three that end it")
    found: dict[str, Any] = {"tokenizer.ggml.model": "no_vocab"}
    if assets.tokenizer is not None:
        found = _vocabulary(json.loads(assets.tokenizer), vocab_size)
        eos = Tokenizer.from_json(assets.tokenizer).eos_id
    else:
        eos = None
    stops = assets.stop_tokens or (() if eos is None else (eos,))
    found |= {f"tokenizer.ggml.{name}_token_id": stop for name, stop in zip(("eos", "eot", "eom"), stops, strict=False)}
    found |= {"tokenizer.ggml.bos_token_id": assets.prefix[0]} if assets.prefix else {}
    found["tokenizer.ggml.add_bos_token"] = bool(assets.prefix)
    if assets.chat_template is not None:
        found["tokenizer.chat_template"] = assets.chat_template
    return found | {f"general.sampling.{_SAMPLING[name]}": value for name, value in assets.sampling.items()}


def _vocabulary(core: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model = core["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"the tokenizer's model is {model['type']}: GGUF has place for plain BPE only")
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size

    def put(token: str, i: int, kind: int) -> None:
        if i >= vocab_size:
            raise UserError(f"the tokenizer has token {token!r} with id {i}: must be below the vocabulary's size {vocab_size}")
        tokens[i], types[i] = token, kind

    for token, i in model["vocab"].items():
        put(token, i, _NORMAL)
    for entry in core["added_tokens"]:
        if entry["lstrip"] or entry["rstrip"] or entry["single_word"]:
            raise UserError(f"token {entry['content']!r} takes spaces beside it (lstrip, rstrip, single_word): GGUF has no place for that")
        put(entry["content"], entry["id"], _CONTROL if entry["special"] else _USER)
    if model.get("byte_fallback"):
        return _as_sentencepiece(core, tokens, types)
    pre = next((name for name, steps in _PRE.items() if _same(core["pre_tokenizer"], steps)), None)
    if (
        pre is None
        or core["normalizer"]
        or core["decoder"]["type"] != "ByteLevel"
        or bool(model["ignore_merges"]) != (pre == _WHOLE_PIECES)
    ):
        raise UserError(f"the tokenizer cuts text in a way that GGUF has no name for: must be as one of {', '.join(_PRE)}")
    found = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": [" ".join(pair) for pair in _pairs(model)]}
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}


def _as_sentencepiece(core: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    model = core["model"]
    steps = (core["normalizer"] or {}).get("normalizers") or [core["normalizer"]]
    kinds = [(step or {}).get("type") for step in steps]
    if core["pre_tokenizer"] or kinds not in (["Prepend", "Replace"], ["Replace"]) or steps[-1]["content"] != _SPACE:
        raise UserError("the tokenizer falls back to bytes but does not treat spaces as SentencePiece does: GGUF has no place for that")
    for i, token in enumerate(tokens):
        if types[i] == _NORMAL and token in _BYTES:
            types[i] = _BYTE
        elif token == model["unk_token"]:
            types[i] = _UNKNOWN
    vocab = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    pairs = _pairs(model)
    ranks: dict[str, float] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), float(-rank))
    scores = {token: ranks.get(token, float(-len(pairs))) for token in vocab}
    if _merges(scores, vocab) != pairs:
        raise UserError("the tokenizer's merges do not follow from scores of its tokens: GGUF has no place for them")
    found = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [scores.get(token, 0.0) for token in tokens],
        "token_type": types,
    }
    found |= {"add_space_prefix": kinds[0] == "Prepend", "unknown_token_id": tokens.index(model["unk_token"])}
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}


def _pairs(model: dict[str, Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def _same(found: Any, steps: dict[str, Any]) -> bool:
    """Whether two pre-tokenizers cut alike: all but the offsets, which no program here uses."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: bare(part) for name, part in value.items() if name != "trim_offsets"}
        return [bare(part) for part in value] if isinstance(value, Sequence) and not isinstance(value, str) else value

    return bare(found) == bare(steps)
