"""Joules from Linux's counters."""

import pytest

from bitnet_jax.benchmark import energy


def package(root, name, microjoules, largest=999_999):
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{largest}\n")


def test_packages_are_added_and_their_parts_are_not_counted_twice(tmp_path):
    for number, start in ((0, 100), (1, 7_000)):
        package(tmp_path, f"intel-rapl:{number}", start)
        package(tmp_path, f"intel-rapl:{number}:0", 5)
    before = energy.read(tmp_path)
    package(tmp_path, "intel-rapl:0", 300_100)
    package(tmp_path, "intel-rapl:0:0", 200_000)
    package(tmp_path, "intel-rapl:1", 207_000)
    assert before is not None
    assert energy.read(tmp_path).joules_since(before) == pytest.approx(0.5)


def test_a_counter_that_began_again_is_counted_on(tmp_path):
    package(tmp_path, "intel-rapl:0", 999_990)
    before = energy.read(tmp_path)
    package(tmp_path, "intel-rapl:0", 10)
    assert energy.read(tmp_path).joules_since(before) == pytest.approx(20e-6)


def test_a_machine_that_does_not_count_or_does_not_tell_says_so(tmp_path):
    assert energy.read(tmp_path / "none") is None
    assert energy.read(tmp_path) is None
    package(tmp_path, "intel-rapl:0", "?")
    assert energy.read(tmp_path) is None
