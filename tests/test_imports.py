"""Which way imports go, read from the source: a module imports from the layers below its own, never upwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The layers of bitnet_jax, from the ground up. A folder stands for everything in it, and may import from itself.
# Neighbours in one layer do not know each other. A new module is entered here.
LAYERS = (
    ("errors",),
    ("config",),
    ("presets", "array_types", "costs", "data", "programs", "memory", "orbax_errors"),
    ("sums", "norms", "compilation", "partition"),
    ("quant",),
    ("cpu",),
    ("dot",),
    ("bitlinear",),
    ("layers",),
    ("transformer",),
    ("params",),
    ("inference",),
    ("evaluation",),
    ("training", "formats"),
    ("models", "statistics"),
    ("conversion", "benchmark", "plotting"),
    ("planning",),
    ("",),  # bitnet_jax/__init__.py, the table of contents
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
STANDARD_LIBRARY_ONLY = {"errors", "config", "presets", "costs"}
# Within a layer or upwards, and meant.
EXTRA = {("config", "presets")}  # `ModelConfig.preset` looks its table up when called
FORBIDDEN = {("training", "formats"), ("training", "inference"), ("evaluation", "formats")}
# Packages that only an extra brings: importing a module must work without them.
OPTIONAL = {"atheris", "beartype", "datasets", "gguf", "lm_eval", "pyarrow", "torch", "transformers", "wandb", "zstandard"}

FILES = sorted(path.relative_to(ROOT) for package in ("bitnet_jax", "kernels_pallas") for path in (ROOT / package).rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names that the file imports; `from a import b` counts as a.b, since b may be a module."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if top_level_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = ".".join(path.with_suffix("").parts[: -node.level]) if node.level else ""
            base = ".".join(part for part in (folder, node.module) if part)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def part(dotted: str) -> str:
    """The module or folder directly under bitnet_jax: 'bitnet_jax.training.step.f' is of 'training', a name of the package itself of ''."""
    pieces = dotted.split(".")
    name = pieces[1] if len(pieces) > 1 else ""
    exists = (ROOT / "bitnet_jax" / name).is_dir() or (ROOT / "bitnet_jax" / f"{name}.py").is_file()
    return name if name and exists else ""


def owner(path: Path) -> str:
    return "" if path.name == "__init__.py" and len(path.parts) == 2 else path.with_suffix("").parts[1]


def ids(path: Path) -> str:
    return str(path)


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "kernels_pallas"], ids=ids)
def test_kernels_import_only_jax_and_numpy(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
    assert packages <= {"jax", "numpy", "kernels_pallas"}


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "bitnet_jax"], ids=ids)
def test_modules_import_only_from_layers_below(path: Path) -> None:
    here = owner(path)
    assert here in RANK, f"{path} has no layer: enter it in LAYERS"
    for name in imports(path):
        if name.split(".")[0] != "bitnet_jax" or (there := part(name)) == here:
            continue
        assert RANK[there] < RANK[here] or (here, there) in EXTRA, f"{path} imports {name}, which is not below it"
        assert (here, there) not in FORBIDDEN, f"{path} imports {name}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parts[0] == "bitnet_jax" and owner(path) in STANDARD_LIBRARY_ONLY], ids=ids
)
def test_configurations_import_only_the_standard_library(path: Path) -> None:
    outside = {name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}
    assert {part(name) for name in outside if name.startswith("bitnet_jax.")} <= STANDARD_LIBRARY_ONLY
    assert {name.split(".")[0] for name in outside} <= {"bitnet_jax"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_module_touches_the_inside_of_jax(path: Path) -> None:
    assert not {name for name in imports(path) if name.startswith("jax._src")}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & OPTIONAL


@pytest.mark.parametrize("module", ["bitnet_jax.config", "bitnet_jax.presets", "bitnet_jax.costs"])
def test_reading_a_configuration_does_not_start_jax(module: str) -> None:
    program = f"import sys, {module}; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
