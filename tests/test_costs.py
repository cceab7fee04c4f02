"""Costs against the tables of the papers and against the arrays that are really made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitnet_jax import params as trees
from bitnet_jax.config import DType, FeedForward, Linear, ModelConfig, NormPlacement, QuantConfig
from bitnet_jax.costs import (
    Matrix,
    Precision,
    Process,
    Storage,
    bytes_by_part,
    energy,
    forward_flops,
    kv_cache_bytes,
    matrices,
    packed_bytes,
    parameters,
    peak_flops,
    train_flops,
)
from bitnet_jax.presets import PRESETS
from bitnet_jax.transformer import KVCache, parameter_shapes
from kernels_pallas import packing
from tests.shapes import tiny

SMALL = dataclasses.replace(PRESETS["ladder-0.2m"], num_kv_heads=1)


def llama(layers: int, hidden: int, q: int, kv: int, ffn: int) -> ModelConfig:
    """A gated model of `q` query features and `kv` key features, in heads of 64."""
    return ModelConfig(
        vocab_size=32,
        hidden_size=hidden,
        ffn_size=ffn,
        num_layers=layers,
        num_heads=q // 64,
        num_kv_heads=kv // 64,
        head_dim=64,
        norm=NormPlacement.NONE,
        linear=Linear.FULL,
    )


# --- energy ----------------------------------------------------------------------------------------------------------

# b1, Table 1: joules at 512 tokens, as 7nm multiplications, 7nm additions, 45nm multiplications, 45nm additions.
TABLE_1 = {
    ("6.7b", Precision.FP32): (4.41, 1.28, 12.46, 3.03),
    ("6.7b", Precision.FP16): (1.14, 0.54, 3.70, 1.35),
    ("6.7b", Precision.BITNET): (0.02, 0.04, 0.08, 0.13),
    ("13b", Precision.FP32): (8.58, 2.49, 24.23, 5.89),
    ("13b", Precision.FP16): (2.23, 1.05, 7.20, 2.62),
    ("13b", Precision.BITNET): (0.04, 0.06, 0.12, 0.24),
    ("30b", Precision.FP32): (20.09, 5.83, 56.73, 13.80),
    ("30b", Precision.FP16): (5.21, 2.45, 16.87, 6.13),
    ("30b", Precision.BITNET): (0.06, 0.14, 0.20, 0.53),
}
# The one printed cell that the formula does not give: it gives 0.034.
UNEXPLAINED = {("6.7b", Precision.BITNET, Process.NM7, "additions")}


@pytest.mark.parametrize(("size", "precision"), TABLE_1)
def test_energy_gives_table_1_of_b1(size: str, precision: Precision) -> None:
    values = iter(TABLE_1[size, precision])
    for process in (Process.NM7, Process.NM45):
        result = energy(PRESETS[f"bitnet-b1-{size}"], precision, process=process)
        for part in ("multiplications", "additions"):
            printed = next(values)
            if (size, precision, process, part) in UNEXPLAINED:
                assert round(getattr(result, part), 3) == 0.034
            else:
                assert abs(getattr(result, part) - printed) < 0.0051  # 1.145 is printed as 1.14


B1_ENERGY = {
    # billions of linear parameters; FP16 J, BitNet J and their ratio as computed; the ratio as printed in Figure 1
    "125m": (0.085, 0.02416, 0.002749, 8.8, 8.8),
    "350m": (0.302, 0.08375, 0.007602, 11.0, 11.0),
    "760m": (0.679, 0.1836, 0.01221, 15.0, 15.0),
    "1.3b": (1.208, 0.3221, 0.01737, 18.5, 18.6),
    "2.7b": (2.517, 0.6657, 0.03075, 21.6, 21.7),
    "6.7b": (6.442, 1.684, 0.05786, 29.1, 29.1),
    "13b": (12.58, 3.275, 0.09943, 32.9, 32.9),
    "30b": (29.60, 7.667, 0.1973, 38.8, 38.8),
}


def to_digits(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


@pytest.mark.parametrize("size", B1_ENERGY)
def test_energy_gives_the_reductions_of_b1(size: str) -> None:
    linear, fp16, bitnet, computed, printed = B1_ENERGY[size]
    config = PRESETS[f"bitnet-b1-{size}"]
    full, ternary = energy(config, Precision.FP16).total, energy(config).total
    assert abs(parameters(config).linear / 1e9 - linear) < (0.0051 if linear > 10 else 0.00051)
    assert (to_digits(full, 4), to_digits(ternary, 4)) == (fp16, bitnet)
    assert round(full / ternary, 1) == computed
    assert abs(full / ternary - printed) < 0.1


def test_energy_gives_the_reduction_of_70b() -> None:
    config = dataclasses.replace(
        PRESETS["bitnet-b1-30b"], hidden_size=8192, ffn_size=4 * 8192, num_layers=80, num_heads=64, num_kv_heads=64
    )
    full, ternary = energy(config, Precision.FP16).total, energy(config).total
    assert parameters(config).linear == 64_424_509_440
    assert (to_digits(full, 4), to_digits(ternary, 4), round(full / ternary, 1)) == (16.66, 0.4047, 41.2)


@pytest.mark.parametrize(
    ("name", "config", "computed", "printed"),
    [
        ("BitNet b1.58 2B4T", PRESETS["bitnet-b1.58-2b4t"], 0.0278, 0.028),
        ("LLaMA-3.2-1B", llama(16, 2048, 2048, 512, 8192), 0.2577, 0.258),
        ("Gemma-3-1B", llama(26, 1152, 1024, 256, 6912), 0.1856, 0.186),
        ("Qwen2.5-1.5B", llama(28, 1536, 1536, 256, 8960), 0.3467, 0.347),
        ("SmolLM2-1.7B", llama(24, 2048, 2048, 2048, 8192), 0.4252, 0.425),
        ("MiniCPM-2B", llama(40, 2304, 2304, 2304, 5760), 0.6493, 0.649),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_energy_gives_the_row_of_the_2b4t_table(name: str, config: ModelConfig, computed: float, printed: float) -> None:
    assert round(energy(config).total, 4) == computed
    assert round(energy(config).total, 3) == printed


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [Storage.TWO_BIT, Storage.BASE3])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("k", [32, 128, 160, 192, 5440])
def test_packed_bytes_are_those_that_packing_makes(storage: Storage, group: int | None, k: int) -> None:
    scale = np.ones((), np.float32) if group is None else np.ones((k // group, 3), np.float32)
    packed = packing.pack(np.zeros((k, 3), np.int8), scale, packing.Encoding(storage.value))
    counted = packed_bytes(Matrix(name="", inputs=k, outputs=3), storage, QuantConfig(weight_group=group))
    assert counted == packed.codes.nbytes + packed.scale.nbytes


@pytest.mark.parametrize("storage", [Storage.TWO_BIT, Storage.BASE3])
def test_packed_bytes_of_shards_are_those_of_the_packed_tree(storage: Storage) -> None:
    config = tiny(quant=QuantConfig(weight_shards=4))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), parameter_shapes(config))
    packed = [leaf for _, leaf in trees.leaves(trees.pack(params, config, packing.Encoding(storage.value)))]
    assert bytes_by_part(config, storage).linear == sum(leaf.nbytes for leaf in packed if isinstance(leaf, packing.PackedTernary))


def test_bytes_count_padding_scales_and_the_rest() -> None:
    two_bit, base3 = bytes_by_part(SMALL, Storage.TWO_BIT), bytes_by_part(SMALL, Storage.BASE3, DType.BFLOAT16)
    # A row of D = 64 or F = 192 takes 1 or 2 blocks of 32 bytes at 2 bits, 13 or 39 bytes at 1.6; q has 64 outputs, k and v 32.
    for form, short, long in ((two_bit, 32, 64), (base3, 13, 39)):
        assert form.attention == 3 * (short * (64 + 32 + 32 + 64) + 4 * 4)
        assert form.ffn == 3 * (short * (192 + 192) + long * 64 + 3 * 4)
    assert (two_bit.embedding, base3.embedding) == (4 * 512 * 64, 2 * 512 * 64)
    assert two_bit.norms == 4 * parameters(SMALL).norms


def test_float_bytes_are_the_parameters_times_the_width() -> None:
    assert bytes_by_part(SMALL, Storage.FLOAT32).total == 4 * parameters(SMALL).total
    assert bytes_by_part(SMALL, Storage.BFLOAT16).total == 2 * parameters(SMALL).total


def test_2b4t_takes_its_published_memory() -> None:
    config = PRESETS["bitnet-b1.58-2b4t"]
    assert round(bytes_by_part(config, Storage.TWO_BIT).linear / 1e9, 2) == 0.52
    # The released packed file has these arrays with bfloat16 scales, and 60 kB of header.
    released = bytes_by_part(config, Storage.TWO_BIT, DType.BFLOAT16).total - 2 * 30 * 7
    assert 0 < 1_178_623_988 - released < 100_000


@pytest.mark.parametrize("dtype", DType)
def test_cache_bytes_are_those_of_the_cache(dtype: DType) -> None:
    config = dataclasses.replace(SMALL, dtype=dtype)
    cache = jax.eval_shape(lambda: KVCache.empty(config, batch=3, capacity=7))
    made = sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in (cache.k, cache.v))
    assert kv_cache_bytes(config, batch=3, capacity=7) == made


# --- printed memory --------------------------------------------------------------------------------------------------

# b1.58, Table 1: GB of LLaMA in fp16 and of the BitNet, as measured on a GPU.
B158_MEMORY = {"700m": (2.08, 0.80, 0.37), "1.3b": (3.34, 1.14, 0.56), "3b": (7.89, 2.22, 1.21), "3.9b": (None, 2.38, 1.47)}


@pytest.mark.parametrize("size", B158_MEMORY)
def test_memory_of_b158_is_that_of_the_weights_and_an_overhead_that_both_sides_have(size: str) -> None:
    llama_printed, printed, expected = B158_MEMORY[size]
    count = parameters(PRESETS[f"bitnet-b1.58-{size}"])
    full = 2 * count.total / 1e9
    ternary = (count.linear / 4 + 2 * (count.embedding + count.head)) / 1e9
    assert round(ternary, 2) == expected
    assert 0.4 < printed - ternary < 1.1
    if llama_printed is not None:  # what is not weights differs by less than a tenth of a GB between the two
        assert 0 <= (llama_printed - full) - (printed - ternary) < 0.1


# Spectra (2407.12327), table of the models: 10^9 bits of TriLM and of FloatLM.
SPECTRA_BITS = {
    "99m": (0.90, 1.60),
    "190m": (1.42, 3.05),
    "390m": (2.11, 6.28),
    "560m": (2.76, 9.11),
    "830m": (3.55, 13.34),
    "1.1b": (4.42, 18.39),
    "1.5b": (5.36, 24.23),
    "2.4b": (7.23, 39.38),
    "3.9b": (10.76, 63.83),
}


@pytest.mark.parametrize("size", SPECTRA_BITS)
def test_bits_of_spectra_are_1_58_a_ternary_weight_and_16_a_float(size: str) -> None:
    ternary_printed, float_printed = SPECTRA_BITS[size]
    count = parameters(PRESETS[f"trilm-{size}"])
    ternary = (1.58 * count.linear + 16 * (count.total - count.linear)) / 1e9
    assert round(16 * count.total / 1e9, 2) == float_printed
    if size == "190m":  # printed as 1.42; its printed count of parameters is not met either (tests/test_presets.py)
        assert round(ternary, 4) == 1.4149
    else:
        assert round(ternary, 2) == ternary_printed


@pytest.mark.parametrize(
    ("name", "config", "bits", "printed", "digits"),
    [
        ("BitNet b1.58 2B4T", PRESETS["bitnet-b1.58-2b4t"], 1.58, 0.4, 1),
        ("LLaMA-3.2-1B", llama(16, 2048, 2048, 512, 8192), 16, 2, 0),
        ("Gemma-3-1B", llama(26, 1152, 1024, 256, 6912), 16, 1.4, 1),
        ("Qwen2.5-1.5B", llama(28, 1536, 1536, 256, 8960), 16, 2.6, 1),
        ("SmolLM2-1.7B", llama(24, 2048, 2048, 2048, 8192), 16, 3.2, 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_memory_of_the_2b4t_table_is_that_of_the_linear_layers(
    name: str, config: ModelConfig, bits: float, printed: float, digits: int
) -> None:
    assert round(bits * parameters(config).linear / 8e9, digits) == printed


def test_minicpm_has_more_than_its_printed_memory() -> None:
    # Table 1 of 2B4T prints 4.8; 40 layers of its published shape are 4.88.
    assert round(2 * parameters(llama(40, 2304, 2304, 2304, 5760)).linear / 1e9, 2) == 4.88


def test_batches_of_b158_at_70b_are_those_of_a_cache_of_eight_bits() -> None:
    # b1.58, Table 3: at most 16 and 176 sequences of 512 tokens on two cards of 80 GB; Figure 2: 131.7 and 18.4 GB without a batch.
    # With batch = (usable - weights) / sequence, two equations for two unknowns:
    sequence = (131.7 - 18.4) / (176 - 16)
    usable = 131.7 + 16 * sequence
    assert round(sequence, 3) == 0.708
    assert round(usable / 160, 2) == 0.89
    shape = dataclasses.replace(  # the shape of 70B that the printed energy has
        PRESETS["bitnet-b1-30b"], hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=64, head_dim=128, dtype=DType.BFLOAT16
    )
    cache = kv_cache_bytes(shape, batch=1, capacity=512) / 1e9
    assert round(cache, 3) == 1.342
    assert 0.5 < sequence / cache < 0.53  # half of a 16-bit cache, and a twentieth of that for activations


# --- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ffn", FeedForward)
def test_flops_are_those_of_the_matrix_products(ffn: FeedForward) -> None:
    config = dataclasses.replace(SMALL, ffn=ffn, linear=Linear.FULL)
    seq_len = 16
    by_hand = 2 * 512 * 64  # head
    by_hand += sum(2 * 3 * matrix.inputs * matrix.outputs for matrix in matrices(config))
    by_hand += 3 * 2 * (2 * seq_len * 2 * 32)  # 3 layers; QK^T and AV; 2 heads of 32
    assert forward_flops(config, seq_len) == by_hand
    assert forward_flops(config.twin, seq_len) == forward_flops(dataclasses.replace(config, linear=Linear.BIT), seq_len)
    assert train_flops(config, seq_len) == 3 * by_hand


def test_training_of_a_large_model_takes_six_operations_a_parameter() -> None:
    config = PRESETS["bitnet-b1.58-3.9b"]
    counted = parameters(config)
    assert train_flops(config, 1) == pytest.approx(6 * (counted.total - counted.embedding), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("cpu", None),
        ("NVIDIA L400", None),
    ],
)
def test_peak_of_known_devices_only(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak
