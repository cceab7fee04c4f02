"""Tokenizer, chat template and generation defaults, as the files beside the weights say them."""

import json
from typing import Any

import tokenizers
from tokenizers import processors

from bitnet_jax.config import ModelConfig
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.errors import UserError
from bitnet_jax.formats.huggingface.folder import TOKENIZER_BYTES, Folder
from bitnet_jax.formats.weights import SAMPLING, Assets, assets_from_json

TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
CHAT_TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"

_BOUNDS = {"temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "repetition_penalty": (0.0, 100.0), "top_k": (0, 1 << 31)}
"""Above the first, and at most the second."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Folder, fields: dict[str, Any], config: ModelConfig) -> Assets:
    """What the files beside config.json, whose fields are `fields`, say about text and generation.

    The prefix is what the tokenizer itself puts before a text, or the beginning of text where tokenizer_config.json asks for it. Stop
    tokens are those of generation_config.json or else config.json, and the tokenizer's end of text.

    Raises:
        UserError: a file is damaged or too large, an id is outside the vocabulary, a number is out of bounds.
    """
    text = folder.text(TOKENIZER, TOKENIZER_BYTES)
    where = str(folder.path / TOKENIZER)
    named = folder.json(TOKENIZER_CONFIG) or {}
    generation = folder.json(GENERATION) or {}
    prefix: list[int] = []
    stop = _ids(generation.get("eos_token_id", fields.get("eos_token_id")))
    if text is not None:
        tokenizer = tokenizers.Tokenizer.from_str(Tokenizer(text, where).to_json())
        prefix = _own_prefix(tokenizer)
        if not prefix and named.get("add_bos_token") is True:
            begin = _token(tokenizer, named.get("bos_token"))
            prefix = [begin] if begin is not None else _ids(fields.get("bos_token_id"))
            if not prefix:
                raise UserError(f"{folder.path / TOKENIZER_CONFIG}: add_bos_token is true, but no bos_token is in the vocabulary")
        end = _token(tokenizer, named.get("eos_token"))
        stop += [end] if end is not None and end not in stop else []
    values = {"chat_template": _template(folder, named), "prefix": prefix, "stop_tokens": stop, "sampling": _sampling(folder, generation)}
    return assets_from_json(values, config, text, str(folder.path))


def _own_prefix(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """Ids of the special tokens that the tokenizer puts before any text."""
    found = tokenizer.encode("a", add_special_tokens=True)
    # A vocabulary without the letter leaves nothing but special tokens, and the text between them cannot be told.
    plain = found.special_tokens_mask.index(0) if 0 in found.special_tokens_mask else 0
    return found.ids[:plain]


def _token(tokenizer: tokenizers.Tokenizer, value: Any) -> int | None:
    text = value.get("content") if isinstance(value, dict) else value
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _ids(value: Any) -> list[Any]:
    """One id or several as a list, which `assets_from_json` checks."""
    return [] if value is None else [*value] if isinstance(value, list) else [value]


def _template(folder: Folder, named: dict[str, Any]) -> str | None:
    text = folder.text(CHAT_TEMPLATE)
    if text is not None:
        return text
    found = named.get("chat_template")
    if isinstance(found, list):  # several, each with a name
        found = next((entry.get("template") for entry in found if isinstance(entry, dict) and entry.get("name") == "default"), None)
    return found


def _sampling(folder: Folder, generation: dict[str, Any]) -> dict[str, float]:
    """Settings of a generation that samples; one that does not has none."""
    if generation.get("do_sample") is not True:
        return {}
    found: dict[str, float] = {}
    for name in SAMPLING:
        value = generation.get(name)
        if value is None or (name == "top_k" and value == 0):
            continue
        low, high = _BOUNDS[name]
        if type(value) not in (int, float) or not low < value <= high or (name == "top_k" and type(value) is not int):
            raise UserError(f"{folder.path / GENERATION}: {name}={str(value)[:40]} must be a number above {low} and at most {high}")
        found[name] = value
    return found


# --- writing ---------------------------------------------------------------------------------------------------------


def end_of_text(assets: Assets) -> int | list[int] | None:
    """`eos_token_id`: one id, several, or none."""
    stop = list(assets.stop_tokens)
    return stop[0] if len(stop) == 1 else stop or None


def files(assets: Assets, config: ModelConfig) -> dict[str, str]:
    """Text of each file, by name.

    Raises:
        UserError: an id of the prefix or the stop tokens is none of the tokenizer's.
    """
    generation: dict[str, Any] = {
        "bos_token_id": assets.prefix[0] if assets.prefix else None,
        "eos_token_id": end_of_text(assets),
        "do_sample": bool(assets.sampling),
        **assets.sampling,
    }
    found = {GENERATION: _json({name: value for name, value in generation.items() if value is not None})}
    if assets.tokenizer is None:
        return found
    tokenizer = Tokenizer(assets.tokenizer)
    core = tokenizers.Tokenizer.from_str(tokenizer.to_json())

    def name(token: int | None) -> str | None:
        text = None if token is None else core.id_to_token(token)
        if token is not None and text is None:
            raise UserError(f"token {token} begins or ends a text, but the tokenizer has none of that id")
        return text

    prefix = [name(token) for token in assets.prefix]
    special = {
        "bos_token": prefix[0] if prefix else name(tokenizer.bos_id),
        "eos_token": name(assets.stop_tokens[0] if assets.stop_tokens else tokenizer.eos_id),
    }
    special = {key: text for key, text in special.items() if text is not None}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if assets.chat_template is not None:
        settings["chat_template"] = found[CHAT_TEMPLATE] = assets.chat_template
    found |= {TOKENIZER: assets.tokenizer, TOKENIZER_CONFIG: _json(settings), SPECIAL_TOKENS: _json(special)}
    if tuple(_own_prefix(core)) != assets.prefix:
        pieces = [(text, token) for text, token in zip(prefix, assets.prefix, strict=True) if text is not None]
        core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=[text for text, _ in pieces] + ["$A"], special_tokens=list(dict.fromkeys(pieces))
        )
        found[TOKENIZER] = core.to_str()
    return found


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
