"""bitnet-jax plan."""

import importlib.util
import json

import pytest

from bitnet_jax.cli import main
from bitnet_jax.cli.plan import mesh_config
from bitnet_jax.config import Gather, MeshConfig
from bitnet_jax.errors import UserError

MACHINE = ("--topology", "h100:8")


def failing(capsys, *args):
    assert main(["plan", "ladder-1m", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_mesh_is_read():
    assert mesh_config("fsdp=64,tensor=8") == MeshConfig(fsdp=64, tensor=8)
    assert mesh_config("data=2, sequence=4", Gather.INT8) == MeshConfig(data=2, sequence=4, gather=Gather.INT8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pipeline=2", "has axis 'pipeline': must be one of data, fsdp, tensor, sequence"),
        ("", "has axis ''"),
        ("fsdp=2,", "has axis ''"),
        ("fsdp", "has fsdp=''"),
        ("fsdp=two", "has fsdp='two': must be a whole number from 1 on"),
        ("fsdp=0", "has fsdp='0'"),
        ("fsdp=-1", "has fsdp='-1'"),
        ("fsdp=2,fsdp=2", "names fsdp twice"),
    ],
)
def test_what_is_no_mesh_is_one_line(text, said):
    with pytest.raises(UserError) as caught:
        mesh_config(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--topology is missing"),
        (("--topology", "v9:2"), "topology 'v9:2' is unknown"),
        ((*MACHINE, "--mesh", "fsdp=3"), "is 3 devices: must be the 8 there are"),
        ((*MACHINE, "--mesh", "tensor=3"), "needs a multiple of 3 devices: there are 8"),
        ((*MACHINE, "--mesh", "fsdp=8", "--mesh.tensor", "2"), "are both given"),
        ((*MACHINE, "--batch-size", "12"), "batch_size=12 must be a multiple of data=1 * fsdp=8"),
        ((*MACHINE, "--mesh", "fsdp=1,tensor=8", "--model.ffn-size", "100"), "100 must be a multiple of tensor=8"),
        ((*MACHINE, "--tokens", "-1"), "tokens=-1.0 must be positive"),
        ((*MACHINE, "--context", "0"), "context=0 must be at least 1"),
        ((*MACHINE, "--link-bandwidth", "0"), "must be positive"),
        ((*MACHINE, "--gather", "all"), "--gather"),
    ],
)
def test_wrong_input_is_one_line(args, said, capsys):
    assert said in failing(capsys, *args)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_without_libtpu_the_extra_is_named(capsys):
    assert "pip install 'bitnet-jax[tpu-aot]'" in failing(capsys, "--topology", "v5e:2x2")


def test_a_plan_by_formula_is_labelled(capsys):
    args = ["--topology", "v5e:2x2", "--no-compile", "--mesh", "fsdp=2,tensor=2", "--tokens", "1e9", "--dtype", "bfloat16"]
    assert main(["plan", "ladder-1m", *args]) == 0
    out = capsys.readouterr().out
    for text in ("by formula, not compiled", "data=1 fsdp=2 tensor=2 sequence=1", "tokens/s", "MFU", "days", "reduce-scatter", "fits"):
        assert text in out


def test_flags_and_short_flags_reach_the_run(capsys):
    args = ["--topology", "cpu", "--memory-bandwidth", "20", "--seq-len", "2048", "--remat", "full", "--batch-size", "2", "--json"]
    assert main(["plan", "ladder-1m", *args, "--mesh.gather", "int8", "--decode-batch", "4"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["model"]["max_seq_len"] == facts["config"]["data"]["seq_len"] == facts["serving"]["context"] == 2048
    assert facts["config"]["model"]["remat"] == "full"
    assert facts["mesh"]["gather"] == "int8"
    assert facts["rates"]["memory"] == 2e10
    assert facts["serving"]["batch"] == 4
    assert facts["serving"]["tokens_per_second"] == pytest.approx(4 * 2e10 / facts["serving"]["bytes"])
    assert "table of the first pass" in facts["serving"]["memory"]
    assert facts["training"]["tokens_per_second"] is None  # the peak of a CPU is not in the tables
