# %% [markdown]
# # 8. Learning dynamics
#
# What the latent weights and their codes do while a BitNet learns: how many codes change at a step, how the weights spread, and what the
# two stages of the published schedule do to the loss. Two small runs are trained, which differ in the schedule alone.

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

import numpy as np

import bitnet_jax as bj
from bitnet_jax import plotting
from bitnet_jax.config import Schedule
from bitnet_jax.training import codes, loop
from bitnet_jax.training.optimizer import make_optimizer

RUNS = Path(tempfile.mkdtemp())  # in a folder of your own, the runs are kept, and go on where they were

# %% [markdown]
# ## The schedules
#
# The FAQ of b1.58 trains in two stages: half-way, the learning rate falls to a lower line, and weight decay ends. Against it stands a
# single line from the same peak to the same end.

# %%
if SMOKE:  # text that every Python has, and next to no model
    MODEL = dataclasses.replace(bj.ModelConfig.preset("ladder-0.2m"), num_layers=1)
    DATA = bj.DataConfig(source="stdlib", tokenizer="bytes", seq_len=32, validation_fraction=0.01)
    STEPS, BATCH, WINDOWS = 12, 4, 4
else:
    MODEL = bj.ModelConfig.preset("ladder-0.2m")
    DATA = bj.DataConfig(source="shakespeare", tokenizer="bytes", seq_len=64)
    STEPS, BATCH, WINDOWS = 960, 4, 128

two_stage = bj.TrainConfig(
    model=MODEL,
    data=DATA,
    optimizer=bj.OptimizerConfig(learning_rate=3e-2, second_learning_rate=1e-2, final_learning_rate=1e-4, warmup_steps=STEPS // 10),
    output=bj.OutputConfig(log_every=1, eval_every=max(1, STEPS // 24), eval_windows=WINDOWS, checkpoint_every=STEPS, tensorboard=False),
    steps=STEPS,
    batch_size=BATCH,
)
linear = dataclasses.replace(two_stage, optimizer=dataclasses.replace(two_stage.optimizer, schedule=Schedule.LINEAR))
runs = {"two stages": two_stage, "one stage": linear}
plotting.schedule({label: run.optimizer for label, run in runs.items()}, STEPS)

# %% [markdown]
# ## Training, and looking on
#
# `train_run` calls `measure` with the parameters at every evaluation, and logs the numbers that it returns. This one keeps a copy of one
# latent matrix, and counts the codes of the whole model that are not what they were at the beginning.


# %%
def kernel(parameters):
    """The latent weights of one matrix [K, N]."""
    return np.asarray(parameters["blocks"]["ffn"]["down"]["kernel"][0])


def watch(run, history):
    """The function that looks on at `run`, and puts a matrix into `history` at every evaluation."""
    beginning = loop.init_run(run, make_optimizer(run.optimizer, run.steps)).params
    first = codes.snapshot(beginning, run.model)
    history[0] = kernel(beginning)

    def measure(parameters):
        history[len(history) * run.output.eval_every] = kernel(parameters)
        counts = codes.summarize(codes.count(codes.snapshot(parameters, run.model), first))
        assert counts is not None  # for the model is ternary
        return {"changed_codes": (counts.flips or 0) / counts.weights}

    return measure


folders = {label: RUNS / label for label in runs}
histories = {label: {} for label in runs}
for label, run in runs.items():
    bj.train_run(run, folders[label], measure=watch(run, histories[label]))

# %% [markdown]
# ## The S-curve
#
# At a high learning rate the loss stalls: the steps are too large to settle. Where the rate jumps down, the loss falls at once, and the
# curve has the shape of an S. Smaller steps gain less from then on, and the single line, whose rate falls all the way, catches up. In so
# short a run of so small a model it may well end lower; which schedule is better is a question for several seeds, as in notebook 3, and
# for longer runs.

# %%
plotting.logged(folders, ["validation_loss", "learning_rate"], "The S-curve of two stages")

# %% [markdown]
# ## Flips
#
# A flip is a code that is not what it was one step before. Their number follows the learning rate, down to the jump at the switch. The
# share of codes that are not what they were before the first step soon stops growing, while the flips go on: most of them are back and
# forth over a threshold.

# %%
shown = {
    "flip_fraction": "share of codes that\nflip at this step",
    "changed_codes": "share of codes not as\nbefore the first step",
    "ternary/all/zero": "share of codes\nthat are 0",
}
plotting.logged(folders, shown, "Codes on the move")

# %% [markdown]
# By kind of layer: the scale follows the weights, so the shares of the three codes move by a few points only, most of it early.

# %%
plotting.codes_over_time(folders["two stages"], "Codes of the run of two stages")

# %% [markdown]
# ## Latent weights
#
# One matrix, in units of its scale. Between the dashed lines the code is 0. The gradient of a latent weight is that of its rounded value,
# so there is nothing that draws it to one of the three values: the weights spread over the thresholds as they did at the beginning.

# %%
plotting.latent_histograms(histories["two stages"], MODEL.quant, "down of the first block")

# %% [markdown]
# The same matrix at the beginning and at the end, in its own units: the weights have grown, and the scale with them.

# %%
history = histories["two stages"]
ends = {"before training": (history[0], MODEL.quant), "after training": (history[STEPS], MODEL.quant)}
plotting.weight_histogram(ends, "down of the first block")
