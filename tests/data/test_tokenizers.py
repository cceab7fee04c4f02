"""Text → ids → text, for every kind of tokenizer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from bitnet_jax.data.tokenizers import TextStream, Tokenizer, byte_tokenizer, train_bpe
from bitnet_jax.errors import UserError

TEXT = "To be, or not to be, that is the question: whether it is nobler in the mind to suffer. 世界 naïve 👍\n" * 5
BPE = train_bpe([TEXT], 300)
BYTES = byte_tokenizer()


def sentencepiece_like() -> Tokenizer:
    """Spaces as ▁, one in front of the text, and byte tokens for what the vocabulary lacks: as in LLaMA-2."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    core = tokenizers.Tokenizer(
        models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(core.to_str())


ALL = {"bpe": BPE, "bytes": BYTES, "sentencepiece": sentencepiece_like()}


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=60))
@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_decoding_what_was_encoded_gives_the_text_back(name: str, text: str) -> None:
    ids = ALL[name].encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert ALL[name].decode(ids) == text


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=60))
def test_byte_ids_are_the_bytes_and_the_file_says_the_same(text: str) -> None:
    np.testing.assert_array_equal(BYTES.encode(text), list(text.encode()))
    # With `special` the ids come from the tokenizer.json and not from the short cut.
    if "<|endoftext|>" not in text:
        np.testing.assert_array_equal(BYTES.encode(text, special=True), BYTES.encode(text))


@pytest.mark.parametrize("name", ALL)
def test_a_saved_tokenizer_is_the_same(name: str, tmp_path: Path) -> None:
    tokenizer = ALL[name]
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    for again in (Tokenizer.from_json(tokenizer.to_json()), Tokenizer.read(tmp_path / "tokenizer.json")):
        assert again == tokenizer
        assert (again.vocab_size, again.eos_id, again.bos_id) == (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id)
        np.testing.assert_array_equal(again.encode("a ab " + TEXT), tokenizer.encode("a ab " + TEXT))


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_encoded_as_its_texts_are(name: str) -> None:
    texts = ["", "a", TEXT, "ab <|endoftext|> </s>"]
    for found, text in zip(ALL[name].encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(found, ALL[name].encode(text))
        assert found.dtype == np.int32


def test_vocabularies_and_special_tokens_are_found() -> None:
    assert (BPE.vocab_size, BPE.eos_id, BPE.bos_id) == (300, 0, None)
    assert (BYTES.vocab_size, BYTES.eos_id, BYTES.bos_id) == (257, 256, None)
    assert (ALL["sentencepiece"].eos_id, ALL["sentencepiece"].bos_id) == (2, 1)


@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_special_tokens_in_a_text_are_text_unless_asked_for(name: str) -> None:
    tokenizer, text = ALL[name], "a<|endoftext|>b"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(text, special=True)
    assert list(ids).count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, special=True) == text


def test_what_a_file_says_of_padding_truncation_and_added_tokens_does_not_change_the_ids() -> None:
    core = tokenizers.Tokenizer.from_str(BPE.to_json())
    core.enable_padding(length=64)
    core.enable_truncation(2)
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    np.testing.assert_array_equal(Tokenizer(core.to_str()).encode(TEXT), BPE.encode(TEXT))


def test_bpe_is_as_large_as_asked_unless_the_text_is_too_small() -> None:
    assert train_bpe([TEXT], 280).vocab_size == 280
    assert train_bpe(["aa"], 2048).vocab_size == 258
    with pytest.raises(UserError, match=r"vocab_size=256 must be at least 257 .* for tokenizer='bpe'"):
        train_bpe([TEXT], 256)


def test_training_and_batches_do_not_depend_on_cores_and_print_nothing() -> None:
    program = """
import os
from bitnet_jax.data.tokenizers import train_bpe
texts = [f"{n} {n * n} word{n % 7} " * 20 for n in range(200)]
tokenizer = train_bpe(texts, 600)
ids = tokenizer.encode_batch(texts)
child = 0
if os.environ["TOKENIZERS_PARALLELISM"] == "false" and (child := os.fork()) == 0:
    tokenizer.encode_batch(texts)
    os._exit(0)
assert not child or os.waitpid(child, 0)[1] == 0
print(tokenizer.to_json(), [list(some) for some in ids])
"""
    outputs = []
    for setting in (None, "true", "false"):
        environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
        if setting is not None:
            environment["TOKENIZERS_PARALLELISM"] = setting
        done = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert done.stderr == ""
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]


# --- streaming -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(data=st.data())
@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_streamed_text_joins_to_the_decoded_text(name: str, data: st.DataObject) -> None:
    tokenizer = ALL[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push(token) for token in ids), stream.flush()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ALL)
def test_a_stream_never_shows_half_a_character_and_holds_nothing_else_back(name: str) -> None:
    text = "ab a €👍 b"
    ids = ALL[name].encode(text)
    stream, shown = TextStream(ALL[name]), ""
    for count, token in enumerate(ids, start=1):
        shown += stream.push(int(token))
        so_far = ALL[name].decode(ids[:count])
        assert text.startswith(shown)
        assert shown == so_far or so_far.endswith("\N{REPLACEMENT CHARACTER}")
    assert shown == text
    assert stream.flush() == ""


def test_a_character_that_is_never_completed_comes_with_the_flush() -> None:
    stream = TextStream(BYTES)
    assert [stream.push(byte) for byte in b"a\xe2\x82"] == ["a", "", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_are_refused() -> None:
    for ids in ([257], [-1], np.array([3, 999])):
        with pytest.raises(UserError, match=r"token (257|-1|999) must be from 0 to 256"):
            BYTES.decode(ids)
    assert BYTES.decode([]) == ""


@pytest.mark.parametrize("name", ALL)
def test_a_lone_surrogate_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="lone surrogate at character 2"):
        ALL[name].encode("ab\ud800")
    with pytest.raises(UserError, match="lone surrogate at character 2"):
        ALL[name].encode_batch(["ab\ud800"])


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", json.dumps({"model": {"type": "BPE"}}).encode(), b"[1]"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json (is not a tokenizer\.json|cannot be read)") as caught:
        Tokenizer.read(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.read(tmp_path / "absent.json")
