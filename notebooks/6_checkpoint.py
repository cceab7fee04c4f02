# %% [markdown]
# # 6. Inside a checkpoint
#
# Load a model in the layout of the official checkpoint, `microsoft/bitnet-b1.58-2B-4T`, and look inside: how its weights are spread over
# -1, 0 and 1, what goes into its linear layers, and where that has outliers and zeros.
#
# Without more, the notebook trains a small model of that structure first and writes it in that layout. Any other checkpoint takes its
# place: `CHECKPOINT` below is a path, or a name on the Hugging Face hub.

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

import numpy as np

import bitnet_jax as bj
from bitnet_jax import plotting
from bitnet_jax.config import DataConfig, FeedForward, OptimizerConfig, OutputConfig
from bitnet_jax.conversion import Format, convert
from bitnet_jax.evaluation import activation_statistics
from bitnet_jax.models import open_weights
from bitnet_jax.statistics import ternary_layers

CHECKPOINT = None  # "microsoft/bitnet-b1.58-2B-4T" where there is a network: 1.2 GB; or a folder, a .gguf, a run of yours

# %% [markdown]
# ## A checkpoint
#
# 2B4T has norms before o_proj and down_proj, and relu² between gate and down. This one has that too, in four layers; it reads the manual
# of Python for some hundred steps, byte by byte. `convert` writes a folder as Microsoft's is, and proves that the model in it is the same.

# %%
work = Path(tempfile.mkdtemp())


def small_checkpoint(folder):
    """A small model of the structure of 2B4T, trained and written in the official layout."""
    steps = 40 if SMOKE else 400
    config = bj.TrainConfig(
        model=replace(bj.ModelConfig.preset("ladder-0.2m"), ffn=FeedForward.RELU2, num_layers=4),
        data=DataConfig(source="stdlib", tokenizer="bytes", seq_len=64 if SMOKE else 128),
        optimizer=OptimizerConfig(learning_rate=1e-2, second_learning_rate=6e-3, final_learning_rate=1e-4, warmup_steps=steps // 16),
        output=OutputConfig(tensorboard=False, log_every=steps // 20, checkpoint_every=steps),
        steps=steps,
        batch_size=8,
    )
    bj.train_run(config, work / "run")
    weights, _ = open_weights(work / "run")
    print(convert(weights, folder, Format.HF_PACKED).proof)


if CHECKPOINT is None:
    CHECKPOINT = work / "checkpoint"
    small_checkpoint(CHECKPOINT)
    print(*sorted(path.name for path in CHECKPOINT.iterdir()), sep="\n")

# %%
model = bj.load(CHECKPOINT)
print(f"{model.kind}, packed: {model.packed}, layers: {model.config.num_layers}, width: {model.config.hidden_size}")

# %% [markdown]
# ## Weights
#
# Absmean divides a matrix by the mean of its magnitudes and rounds: whatever is smaller than half of that mean becomes 0. Of a normal
# distribution that is 31 % (dashed). The FAQ of b1.58 reports about a third for each of -1, 0 and 1. The scale is what a weight of 1
# stands for.

# %%
plotting.ternary(ternary_layers(model.params, model.config), "Ternary weights")

# %% [markdown]
# ## Activations
#
# Each token's activations are divided by their largest and rounded to 8 bits. So one large number costs the others their precision: the
# further the solid and dashed lines are above the dotted one, the fewer codes the bulk has. The input of down_proj is the product of two
# projections, one of them squared: it has the long tail (FAQ; BitNet a4.8 keeps 8 bits there for that reason). relu leaves zeros in it,
# and rounding makes more: FAQ and a4.8 report above 80 % zeros at full size.

# %%
TEXT = (
    "A language model assigns a probability to every text. It reads the words that came before and says which one comes next. "
    "The weights of this model are minus one, zero or one, so that a product with them is an addition, a subtraction, or nothing. "
) * 4
tokens = np.asarray([*model.prefix, *model.need_tokenizer().encode(TEXT)])[: 256 if SMOKE else 512]
statistics = activation_statistics(model.params, model.config, tokens[None])
plotting.activations(statistics, f"Inputs of the linear layers over {len(tokens)} tokens")

# %% [markdown]
# Are the outliers always the same features? A column that is bright from top to bottom says so. Dark columns before down_proj are features
# whose relu never opened.

# %%
plotting.channels(statistics, "Largest activation of each feature")

# %% [markdown]
# ## Sparsity and outliers, together
#
# The share of products that do nothing: the weight is 0, or the activation's code is; either of them, as if the two were independent.

# %%
fractions = {(row["layer"], row["matrix"].split("/")[-1]): row["fractions"][1] for row in ternary_layers(model.params, model.config)}
first = {"qkv": "q", "o": "o", "gate_up": "up", "down": "down"}
plotting.bars(
    {
        name: {
            "weight is 0": [fractions[row.layer, matrix] for row in statistics if row.input == name],
            "activation is 0": [row.zero_codes or 0 for row in statistics if row.input == name],
            "either": [1 - (1 - fractions[row.layer, matrix]) * (1 - (row.zero_codes or 0)) for row in statistics if row.input == name],
        }
        for name, matrix in first.items()
    },
    "share of products",
    "Products with zero: median and quartiles over the layers",
)

# %% [markdown]
# The share of activations further out than six times the root mean square. Of a normal distribution two in a thousand million are.

# %%
plotting.bars({name: {"outliers": [row.outliers for row in statistics if row.input == name]} for name in first}, "share of activations")
