"""Shared fixtures; tests marked slow run only if a marker expression asks for them."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
import pytest

# Formulas are under test: on a GPU products of float32 would by default be rounded to TF32.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_configure(config: pytest.Config) -> None:
    """Lets tests share what they compile, which takes most of their time.

    The programs that they start share another folder: one that is killed may leave half of a
    file there, which costs the next a warning, and here warnings are errors.
    """
    folder = tempfile.mkdtemp(prefix="sevo_jax-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", f"{folder}/own")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/started"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))
        if "cpu" in item.keywords and jax.default_backend() != "cpu":
            item.add_marker(pytest.mark.skip(reason="of what JAX does on a CPU"))


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[np.dtype]:
    """Runs the test in both precisions, with JAX's 64-bit mode on for the second."""
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield
