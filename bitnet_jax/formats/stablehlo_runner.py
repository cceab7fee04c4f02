"""Continues a prompt greedily with the model in this folder. Needs jax and numpy; for text in place of token ids, tokenizers as well."""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export


def main(here: Path) -> None:
    """Runs the model in the folder `here` as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", help="text; with --ids token ids such as 1,17,4, and so is the result")
    parser.add_argument("--ids", action="store_true")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens at most")
    args, manifest = parser.parse_args(), json.loads((here / "manifest.json").read_text("utf-8"))
    for name, entry in manifest["files"].items():
        if hashlib.sha256(np.memmap(here / name, mode="r")).hexdigest() != entry["sha256"]:
            sys.exit(f"{name} is damaged: its hash is not the manifest's")
    if manifest["calling_convention"] > export.maximum_supported_calling_convention_version:
        sys.exit(f"jax {jax.__version__} is too old for the programs, which jax {manifest['jax']} exported")
    sys.path.append(str(here / "flatbuffers.zip"))  # jax.export reads programs with this package, and jax does not bring it
    programs = [export.deserialize(bytearray((here / name).read_bytes())) for name in ("prefill.bin", "decode.bin")]
    prefill, decode = (jax.jit(program.call, donate_argnums=(1, 2)) for program in programs)
    raw, weights = np.memmap(here / "weights.safetensors", mode="r"), {}
    first = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    for name, entry in json.loads(raw[8:first].tobytes()).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = {"U8": np.uint8, "F32": np.float32, "BF16": jax.numpy.bfloat16}[entry["dtype"]]
            weights[name] = jax.device_put(raw[first + begin : first + end].view(dtype).reshape(entry["shape"]))
    if args.ids:
        tokenizer, ids = None, [int(i) for i in args.prompt.split(",")]
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
        tokenizer.encode_special_tokens = True  # text stays text
        ids = manifest["prefix"] + tokenizer.encode(args.prompt, add_special_tokens=False).ids
    capacity, known = manifest["capacity"], manifest["config"]["vocab_size"]
    if not 1 <= len(ids) <= capacity - args.tokens or not 0 <= min(ids) <= max(ids) < known:
        sys.exit(f"prompt and new tokens must be from 1 to {capacity} together, with ids from 0 to {known - 1}")
    k, v = (jax.numpy.zeros(**manifest["cache"]) for _ in "kv")
    length, chunk, new = np.zeros(manifest["batch"], np.int32), manifest["chunk"], []
    for start in range(0, len(ids), chunk):  # every row of the batch is the same prompt
        count = min(chunk, len(ids) - start)
        tokens = np.array([ids[start : start + chunk] + [0] * (chunk - count)] * len(length), np.int32)
        logits, k, v, length = prefill(weights, k, v, length, tokens, np.full(len(length), count, np.int32))
    while len(new) < args.tokens:
        if new:
            logits, k, v, length = decode(weights, k, v, length, np.full(len(length), new[-1], np.int32))
        scores = np.asarray(logits)[0, : manifest["vocabulary"]]
        if not np.isfinite(scores).all():
            sys.exit("the model's logits are not finite")
        if (token := int(scores.argmax())) in manifest["stop_tokens"]:
            break
        new.append(token)
    sys.stdout.write((tokenizer.decode(new) if tokenizer else ",".join(map(str, new))) + "\n")


if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
