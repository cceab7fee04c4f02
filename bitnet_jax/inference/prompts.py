"""Prompts as one padded array, in a few lengths only, so that not every length compiles a program of its own."""

from collections.abc import Callable, Sequence

import numpy as np

from bitnet_jax.config import ModelConfig
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.errors import UserError

Prompt = str | Sequence[int] | np.ndarray
"""Text, which needs a tokenizer, or token ids."""


def encode(
    prompts: Sequence[Prompt], config: ModelConfig, tokenizer: Tokenizer | None, max_new_tokens: int, prefix: Sequence[int] = ()
) -> list[np.ndarray]:
    """The token ids of each prompt, int32 [tokens].

    `prefix` is put before every prompt that is text; ids stay as they are. A prompt that is empty even so is the tokenizer's beginning
    of text, or its end of text where it has no beginning: what stands before the texts that a model is trained on.

    Raises:
        UserError: there is no prompt, one is text or empty without a tokenizer that could help, holds an id outside the vocabulary, or
            is too long for the model together with the new tokens.
    """
    if isinstance(prompts, str):
        raise UserError(f"prompts={prompts!r} must be a list of prompts")
    if len(prompts) == 0:
        raise UserError("prompts is empty: must have at least one prompt")
    found = [_ids(prompt, f"prompt {number}", config.vocab_size, tokenizer, prefix) for number, prompt in enumerate(prompts)]
    for number, ids in enumerate(found):
        total = len(ids) + max_new_tokens
        if total > config.max_seq_len:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens, with max_new_tokens={max_new_tokens} {total}: "
                f"must be at most max_seq_len={config.max_seq_len}"
            )
    return found


def _ids(prompt: Prompt, name: str, vocab_size: int, tokenizer: Tokenizer | None, prefix: Sequence[int]) -> np.ndarray:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError(f"{name} is text: without a tokenizer it must be token ids")
        ids = np.concatenate([np.array(prefix, np.int64), tokenizer.encode(prompt)])
    else:
        ids = np.asarray(prompt)
        if ids.size == 0:
            ids = ids.reshape(-1).astype(np.int32)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"{name} is {ids.dtype}{list(ids.shape)}: must be text, or token ids in one dimension")
    if ids.size == 0:
        start = None if tokenizer is None else tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if start is None:
            raise UserError(f"{name} is empty: must have at least one token, for no tokenizer says what a text begins with")
        ids = np.array([start], np.int32)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise UserError(f"{name} holds token {wrong[0]}: must be from 0 to {vocab_size - 1}")
    return ids.astype(np.int32)


def bucket(size: int) -> int:
    """The smallest of 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, … that is not below `size`: four to every doubling from 64 on."""
    step = max(16, 1 << max(size - 1, 1).bit_length() >> 3)
    return -(-size // step) * step


def coarse(size: int) -> int:
    """The smallest power of two that is not below `size`, and at least 64: for prompts that grow, as in a conversation."""
    return max(64, 1 << max(size - 1, 1).bit_length())


def pad(prompts: Sequence[np.ndarray], sizes: Callable[[int], int] = bucket) -> tuple[np.ndarray, np.ndarray]:
    """The prompts padded on the right to one of `sizes`, int32 [B, T], and their lengths, int32 [B]."""
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    padded = np.zeros((len(prompts), sizes(int(lengths.max()))), np.int32)
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = ids
    return padded, lengths
