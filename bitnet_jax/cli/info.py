"""bitnet-jax info PATH: what a run or a model file is."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from bitnet_jax.cli import arguments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Says what a run or a model file is: shape, parameters, bytes by part, ternary statistics per layer, provenance."""

    path: tyro.conf.Positional[Path]
    """A run's folder, a model in any format that `convert` reads, or the name of a preset."""
    json: bool = False
    """Print one JSON object instead of tables."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parsed = arguments.parse(Args, args, "info")
    facts = gather(parsed.path)
    if parsed.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)
    return 0


def gather(path: Path) -> dict[str, Any]:
    """Everything the command shows, as JSON values; for a preset only what follows from the configuration."""
    from bitnet_jax import config as configs
    from bitnet_jax import costs
    from bitnet_jax.bitlinear import is_ternary
    from bitnet_jax.config import ModelConfig
    from bitnet_jax.presets import presets

    if not path.exists() and str(path) in presets():
        config, facts = ModelConfig.preset(str(path)), {"name": str(path), "kind": "preset"}
    else:
        from bitnet_jax import models, statistics

        model = models.load(path)
        config = model.config
        facts = {
            "name": str(path),
            "kind": model.kind,
            "packed": model.packed,
            "bytes_on_disk": _bytes_on_disk(path),
            "layers": statistics.ternary_layers(model.params, config),
            "tokenizer": None if model.tokenizer is None else {"vocab_size": model.tokenizer.vocab_size, "eos_id": model.tokenizer.eos_id},
            "provenance": model.provenance,
        }
    return facts | {
        "config": configs.to_dict(config),
        "parameters": asdict(costs.parameters(config)) | {"total": costs.parameters(config).total},
        "bytes": {
            storage.value: asdict(costs.bytes_by_part(config, storage)) | {"total": costs.bytes_by_part(config, storage).total}
            for storage in costs.Storage
            if is_ternary(config) or storage in (costs.Storage.FLOAT32, costs.Storage.BFLOAT16)
        },
    }


def _bytes_on_disk(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def show(facts: dict[str, Any]) -> None:
    """Prints the facts as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    config = facts["config"]
    packed = " packed" if facts.get("packed") else ""
    console.print(f"[bold]{facts['name']}[/bold]: {facts['kind']}{packed}, {facts['parameters']['total']:,} parameters", highlight=False)
    console.print(
        f"{config['num_layers']} layers, width {config['hidden_size']}, feed-forward {config['ffn_size']} ({config['ffn']}), "
        f"{config['num_heads']} heads of {config['head_dim']} ({config['num_kv_heads']} key-value), vocabulary {config['vocab_size']}"
        f"{' tied' if config['tie_embeddings'] else ''}; linear layers: {config['linear']}, weights {config['quant']['weight']}, "
        f"activations {config['quant']['activation']} {config['quant']['activation_bits']} bits, norm {config['norm']}",
        highlight=False,
    )
    parts = [name for name in facts["parameters"] if name != "total"]
    table = Table("part", "parameters", *facts["bytes"], title="parameters, and bytes in each form")
    for part in [*parts, "total"]:
        table.add_row(part, f"{facts['parameters'][part]:,}", *(f"{form[part]:,}" for form in facts["bytes"].values()))
    console.print(table)
    if facts.get("layers"):
        table = Table("layer", "matrix", "shape", "-1", "0", "+1", "scale", title="ternary weights")
        for row in facts["layers"]:
            minus, zero, plus = (f"{share:.3f}" for share in row["fractions"])
            table.add_row(
                str(row["layer"]), row["matrix"], f"{row['shape'][0]} x {row['shape'][1]}", minus, zero, plus, f"{row['scale']:.5f}"
            )
        console.print(table)
    if facts.get("provenance"):
        console.print("provenance:", highlight=False)
        console.print(json.dumps(facts["provenance"], indent=2), highlight=False, markup=False)
