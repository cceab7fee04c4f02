"""bitnet-jax pack MODEL OUT: one file with 2 or 1.6 bits a ternary weight, proved to be the same model before it is kept."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from bitnet_jax.cli import arguments
from bitnet_jax.config import DType
from bitnet_jax.errors import UserError
from kernels_pallas import Encoding


@dataclass(frozen=True, kw_only=True)
class Args:
    """Writes the model of a run, or a latent model file, as one packed file."""

    model: tyro.conf.Positional[Path]
    """A run's folder, or a model file."""
    out: tyro.conf.Positional[Path]
    """The file to write, ending in .safetensors."""
    encoding: Encoding = Encoding.TWO_BIT
    """two_bit: 4 weights a byte, quickest to run. base3: 5 weights a byte, 1.6 bits a weight."""
    dtype: DType | None = None
    """Type of embeddings and norms; None is the type that the model computes in, which loses nothing. Another may, and is not proved."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a file that is there."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parsed = arguments.parse(Args, args, "pack")
    from bitnet_jax import models, params
    from bitnet_jax.formats import model_file

    if parsed.out.exists() and not parsed.force:
        raise UserError(f"{parsed.out} exists: --force replaces it")
    model = models.load(parsed.model)
    if model.packed:
        raise UserError(f"{parsed.model} is packed already")
    packed = params.pack(model.params, model.config, parsed.encoding)
    draft = parsed.out.with_name(f".{parsed.out.stem}.{os.getpid()}.draft{parsed.out.suffix}")
    try:
        weights = model.weights(packed)
        size = model_file.write(
            draft, replace(weights, provenance={"packed_from": str(parsed.model), **model.provenance}), dtype=parsed.dtype
        )
        if parsed.dtype is None:
            proof = prove(model, models.load(draft))
        else:
            proof = f"not proved: embeddings and norms were rounded to {parsed.dtype.value}, as asked"
        os.replace(draft, parsed.out)
    finally:
        draft.unlink(missing_ok=True)
    latent = sum(leaf.size * leaf.dtype.itemsize for _, leaf in params.leaves(model.params))
    print(f"{parsed.out}: {size:,} bytes, {latent / size:.2f} times smaller than the latent parameters ({latent:,} bytes)")
    print(proof)
    return 0


def prove(latent: Any, packed: Any, prompts: int = 4, prompt_tokens: int = 32, new_tokens: int = 32) -> str:
    """Compares a latent `Model` with the packed one made of it, and returns the line that says what was compared.

    Prompts are random tokens, which no model has learned to expect: what is equal on them is not equal by habit.

    Raises:
        RunError: they are not the same model.
    """
    import numpy as np

    from bitnet_jax.inference import check_parity

    length = min(prompt_tokens, latent.config.max_seq_len // 2)
    ids = np.random.default_rng(0).integers(0, latent.config.vocab_size, (prompts, length), np.int32)
    parity = check_parity(
        latent.params, packed.params, latent.config, list(ids), max_new_tokens=min(new_tokens, latent.config.max_seq_len - length)
    )
    parity.require()
    return describe(parity)


def describe(parity: Any) -> str:
    """A `Parity` in one line."""
    return (
        f"the same model: {parity.weights:,} ternary weights and {parity.scales:,} scales equal, "
        f"{parity.accumulators:,} integer sums equal, {parity.tokens:,} greedy tokens equal"
    )
