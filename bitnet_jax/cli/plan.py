"""bitnet-jax plan PRESET --topology v5p:8x8x8: memory, traffic and the best time of a run on a machine that is not at hand."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from bitnet_jax import config as configs
from bitnet_jax.cli import arguments
from bitnet_jax.config import DType, Gather, MeshConfig, Remat, TrainConfig
from bitnet_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Plans a run of a preset, the first word, or of --config FILE, without the machine: what a training step and a decode step hold in
    memory, send, and take at the best. For TPUs both are compiled by libtpu (extra tpu-aot), for other machines everything is by formula.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run."""
    topology: str
    """The machine: v5p:8x8x8 or v6e:16x16 (TPUs), h100:8 or h200:8x4 (GPUs, in 4 machines), cpu (this one, its bandwidth measured)."""
    mesh: str | None = None
    """Sizes of the mesh's axes: fsdp=64,tensor=8; those of data, fsdp, tensor, sequence. Without it all devices are fsdp."""
    gather: Gather | None = None
    """What of the ternary weights travels, short for --mesh.gather."""
    seq_len: int | None = None
    """Tokens of a window, short for --data.seq-len; beyond the preset's longest sequence that is raised too."""
    remat: Remat | None = None
    """What a block keeps for the backward pass, short for --model.remat."""
    dtype: DType | None = None
    """Type of activations and products, short for --model.dtype."""
    tokens: float | None = None
    """Tokens of the whole run, as 4e12: for its days."""
    decode_batch: int = 1
    """Rows of the decode step."""
    context: int | None = None
    """Tokens that the decode step has room for; without it the window's."""
    link_bandwidth: float | None = None
    """GB/s that a device sends to others, over all its links; without it what the makers state."""
    memory_bandwidth: float | None = None
    """GB/s of a device's memory; without it what the makers state, or on cpu what is measured."""
    compile: bool = True
    """Compile for TPUs; --no-compile plans them by formula too."""
    json: bool = False
    """Print one JSON object instead of tables."""


def run(args: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    base, rest = arguments.starting_point(args, "plan")
    parsed = arguments.parse(Args, rest, "plan", Args(config=base, topology=""))
    facts = gather_facts(parsed)
    if parsed.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)
    return 0


def configured(args: Args) -> TrainConfig:
    """The run, with the short flags in place."""
    config = args.config
    model, data, mesh = config.model, config.data, config.mesh
    if args.seq_len is not None:
        data = replace(data, seq_len=args.seq_len)
        model = replace(model, max_seq_len=max(model.max_seq_len, args.seq_len))
    if args.remat is not None:
        model = replace(model, remat=args.remat)
    if args.dtype is not None:
        model = replace(model, dtype=args.dtype)
    if args.mesh is not None:
        if replace(mesh, gather=Gather.LATENT) != MeshConfig():
            raise UserError(f"mesh {args.mesh!r} and --mesh.AXIS are both given: must be one of them")
        mesh = mesh_config(args.mesh, mesh.gather)
    if args.gather is not None:
        mesh = replace(mesh, gather=args.gather)
    return replace(config, model=model, data=data, mesh=mesh)


def mesh_config(text: str, gather: Gather = Gather.LATENT) -> MeshConfig:
    """The mesh that 'fsdp=64,tensor=8' names.

    Raises:
        UserError: an axis is unknown or named twice, or its size is not a whole number from 1 on.
    """
    from bitnet_jax.partition import AXES

    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise UserError(f"mesh {text!r} has axis {axis!r}: must be one of {', '.join(AXES)}, as fsdp=64,tensor=8")
        if axis in sizes:
            raise UserError(f"mesh {text!r} names {axis} twice")
        if not (size.isascii() and size.isdigit() and 0 < int(size) < 2**31):
            raise UserError(f"mesh {text!r} has {axis}={size!r}: must be a whole number from 1 on")
        sizes[axis] = int(size)
    return MeshConfig(gather=gather, **sizes)


def gather_facts(args: Args) -> dict[str, Any]:
    """Everything the command shows, as JSON values."""
    from bitnet_jax import costs, planning
    from bitnet_jax.training import sharding

    if not args.topology:
        raise UserError("--topology is missing: must name the machine, as v5p:8x8x8, h100:8 or cpu")
    config, machine = configured(args), planning.topology(args.topology)
    giga = {"link": args.link_bandwidth, "memory": args.memory_bandwidth}
    shape = sharding.sizes(config.mesh, machine.devices)
    sharding.check(config, shape)
    devices = planning.devices(machine) if machine.platform == "tpu" and args.compile else None
    rates = planning.rates(machine, **{name: None if value is None else 1e9 * value for name, value in giga.items()})
    training = planning.training(config, machine, rates, devices, args.tokens)
    context = config.data.seq_len if args.context is None else args.context
    # What `generate` runs on a CPU makes a first pass over an int8 copy of the table.
    table = "int8" if machine.platform == "cpu" else "float32"
    serving = planning.serving(config.model, rates, args.decode_batch, context, None if devices is None else devices[0], table)
    return {
        "topology": dataclasses.asdict(machine),
        "mesh": shape | {"gather": config.mesh.gather.value},
        "rates": dataclasses.asdict(rates),
        "parameters": costs.parameters(config.model).total,
        "tokens_per_step": config.batch_size * config.data.seq_len,
        "tokens": args.tokens,
        "training": planning.to_json(training),
        "serving": planning.to_json(serving),
        "config": configs.to_dict(config),
    }


def show(facts: dict[str, Any]) -> None:
    """Prints the facts as tables."""
    from rich.console import Console
    from rich.table import Table

    console, config, rates, mesh = Console(), facts["config"], facts["rates"], facts["mesh"]
    machine = facts["topology"]

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    axes = " ".join(f"{axis}={size}" for axis, size in mesh.items())
    say(f"{facts['parameters']:,} parameters on {machine['name']} (devices: {machine['devices']}): {axes}")
    say(
        f"batch of {config['batch_size']} x {config['data']['seq_len']} tokens, {config['model']['dtype']}, "
        f"remat {config['model']['remat']}"
    )
    say(
        f"a device: {_or_unknown(rates['flops'], 1e12, 'TFLOP/s', 'peak')}, {rates['memory'] / 1e9:,.0f} GB/s of memory, "
        f"{_or_unknown(rates['link'], 1e9, 'GB/s of links', 'links')} ({rates['source']})"
    )
    for name, plan in (("training step", facts["training"]), ("decode step", facts["serving"])):
        say(f"\n{name}: {plan['source']}")
        table = Table("memory of a device", "GB")
        for kind, size in plan["memory"].items():
            table.add_row(kind, f"{size / 1e9:,.3f}")
        table.add_section()
        table.add_row("all" if plan["fits"] or plan["message"] is None else "all, needed", f"{plan['total'] / 1e9:,.3f}")
        table.add_row("there is", f"{plan['capacity'] / 1e9:,.3f}")
        console.print(table)
        say(("fits" if plan["fits"] else plan["message"] or "does not fit") + _compiled_in(plan))
        if name == "training step":
            _show_training(plan, facts, say, console)
        else:
            _show_serving(plan, say)


def _show_training(plan: dict[str, Any], facts: dict[str, Any], say: Any, console: Any) -> None:
    from rich.table import Table

    table = Table("sent by a device in a step", "type", "transfers", "GB")
    for one in plan["sent"]:
        table.add_row(one["kind"], one["type"], f"{one['count']:,}", f"{one['bytes'] / 1e9:,.3f}")
    if plan["sent"]:
        console.print(table)
    times, flops = plan["times"], plan["flops"]
    say(
        f"a device and step, by formula: {flops['computed'] / 1e12:,.2f} TFLOP, {flops['model'] / 1e12:,.2f} of them not computed again; "
        f"{plan['bytes'] / 1e9:,.2f} GB of memory traffic"
    )
    step = f"{_seconds(times['least'])} if everything overlaps, {_seconds(times['most'])} if nothing does"
    parts = ", ".join(f"{name} {_seconds(times[name])}" for name in ("compute", "memory", "links"))
    say(f"step: {'not known' if times['least'] is None else step} ({parts})")
    if plan["tokens_per_second"] is None:
        return
    (slow, fast), mfu = plan["tokens_per_second"], plan["mfu"]
    say(f"at the best {slow:,.0f} to {fast:,.0f} tokens/s, {100 * mfu[0]:.0f} to {100 * mfu[1]:.0f} % MFU")
    if plan["days"] is not None:
        say(f"{facts['tokens']:.3g} tokens: {plan['days'][1]:,.1f} to {plan['days'][0]:,.1f} days")


def _show_serving(plan: dict[str, Any], say: Any) -> None:
    pace = "" if plan["tokens_per_second"] is None else f": at most {plan['tokens_per_second']:,.1f} tokens/s"
    say(f"batch of {plan['batch']}, room for {plan['context']} tokens: {plan['bytes'] / 1e9:,.3f} GB read a step{pace}")


def _compiled_in(plan: dict[str, Any]) -> str:
    return "" if plan["compile_seconds"] is None else f" (compiled in {plan['compile_seconds']:.0f} s)"


def _or_unknown(value: float | None, unit: float, name: str, what: str) -> str:
    return f"{what} not known" if value is None else f"{value / unit:,.0f} {name}"


def _seconds(value: float | None) -> str:
    return "not known" if value is None else f"{value * 1e3:,.1f} ms"
