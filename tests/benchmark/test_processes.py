"""A measurement's process: its cores, its memory, its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitnet_jax.benchmark import processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="binds processes to cores")


def python(program, threads=1, **environment):
    return processes.run([sys.executable, "-c", program], threads, environment)


def test_threads_are_cores_and_ours_stay_as_they_were():
    before = os.sched_getaffinity(0)
    for threads in {1, len(before)}:
        ended = python("import os; print(sorted(os.sched_getaffinity(0)))", threads)
        assert ended.output == f"{sorted(before)[:threads]}\n"
    assert os.sched_getaffinity(0) == before


def test_peak_memory_is_the_processs_own_largest():
    """Until it runs its own program a process's memory is counted as large as its parent's, hence a parent without JAX."""
    program = """
import sys
from bitnet_jax.benchmark import processes, session, table
assert not {"jax", "flax"} & set(sys.modules)
child = "bytes(b'x') * (300 << 20); print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
ended = processes.run([sys.executable, "-c", child], 1)
print(ended.peak_bytes, ended.output)
"""
    peak, kibibytes = map(int, python(program).output.split())
    assert peak > 300 << 20
    assert peak == pytest.approx(1024 * kibibytes, rel=0.01)


def test_output_errors_code_and_environment():
    ended = python("import os, sys; print(os.environ['A']); print('why\\n', file=sys.stderr); sys.exit(3)", A="b")
    assert (ended.code, ended.output, ended.errors, ended.last_line) == (3, "b\n", "why\n\n", "why")
    assert python("").last_line == "no output"
    assert python("import os; os.kill(os.getpid(), 9)").code == -9


def test_interrupted_it_ends_the_process_and_all_that_it_started(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    mark = tmp_path / "pid"
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(1)
    try:
        with pytest.raises(KeyboardInterrupt):
            processes.run(["sh", "-c", f"sleep 60 & echo $! > {mark}; wait"], 1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    pid = int(mark.read_text())
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except OSError:
            return
        if state == "Z":  # ended, and not yet waited for by whoever inherited it
            return
        time.sleep(0.05)
    pytest.fail("a process outlived the measurement")


def test_a_signal_while_a_process_is_started_leaves_none(monkeypatch):
    """The worst moment: the process is there, and nobody has its number yet."""
    started, real = [], subprocess.Popen

    def start(*args, **options):
        started.append(real(*args, **options))
        signal.raise_signal(signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        processes.run([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert started[0].poll() == -signal.SIGKILL
