"""`bitnet-jax bench`: wrong inputs before anything runs, tables of what is kept, and real processes of a small model."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from bitnet_jax import cli
from bitnet_jax.benchmark import processes
from bitnet_jax.cli import bench
from bitnet_jax.formats import model_file
from bitnet_jax.formats.random_model import random_packed
from tests.shapes import tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="binds processes to cores")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "a model file or --shape must be given, and not both"),
        (("m.safetensors", "--shape", "2b4t"), "a model file or --shape must be given, and not both"),
        (("none.safetensors",), "none.safetensors does not exist"),
        (("--shape", "3b"), "shape '3b' is unknown: must be 2b4t, 700m, or a preset"),
        (("--shape", "2b4t", "--encoding", "ternary"), "invalid choice 'ternary'"),
        (("--shape", "2b4t", "--threads", "0"), "threads=0 must be from 1 to"),
        (("--shape", "2b4t", "--threads", "1", "4096"), "threads=4096 must be from 1 to"),
        (("--shape", "2b4t", "--prompt", "0"), "prompt=0 must be at least 1"),
        (("--shape", "2b4t", "--prompt", "4090"), "prompt=4090 with generate=256 is 4346 tokens: must be at most max_seq_len=4096"),
        (("--shape", "2b4t", "--generate", "1"), "generate=1 must be at least 2"),
        (("--shape", "2b4t", "--peer", "a"), "peer 'a' must be NAME=COMMAND"),
        (("--shape", "2b4t", "--peer", "a=ls", "--peer", "b=no-such-program {prompt}"), "no-such-program is no program"),
        (("--shape", "2b4t", "--json", "no-such-folder/r.json"), "--json no-such-folder/r.json must be a file in a folder that exists"),
        (("--table", "none.json"), "none.json cannot be read"),
        (("--table", "m.safetensors"), "m.safetensors cannot be read"),
    ],
)
def test_a_wrong_input_is_one_line_before_anything_runs(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.safetensors").write_bytes(b"\xff")
    monkeypatch.setattr(processes, "run", lambda *_: pytest.fail("a process was started"))
    assert cli.main(["bench", *args]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_table_needs_results(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    assert cli.main(["bench", "--table"]) == 2
    assert "--table needs a file" in capsys.readouterr().err


def small_model(folder):
    model_file.write(folder / "m.safetensors", random_packed(tiny()))
    peer = json.dumps({"prefill_tokens_per_second": 9, "decode_tokens_per_second": 7})
    (folder / "peer.sh").write_text(f"echo loading; echo '{peer}'")
    return ["bench", "m.safetensors", "--prompt", "8", "--generate", "4", "--threads", "1", "--repeats", "1", "--json", "r.json"]


@pytest.mark.slow
def test_a_small_model_beside_a_peer_that_works_and_one_that_does_not(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = [*small_model(tmp_path), "--twin", "float32", "--peer", "good=sh peer.sh", "--peer", "bad=ls no-such-{prompt}"]
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert "failed: exit code 2" in shown.err
    found = json.loads((tmp_path / "r.json").read_text())
    runs = {run["subject"]: run for run in found["runs"]}
    assert list(runs) == ["read bandwidth", "bitnet-jax", "full precision in XLA, float32", "good", "bad", "start"]
    ours = runs["bitnet-jax"]
    for name in ("prefill", "decode", "streamed", "cold_prefill", "cold_decode"):
        assert ours[f"{name}_tokens_per_second"] > 0
    assert 0 < ours["load_seconds"] < ours["first_token_seconds"] < ours["seconds"]
    mine = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # a child's peak is at least its parent's when it forks
    assert 50e6 < ours["peak_bytes"] < mine + 2e9
    states = runs["start"]["states"]
    assert list(states) == ["nothing compiled", "cold", "warm"]
    assert states["warm"]["compile_seconds"] < states["nothing compiled"]["compile_seconds"]
    assert runs["good"]["decode_tokens_per_second"] == 7
    assert found["sessions"][0]["settings"]["threads"] == [1]
    assert found["sessions"][0]["packages"]["jax"]

    assert cli.main(["bench", "--table", "r.json"]) == 0
    assert capsys.readouterr().out == shown.out
    kept = found["runs"]
    assert cli.main([*command, "--peer", "more=sh peer.sh"]) == 0  # only what is new, and what failed, is run
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [run for run in runs if run in kept] == [run for run in kept if run["subject"] != "bad"]
    assert {run["subject"] for run in runs if run not in kept} == {"bad", "more"}
    assert cli.main(["bench", "m.safetensors", "--implementation", "cuda", "--prompt", "8", "--generate", "4"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("bitnet-jax: error: implementation 'cuda' is unknown: must be one of ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_measured_and_leaves_no_process(tmp_path, number):
    command = [*small_model(tmp_path), "--peer", "sleeper=sleep 61"]
    process = subprocess.Popen([sys.executable, "-m", "bitnet_jax", *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "bitnet-jax, 1 threads" in line:
            break
    child = ""
    while process.poll() is None and not child:  # the sleeper is next
        child = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "bitnet-jax: interrupted: what was measured is in r.json; the same command goes on"
    assert [run["subject"] for run in json.loads((tmp_path / "r.json").read_text())["runs"]] == ["read bandwidth", "bitnet-jax"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(child), 0)
