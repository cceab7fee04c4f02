"""Machines and their rates."""

import pytest

from bitnet_jax import planning
from bitnet_jax.errors import UserError
from kernels_pallas.arg_specs import CHIPS


@pytest.mark.parametrize(
    ("name", "platform", "chip", "devices", "hosts"),
    [
        ("v5p:8x8x8", "tpu", "v5p", 512, 1),
        ("v6e:16x16", "tpu", "v6e", 256, 1),
        ("tpu7x:2x2x1", "tpu", "7x", 8, 1),  # a chip is two devices
        ("h100:8", "gpu", "h100", 8, 1),
        ("h200:8x4", "gpu", "h200", 32, 4),
        ("none", "cpu", None, 1, 1),
    ],
)
def test_a_topology_is_read(name, platform, chip, devices, hosts):
    found = planning.topology(name)
    assert (found.platform, found.chip, found.devices, found.hosts) == (platform, chip, devices, hosts)


@pytest.mark.parametrize("name", ["", "v5p", "v9:2x2", "v5p:", "v5p:8", "v5p:8x", "v5p:0x2x2", "v5p:-1x2", "h100:2x2x2", "h100:8.0", "CPU"])
def test_what_is_no_topology_is_one_line(name):
    with pytest.raises(UserError, match="topology ") as caught:
        planning.topology(name)
    assert "\n" not in str(caught.value)


def test_the_names_are_libtpus():
    assert planning.topology("7x:2x2x1").libtpu_name == "tpu7x:2x2x1"
    assert planning.topology("v5p:4x4x4").libtpu_name == "v5p:4x4x4"


def test_rates_are_those_of_the_tables_or_as_given():
    found = planning.rates(planning.topology("v5p:4x4x4"))
    assert (found.flops, found.memory, found.capacity) == (CHIPS["v5p"].bf16, CHIPS["v5p"].bandwidth, CHIPS["v5p"].hbm)
    assert found.link == 6e11
    given = planning.rates(planning.topology("v4:2x2x1"), link=1e11)
    assert given.link == 1e11
    assert "link as given" in given.source
    assert planning.rates(planning.topology("v4:2x2x1")).link is None
    # Machines are connected by less than what connects the GPUs of one.
    assert planning.rates(planning.topology("h200:8x4")).link == 5e10 < planning.rates(planning.topology("h200:8")).link
    with pytest.raises(UserError, match="must be positive"):
        planning.rates(planning.topology("h100:8"), memory=0)


def test_a_cpu_has_no_peak_and_its_own_memory():
    found = planning.rates(planning.topology("cpu"), memory=2e10)
    assert (found.flops, found.memory, found.source) == (None, 2e10, "bandwidth as given")
    assert found.capacity > 1e8
