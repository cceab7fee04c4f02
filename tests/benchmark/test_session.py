"""The order of measurements, and going on with them. Processes are stand-ins here; tests/cli/test_bench.py runs real ones."""

import json

import pytest

from bitnet_jax import config as configs
from bitnet_jax.benchmark import processes, results, session
from bitnet_jax.benchmark.settings import Peer, Settings
from bitnet_jax.errors import RunError, UserError
from tests.shapes import tiny

PEERS = (Peer(name="one", command="ls {prompt}"), Peer(name="two", command="ls {threads}"))
SPEEDS = {"prefill_tokens_per_second": 5.0, "decode_tokens_per_second": 4.0, "head": "float32", "first_token_seconds": 1.0}


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """A model file, and the list of what was run in its place; an entry of `ends` decides how the process of that number ends."""
    monkeypatch.setattr(processes, "cores", lambda: [0, 1])
    model, ran, ends = tmp_path / "m.safetensors", [], {}
    model.write_bytes(b"x")

    def run(command, threads, _=None):
        ours = "bitnet_jax.benchmark.worker" in command
        job = json.loads(command[-1]) if ours else {"job": command[-1]}
        if job["job"] == "describe":
            facts = {"kind": "model file", "bytes": 1, "storage": "two_bit", "config": configs.to_dict(tiny())}
            return ended(
                json.dumps(
                    {"model": facts, "environment": {"commit": None, "device": {"kind": "K6"}, "cores": 2, "packages": {"jaxlib": "1"}}}
                )
            )
        ran.append((job["job"], threads))
        end = ends.pop(len(ran), None)
        if isinstance(end, BaseException):
            raise end
        if end is not None:
            return end
        return ended("noise\n" + json.dumps({"bytes_per_second": 1e9} if job["job"] == "bandwidth" else SPEEDS))

    monkeypatch.setattr(processes, "run", run)

    def measure(output=None, **changes):
        wanted = Settings(**{"threads": (2, 1), "prompt": (8,), "generate": (4, 2), "repeats": 2, "peers": PEERS, **changes})
        return session.measure("m", model, wanted, output, lambda line: None)

    return measure, ran, ends


def ended(output="", errors="", code=0):
    return processes.Ended(code=code, output=output, errors=errors, seconds=1.0, peak_bytes=1)


def test_programs_take_turns_and_the_first_cells_come_first(stage):
    measure, ran, _ = stage
    measure(twin=("float32",))
    turn = [("speed", 2), ("twin", 2), ("8", 2), ("2", 2)]
    assert ran[:10] == [("bandwidth", 2), *turn, ("bandwidth", 2), *turn]
    assert ran[10:18] == turn * 2  # bandwidth belongs to no prompt
    assert ran[18:24] == [("start", 2)] * 6
    assert {threads for _, threads in ran[24:]} == {1}


def test_what_is_done_is_not_done_again(stage, tmp_path):
    measure, ran, _ = stage
    first = measure(tmp_path / "r.json")
    ran.clear()
    again = measure(tmp_path / "r.json")
    assert ran == []
    assert again["runs"] == first["runs"]
    assert len(again["sessions"]) == 2
    measure(tmp_path / "r.json", repeats=3, start=False)
    assert len(ran) == 2 * (1 + 2 * 3)


def test_results_of_another_machine_are_not_mixed_in(stage, tmp_path):
    measure, ran, _ = stage
    measure(tmp_path / "r.json")
    other = (tmp_path / "r.json").read_text().replace('"kind": "K6"', '"kind": "K7"')
    (tmp_path / "r.json").write_text(other)
    ran.clear()
    with pytest.raises(UserError, match="holds results of another machine or jaxlib"):
        measure(tmp_path / "r.json")
    assert ran == []


@pytest.mark.parametrize("number", [1, 2, 7])
def test_an_interruption_keeps_what_was_measured(stage, tmp_path, number):
    measure, ran, ends = stage
    ends[number] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "r.json")
    kept = results.read(tmp_path / "r.json")["runs"] if number > 1 else []
    assert len(kept) == number - 1
    ran.clear()
    assert measure(tmp_path / "r.json")["runs"][: number - 1] == kept
    assert len(ran) + number - 1 == 40


def test_a_peer_that_fails_is_noted_and_the_others_go_on(stage):
    measure, ran, ends = stage
    ends |= {3: ended(errors="loading\nno such model\n", code=1), 4: ended("slow but well\n")}
    runs = measure()["runs"]
    assert len(ran) == 40
    assert [run["failed"] for run in runs if "failed" in run] == [
        "exit code 1: no such model",
        "it printed no speeds: must be llama-bench's JSON, or an object with prefill_ and decode_tokens_per_second; "
        "its last line: slow but well",
    ]


def test_a_failure_of_ours_ends_the_benchmark_in_a_line(stage):
    measure, _, ends = stage
    ends[2] = ended(errors="INFO\nimplementation native cannot: why\n", code=2)
    with pytest.raises(UserError, match=r"^implementation native cannot: why$"):
        measure()
    ends[4] = ended(code=-9)
    with pytest.raises(RunError, match="the process that measures speed ended with -9: no output"):
        measure()


def test_the_models_context_decides_before_anything_is_measured(stage):
    measure, ran, _ = stage
    with pytest.raises(UserError, match="must be at most max_seq_len=64"):
        measure(prompt=(62,))
    assert ran == []
