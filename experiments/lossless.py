"""Greedy text of a trained model: packed, by each implementation, against the latent model computed on integer-valued operands.

    python -m experiments.lossless runs/quickstart/bitnet --prompts 1000 --new-tokens 100

Prompts are windows of the run's own held-out text. What is not a product of ternary weights is computed in the same way for both sides
(papers: bitnet.cpp's "lossless inference" is stated for 1000 prompts). Writes experiments/results/lossless/RUN.json, with how many tokens
differ; 0 is what is expected, and the exit code is 1 otherwise. Cost: about a quarter of an hour on two CPU cores for ladder-1m.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax import config as configs
from bitnet_jax import models, params
from bitnet_jax.config import DType, TrainConfig
from bitnet_jax.data import prepare
from bitnet_jax.errors import UserError
from bitnet_jax.inference import first_pass, generate
from bitnet_jax.training import run_directory
from kernels_pallas import Encoding

RESULTS = Path(__file__).parent / "results" / "lossless"


@dataclass(frozen=True)
class Engine:
    """One way to compute the packed model, and which way of the latent one it is held against."""

    encoding: Encoding
    implementation: str
    first_pass: bool

    @property
    def beside(self) -> str | None:
        """The `implementation` of the latent model: None has the native library compute what is not a product of weights."""
        return None if self.implementation == "native" else "xla"

    @property
    def name(self) -> str:
        return f"{self.encoding.value}, {self.implementation}" + (", first pass" if self.first_pass else "")


ENGINES = (
    *(Engine(encoding, "native", exact) for encoding in Encoding for exact in (False, True)),
    Engine(Encoding.TWO_BIT, "xla", False),
)


def main(args: list[str] | None = None) -> int:
    """Compares the run named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--dtype", choices=[dtype.value for dtype in DType], default=DType.FLOAT32.value)
    parsed = parser.parse_args(args)
    config = configs.read(TrainConfig, parsed.run / run_directory.CONFIG)
    model = models.load(parsed.run)
    held_out = prepare(config.data, vocab_size=config.model.vocab_size, tokenizer=model.tokenizer).validation.ids
    if len(held_out) < parsed.prompts * parsed.prompt_tokens:
        raise UserError(f"{parsed.run} has {len(held_out)} held-out tokens: must be at least {parsed.prompts * parsed.prompt_tokens}")
    starts = np.linspace(0, len(held_out) - parsed.prompt_tokens, parsed.prompts).astype(int)
    prompts = [np.asarray(held_out[start : start + parsed.prompt_tokens]).astype(np.int32) for start in starts]
    shape = replace(model.config, dtype=DType(parsed.dtype))

    def tokens(tree: Any, implementation: str | None, rough: Any = None) -> tuple[np.ndarray, float]:
        begun, rows = time.perf_counter(), []
        for start in range(0, len(prompts), parsed.batch):
            part = prompts[start : start + parsed.batch]
            options: dict[str, Any] = {"max_new_tokens": parsed.new_tokens, "stop_tokens": (), "implementation": implementation}
            rows += [row.tokens for row in generate(tree, shape, part, first_pass=rough, **options).rows]
            print(f"\r{len(rows)} prompts", end="", file=sys.stderr)
        print(file=sys.stderr)
        return np.stack(rows), time.perf_counter() - begun

    latent = {beside: tokens(model.params, beside) for beside in sorted({engine.beside for engine in ENGINES}, key=str)}
    found = []
    for engine in ENGINES:
        packed = params.pack(model.params, shape, engine.encoding)
        made, seconds = tokens(packed, engine.implementation, first_pass(packed, shape) if engine.first_pass else None)
        expected = latent[engine.beside][0]
        found.append({"engine": engine.name, "tokens": made.size, "differ": int((made != expected).sum()), "seconds": round(seconds, 1)})
        print(f"{engine.name}: {found[-1]['differ']} of {made.size} tokens differ")
    facts = {
        "run": parsed.run.name,
        "step": model.provenance.get("step"),
        "parameters": sum(int(np.prod(leaf.shape)) for _, leaf in params.leaves(model.params)),
        "settings": {name: getattr(parsed, name) for name in ("prompts", "prompt_tokens", "new_tokens", "batch", "dtype")},
        "distinct_tokens": int(np.unique(latent[None][0]).size),
        "latent_seconds": {str(beside or "native"): round(seconds, 1) for beside, (_, seconds) in latent.items()},
        "between_latent_engines_differ": int((latent[None][0] != latent["xla"][0]).sum()),
        "engines": found,
        "environment": run_directory.environment(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"{parsed.run.resolve().name}-{parsed.dtype}.json"
    (RESULTS / name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return int(any(one["differ"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
