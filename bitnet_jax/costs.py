"""What a model costs: parameters, floating-point operations, bytes, joules. Pure functions of `ModelConfig`, without JAX.

`kernels_pallas.packing` defines the packed format; the bytes computed here are those it stores, and a test holds the two together.
"""

import enum
import math
from dataclasses import dataclass, fields

from bitnet_jax.config import DType, FeedForward, Linear, ModelConfig, NormPlacement, QuantConfig, WeightQuantizer

# --- shapes and parameters -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One linear layer of a block: `inputs` (K) by `outputs` (N)."""

    name: str
    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        return self.inputs * self.outputs


def matrices(config: ModelConfig) -> tuple[Matrix, ...]:
    """The linear layers of one block, in the order in which they are applied."""
    d, f, kv = config.hidden_size, config.ffn_size, config.num_kv_heads * config.head_dim
    q = config.num_heads * config.head_dim
    shapes = {"attn/q": (d, q), "attn/k": (d, kv), "attn/v": (d, kv), "attn/o": (q, d)}
    if config.ffn is not FeedForward.GELU:
        shapes["ffn/gate"] = (d, f)
    shapes |= {"ffn/up": (d, f), "ffn/down": (f, d)}
    return tuple(Matrix(name=name, inputs=k, outputs=n) for name, (k, n) in shapes.items())


@dataclass(frozen=True, kw_only=True)
class Parts:
    """An amount (parameters, bytes) of each part of a model."""

    embedding: int
    """The embedding, which is the head as well where they are tied."""
    head: int
    """The output head; 0 where it is tied."""
    attention: int
    """q, k, v and o of all blocks."""
    ffn: int
    """gate, up and down of all blocks."""
    norms: int
    """Gains of all norms."""

    @property
    def linear(self) -> int:
        """All linear layers of the blocks: what a BitNet quantises."""
        return self.attention + self.ffn

    @property
    def non_embedding(self) -> int:
        """Everything but embedding and head."""
        return self.linear + self.norms

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def parameters(config: ModelConfig) -> Parts:
    """Number of parameters of each part; the sum of the sizes of `Transformer(config).init`."""
    sizes = {matrix.name: config.num_layers * matrix.size for matrix in matrices(config)}
    embedding = config.vocab_size * config.hidden_size
    return Parts(
        embedding=embedding,
        head=0 if config.tie_embeddings else embedding,
        attention=sum(size for name, size in sizes.items() if name.startswith("attn/")),
        ffn=sum(size for name, size in sizes.items() if name.startswith("ffn/")),
        norms=config.num_layers * _block_norms(config) + config.hidden_size,
    )


def _block_norms(config: ModelConfig) -> int:
    """Gains of one block: none, two over D, or those and one each over the inputs of o and down."""
    match config.norm:
        case NormPlacement.INSIDE:
            return 0
        case NormPlacement.NONE:
            return 2 * config.hidden_size
        case NormPlacement.SUB:
            return 2 * config.hidden_size + config.num_heads * config.head_dim + config.ffn_size


# --- floating-point operations ---------------------------------------------------------------------------------------


def forward_flops(config: ModelConfig, seq_len: int) -> int:
    """Operations of the forward pass for each token of a sequence of `seq_len` (T), a multiplication and an addition being two:

        2 (linear + V D) + 4 L T N H

    The first term is the linear layers and the head, the second the products of attention, QK^T and AV, over the full square as they
    are computed, without regard to the causal mask (the convention of PaLM, 2204.02311, appendix B). Norms, softmax, quantisers and the
    look-up of the embedding are left out; integer products count like any other, so a BitNet and its twin have the same number.
    """
    products = parameters(config).linear + config.vocab_size * config.hidden_size
    return 2 * products + 4 * config.num_layers * seq_len * config.num_heads * config.head_dim


def train_flops(config: ModelConfig, seq_len: int) -> int:
    """Operations of a training step for each token: three forward passes, one of them forward and two backward.

    What rematerialisation computes again is not counted, so utilisation computed from this is model FLOP utilisation.
    """
    return 3 * forward_flops(config, seq_len)


# Dense bfloat16 operations per second that the makers state, by the name of one JAX device. For TPU v2 and v3 a device is one of the
# two cores of a chip.
_PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "Tesla V100": 125e12,  # float16: it has no bfloat16
    "Tesla T4": 65e12,  # float16
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second of a device (`jax.Device.device_kind`); None for CPUs and devices not in the table.

    The longest entry that `device_kind` begins with, as a whole word, decides.
    """
    known = [kind for kind in _PEAK_FLOPS if f"{device_kind} ".replace("-", " ").startswith(f"{kind} ")]
    return _PEAK_FLOPS[max(known, key=len)] if known else None


# --- bytes -----------------------------------------------------------------------------------------------------------


class Storage(enum.Enum):
    """How the linear layers are stored."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    TWO_BIT = "two_bit"  # 4 codes a byte, rows filled up to 128 codes
    BASE3 = "base3"  # 5 codes a byte


_FLOAT_BYTES = {DType.FLOAT32: 4, DType.BFLOAT16: 2}
_SCALE_BYTES = 4


def bytes_by_part(config: ModelConfig, storage: Storage, rest: DType = DType.FLOAT32) -> Parts:
    """Bytes of the arrays of a model; a file adds its header.

    Float storage is one type for everything. Packed storage is for the linear layers alone, with the padding of their rows and their
    float32 scales; embedding, head and norms are of type `rest`.
    """
    count = parameters(config)
    if storage in (Storage.FLOAT32, Storage.BFLOAT16):
        size = _FLOAT_BYTES[DType(storage.value)]
        return Parts(**{part.name: size * getattr(count, part.name) for part in fields(Parts)})
    packed = {matrix.name: config.num_layers * packed_bytes(matrix, storage, config.quant) for matrix in matrices(config)}
    size = _FLOAT_BYTES[rest]
    return Parts(
        embedding=size * count.embedding,
        head=size * count.head,
        attention=sum(value for name, value in packed.items() if name.startswith("attn/")),
        ffn=sum(value for name, value in packed.items() if name.startswith("ffn/")),
        norms=size * count.norms,
    )


def packed_bytes(matrix: Matrix, storage: Storage, quant: QuantConfig) -> int:
    """Bytes of one packed matrix: N rows, and one scale, or K / weight_group, 1 or weight_shards scales a column.

    A row is whole blocks of 32 bytes for 128 codes, or ceil(K / 5) bytes.
    """
    row = 32 * math.ceil(matrix.inputs / 128) if storage is Storage.TWO_BIT else math.ceil(matrix.inputs / 5)
    codes = matrix.outputs * row
    axis = -2 if matrix.name in ("attn/o", "ffn/down") else -1  # as `partition.RULES` says
    return codes + _SCALE_BYTES * math.prod(quant.scale_shape(matrix.inputs, matrix.outputs, axis))


def kv_cache_bytes(config: ModelConfig, batch: int, capacity: int) -> int:
    """Bytes of the keys and values of `batch` rows (B) with room for `capacity` tokens (S): 2 L B S K H of the compute type."""
    values = 2 * config.num_layers * batch * capacity * config.num_kv_heads * config.head_dim
    return _FLOAT_BYTES[config.dtype] * values


# --- energy ----------------------------------------------------------------------------------------------------------


class Process(enum.Enum):
    """Semiconductor process of the energy table."""

    NM45 = "45nm"
    NM7 = "7nm"


class Precision(enum.Enum):
    """Arithmetic of the linear layers in the energy table."""

    FP32 = "fp32"
    FP16 = "fp16"
    BITNET = "bitnet"  # integer additions; scales and attention in fp16


_PICOJOULES = {
    # (addition, multiplication), b1, Table 2
    (Process.NM45, "fp32"): (0.9, 3.7),
    (Process.NM45, "fp16"): (0.4, 1.1),
    (Process.NM45, "int8"): (0.03, 0.2),
    (Process.NM7, "fp32"): (0.38, 1.31),
    (Process.NM7, "fp16"): (0.16, 0.34),
    (Process.NM7, "int8"): (0.007, 0.07),
}


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules of the additions and the multiplications of one forward pass."""

    additions: float
    multiplications: float

    @property
    def total(self) -> float:
        return self.additions + self.multiplications


def energy(config: ModelConfig, precision: Precision | None = None, tokens: int = 512, process: Process = Process.NM7) -> Energy:
    """Arithmetic energy of one forward pass over `tokens` (T), by the model that reproduces the tables of b1, b1.58 and 2B4T.

    With the multiply-adds of the linear layers, M = linear T, and of attention over the full square, A = 2 L T^2 N H:

        fp16, fp32:  (M + A) additions and (M + A) multiplications in that type
        BitNet:      M int8 additions; A additions and A multiplications in fp16; for the scales, T (K + N) fp16 multiplications
                     for each matrix [K, N]

    Embedding and head are left out, as is the energy of moving data. The published tables are at 512 tokens; those of b1.58 and 2B4T at
    7 nm. `precision` None is BitNet or fp16, as `config.linear` says. Scales that are not per tensor would add to the last term; that is
    not modelled.
    """
    if precision is None:
        quantised = config.linear is Linear.BIT and config.quant.weight is not WeightQuantizer.NONE
        precision = Precision.BITNET if quantised else Precision.FP16
    linear = parameters(config).linear * tokens
    attention = 2 * config.num_layers * tokens**2 * config.num_heads * config.head_dim
    if precision is not Precision.BITNET:
        add, multiply = _PICOJOULES[process, precision.value]
        return Energy(additions=(linear + attention) * add * 1e-12, multiplications=(linear + attention) * multiply * 1e-12)
    scales = config.num_layers * tokens * sum(matrix.inputs + matrix.outputs for matrix in matrices(config))
    add, multiply = _PICOJOULES[process, "fp16"]
    int8_add, _ = _PICOJOULES[process, "int8"]
    return Energy(additions=(linear * int8_add + attention * add) * 1e-12, multiplications=(attention + scales) * multiply * 1e-12)
