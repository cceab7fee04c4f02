# %% [markdown]
# # 3. Ablate one thing
#
# Take a BitNet, change one field of its configuration, train both with several seeds, and see whether the change is larger than what the
# seed does. This notebook does it for the place of the norm. To ask a question of your own, change `CHOSEN`, or write a dictionary.

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
from dataclasses import replace

from bitnet_jax import compilation

compilation.keep_programs()  # seeds differ in numbers alone: the program of the first serves the others

import bitnet_jax as bj
from bitnet_jax import config, plotting
from bitnet_jax.config import ActivationQuantizer, NormPlacement, WeightQuantizer

RUNS = Path(tempfile.mkdtemp())  # in a folder of your own, the runs are kept, and go on where they were

# %% [markdown]
# ## The base

# %%
if SMOKE:  # text that every Python has, and next to no model
    MODEL = dataclasses.replace(bj.ModelConfig.preset("ladder-0.2m"), num_layers=1)
    DATA = bj.DataConfig(source="stdlib", tokenizer="bytes", seq_len=32, validation_fraction=0.01)
    STEPS, BATCH, WINDOWS, SEEDS = 10, 4, 4, (0, 1)
else:
    MODEL = bj.ModelConfig.preset("ladder-0.2m")
    DATA = bj.DataConfig(source="shakespeare", seq_len=64)
    STEPS, BATCH, WINDOWS, SEEDS = 200, 16, 64, (0, 1, 2)

BASE = bj.TrainConfig(
    model=MODEL,
    data=DATA,
    optimizer=bj.OptimizerConfig(learning_rate=6e-3, second_learning_rate=4e-3, final_learning_rate=1e-4, warmup_steps=STEPS // 10),
    output=bj.OutputConfig(
        log_every=max(1, STEPS // 25), eval_every=STEPS // 5, eval_windows=WINDOWS, checkpoint_every=STEPS, tensorboard=False
    ),
    steps=STEPS,
    batch_size=BATCH,
)

# %% [markdown]
# ## The variants
#
# Each is the base with one thing replaced, and the first one is what the others are compared with. A change of the quantiser, of the
# schedule, or of anything else in a `TrainConfig` is written in the same way. `config.differences` says what was changed, so that it is
# one thing.


# %%
def model(**changes):
    """The base with other fields of the model."""
    return replace(BASE, model=replace(MODEL, **changes))


def quantiser(**changes):
    """The base with other fields of the quantiser."""
    return model(quant=replace(MODEL.quant, **changes))


def optimizer(**changes):
    """The base with other fields of the optimiser."""
    return replace(BASE, optimizer=replace(BASE.optimizer, **changes))


ABLATIONS = {
    "norm": {
        "before o and down as well": BASE,
        "inside every layer": model(norm=NormPlacement.INSIDE),
        "block norms only": model(norm=NormPlacement.NONE),
    },
    "weights": {
        "absmean": BASE,
        "absmedian": quantiser(weight=WeightQuantizer.ABSMEDIAN),
        "absmean of 32": quantiser(weight_group=32),
        "sign": quantiser(weight=WeightQuantizer.SIGN),
    },
    "activations": {
        "8 bits": BASE,
        "4 bits": quantiser(activation_bits=4),
        "not quantised": quantiser(activation=ActivationQuantizer.NONE),
    },
    "learning rate": {f"{rate:g}": optimizer(learning_rate=rate, second_learning_rate=rate / 1.5) for rate in (6e-3, 1.5e-3, 2.4e-2)},
}
CHOSEN = "norm"

VARIANTS = dict([*ABLATIONS[CHOSEN].items()][: 2 if SMOKE else None])
for label, variant in VARIANTS.items():
    print(f"{label}: {'; '.join(config.differences(BASE, variant)) or 'the base'}")

# %% [markdown]
# ## The runs
#
# One for each variant and seed. The seed decides the initial weights and the order of the text, the same for all variants. Lines are
# means over seeds, bands one standard deviation.

# %%
folders, losses = {}, {}
for label, variant in VARIANTS.items():
    folders[label] = [RUNS / CHOSEN / f"{label}-{seed}" for seed in SEEDS]
    summaries = [bj.train_run(replace(variant, seed=seed), folder) for seed, folder in zip(SEEDS, folders[label], strict=True)]
    losses[label] = [summary.evaluation["validation_loss"] for summary in summaries]
plotting.loss_curves(folders, f"Ablation of {CHOSEN}, {len(SEEDS)} seeds")

# %% [markdown]
# ## What is left of it
#
# Grey points are seeds, and the bars one standard deviation over them. On the left are the losses themselves. On the right each is
# compared with the first variant's *of the same seed*: what the seed does to all variants alike is gone, so this is where small effects
# show. A bar that reaches over zero says that so many seeds cannot tell the two apart. A few hundred steps of a tiny model say little
# about a large one either way; the runs of `experiments/configs/ablations.py` are larger and have the papers' claims beside them.

# %%
plotting.over_seeds(losses, "held-out loss (nats per token)", f"Ablation of {CHOSEN}")

# %% [markdown]
# Where a variant is unstable rather than worse, its gradients say so.

# %%
plotting.logged(folders, ["grad_norm", "ternary/all/zero"], "Norm of the gradient, and share of zero weights")
