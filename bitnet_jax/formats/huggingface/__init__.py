"""Folders as transformers reads and writes them: config.json, safetensors, tokenizer files.

What a checkpoint is, its config.json says, and nothing is guessed from tensors. The layouts:

    BitNetForCausalLM   norms before o_proj and down_proj; packed or latent          microsoft/bitnet-b1.58-2B-4T, …-bf16
    LlamaForCausalLM    no such norms; packed, latent or full precision              Falcon-E, Falcon3-1.58bit, Llama3-8B-1.58
    BitnetForCausalLM   latent, as BitNetForCausalLM under other names               1bitLLM/bitnet_b1_58-large
    variant="trilm"     LlamaForCausalLM whose matrices hold -s, 0 and s             SpectraSuite/TriLM: config.json does not tell
"""

from bitnet_jax.formats.huggingface.reading import is_checkpoint, read
from bitnet_jax.formats.huggingface.writing import SHARD_BYTES, write

__all__ = ["SHARD_BYTES", "is_checkpoint", "read", "write"]
