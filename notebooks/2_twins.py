# %% [markdown]
# # 2. Twins
#
# A BitNet and its full-precision twin: the same shape, initial weights, text and order of the text. They differ in one field of the
# configuration, so whatever differs between the two curves is due to the ternary layers. A small pair is trained here on Shakespeare,
# compared, packed, and asked for a few lines.

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
import dataclasses
import tempfile

from bitnet_jax import compilation

compilation.keep_programs()  # what is compiled once is found again the next time

import treescope

import bitnet_jax as bj
from bitnet_jax import config, plotting, statistics
from bitnet_jax.config import DType
from bitnet_jax.evaluation import evaluator
from bitnet_jax.formats import model_file
from bitnet_jax.params import LINEAR
from kernels_pallas import Encoding

RUNS = Path(tempfile.mkdtemp())  # in a folder of your own, the runs are kept, and go on where they were

# %% [markdown]
# ## Two configurations
#
# Every choice is a field of a frozen dataclass; `dataclasses.replace` changes it.

# %%
if SMOKE:  # text that every Python has, and next to no model
    MODEL = dataclasses.replace(bj.ModelConfig.preset("ladder-0.2m"), num_layers=1)
    DATA = bj.DataConfig(source="stdlib", tokenizer="bytes", seq_len=32, validation_fraction=0.01)
    STEPS, BATCH, WINDOWS = 12, 4, 4
else:
    MODEL = bj.ModelConfig.preset("ladder-1m")
    DATA = bj.DataConfig(source="shakespeare", seq_len=128)
    STEPS, BATCH, WINDOWS = 240, 8, 32

bitnet = bj.TrainConfig(
    model=MODEL,
    data=DATA,
    optimizer=bj.OptimizerConfig(learning_rate=6e-3, second_learning_rate=4e-3, final_learning_rate=1e-4, warmup_steps=STEPS // 10),
    output=bj.OutputConfig(
        log_every=max(1, STEPS // 40), eval_every=STEPS // 6, eval_windows=WINDOWS, checkpoint_every=STEPS, tensorboard=False
    ),
    steps=STEPS,
    batch_size=BATCH,
    seed=0,
)
twin = dataclasses.replace(bitnet, model=bitnet.model.twin)
print("\n".join(config.differences(bitnet, twin)))

# %% [markdown]
# ## Training
#
# Small ternary models lag behind their twins at equal learning rates or overtake them, depending on the rate: BitNet likes high ones.
# Both have the same here, so this is a demonstration and no comparison; `experiments/configs/scaling.py` gives each side its own best
# rate, and several seeds.

# %%
folders = {"b1.58": RUNS / "bitnet", "full precision": RUNS / "twin"}
for configuration, folder in zip((bitnet, twin), folders.values(), strict=True):
    bj.train_run(configuration, folder)
plotting.loss_curves(folders, "The same text in the same order")

# %% [markdown]
# All of the held-out text, in bits for each byte: a unit that does not depend on the tokenizer. The packed model is the trained one, so
# it has the same bar.

# %%
trained = {label: bj.load(folder) for label, folder in folders.items()}
latent = trained["b1.58"]
packed = bj.pack(latent.params, latent.config)
held_out = bj.prepare(DATA, vocab_size=MODEL.vocab_size).validation


def bits_per_byte(params, configuration):
    """On the held-out text; in smoke mode on its beginning."""
    beginning = WINDOWS * DATA.seq_len if SMOKE else None
    evaluate = evaluator(configuration, held_out.ids, window=DATA.seq_len, text_bytes=held_out.text_bytes, max_tokens=beginning)
    return evaluate(params)["validation_bits_per_byte"]


found = {label: bits_per_byte(model.params, model.config) for label, model in trained.items()}
found["b1.58, packed"] = bits_per_byte(packed, latent.config)
plotting.bars({label: {"b": value} for label, value in found.items()}, "bits per byte", "Held-out text")

# %% [markdown]
# ## The packed model
#
# Packing puts bytes in place of the latent matrices, under the same names. Here is the tree of one; click to open it.

# %%
if "IPython" in sys.modules:  # it draws for notebooks only
    treescope.show(packed)

# %% [markdown]
# How the weights of each kind of layer are spread over the three values, all layers together:

# %%
rows = statistics.ternary_layers(packed, latent.config)
shares = {kind: [row["fractions"] for row in rows if row["matrix"].endswith(f"/{kind}")] for kind in LINEAR}
plotting.bars(
    {kind: dict(zip(("-1", "0", "+1"), zip(*of, strict=True), strict=True)) for kind, of in shares.items()},
    "share of the weights",
    "Codes by kind of layer, median and quartiles over layers",
)

# %% [markdown]
# The proof that nothing was lost: all codes and scales, integer sums of every layer on real activations, and the text that both write
# greedily.

# %%
length = DATA.seq_len // 2
prompts = [held_out.ids[i * length : (i + 1) * length].astype("int32") for i in range(2)]
parity = bj.check_parity(latent.params, packed, latent.config, prompts, max_new_tokens=8 if SMOKE else length)
parity.require()  # raises where anything differs
print(f"equal: {parity.weights:,} codes, {parity.accumulators:,} integer sums, {parity.tokens:,} greedy tokens")

# %% [markdown]
# ## Bytes
#
# Whole files, embedding and tokenizer included. Of a packed model as small as this one most is embedding; the larger it is, the nearer
# its file comes to the bits of its linear layers.

# %%
files = {
    "latent, float32": (latent.weights(), DType.FLOAT32),
    "latent, bfloat16": (latent.weights(), DType.BFLOAT16),
    "packed, 2 bits": (latent.weights(packed), None),
    "packed, 1.6 bits": (latent.weights(bj.pack(latent.params, latent.config, Encoding.BASE3)), None),
}
sizes = {name: model_file.write(RUNS / "model.safetensors", weights, dtype=dtype) / 1e6 for name, (weights, dtype) in files.items()}
plotting.bars({name: {"file": size} for name, size in sizes.items()}, "MB", "The model on disk")

# %% [markdown]
# ## Text
#
# What the two write, from the packed bytes and in full precision. A few minutes of training make lines that look like a play, and little
# sense.

# %%
sampling = bj.Sampling(temperature=0.7, top_p=0.95)
for label, params in {"b1.58, packed": packed, "full precision": trained["full precision"].params}.items():
    model = trained["full precision"] if label == "full precision" else latent
    written = bj.generate(
        params, model.config, ["KING. "], max_new_tokens=8 if SMOKE else 80, sampling=sampling, tokenizer=model.need_tokenizer(), seed=1
    )
    print(f"--- {label}\nKING. {written.rows[0].text}\n")
