"""Settings of every test: strict JAX, CPU unless asked otherwise, and no writing outside temporary folders."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

# Set before JAX, Matplotlib and the Hugging Face libraries are imported, and inherited by processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
_native = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitnet-jax" / "native"
_scratch = tempfile.mkdtemp(prefix="bitnet-jax-tests-")
for _variable, _folder in (("XDG_CACHE_HOME", "cache"), ("HF_HOME", "huggingface"), ("WANDB_DIR", "wandb")):
    os.environ[_variable] = str(Path(_scratch, _folder))
# Matplotlib's list of fonts takes seconds to make, so it outlives the session.
os.environ["MPLCONFIGDIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "matplotlib")

# Nor are the native kernels compiled again: tests use those of the user's cache, and make them there, as every use would.
with contextlib.suppress(OSError):
    _native.mkdir(parents=True, exist_ok=True)
Path(_scratch, "cache", "bitnet-jax").mkdir(parents=True)
Path(_scratch, "cache", "bitnet-jax", "native").symlink_to(_native)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compiling is most of what tests of small models spend their time on; tests whose point is the compiler's own arithmetic ask for it.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 2)  # so that sharding is exercised


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the tests that need a device which is not the default one, and leaves those out that run only when they are asked for."""
    for marker in ("huge", "tpu_aot", "gpu_aot"):
        if not config.getoption("markexpr").startswith(marker):
            left_out = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
    for item in items:
        for marker, platform in (("gpu", "gpu"), ("tpu", "tpu")):
            if item.get_closest_marker(marker) and jax.default_backend() != platform:
                item.add_marker(pytest.mark.skip(reason=f"needs a {marker.upper()}"))


def pytest_unconfigure() -> None:
    """Removes what the tests wrote."""
    shutil.rmtree(_scratch, ignore_errors=True)
