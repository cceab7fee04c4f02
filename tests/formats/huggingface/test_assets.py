"""Tokenizer, template and generation defaults come from the files that transformers takes them from, and go back there."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from bitnet_jax.data import byte_tokenizer
from bitnet_jax.errors import UserError
from bitnet_jax.formats.huggingface import assets
from bitnet_jax.formats.huggingface.folder import Folder
from bitnet_jax.formats.weights import Assets
from tests.shapes import tiny

CONFIG = tiny(vocab_size=300)
PLAIN = byte_tokenizer().to_json()


def with_begin() -> str:
    """The byte tokenizer with a token 257 that it puts before every text, and an ordinary one, 258."""
    core = tokenizers.Tokenizer.from_str(PLAIN)
    core.add_special_tokens(["<s>", "<|eot|>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])  # pyright: ignore
    return core.to_str()


def read(folder: Path, files: dict[str, Any], **fields: Any) -> Assets:
    for name, value in files.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return assets.read(Folder(folder), fields, CONFIG)


def test_nothing_is_made_up_where_nothing_is_said(tmp_path: Path) -> None:
    assert read(tmp_path, {}) == Assets()
    assert read(tmp_path, {"tokenizer.json": PLAIN}) == Assets(tokenizer=PLAIN)


def test_the_prefix_is_what_the_tokenizer_puts_before_a_text(tmp_path: Path) -> None:
    found = read(tmp_path, {"tokenizer.json": with_begin(), "tokenizer_config.json": {"add_bos_token": False}})
    assert found.prefix == (257,)


def test_a_begin_of_text_that_is_asked_for_is_the_prefix(tmp_path: Path) -> None:
    asked = {"add_bos_token": True, "bos_token": {"content": "<|endoftext|>"}}
    assert read(tmp_path, {"tokenizer.json": PLAIN, "tokenizer_config.json": asked}).prefix == (256,)
    assert read(tmp_path, {"tokenizer_config.json": {"add_bos_token": True}}, bos_token_id=5).prefix == (5,)
    with pytest.raises(UserError, match="add_bos_token is true, but no bos_token is in the vocabulary"):
        read(tmp_path, {}, bos_token_id=None)


def test_stop_tokens_are_those_of_the_generation_and_of_the_tokenizer(tmp_path: Path) -> None:
    assert read(tmp_path, {}, eos_token_id=3).stop_tokens == (3,)
    assert read(tmp_path, {"generation_config.json": {"eos_token_id": [4, 256]}}, eos_token_id=3).stop_tokens == (4, 256)
    files = {"tokenizer.json": with_begin(), "tokenizer_config.json": {"eos_token": "<|eot|>"}}
    assert read(tmp_path, files).stop_tokens == (4, 256, 258)


def test_the_template_of_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "usual"}]
    assert read(tmp_path, {"tokenizer_config.json": {"chat_template": "one"}}).chat_template == "one"
    assert read(tmp_path, {"tokenizer_config.json": {"chat_template": named}}).chat_template == "usual"
    assert read(tmp_path, {"tokenizer_config.json": {"chat_template": named[:1]}}).chat_template is None
    assert read(tmp_path, {"chat_template.jinja": "file"}).chat_template == "file"


def test_only_a_generation_that_samples_has_settings(tmp_path: Path) -> None:
    stated = {"temperature": 0.6, "top_p": 0.9, "top_k": 0, "repetition_penalty": None, "max_length": 4096}
    assert read(tmp_path, {"generation_config.json": stated}).sampling == {}
    assert read(tmp_path, {"generation_config.json": stated | {"do_sample": False}}).sampling == {}
    assert read(tmp_path, {"generation_config.json": stated | {"do_sample": True}}).sampling == {"temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"generation_config.json": {"eos_token_id": 300}}, "stop_tokens must be a list of token ids from 0 to 299"),
        ({"generation_config.json": {"eos_token_id": [-1]}}, "stop_tokens must be"),
        ({"generation_config.json": {"eos_token_id": [[1]]}}, "stop_tokens must be"),
        ({"generation_config.json": {"eos_token_id": "2"}}, "stop_tokens must be"),
        ({"generation_config.json": {"do_sample": True, "temperature": -1}}, "temperature=-1 must be a number above 0"),
        ({"generation_config.json": {"do_sample": True, "top_p": 1.5}}, "top_p=1.5 must be a number above 0"),
        ({"generation_config.json": {"do_sample": True, "top_k": 2.5}}, "top_k=2.5 must be"),
        ({"generation_config.json": {"do_sample": True, "top_k": "x" * 1000}}, "top_k=xxx"),
        ({"generation_config.json": []}, "must hold an object"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "chat_template must be text"),
        ({"tokenizer.json": "{}"}, "is not a tokenizer.json"),
        ({"chat_template.jinja": "x" * 1_100_000}, "must be at most 1048576 bytes"),
    ],
)
def test_a_damaged_file_is_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, files)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


FULL = Assets(
    tokenizer=with_begin(),
    chat_template="{{ messages }}",
    prefix=(257,),
    stop_tokens=(256, 258),
    sampling={"temperature": 0.6, "top_p": 0.9, "top_k": 40},
)


@pytest.mark.parametrize(
    "written", [FULL, Assets(), Assets(tokenizer=PLAIN, stop_tokens=(256,)), Assets(stop_tokens=(1, 2), sampling={"temperature": 1.0})]
)
def test_what_is_written_is_read_again(written: Assets, tmp_path: Path) -> None:
    assert read(tmp_path, assets.files(written, CONFIG)) == written


def test_a_prefix_that_the_tokenizer_does_not_put_is_put_into_it(tmp_path: Path) -> None:
    found = read(tmp_path, assets.files(Assets(tokenizer=PLAIN, prefix=(256,)), CONFIG))
    assert found.prefix == (256,)
    core = tokenizers.Tokenizer.from_str(found.tokenizer or "")
    assert core.encode("ab").ids == [256, 97, 98]
    found = read(tmp_path, assets.files(Assets(tokenizer=with_begin(), prefix=()), CONFIG))
    assert found.prefix == ()


def test_an_id_that_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="token 299 begins or ends a text, but the tokenizer has none of that id"):
        assets.files(Assets(tokenizer=PLAIN, stop_tokens=(299,)), CONFIG)
