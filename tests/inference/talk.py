"""For tests of conversations: a tokenizer with LLaMA-3's special tokens, and replies that need no model."""

import functools
from collections.abc import Iterator
from typing import Any

import tokenizers

from bitnet_jax.data.tokenizers import Tokenizer, train_bpe
from bitnet_jax.inference import Finish, Piece

TEXT = "User: Hi there. Assistant: Hello! How are you? System: You are kind. say it, and then stop.\n" * 5
BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


@functools.cache
def llama_like() -> Tokenizer:
    """A byte-level BPE of 300 tokens, of which 0 ends a text, and two more: 300 begins a text, 301 ends a turn."""
    core = tokenizers.Tokenizer.from_str(train_bpe([TEXT], 300).to_json().replace("<|endoftext|>", EOS))
    core.add_special_tokens([BOS, EOT])
    return Tokenizer(core.to_str())


class Canned:
    """In place of `stream`: keeps what it is asked for, and every reply is "so", one character at a time."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, prompts: Any, **options: Any) -> Iterator[Piece]:
        self.prompts.append(list(prompts[0]))
        self.options.append(options)
        return iter([Piece(row=0, token=1, text="s", finish=None), Piece(row=0, token=2, text="o", finish=Finish.LENGTH)])
