"""Text from a trained model, latent or packed.

Generation     generate, stream; first_pass for greedy text; Sampling; Generations, Generation, Timing; Stream, Piece; Finish
Proof          check_parity, Parity: a packed model is the latent one
"""

from bitnet_jax.inference.decoding import WORTHWHILE_TOKENS, WORTHWHILE_VOCABULARY, first_pass
from bitnet_jax.inference.generation import Generations, Stream, Timing, generate, stream
from bitnet_jax.inference.parity import Parity, check_parity
from bitnet_jax.inference.rows import Finish, Generation, Piece
from bitnet_jax.inference.sampling import Sampling

__all__ = [
    "WORTHWHILE_TOKENS",
    "WORTHWHILE_VOCABULARY",
    "Finish",
    "Generation",
    "Generations",
    "Parity",
    "Piece",
    "Sampling",
    "Stream",
    "Timing",
    "check_parity",
    "first_pass",
    "generate",
    "stream",
]
