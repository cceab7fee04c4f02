"""Compiled programs are kept where the user's cache is, and found by the next process."""

import os
import subprocess
import sys
from pathlib import Path

from bitnet_jax import compilation

PROGRAM = """
from bitnet_jax.compilation import keep_programs
keep_programs()
import jax
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: jax.numpy.linalg.svd(x @ x.T))(jax.numpy.ones((40, 40)))
print(found.count("/jax/compilation_cache/cache_hits") > 0)
"""


def test_a_second_process_compiles_nothing(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for expected in ("False", "True"):
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [expected]
        assert not done.stderr
    assert list(Path(tmp_path, "bitnet-jax", "programs").glob("*/*"))


def test_what_the_user_has_set_is_left(monkeypatch):
    environment = {"JAX_COMPILATION_CACHE_DIR": "elsewhere", "XDG_CACHE_HOME": "cache"}
    monkeypatch.setattr(os, "environ", environment)
    compilation.keep_programs()
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    del environment["JAX_COMPILATION_CACHE_DIR"]
    compilation.keep_programs()
    assert Path(environment["JAX_COMPILATION_CACHE_DIR"]).parent == Path("cache/bitnet-jax/programs")
