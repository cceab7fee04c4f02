"""One change at a time to a small BitNet b1.58, three seeds each.

Sources: b1 (2310.11453), Tables 3 and 4 and Figure 5; the FAQ of b1.58, Figures 1 and 2 and its observations; Spectra (2407.12327), its
ablations of the schedule and of binary weights; b1.58 Reloaded (2407.09527), median and double width; 2B4T (2504.12285), squared ReLU;
Hugging Face's blog on 1.58 bits, quantisation that is warmed up; results of OpenAI's parameter-golf with ternary weights, an average of
the latent weights.

Command: python -m experiments.run ablations, then python -m experiments.tables

Cost: 114 runs of 1.6 million parameters and 524,288 tokens, about 3 minutes each on two cores of a Zen 3 server: 6 hours. The time is
reckoned from that of a finished run of `scaling` at 1m by parameters and tokens; beside other work it is two to four times as long.

Seed 0 of every variant comes first, then seed 1, then seed 2, so that a run that is stopped has compared all of them.

Expected: what each group's line in `GROUPS` says.

Ours differs from the papers: 1.6 million parameters instead of 0.1 to 7 billion, a third of a token a parameter, plays. The peak learning
rate is that of the default for every change but those of the rate itself, as in the papers' ablations. The blog warms up on a model that
was trained in full precision as well; here every run begins with random weights.

What the library's configuration cannot say, and so is not here: b1's elastic quantiser and BMT; a4.8's top-K and 4-bit absmean, and 8 bits
for one matrix but 4 for others; v2's Hadamard rotation; scales of a row; the blog's sigmoid and exponential warm-ups.
"""

from dataclasses import dataclass, replace
from typing import Any

from bitnet_jax.config import ActivationQuantizer, FeedForward, Linear, ModelConfig, NormPlacement, Schedule, TrainConfig, WeightQuantizer
from experiments.cells import Cell, Results
from experiments.configs import scaling

STEPS = 512
SEEDS = (0, 1, 2)
RATE = {"bitnet": 6e-3, "twin": 3e-3}
"""The best of the sweeps of `scaling` at the sizes below this one: of 1m for the BitNet, of 0.5m for the twin."""
BASE = scaling.small("ladder-3m", num_layers=2)
"""Every width is a multiple of 256, so that weights can be scaled in groups of 64, 128 and 256. 1,575,680 parameters."""
DEFAULT = scaling.train_config(BASE, RATE["bitnet"], 0, STEPS)
TWIN = scaling.train_config(BASE.twin, RATE["twin"], 0, STEPS)


@dataclass(frozen=True)
class Group:
    """Variants that are read together; the default stands in every group.

    Attributes:
        title: what is varied.
        expected: what the papers find, and where.
        variants: name → run.
    """

    title: str
    expected: str
    variants: dict[str, TrainConfig]


def model(**changes: Any) -> TrainConfig:
    return replace(DEFAULT, model=replace(BASE, **changes))


def quant(**changes: Any) -> TrainConfig:
    return model(quant=replace(BASE.quant, **changes))


def optimizer(**changes: Any) -> TrainConfig:
    return replace(DEFAULT, optimizer=replace(DEFAULT.optimizer, **changes))


def at_rate(base: ModelConfig, rate: float) -> TrainConfig:
    return scaling.train_config(base, rate, 0, STEPS)


def half_width(linear: Linear) -> ModelConfig:
    return replace(BASE, linear=linear, hidden_size=128, ffn_size=256, head_dim=32)


HIGH, LOW = RATE["bitnet"], RATE["bitnet"] * 2 / 3
ONE_STAGE: dict[str, Any] = {"schedule": Schedule.LINEAR, "second_learning_rate": None}

GROUPS = {
    "precision": Group(
        "Weights and activations",
        "full precision, activations as they are, 8 bits, 4 bits: in this order (b1.58, Table 1; Spectra; FAQ)",
        {
            "default": DEFAULT,
            "twin": TWIN,
            "activations-none": quant(activation=ActivationQuantizer.NONE),
            "activations-4-bit": quant(activation_bits=4),
        },
    ),
    "activations": Group(
        "Over what activations are scaled",
        "per token is at least as good as per tensor (b1.58, section 2)",
        {"default": DEFAULT, "activations-per-tensor": quant(activation=ActivationQuantizer.PER_TENSOR)},
    ),
    "weights": Group(
        "Weight quantiser",
        "{-1, 1} works but is worse (FAQ; Spectra: by 0.12 to 0.19 nats), {0, 1} diverges early (FAQ); the median is close to the mean "
        "(Reloaded)",
        {
            "default": DEFAULT,
            "weights-absmedian": quant(weight=WeightQuantizer.ABSMEDIAN),
            "weights-absmax": quant(weight=WeightQuantizer.ABSMAX),
            "weights-sign": quant(weight=WeightQuantizer.SIGN),
            "weights-zero-one": quant(weight=WeightQuantizer.ZERO_ONE),
        },
    ),
    "scales": Group(
        "Inputs that share a weight scale",
        "one scale for a matrix is enough: finer ones change little (b1.58, section 2; HF blog)",
        {"default": DEFAULT, **{f"group-{size}": quant(weight_group=size) for size in (64, 128, 256)}},
    ),
    "quant-warmup": Group(
        "Quantisation warmed up",
        "a converted Llama gains by it (perplexity 12.2, against 26 from random weights), SmolLM-135M does not (HF blog)",
        {"default": DEFAULT, **{f"quant-warmup-{steps}": optimizer(quant_warmup_steps=steps) for steps in (STEPS // 4, STEPS // 2)}},
    ),
    "ema": Group(
        "Moving average of the latent weights",
        "the average, made ternary, is worse than the last weights (parameter-golf: by 0.12 to 1.07 after the round trip)",
        {"default": DEFAULT, **{f"ema-{decay:g}": optimizer(ema_decay=decay) for decay in (0.9, 0.99)}},
    ),
    "norm": Group(
        "Norm before the quantiser",
        "inside or sub-norm is better than none (b1, Table 4: 20.3 against 22.1; HF blog: 5.9 against 6.3)",
        {"default": DEFAULT, "norm-inside": model(norm=NormPlacement.INSIDE), "norm-none": model(norm=NormPlacement.NONE)},
    ),
    "ffn": Group(
        "Feed-forward of equal parameters",
        "squared ReLU is as good as SwiGLU (2B4T; a4.8)",
        {
            "default": DEFAULT,
            "ffn-relu2": model(ffn=FeedForward.RELU2),
            "ffn-gelu": model(ffn=FeedForward.GELU, ffn_size=BASE.ffn_size * 3 // 2),
        },
    ),
    "width": Group(
        "Half the width",
        "a BitNet of twice the width is close to the twin (Reloaded): default against twin-half-width",
        {
            "default": DEFAULT,
            "half-width": at_rate(half_width(Linear.BIT), RATE["bitnet"]),
            "twin-half-width": at_rate(half_width(Linear.FULL), RATE["twin"]),
        },
    ),
    "schedule": Group(
        "Schedule",
        "two stages < low rate with weight decay < either rate without (FAQ, Figure 1b: 3.239, 3.275, 3.293, 3.290); both interventions < "
        "weight decay off < rate dropped < neither in accuracy (Spectra)",
        {
            "default": DEFAULT,
            "high-no-decay": optimizer(**ONE_STAGE, weight_decay=0.0),
            "low-no-decay": optimizer(**ONE_STAGE, learning_rate=LOW, weight_decay=0.0),
            "low-decay": optimizer(**ONE_STAGE, learning_rate=LOW),
            "high-decay": optimizer(**ONE_STAGE),
            "rate-dropped-only": optimizer(weight_decay_switch=1.0),
            "decay-off-only": optimizer(second_learning_rate=HIGH),
        },
    ),
    "rate": Group(
        "Peak learning rate",
        "the BitNet's best rate is higher, and it stands rates that the twin does not (b1, Figure 5; FAQ, Table 2: six times the twin's)",
        {
            **{
                f"rate-{rate:g}": DEFAULT if rate == RATE["bitnet"] else at_rate(BASE, rate)
                for rate in (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
            },
            **{
                f"twin-rate-{rate:g}": TWIN if rate == RATE["twin"] else at_rate(BASE.twin, rate)
                for rate in (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
            },
        },
    ),
}
SAME = {"rate-0.006": "default", "twin-rate-0.003": "twin"}
"""Variants that are others under a second name, and are run once."""
ALSO = {
    "twin": ("ternarised", "twin, ternary after training"),
    "ema-0.9": ("ema", "ema-0.9, the average"),
    "ema-0.99": ("ema", "ema-0.99, the average"),
}
"""Variant → label of what is evaluated of its run as well, and its name in the table."""


def run_name(variant: str) -> str:
    """The name under which a variant is run."""
    return SAME.get(variant, variant)


def cells(results: Results) -> list[Cell]:
    """Every variant with every seed. The twin is evaluated as a BitNet as well, ternary only after training (b1, Table 3)."""
    del results
    runs = {run_name(name): config for group in GROUPS.values() for name, config in group.variants.items()}
    also = {"twin": {"ternarised": BASE}}
    return [
        Cell(name=f"{name}-seed{seed}", config=replace(config, seed=seed), also=also.get(name, {}))
        for seed in SEEDS
        for name, config in runs.items()
    ]
