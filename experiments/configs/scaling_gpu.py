"""Loss against size on a GPU: `scaling` at 10 to 400 million parameters.

Source and expected result: as `scaling`. The sizes overlap those of the papers (TriLM 99M, 190M and 390M; b1 125M and 350M).

Command: python -m experiments.run scaling_gpu, on a machine with a GPU and the Hugging Face hub (extra `datasets`)

Cost: not run. By 6 operations a parameter and token, 1.1 hours a run of 400m at 40 % of an H200's stated peak, and 10 hours in all.

Ours differs from the papers: a BPE of 16,384 trained on the text, sub-norms and tied embeddings as in 2B4T, 655 million tokens a run,
one seed from 100m on.
"""

from dataclasses import replace

from bitnet_jax.config import DataConfig, DType, ModelConfig
from experiments.cells import Cell, Results
from experiments.configs import scaling

DATA = DataConfig(source="hf:HuggingFaceFW/fineweb-edu:sample-10BT", seq_len=1024, validation_fraction=0.001)
STEPS = 2500
BATCH_SIZE = 256
ACCUMULATION = 16
"""Microbatches of 16 windows: what a block keeps for the backward pass must fit beside the others'."""
FIRST = {"bitnet": 3e-3, "twin": 1.5e-3}


def shape(hidden: int, ffn: int, layers: int, heads: int) -> ModelConfig:
    return replace(
        ModelConfig.preset("ladder-100m"),
        vocab_size=16_384,
        hidden_size=hidden,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        dtype=DType.BFLOAT16,
    )


# Parameters in all: 13.4, 30.9, 104.7, 196.7 and 407.1 million
SIZES = {
    "10m": shape(384, 1024, 4, 6),
    "30m": shape(512, 1408, 7, 8),
    "100m": shape(768, 2304, 12, 12),
    "200m": shape(1024, 2816, 14, 16),
    "400m": shape(1280, 3584, 19, 20),
}


def cells(results: Results) -> list[Cell]:
    """As `scaling.cells`."""
    seeds = {size: (0, 1, 2) if size in ("10m", "30m") else (0,) for size in SIZES}
    tries = {"100m": 3, "200m": 2, "400m": 2}
    return scaling.plan(results, SIZES, seeds, tries, FIRST, steps=STEPS, data=DATA, batch_size=BATCH_SIZE, accumulation=ACCUMULATION)
