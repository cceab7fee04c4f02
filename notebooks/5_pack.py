# %% [markdown]
# # 5. Pack, look at the bytes, run, export
#
# What is trained are latent weights in float32; what is served are their codes, -1, 0 or 1, four or five to a byte. This notebook packs a
# model, looks at the bytes, runs both forms and compares them integer by integer, and writes the model in the formats of other programs.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# %matplotlib inline

SMOKE = os.environ.get("SMOKE", "0") not in ("", "0")  # SMOKE=1: small examples, as the tests run this
ROOT = next((folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "experiments" / "results").is_dir()), None)
if importlib.util.find_spec("bitnet_jax") is None:  # as on Colab: from a clone of the repository where there is one
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", str(ROOT or "bitnet-jax")], check=True)

# %%
import tempfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

import bitnet_jax as bj
from bitnet_jax import conversion, cpu, plotting, quant
from bitnet_jax.config import DType, FeedForward
from bitnet_jax.conversion import Format, Options
from bitnet_jax.formats import model_file, safetensors, stablehlo
from bitnet_jax.models import Model
from kernels_pallas import Encoding, pack, ternary_matmul, unpack

work = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)

# %% [markdown]
# ## A byte and its four weights
#
# A weight w is stored as w + 1: 0, 1 or 2, which are two bits. One column of a matrix, 128 inputs of it, is a block of 32 bytes. Byte j
# holds the inputs j, j + 32, j + 64 and j + 96, the first in the top bits: below each column of four weights stands their byte. A shift
# and a mask take 32 neighbours out of 32 bytes at a time.

# %%
matrix = rng.integers(-1, 2, (128, 4)).astype(np.int8)  # [K, N]
packed = pack(matrix, np.full((), 0.5, np.float32))
plotting.packed_block(packed, output=0, title="Two bits a weight: 128 weights in 32 bytes")

# %% [markdown]
# The first byte by hand, and the way back.

# %%
w = matrix[[0, 32, 64, 96], 0].astype(int)
byte = (w[0] + 1) << 6 | (w[1] + 1) << 4 | (w[2] + 1) << 2 | (w[3] + 1)
print(f"weights {w.tolist()} -> codes {(w + 1).tolist()} -> byte {byte:08b} = {byte:#04x}; stored: {packed.codes[0, 0]:#04x}")
print("unpacked it is the same matrix:", np.array_equal(unpack(packed), matrix))

# %% [markdown]
# Three values need log2(3) = 1.58 bits, and 3^5 = 243 fits into a byte: five weights as a number in base 3. That is a fifth smaller, and a
# division in place of a shift.

# %%
plotting.packed_block(pack(matrix, np.full((), 0.5, np.float32), Encoding.BASE3), title="1.6 bits a weight: 128 weights in 26 bytes")

# %% [markdown]
# ## A model
#
# Packing replaces each latent matrix by its codes and its scale; embedding, norms and head stay as they are. The model here has random
# weights: what is compared is every number, so they do as well. `RUN` takes a run of yours.

# %%
RUN = None  # "runs/quickstart/bitnet"
if RUN is None:
    size = {"hidden_size": 128, "ffn_size": 256, "num_heads": 4, "num_kv_heads": 4, "num_layers": 2 if SMOKE else 6}
    config = replace(bj.ModelConfig.preset("ladder-0.2m"), ffn=FeedForward.RELU2, head_dim=32, **size)
    init = jax.jit(lambda: bj.Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    model = Model(config=config, params=init(), tokenizer=None, provenance={}, kind="random")
else:
    model = bj.load(RUN)
config, latent = model.config, model.params
forms = {"2 bits": bj.pack(latent, config), "1.6 bits": bj.pack(latent, config, Encoding.BASE3)}

# %% [markdown]
# The bytes of the published 2B4T in every form: packed, its embedding in bfloat16 is more than half of it.

# %%
plotting.memory(bj.ModelConfig.preset("bitnet-b1.58-2b4t"), "BitNet b1.58 2B4T in memory")

# %% [markdown]
# ## The same integers
#
# One layer: activations are rounded to int8, and their products with the codes are summed. Whoever computes these sums, from latent
# weights as in training, from packed ones by XLA, or by native code where there is a compiler, must get the same integers.

# %%
kernel = jnp.asarray(latent["blocks"]["ffn"]["up"]["kernel"][0])  # layer 0, [K, N]
x = quant.quantize_activations(jnp.asarray(rng.standard_normal((4, kernel.shape[0])), jnp.float32), config.quant).codes
trained = np.asarray(x, np.int64) @ np.asarray(quant.quantize_weights(kernel, config.quant).codes, np.int64)


def sums(form, implementation):
    """The integer sums of packed bytes."""
    one = jax.tree.map(lambda leaf: leaf[0], forms[form]["blocks"]["ffn"]["up"]["kernel"])
    one, step = replace(one, scale=jnp.ones(())), jnp.ones((4, 1))
    return ternary_matmul(x.astype(jnp.int8), one, x_scale=step, out_dtype=jnp.float32, implementation=implementation)


cpu.register()
ways = ("xla", "native") if cpu.runs("native") else ("xla",)
plotting.against(trained, {f"{form}, {way}": sums(form, way) for form in forms for way in ways}, "Sums of int8 times ternary")

# %% [markdown]
# The whole model: `check_parity` compares all codes, all scales, and the sums of every layer on the activations that it has there.

# %%
prompts = [rng.integers(0, config.vocab_size, 16).astype(np.int32) for _ in range(2)]
for form, params in list(forms.items())[: 1 if SMOKE else None]:
    found = bj.check_parity(latent, params, config, prompts, max_new_tokens=0)
    print(f"{form}, differences: {found.weights_differ} of {found.weights:,} weights,", end=" ")
    print(f"{found.scales_differ} of {found.scales:,} scales, {found.accumulators_differ} of {found.accumulators:,} sums")

# %% [markdown]
# And the tokens themselves: greedy text of the packed forms against that of the latent weights.


# %%
def text(params):
    """Greedy tokens behind every prompt."""
    return np.stack([row.tokens for row in bj.generate(params, config, prompts, max_new_tokens=24 if SMOKE else 128).rows])


expected = text(latent)
plotting.against(expected, {form: text(params) for form, params in forms.items()}, "Greedy tokens")

# %% [markdown]
# ## A file
#
# A model file is one safetensors file: a header that says where every tensor lies, and the bytes, which are mapped and used where they lie.

# %%
size = model_file.write(work / "model.safetensors", model.weights(forms["2 bits"]))
header = safetensors.File(work / "model.safetensors").tensors
for name in ("blocks/ffn/up/kernel.codes", "blocks/ffn/up/kernel.scale", "embed/embedding"):
    print(f"{name:30} {header[name].dtype:4} {header[name].shape!s:16} bytes {header[name].start:,} to {header[name].stop:,}")
plotting.file_layout(work / "model.safetensors", f"model.safetensors, {size:,} bytes")

# %% [markdown]
# ## Other formats
#
# `convert` writes a model leaf by leaf, reads the result back, and keeps it only where weights, logits and greedy tokens are those of the
# source, but for what the format itself rounds (GGUF here: the embedding, to float16). GGUF of type I2_S is for bitnet.cpp; TQ1_0 and TQ2_0
# are for the models that llama.cpp computes. The folder is for transformers. StableHLO is compiled programs beside the weights, which run
# with jax and numpy alone.

# %%
formats = {
    "latent,\nfloat32": ("latent.safetensors", Format.LATENT, Options(dtype=DType.FLOAT32)),
    "packed,\n2 bits": ("two_bit.safetensors", Format.PACKED, Options()),
    "packed,\n1.6 bits": ("base3.safetensors", Format.PACKED, Options(encoding=Encoding.BASE3)),
    "Hugging\nFace": ("folder", Format.HF_PACKED, Options()),
    "GGUF\ni2_s": ("i2_s.gguf", Format.GGUF, Options(type="i2_s")),
    "StableHLO": ("stablehlo", Format.STABLEHLO, Options(platforms=("cpu",), capacity=64)),
}
if SMOKE:
    formats = {name: formats[name] for name in ("packed,\n2 bits", "GGUF\ni2_s", "StableHLO")}
source = model.weights()
written = {}
for name, (file, kind, options) in formats.items():
    written[name] = conversion.convert(source, work / file, kind, options)
    print(f"{file}: {written[name].proof}")

# %% [markdown]
# Sizes of the files. At this size the embedding is much of a model (and GGUF keeps it in float16); StableHLO has the programs beside it.

# %%
plotting.bars({name: {"file": result.size / 1e3} for name, result in written.items()}, "kB", "The same model in every format")

# %% [markdown]
# What was exported says the same: tokens of the StableHLO folder, run without this package's model code.

# %%
plotting.against(expected[0, :24], {"StableHLO": stablehlo.generate(work / "stablehlo", prompts[0].tolist(), 24)}, "Greedy tokens")
