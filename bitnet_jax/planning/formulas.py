"""What a training step and a decode step hold, compute, read and send on each device, by formula. Nothing is compiled or allocated."""

import math
from dataclasses import dataclass, fields
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from bitnet_jax import costs, partition
from bitnet_jax.bitlinear import is_ternary
from bitnet_jax.config import DType, Gather, ModelConfig, Remat, TrainConfig
from bitnet_jax.training import sharding
from bitnet_jax.training.collectives import Traffic
from bitnet_jax.transformer import parameter_shapes

_BYTES = {DType.FLOAT32: 4, DType.BFLOAT16: 2}
Shape = dict[str, int]
"""Devices along each axis of the mesh (`sharding.sizes`)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device while a step runs.

    Attributes:
        parameters: the latent float32 parameters, cut up.
        moments: the two of Adam.
        gradients: one for each parameter.
        kept: what the forward pass keeps of every block for the backward pass, as `config.model.remat` says.
        working: one block as it is computed, with its whole weights; or the logits and their gradient, where these are more.
    """

    parameters: int
    moments: int
    gradients: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def tree_bytes(tree: Any) -> int:
    """Bytes of a placed tree (`sharding.place`) on one device."""

    def one(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def parameter_bytes(config: ModelConfig, shape: Shape) -> int:
    """Bytes of the float32 parameters on one device: exactly those that `sharding.place` puts there."""
    mesh = AbstractMesh(tuple(shape.values()), partition.AXES, axis_types=(AxisType.Auto,) * len(shape))
    return tree_bytes(sharding.place(parameter_shapes(config), mesh))  # pyright: ignore[reportArgumentType]


def memory(config: TrainConfig, shape: Shape) -> Memory:
    """Of a training step, on each of the devices of a mesh of `shape`.

    With t tokens on a device at a time, b bytes a number, q bytes of what a linear layer keeps of its input (1 for int8 codes), and a
    block's matrices [K, N], what is kept of each block for each token is

        full    D b
        dots    D b + sum N b                                     (the products' results; those of attention are computed again)
        none    D b + sum N b + sum K q + (4 + b) N_heads T        (scores in float32 and probabilities too)

    all but D b divided by `tensor`. One block at work takes that of `none`, with weights, codes and weight gradients of one block whole but
    for `tensor`; logits take 3 V float32 a token (logits, their softmax and gradient). The compiler may need more, or less.
    """
    model = config.model
    parameters = parameter_bytes(model, shape)
    tokens = local_tokens(config, shape)
    size = _BYTES[model.dtype]
    row = model.hidden_size * size * tokens
    block = {policy: row + tokens * _inside(config, policy) // shape["tensor"] for policy in Remat}
    weights = sum(matrix.size for matrix in costs.matrices(model)) * (size + 4) // shape["tensor"]
    logits = 3 * 4 * tokens * model.vocab_size // shape["tensor"]
    return Memory(
        parameters=parameters,
        moments=2 * parameters,
        gradients=parameters,
        kept=model.num_layers * block[model.remat],
        working=max(logits, weights + (block[Remat.NONE] if model.remat is not Remat.NONE else 0)),
    )


def _inside(config: TrainConfig, policy: Remat) -> int:
    """Bytes that a block keeps for a token beside its input."""
    model, matrices = config.model, costs.matrices(config.model)
    if policy is Remat.FULL:
        return 0
    size = _BYTES[model.dtype]
    outputs = sum(matrix.outputs for matrix in matrices) * size
    if policy is Remat.DOTS:
        return outputs
    inputs = sum(matrix.inputs for matrix in matrices) * (1 if is_ternary(model) else size)
    return outputs + inputs + (4 + size) * model.num_heads * config.data.seq_len


def local_tokens(config: TrainConfig, shape: Shape) -> int:
    """Tokens of a microbatch on one device (t)."""
    rows = config.batch_size // config.accumulation
    return rows * config.data.seq_len // (shape["data"] * shape["fsdp"] * shape["sequence"])


def tokens(config: TrainConfig) -> int:
    """Tokens of a step, over all devices."""
    return config.batch_size * config.data.seq_len


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of a step on one device.

    Attributes:
        model: `costs.train_flops`, from which utilisation is computed.
        computed: with what rematerialisation computes again.
    """

    model: float
    computed: float


def flops(config: TrainConfig, devices: int) -> Flops:
    """Of a training step: `full` computes the blocks' forward pass twice, `dots` the products of attention."""
    model, length = config.model, config.data.seq_len
    head = 2 * model.vocab_size * model.hidden_size
    attention = 4 * model.num_layers * length * model.num_heads * model.head_dim
    again = {Remat.NONE: 0, Remat.DOTS: attention, Remat.FULL: costs.forward_flops(model, length) - head}[model.remat]
    each = tokens(config) / devices
    return Flops(model=each * costs.train_flops(model, length), computed=each * (costs.train_flops(model, length) + again))


def step_bytes(config: TrainConfig, shape: Shape) -> float:
    """Bytes that a training step reads and writes in a device's memory, at the least that this program's structure allows.

    Seven passes over what parameters take (they and two moments read and written, gradients read); gradients written for each
    microbatch; weights of every product read in the compute type in the forward pass (twice where blocks are computed again) and twice
    in the backward pass; for each such pass and token, inputs and results of the matrices, and the scores of attention in float32,
    written and read.
    """
    model = config.model
    size = _BYTES[model.dtype]
    passes = 4 if model.remat is Remat.FULL else 3
    state = parameter_bytes(model, shape) * (7 + config.accumulation)
    linear = costs.parameters(model).linear * size * passes * config.accumulation / shape["tensor"]
    each = sum(matrix.inputs + matrix.outputs for matrix in costs.matrices(model)) * size + 2 * 4 * model.num_heads * config.data.seq_len
    work = local_tokens(config, shape) * config.accumulation
    head = 2 * 4 * 3 * model.vocab_size * work / shape["tensor"]
    return state + linear + passes * model.num_layers * each * work / shape["tensor"] + head


def collectives(config: TrainConfig, shape: Shape) -> dict[tuple[str, str], Traffic]:
    """(kind, element type) → what each device sends in a training step, as `collectives.collectives` counts it from a compiled program.

    A matrix comes to the devices of `fsdp` for the forward pass in float32 (twice where blocks are computed again) or as its codes, and
    for the backward pass as its codes, with which blocks are computed again too; table and head come in the compute type. Gradients go
    back in float32, by reduce-scatter among `fsdp` and all-reduce among `data`. With `tensor`, each half of a block adds up its results
    [t, D] over these devices forward, and backward likewise. What `sequence` adds is left out.
    """
    model = config.model
    tensor, fsdp, data = shape["tensor"], shape["fsdp"], shape["data"]
    count = costs.parameters(model)
    linear, rest = count.linear / tensor, (count.embedding + count.head) / tensor
    again = 2 if model.remat is Remat.FULL else 1
    size, kind = _BYTES[model.dtype], {DType.FLOAT32: "f32", DType.BFLOAT16: "bf16"}[model.dtype]
    matrices, micro = len(costs.matrices(model)) * model.num_layers, config.accumulation
    found: dict[tuple[str, str], Traffic] = {}

    def add(key: tuple[str, str], times: int, sent: float) -> None:
        if sent:
            before = found.get(key, Traffic(0, 0.0))
            found[key] = Traffic(before.count + times, before.bytes + sent)

    share = (fsdp - 1) / fsdp
    codes = {Gather.LATENT: ("s8", 1.0), Gather.INT8: ("s8", 1.0), Gather.TWO_BIT: ("u8", 0.25)}[config.mesh.gather]
    forward = ("f32", 4.0) if config.mesh.gather is Gather.LATENT else codes
    if not is_ternary(model):
        forward = codes = (kind, float(size))
    for (dtype, each), times in ((forward, 1 if forward == codes else again), (codes, 1)):
        add(("all-gather", dtype), micro * matrices * times, micro * times * share * linear * each)
    add(
        ("all-gather", kind),
        micro * 3,
        micro * share * (count.embedding * (2 if model.tie_embeddings else 1) + 2 * count.head) / tensor * size,
    )
    add(("reduce-scatter", "f32"), micro * matrices, micro * share * 4 * (linear + rest))
    add(("all-reduce", "f32"), matrices, 2 * (data - 1) / data * 4 * (linear + rest) / fsdp)
    sums = 2 * model.num_layers * (1 + again)
    add(
        ("all-reduce", kind),
        micro * sums,
        sums * micro * 2 * (tensor - 1) / tensor * local_tokens(config, shape) * model.hidden_size * size,
    )
    return found
