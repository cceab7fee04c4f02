"""BitNet b1.58 in JAX and Flax: train ternary language models beside their full-precision twins, pack them, run them.

    import bitnet_jax as bj

    model = bj.load("runs/quickstart/bitnet")
    logits = bj.Transformer(model.config).apply({"params": model.params}, tokens).logits

Importing this has no side effect and does not start JAX; a name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet_jax.bitlinear import BitLinear as BitLinear
    from bitnet_jax.config import DataConfig as DataConfig
    from bitnet_jax.config import ModelConfig as ModelConfig
    from bitnet_jax.config import OptimizerConfig as OptimizerConfig
    from bitnet_jax.config import OutputConfig as OutputConfig
    from bitnet_jax.config import QuantConfig as QuantConfig
    from bitnet_jax.config import TrainConfig as TrainConfig
    from bitnet_jax.data import Tokenizer as Tokenizer
    from bitnet_jax.data import prepare as prepare
    from bitnet_jax.errors import RunError as RunError
    from bitnet_jax.errors import UserError as UserError
    from bitnet_jax.evaluation import perplexity as perplexity
    from bitnet_jax.inference import Sampling as Sampling
    from bitnet_jax.inference import check_parity as check_parity
    from bitnet_jax.inference import generate as generate
    from bitnet_jax.inference import stream as stream
    from bitnet_jax.models import Model as Model
    from bitnet_jax.models import load as load
    from bitnet_jax.params import pack as pack
    from bitnet_jax.params import unpack as unpack
    from bitnet_jax.presets import presets as presets
    from bitnet_jax.presets import recipe as recipe
    from bitnet_jax.training.loop import train as train
    from bitnet_jax.training.run import train_run as train_run
    from bitnet_jax.transformer import KVCache as KVCache
    from bitnet_jax.transformer import Output as Output
    from bitnet_jax.transformer import Transformer as Transformer

__version__ = "0.1.0"

_HOME = {
    # Configuration
    "ModelConfig": "config",
    "QuantConfig": "config",
    "TrainConfig": "config",
    "DataConfig": "config",
    "OptimizerConfig": "config",
    "OutputConfig": "config",
    "presets": "presets",
    "recipe": "presets",
    # Model
    "Transformer": "transformer",
    "Output": "transformer",
    "KVCache": "transformer",
    "BitLinear": "bitlinear",
    # Parameters
    "pack": "params",
    "unpack": "params",
    # Models on disk
    "Model": "models",
    "load": "models",
    # Data
    "prepare": "data",
    "Tokenizer": "data",
    # Training, evaluation, generation
    "train": "training.loop",
    "train_run": "training.run",
    "perplexity": "evaluation",
    "generate": "inference",
    "stream": "inference",
    "Sampling": "inference",
    "check_parity": "inference",
    # Errors
    "UserError": "errors",
    "RunError": "errors",
}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitnet_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bitnet_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
