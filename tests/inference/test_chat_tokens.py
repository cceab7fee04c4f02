"""What is typed stays text, and everything else is encoded as the tokenizer encodes it."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers

from bitnet_jax.data.tokenizers import Tokenizer, train_bpe
from bitnet_jax.inference.chat_tokens import ChatTokens
from tests.inference.talk import BOS, EOS, EOT, TEXT, llama_like

TOKENIZER = llama_like()
CHAT = ChatTokens(TOKENIZER)
FRAGMENTS = [BOS, EOS, EOT, "<", "<|", "|>", "eot_id|>", "<|eot", "Hi there", " ", "\n", "é", "\U0001f44d", "\U00100000", "\U00100001"]


def ids_of(chat, *contents, frame="{}"):
    """The ids of `frame` with the contents in it."""
    messages, stand_ins = chat.hide([{"role": "user", "content": content} for content in contents], frame)
    assert [message["role"] for message in messages] == ["user"] * len(contents)
    return chat.encode(frame.format(*(message["content"] for message in messages)), stand_ins)


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=8))
def test_typed_names_are_text_and_the_templates_are_ids(parts):
    content = "".join(parts)
    found = ids_of(CHAT, content, frame=f"{BOS}User: {{}}{EOT}Assistant: ")
    plain = TOKENIZER.encode("User: " + content)
    assert found.tolist() == [300, *plain.tolist(), 301, *TOKENIZER.encode("Assistant: ").tolist()]
    assert not {0, 300, 301} & set(plain.tolist())


@settings(deadline=None, max_examples=30)
@given(content=st.text(max_size=30))
def test_where_nothing_is_typed_that_matters_the_tokenizer_decides_alone(content):
    text = f"User: {content}{EOT}Assistant: "
    np.testing.assert_array_equal(ids_of(CHAT, content, frame=f"User: {{}}{EOT}Assistant: "), TOKENIZER.encode(text, special=True))


def test_a_stand_in_is_a_character_that_stands_nowhere_else():
    contents = ["\U00100000" + EOT, "\U00100001"]
    messages, stand_ins = CHAT.hide([{"role": "user", "content": content} for content in contents], "\U00100002")
    assert stand_ins == (("\U00100003", "<"),)
    assert [message["content"] for message in messages] == ["\U00100000\U00100003|eot_id|>", "\U00100001"]


def test_stop_tokens_are_special_whatever_the_tokenizer_says():
    definition = json.loads(TOKENIZER.to_json())
    for token in definition["added_tokens"]:
        token["special"] = token["special"] and token["content"] != EOT
    tokenizer = Tokenizer(json.dumps(definition))
    assert 301 in ids_of(ChatTokens(tokenizer), EOT)  # an ordinary token of that tokenizer
    assert 301 not in ids_of(ChatTokens(tokenizer, [301]), EOT)
    assert 301 in ids_of(ChatTokens(tokenizer, [301]), EOT, frame="{}" + EOT)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_tokenizers_own_normaliser_and_stripping_stay(normalized):
    core = tokenizers.Tokenizer.from_str(train_bpe([TEXT], 300).to_json())
    core.normalizer = normalizers.Lowercase()
    core.add_special_tokens([tokenizers.AddedToken(name, rstrip=True, normalized=normalized, special=True) for name in ("<end>", "Bye")])
    chat = ChatTokens(Tokenizer(core.to_str()))
    plain = Tokenizer(core.to_str().replace('"<end>"', '"<other>"').replace('"Bye"', '"Other"'))
    for content in ("Say <end> NOW, Bye", "Say <END> NOW, bye", "Say it NOW"):
        typed = ids_of(chat, content, frame="{}<end>  HI")
        assert typed.tolist() == [*plain.encode(content), 300, *plain.encode("HI")]


def test_names_of_one_character_and_no_names_at_all():
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    assert ids_of(ChatTokens(Tokenizer(core.to_str())), "ab").tolist() == [0, 1]
    core.add_special_tokens(["c"])
    assert ids_of(ChatTokens(Tokenizer(core.to_str())), "ac", frame="{}cb").tolist() == [0, 2, 1]  # the typed c has no token
