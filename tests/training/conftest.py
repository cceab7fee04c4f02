"""A compilation cache for these tests: most of them compile the same small step."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

CACHE = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}


@pytest.fixture(autouse=True, scope="package")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sets the cache for this process and, by the environment, for those it starts."""
    folder = tmp_path_factory.mktemp("compiled")
    settings = {"jax_compilation_cache_dir": str(folder), **CACHE}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]
