"""The process of one measurement: `python -m bitnet_jax.benchmark.worker JOB`, a JSON object; the last line it prints is another.

The time to the first token counts from `begun`, which the starting process takes from the clock that all processes share.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitnet_jax.benchmark import energy
from bitnet_jax.errors import RunError, UserError

_COLD_TOKENS = 8
_BANDWIDTH_BYTES = 1 << 30


def main(text: str) -> int:
    """Does the job and returns the exit code; an error is one line."""
    job = json.loads(text)
    try:
        found = JOBS[job["job"]](job)
    except (UserError, NotImplementedError) as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return 2
    except (RunError, MemoryError, OSError) as error:
        sys.stderr.write(f"{' '.join(str(error).split()) or type(error).__name__}\n")
        return 1
    sys.stdout.write(f"\n{json.dumps(found)}\n")
    return 0


def make(job: dict[str, Any]) -> dict[str, Any]:
    """Writes a random model of a preset's shape."""
    from bitnet_jax.config import DType, ModelConfig
    from bitnet_jax.formats import model_file
    from bitnet_jax.formats import weights as leafwise
    from bitnet_jax.formats.random_model import random_packed
    from kernels_pallas import Encoding

    config = replace(ModelConfig.preset(job["preset"]), dtype=DType.BFLOAT16)
    path = Path(job["model"])
    path.parent.mkdir(parents=True, exist_ok=True)
    return {"bytes": model_file.write(path, leafwise.packed(random_packed(config), Encoding(job["encoding"])))}


def describe(job: dict[str, Any]) -> dict[str, Any]:
    """What the model is, from its header, and what this machine is."""
    from bitnet_jax import config as configs
    from bitnet_jax import cpu, models
    from bitnet_jax.bitlinear import is_ternary
    from bitnet_jax.formats.files import file_size
    from bitnet_jax.training import run_directory
    from kernels_pallas import IMPLEMENTATIONS

    cpu.register()
    if job["implementation"] not in (None, *IMPLEMENTATIONS):
        raise UserError(f"implementation {job['implementation']!r} is unknown: must be one of {', '.join(IMPLEMENTATIONS)}")
    weights, kind = models.open_weights(job["model"])
    ternary = is_ternary(weights.config)
    unpacked = "two_bit" if ternary else weights.config.dtype.value
    return {
        "model": {
            "kind": kind,
            "bytes": file_size(Path(job["model"])),
            "storage": weights.encoding.value if weights.encoding else unpacked,
            "config": configs.to_dict(weights.config),
        },
        "environment": run_directory.environment() | {"processor_flags": _processor_flags()},
    }


def speed(job: dict[str, Any]) -> dict[str, Any]:
    """Prefill and decode: at first, with what the first use of everything costs, and then again; at once, and streamed."""
    from bitnet_jax import models

    begun = time.monotonic()
    model = models.load(job["model"], pack=True)
    loaded = time.monotonic() - begun
    return {"load_seconds": loaded, **_paces(model.params, model.config, job, model.release)}


def twin(job: dict[str, Any]) -> dict[str, Any]:
    """As `speed`, of the full-precision twin with random weights of the configuration's type."""
    import jax
    import ml_dtypes
    import numpy as np

    from bitnet_jax import config as configs
    from bitnet_jax.config import Layers, ModelConfig
    from bitnet_jax.transformer import parameter_shapes

    # Written out layer by layer: a scan would copy each layer's weights out of their stack in every step.
    config = replace(configs.from_dict(ModelConfig, job["config"]).twin, layers=Layers.LOOP)
    random = np.random.default_rng(0)

    def leaf(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        # Signs and 7 bits of fraction at one exponent: numbers of size 2^-6 to 2^-5, made two bytes at a time.
        bits = random.integers(0, 1 << 8, shape.shape, np.uint16)
        return (((bits & 0x80) << 8) | (0x3C80 + (bits & 0x7F))).astype(np.uint16).view(ml_dtypes.bfloat16).astype(config.dtype.value)

    return _paces(jax.tree.map(lambda shape: jax.device_put(leaf(shape)), parameter_shapes(config)), config, job)


def start(job: dict[str, Any]) -> dict[str, Any]:
    """Time to the first token of a process."""
    from bitnet_jax import models
    from bitnet_jax.inference import stream

    begun = time.monotonic()
    model = models.load(job["model"], pack=True)
    loaded = time.monotonic() - begun
    pieces = stream(model.params, model.config, **_options(model.params, model.config, job, model.release))
    next(pieces)
    first = time.monotonic() - job["begun"]
    return {"first_token_seconds": first, "load_seconds": loaded, "compile_seconds": pieces.result().timing.compile_seconds}


def bandwidth(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes a second that the cores can read from memory; without native kernels they are not measured, and nothing is held to them."""
    from bitnet_jax.cpu import build, read_bandwidth

    reason = build.unavailable()
    if reason is not None:
        return {"failed": reason}
    return {"bytes_per_second": 1e9 * read_bandwidth(_BANDWIDTH_BYTES, job["threads"])}


JOBS = {"make": make, "describe": describe, "speed": speed, "twin": twin, "start": start, "bandwidth": bandwidth}


def _paces(params: Any, config: Any, job: dict[str, Any], release: Callable[[], None] = lambda: None) -> dict[str, Any]:
    from bitnet_jax.inference import generate, stream

    begun = time.monotonic()
    options = _options(params, config, job, release)
    prepared = time.monotonic() - begun
    pieces = stream(params, config, **options)
    next(pieces)
    first = time.monotonic() - job["begun"]
    for _ in range(min(_COLD_TOKENS, job["generate"] - 1)):
        next(pieces)
    cold = pieces.result().timing
    del pieces
    warm = generate(params, config, **options).timing
    found = {
        "first_token_seconds": first,
        "first_pass_seconds": prepared,
        "compile_seconds": cold.compile_seconds,
        "cold_prefill_tokens_per_second": cold.prefill_tokens_per_second,
        "cold_decode_tokens_per_second": cold.decode_tokens_per_second,
        "prefill_tokens_per_second": warm.prefill_tokens_per_second,
        "decode_tokens_per_second": warm.decode_tokens_per_second,
        "head": config.dtype.value if options.get("first_pass") is None else "int8",
    }
    if job["stream"]:
        pieces = stream(params, config, **options)
        next(pieces)
        before, begun = energy.read(), time.perf_counter()
        made = sum(1 for _ in pieces)
        found["streamed_tokens_per_second"] = made / (time.perf_counter() - begun)
        after = energy.read()
        found["joules_per_token"] = None if before is None or after is None else after.joules_since(before) / made
    return found


def _options(params: Any, config: Any, job: dict[str, Any], release: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What `generate` and `stream` are given, as `bitnet-jax generate` does: with the first pass of the head where it is of use."""
    import numpy as np

    from bitnet_jax import inference

    prompt = np.random.default_rng(job["seed"]).integers(0, config.vocab_size, job["prompt"], np.int32)
    options = {"prompts": [prompt], "max_new_tokens": job["generate"], "stop_tokens": (), "implementation": job["implementation"]}
    if job["generate"] >= inference.WORTHWHILE_TOKENS and config.vocab_size >= inference.WORTHWHILE_VOCABULARY:
        options["first_pass"] = inference.first_pass(params, config, release, job["implementation"])
    return options


def _processor_flags() -> list[str]:
    """What the processor says it can do; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # nothing is left to tidy up that the system does not
