"""Prompts become one padded array in few lengths, or an error that names the rule."""

import numpy as np
import pytest

from bitnet_jax.data import Tokenizer, byte_tokenizer
from bitnet_jax.errors import UserError
from bitnet_jax.inference import prompts
from tests.shapes import tiny

CONFIG = tiny(vocab_size=257)


def test_buckets_hold_the_size_waste_at_most_a_quarter_and_are_few():
    sizes = [prompts.bucket(size) for size in range(1, 4097)]
    assert all(bucket >= size for size, bucket in enumerate(sizes, 1))
    assert all(bucket * 4 <= size * 5 for size, bucket in enumerate(sizes, 1) if size > 64)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 28
    assert {64, 80, 128, 160, 4096} <= set(sizes)


def test_coarse_sizes_are_powers_of_two_from_64_on():
    assert [prompts.coarse(size) for size in (1, 64, 65, 128, 129, 4096, 4097)] == [64, 64, 128, 128, 256, 4096, 8192]
    assert prompts.pad([np.arange(65, dtype=np.int32)], prompts.coarse)[0].shape == (1, 128)


def test_prompts_are_padded_on_the_right():
    padded, lengths = prompts.pad([np.array([5, 6], np.int32), np.arange(1, 21, dtype=np.int32)])
    assert padded.shape == (2, 32)
    assert lengths.tolist() == [2, 20]
    assert padded[0].tolist() == [5, 6] + [0] * 30
    assert padded[1, :20].tolist() == list(range(1, 21))


def test_text_and_ids_are_prompts():
    tokenizer = byte_tokenizer()
    found = prompts.encode(["ab", [1, 2], np.array([3], np.uint16)], CONFIG, tokenizer, 4)
    assert [ids.tolist() for ids in found] == [[97, 98], [1, 2], [3]]
    assert all(ids.dtype == np.int32 for ids in found)


def test_the_prefix_stands_before_text_and_not_before_ids():
    found = prompts.encode(["ab", [1, 2], ""], CONFIG, byte_tokenizer(), 4, prefix=(256, 5))
    assert [ids.tolist() for ids in found] == [[256, 5, 97, 98], [1, 2], [256, 5]]
    assert all(ids.dtype == np.int32 for ids in found)
    with pytest.raises(UserError, match="prompt 0 holds token 257"):
        prompts.encode(["ab"], CONFIG, byte_tokenizer(), 4, prefix=(257,))
    with pytest.raises(UserError, match="prompt 0 has 61 tokens"):
        prompts.encode(["a" * 60], CONFIG, byte_tokenizer(), 4, prefix=(256,))


def test_an_empty_prompt_is_what_texts_begin_with():
    tokenizer = byte_tokenizer()
    assert prompts.encode(["", []], CONFIG, tokenizer, 4)[1].tolist() == [256]
    definition = tokenizer.to_json().replace("<|endoftext|>", "<s>")
    assert prompts.encode([""], CONFIG, Tokenizer(definition), 4)[0].tolist() == [256]
    with pytest.raises(UserError, match="prompt 1 is empty"):
        prompts.encode([[1], []], CONFIG, None, 4)
    with pytest.raises(UserError, match="prompt 0 is empty"):
        prompts.encode([""], CONFIG, Tokenizer(tokenizer.to_json().replace("<|endoftext|>", "nothing")), 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "prompts is empty"),
        ("text", "'text' must be a list"),
        (["text"], "prompt 0 is text: without a tokenizer"),
        ([[1], [257]], "prompt 1 holds token 257: must be from 0 to 256"),
        ([[-1]], "prompt 0 holds token -1"),
        ([[0.5]], "prompt 0 is float64"),
        ([[[1]]], r"prompt 0 is int64\[1, 1\]"),
        ([[1], [1] * 61], "prompt 1 has 61 tokens, with max_new_tokens=4 65: must be at most max_seq_len=64"),
    ],
)
def test_wrong_prompts_are_named(given, message):
    with pytest.raises(UserError, match=message):
        prompts.encode(given, CONFIG, None, 4)
    prompts.encode([[1] * 60], CONFIG, None, 4)
