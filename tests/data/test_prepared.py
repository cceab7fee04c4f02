"""From a configuration to tokens, end to end on small files."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitnet_jax.config import DataConfig
from bitnet_jax.data import Tokenizer, byte_tokenizer, prepare, read_tokens, train_bpe
from bitnet_jax.data.prepared import check_vocabulary
from bitnet_jax.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Forty documents of different words."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"Document {number} says word{number} and word{number * 7}.\n" * 5)
    return str(folder)


def config(tmp_path: Path, source: str, **options: object) -> DataConfig:
    return DataConfig(**{"source": source, "cache_dir": str(tmp_path / "cache"), "seq_len": 16, **options})  # type: ignore[arg-type]


def test_a_corpus_becomes_two_parts_and_a_tokenizer(tmp_path: Path, source: str) -> None:
    found = prepare(config(tmp_path, source), vocab_size=300)
    assert found.tokenizer.vocab_size == 300
    assert found.train.documents == 38
    assert found.validation.documents == 2
    assert json.loads(json.dumps(found.provenance)) == found.provenance
    sizes = found.provenance["parts"]
    assert sizes["train"] == {"tokens": len(found.train), "bytes": found.train.text_bytes, "documents": 38}
    assert found.provenance["corpus"]["bytes"] == found.train.text_bytes + found.validation.text_bytes
    assert found.provenance["corpus"]["files"] == 40


def test_a_second_time_nothing_is_made_again_and_all_is_equal(tmp_path: Path, source: str) -> None:
    stages: list[str] = []
    first = prepare(config(tmp_path, source), vocab_size=300, progress=lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["read", "train tokenizer", "tokenise"]
    stages.clear()
    again = prepare(config(tmp_path, source), vocab_size=300, progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"read"}
    assert again.tokenizer == first.tokenizer
    assert again.provenance == first.provenance
    np.testing.assert_array_equal(again.train.ids, first.train.ids)
    elsewhere = prepare(config(tmp_path, source, cache_dir=str(tmp_path / "other")), vocab_size=300)
    assert elsewhere.tokenizer == first.tokenizer
    np.testing.assert_array_equal(elsewhere.validation.ids, first.validation.ids)


def test_the_tokenizer_is_trained_on_the_training_part_alone(tmp_path: Path, source: str) -> None:
    found = prepare(config(tmp_path, source), vocab_size=2048)
    text = found.tokenizer.decode(found.train.ids, special=True)
    documents = text.split("<|endoftext|>")[:-1]
    assert len(documents) == 38
    assert train_bpe(documents, 2048) == found.tokenizer
    held_out = found.tokenizer.decode(found.validation.ids, special=True).split("<|endoftext|>")[:-1]
    assert train_bpe(documents + held_out, 2048) != found.tokenizer


def test_a_damaged_tokenizer_in_the_cache_is_made_again(tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture) -> None:
    first = prepare(config(tmp_path, source), vocab_size=300).tokenizer
    (file,) = (tmp_path / "cache" / "tokenizers").iterdir()
    file.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert prepare(config(tmp_path, source), vocab_size=300).tokenizer == first
    assert "is damaged and is made again" in caplog.text
    assert Tokenizer.read(file) == first


def test_tokenizers_by_name_by_file_and_given(tmp_path: Path, source: str) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_json())
    by_name = prepare(config(tmp_path, source, tokenizer="bytes"), vocab_size=257)
    by_file = prepare(config(tmp_path, source, tokenizer=str(tmp_path / "tokenizer.json")), vocab_size=512)
    given = prepare(config(tmp_path, source), vocab_size=512, tokenizer=byte_tokenizer())
    for found in (by_name, by_file, given):
        assert found.tokenizer == byte_tokenizer()
        np.testing.assert_array_equal(found.train.ids, by_name.train.ids)


def test_a_vocabulary_larger_than_the_models_is_refused_before_anything_is_made(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match="the tokenizer has 257 ids, but the model's vocab_size=256"):
        prepare(config(tmp_path, source, tokenizer="bytes"), vocab_size=256)
    assert not (tmp_path / "cache").exists()
    check_vocabulary(byte_tokenizer(), 257)


def test_a_part_shorter_than_a_window_is_refused_with_its_name_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    with pytest.raises(UserError, match=r"the validation part has 6 tokens, but must have at least 17 \(one window: seq_len=16"):
        prepare(config(tmp_path, str(tmp_path / "a.txt"), tokenizer="bytes"), vocab_size=257)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="is empty: it holds no text"):
        prepare(config(tmp_path, str(tmp_path / "a.txt")), vocab_size=300)


def test_all_tokens_of_a_file_can_be_read_for_evaluation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ein Satz. 世界")
    found = read_tokens(str(tmp_path / "a.txt"), byte_tokenizer(), cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(found.ids, [*"Ein Satz. 世界".encode(), 256])
    assert (found.text_bytes, found.documents, len(found)) == (16, 1, 17)


def test_importing_the_package_starts_neither_jax_nor_grain() -> None:
    program = "import sys, bitnet_jax.data; print(*sorted({'jax', 'grain', 'datasets', 'pyarrow', 'zstandard'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []
