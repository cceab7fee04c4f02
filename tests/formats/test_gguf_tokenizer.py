"""Tokenizers in GGUF metadata: the same ids on both sides, and nothing dropped in silence."""

import itertools
import json

import numpy as np
import pytest

from bitnet_jax.data import byte_tokenizer
from bitnet_jax.data.tokenizers import Tokenizer, train_bpe
from bitnet_jax.errors import UserError
from bitnet_jax.formats import gguf_tokenizer
from bitnet_jax.formats.weights import Assets

TEXTS = ["Hello, world's end.  Two  spaces\n\n and 12345 digits!", "ü — 漢字 \U0001f600\ttab", "", " leading", "<|endoftext|> is text"]
CORPUS = ["the cat sat on the mat, the cat's hat; 1999 and 2000 ", "Hello world, hello end. spaces and digits "]


def bpe(**changes):
    core = json.loads(train_bpe(CORPUS, 290).to_json())
    core["model"] |= changes.pop("model", {})
    return json.dumps(core | changes)


def pre(name):
    return {"pre_tokenizer": gguf_tokenizer._PRE[name], "model": {"ignore_merges": name == "llama-bpe"}}


def spm(prefix=True):
    """A SentencePiece vocabulary by hand: later pieces have lower scores."""
    pieces = ["▁", *"abcdehlorw', ", "he", "ll", "hell", "hello", "▁hello", "wor", "or", "ld", "world", "▁w", "▁world"]
    tokens = ["<unk>", "<s>", "</s>", *gguf_tokenizer._BYTES, *pieces]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    found = {"model": "llama", "tokens": tokens, "token_type": np.array(types, np.int32), "scores": np.array(scores, np.float32)}
    found |= {"add_space_prefix": prefix, "bos_token_id": 1, "eos_token_id": 2}
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}


def joined(text, metadata):
    """Ids as SentencePiece defines them: join the neighbours whose union has the highest score, the first of equals; slowly."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][i] == 1}
    parts = list(("▁" if text and metadata["tokenizer.ggml.add_space_prefix"] else "") + text.replace(" ", "▁"))
    while True:
        best = max(((scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids), default=None)
        if best is None:
            return [i for part in parts for i in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]
        parts[-best[1] : 2 - best[1]] = ["".join(parts[-best[1] : 2 - best[1]])]


def as_read(metadata):
    """Lists of numbers as a file gives them."""
    dtypes = {int: np.int32, float: np.float32}
    return {k: np.array(v, dtypes[type(v[0])]) if isinstance(v, list) and v and type(v[0]) in dtypes else v for k, v in metadata.items()}


@pytest.mark.parametrize("name", gguf_tokenizer._PRE)
def test_byte_level_tokenizers_cut_the_same_after_both_ways(name):
    definition = bpe(**pre(name))
    metadata = gguf_tokenizer.write(Assets(tokenizer=definition), 300)
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD299]"
    found = gguf_tokenizer.read(as_read(metadata), 300, "x")
    mine, theirs = Tokenizer(definition), Tokenizer(found.tokenizer or "")
    assert theirs.vocab_size == mine.vocab_size
    for text in TEXTS:
        for special in (False, True):
            assert theirs.encode(text, special=special).tolist() == mine.encode(text, special=special).tolist()
        assert theirs.decode(theirs.encode(text)) == text
    assert found.stop_tokens == (mine.eos_id,)


def test_the_pre_tokenizers_differ_where_their_names_say():
    def pieces(name, text):
        tokenizer = Tokenizer(bpe(**pre(name)))
        return [text for text, _ in tokenizer._plain.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("gpt-2", "a 1234's") == ["a", "Ġ1234", "'s"]
    assert pieces("smollm", "a 1234") == ["a", "Ġ", "1", "2", "3", "4"]
    assert pieces("llama-bpe", "a1234's'S") == ["a", "123", "4", "'s", "'S"]
    assert pieces("default", "a 1234.") == ["a", "Ġ", "123", "4", "."]


def test_whole_pieces_stay_whole_for_llama_3():
    definition = bpe(**pre("llama-bpe"))
    core = json.loads(definition)
    core["model"]["vocab"]["qzq"] = len(core["model"]["vocab"])  # no merge makes it
    found = gguf_tokenizer.read(as_read(gguf_tokenizer.write(Assets(tokenizer=json.dumps(core)), 300)), 300, "x")
    assert Tokenizer(found.tokenizer or "").encode("qzq").size == 1


def test_the_byte_tokenizer_survives():
    metadata = gguf_tokenizer.write(Assets(tokenizer=byte_tokenizer().to_json()), 257)
    assert metadata["tokenizer.ggml.merges"] == []
    found = Tokenizer(gguf_tokenizer.read(as_read(metadata), 257, "x").tokenizer or "")
    assert found.encode("aö").tolist() == list("aö".encode())


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_joins_the_highest_score_first_and_falls_back_to_bytes(prefix):
    metadata = spm(prefix)
    found = gguf_tokenizer.read(metadata, len(metadata["tokenizer.ggml.tokens"]), "x")
    tokenizer = Tokenizer(found.tokenizer or "")
    for text in ("hello world", "hell", "he'd  wor ld", "zö hello", "", "hhellolld"):
        assert tokenizer.encode(text).tolist() == joined(text, metadata), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (found.prefix, found.stop_tokens) == ((1,), (2,))
    unsaid = {key: value for key, value in metadata.items() if not key.endswith("_token_id")}  # SentencePiece's own ids stand in
    assert gguf_tokenizer.read(unsaid, len(metadata["tokenizer.ggml.tokens"]), "x") == found


def test_sentencepiece_goes_both_ways():
    metadata = spm()
    size = len(metadata["tokenizer.ggml.tokens"])
    first = gguf_tokenizer.read(metadata, size, "x")
    written = as_read(gguf_tokenizer.write(first, size))
    assert written["tokenizer.ggml.tokens"] == metadata["tokenizer.ggml.tokens"]
    assert written["tokenizer.ggml.token_type"].tolist() == metadata["tokenizer.ggml.token_type"].tolist()
    assert gguf_tokenizer.read(written, size, "x") == first


def test_assets_go_both_ways():
    tokenizer = bpe()
    assets = Assets(
        tokenizer=tokenizer,
        chat_template="{{ messages }}",
        prefix=(3,),
        stop_tokens=(0, 7, 9),
        sampling={"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1},
    )
    found = gguf_tokenizer.read(as_read(gguf_tokenizer.write(assets, 300)), 300, "x")
    assert (found.chat_template, found.prefix, found.stop_tokens) == ("{{ messages }}", (3,), (0, 7, 9))
    assert found.sampling == assets.sampling
    token = next(token for token, i in json.loads(tokenizer)["model"]["vocab"].items() if i == 3)
    assert json.loads(found.tokenizer or "")["post_processor"]["special_tokens"] == {token: {"id": token, "ids": [3], "tokens": [token]}}
    none = gguf_tokenizer.read(as_read(gguf_tokenizer.write(Assets(), 300)), 300, "x")
    assert (none.tokenizer, none.prefix, none.stop_tokens) == (None, (), ())


@pytest.mark.parametrize(
    ("assets", "message"),
    [
        (Assets(prefix=(1, 2)), "GGUF has place for one token before a text"),
        (Assets(stop_tokens=(1, 2, 3, 4)), "for three that end it"),
        (Assets(tokenizer=bpe(normalizer={"type": "NFC"})), "cuts text in a way that GGUF has no name for"),
        (Assets(tokenizer=bpe(pre_tokenizer={"type": "Whitespace"})), "cuts text in a way"),
        (Assets(tokenizer=bpe(model={"ignore_merges": True})), "cuts text in a way"),
        (Assets(tokenizer=bpe(model={"byte_fallback": True})), "does not treat spaces as SentencePiece does"),
        (Assets(tokenizer=json.dumps(json.loads(bpe()) | {"model": {"type": "WordLevel"}})), "model is WordLevel"),
    ],
)
def test_what_gguf_cannot_say_is_refused(assets, message):
    with pytest.raises(UserError) as caught:
        gguf_tokenizer.write(assets, 300)
    assert message in str(caught.value)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    with pytest.raises(UserError, match="must be below the vocabulary's size 100"):
        gguf_tokenizer.write(Assets(tokenizer=bpe()), 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model='t5' is not known"),
        ({"pre": "qwen35"}, "tokenizer.ggml.pre='qwen35' is not known"),
        ({"pre": 3}, "tokenizer.ggml.pre must be text"),
        ({"tokens": ["a"]}, "must be 300 strings"),
        ({"tokens": ["a"] * 300}, "has 'a' twice"),
        ({"token_type": np.zeros(300, np.int32)}, "token_type holds 0: must be from 1 to 6"),
        ({"token_type": np.ones(3, np.int32)}, "must be 300 numbers"),
        ({"merges": ["a"]}, "merge 0 is 'a': must be two tokens whose union is one"),
        ({"merges": ["a zzz"]}, "must be two tokens"),
        ({"merges": np.ones(3)}, "merges must be strings"),
        ({"eos_token_id": 300}, "must be from 0 to 299"),
        ({"add_bos_token": True}, "add_bos_token must be a boolean, with"),
        ({"add_space_prefix": True}, "must be false for a byte-level tokenizer"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(changes, message):
    metadata = as_read(gguf_tokenizer.write(Assets(tokenizer=bpe()), 300))
    with pytest.raises(UserError) as caught:
        gguf_tokenizer.read(metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}, 300, "x")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.full(287, np.nan, np.float32)}, "scores holds NaN"),
        ({"precompiled_charsmap": np.ones(3, np.uint8)}, "rewrites text"),
        ({"tokens": [f"t{i}" for i in range(287)]}, "lacks <0x00>"),
    ],
)
def test_sentencepiece_metadata_that_do_not_fit_are_refused(changes, message):
    metadata = spm()
    size = len(metadata["tokenizer.ggml.tokens"])
    changes = {name: value[:size] if len(value) > 3 else value for name, value in changes.items()}
    with pytest.raises(UserError) as caught:
        gguf_tokenizer.read(metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}, size, "x")
    assert message in str(caught.value)
