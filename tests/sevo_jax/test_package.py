"""The package as a whole: names, documentation, imports."""

import doctest
import importlib
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import sevo_jax

ROOT = Path(sevo_jax.__file__).parents[1]
NO_EXAMPLES = ("compile", "ids", "layouts", "native", "padded", "tables")
SHARDING = ("shard_adjacency", "row_shardings")  # what that module is for
MODULES = [f"sevo_jax.{module.name}" for module in pkgutil.iter_modules(sevo_jax.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0
    assert result.attempted > 0 or module.rsplit(".", 1)[1] in NO_EXAMPLES


def test_every_public_name_is_documented():
    assert sevo_jax.__all__ == sorted(sevo_jax.__all__)
    names = {name: getattr(sevo_jax, name) for name in sevo_jax.__all__}
    names |= {name: getattr(sevo_jax.sharding, name) for name in SHARDING}
    for name, thing in names.items():
        assert inspect.getdoc(thing), name
        if inspect.isfunction(thing):
            documentation = inspect.getdoc(thing) or ""
            for parameter in inspect.signature(thing).parameters:
                assert f"\n  {parameter}: " in documentation, f"{name}({parameter})"
            hints = [p.annotation for p in inspect.signature(thing).parameters.values()]
            assert inspect.Parameter.empty not in hints, name


def test_the_library_imports_no_flax():
    """Nor the other two packages, or anything else that a user need not have."""
    code = (
        "import sys, sevo_jax; loaded = {name.partition('.')[0] for name in sys.modules}; "
        "print(*loaded & {'flax', 'scipy', 'polars', 'models', 'experiments', 'torch'})"
    )
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    # jax itself may import scipy; the library does not ask for it.
    assert set(result.stdout.split()) <= {"scipy"}
    sources = "".join(path.read_text() for path in (ROOT / "sevo_jax").glob("*.py"))
    assert "scipy" not in sources


def test_version():
    assert sevo_jax.__version__ == importlib.metadata.version("sevo_jax")
