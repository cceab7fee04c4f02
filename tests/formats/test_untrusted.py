"""Files of strangers: whatever is changed in a valid one, a reader takes it or refuses it in one line, soon, and in little memory.

`tests/fuzz` does the same for hours. What is found there becomes a case here.
"""

import time
import tracemalloc
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet_jax import config as configs
from bitnet_jax.config import ModelConfig
from bitnet_jax.errors import UserError
from bitnet_jax.formats import gguf, gguf_container, gguf_tokenizer
from tests.fuzz.targets import FORMATS, target
from tests.shapes import tiny

SECONDS = 5.0
"""Of processor time for one file, a hundred times what it takes."""
BYTES = 64 << 20
"""Of memory for one file, which has at most a quarter of a megabyte; what JAX keeps for a shape is in it."""


@pytest.fixture(scope="module", params=FORMATS)
def reader(request, tmp_path_factory):
    return target(request.param, tmp_path_factory.mktemp("untrusted"))


def test_the_files_to_start_from_are_valid(reader):
    for seed in reader.seeds:
        assert reader.refusal(seed) is None


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**64 - 1))  # and no structure to shrink: it is in the mutations
def test_a_mutated_file_is_taken_or_refused_in_one_line(reader, seed):
    rng = Random(seed)
    data = reader.mutate(rng.choice(reader.seeds), rng)
    tracemalloc.start()
    begun = time.process_time()
    try:
        reader.refusal(data)  # which lets every error but a UserError of one line through
        assert time.process_time() - begun < SECONDS
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()


def test_a_message_is_one_printable_line_whatever_a_file_puts_into_it():
    assert str(UserError("key \x1b[2J\n\u2028é")) == "key \ufffd[2J\ufffd\ufffdé"
    assert len(str(UserError("x" * 10**6))) < 2100


# --- what was found --------------------------------------------------------------------------------------------------


def test_a_number_of_more_digits_than_python_reads_is_refused():
    with pytest.raises(UserError, match="is not JSON"):
        configs.from_json(ModelConfig, '{"vocab_size": ' + "9" * 5000 + "}")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """Metadata and tensors of a valid GGUF file, and how others are written and read."""
    folder = tmp_path_factory.mktemp("gguf")
    found = target("gguf", folder)
    path = folder / "valid.gguf"
    path.write_bytes(found.seeds[2])
    file = gguf_container.File(path)
    tensors = [
        gguf_container.Tensor(name, info.kind, info.shape, lambda name=name: [file.raw(name)]) for name, info in file.tensors.items()
    ]
    metadata = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()}

    def read(**changes):
        gguf_container.write(found.path, metadata | changes, tensors)
        return gguf.read(found.path)

    read()
    return read


@pytest.mark.parametrize("value", [[0, 0], [0.5, 0.5], ["a", "b"], [], True, "x", float("nan"), 0, 2**31])
@pytest.mark.parametrize(
    "key",
    ["general.architecture", "llama.expert_count", "llama.vocab_size", "llama.attention.value_length", "llama.rope.dimension_count"],
)
def test_a_key_of_another_type_is_refused(gguf_file, key, value):
    if (key, value) == ("llama.expert_count", 0):
        return
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        gguf_file(**{key: value})


@pytest.mark.parametrize("field", ["rope_theta", "init_std"])
def test_a_number_that_float32_cannot_hold_is_refused(field):
    with pytest.raises(UserError, match=f"{field}=1e[+]39 must be positive and finite"):
        tiny(**{field: 1e39})


def test_a_token_twice_is_found_soon():
    tokens = [f"t{i}" for i in range(200_000)]
    tokens[-1] = tokens[-2]
    begun = time.process_time()
    with pytest.raises(UserError, match="has 't199998' twice"):
        gguf_tokenizer.read(
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": []}, len(tokens), "file"
        )
    assert time.process_time() - begun < SECONDS


def test_tokens_that_can_be_cut_in_very_many_ways_are_refused():
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *("a" * i for i in range(1, 2000))]
    count = len(tokens)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(count, np.float32),
        "tokenizer.ggml.token_type": np.array([2] + [6] * 256 + [1] * (count - 257), np.int32),
    }
    begun = time.process_time()
    with pytest.raises(UserError, match="has a token of 1999 characters: must be at most 256"):
        gguf_tokenizer.read(metadata, count, "file")
    assert time.process_time() - begun < SECONDS
