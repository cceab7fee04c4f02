"""Text sources → tokens → batches. Importing this does not import JAX.

From a configuration to tokens   prepare, Prepared, TokenArray, read_tokens, check_vocabulary
Batches                          Batches, windows, window_indices
Tokenizers                       Tokenizer, byte_tokenizer, train_bpe, TextStream
Text sources                     open_corpus, Corpus, Piece; cache_folder, Progress
"""

from bitnet_jax.data.cache import Progress, cache_folder
from bitnet_jax.data.corpora import Corpus, Piece, open_corpus
from bitnet_jax.data.pipeline import Batches, window_indices, windows
from bitnet_jax.data.prepared import Prepared, check_vocabulary, prepare, read_tokens
from bitnet_jax.data.tokenizers import TextStream, Tokenizer, byte_tokenizer, train_bpe
from bitnet_jax.data.tokens import TokenArray

__all__ = [
    "Batches",
    "Corpus",
    "Piece",
    "Prepared",
    "Progress",
    "TextStream",
    "TokenArray",
    "Tokenizer",
    "byte_tokenizer",
    "cache_folder",
    "check_vocabulary",
    "open_corpus",
    "prepare",
    "read_tokens",
    "train_bpe",
    "window_indices",
    "windows",
]
