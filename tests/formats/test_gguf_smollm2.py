"""Real weights in a file that nobody here made: SmolLM2-135M-Instruct as GGUF. Wrong rotary layout, norms or tokenizer would show."""

import numpy as np
import pytest

from bitnet_jax import models
from bitnet_jax.errors import UserError
from bitnet_jax.evaluation.perplexity import perplexity
from experiments import parity

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    try:
        parity.smollm2_file(folder)
    except UserError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder / parity.SMOLLM2_FILE)


def test_its_perplexity_is_that_of_other_programs(folder, model):
    """18.3 on Wikipedia leads was measured with another implementation, on another sample of them."""
    text = parity.wikipedia(folder, 40)
    ids = model.need_tokenizer().encode(text)
    assert 14 < perplexity(model.params, model.config, ids, window=512, batch_size=2).perplexity < 23


def test_it_knows_the_capital_of_france(model):
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert "Paris" in parity.greedy_reply(model, prompt)


def test_its_tokenizer_and_special_tokens_are_those_of_the_file(model):
    tokenizer = model.need_tokenizer()
    assert (model.prefix, model.stop_tokens, tokenizer.vocab_size) == ((), (2,), 49152)
    assert tokenizer.encode("<|im_end|>", special=True).tolist() == [2]
    assert tokenizer.decode(np.asarray(tokenizer.encode("In 1999, it's 42."))) == "In 1999, it's 42."
    assert "<|im_start|>" in (model.chat_template or "")
