"""Shared fixtures; tests marked slow run only if a marker expression asks for them."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import pytest

# Formulas are under test: on a GPU products of float32 would by default be rounded to TF32.
jax.config.update("jax_default_matmul_precision", "highest")


# Programs here are many and run for milliseconds: without LLVM's optimizations and MLIR's fused
# operations they take half the time. Set `XLA_FLAGS`, even to nothing, for those of users.
XLA_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
    "--xla_cpu_use_fusion_emitters=false",  # which jax 0.12 has no more
)


def pytest_configure(config: pytest.Config) -> None:
    """Lets tests compile faster and share what they compile: it takes most of their time.

    The programs that they start share another folder: one that is killed may leave half of a
    file there, which costs the next a warning, and here warnings are errors.
    """
    if "XLA_FLAGS" not in os.environ:  # which the workers get from the process that starts them
        os.environ["XLA_FLAGS"] = " ".join(_that_xla_takes(XLA_FLAGS))
    folder = tempfile.mkdtemp(prefix="sevo_jax-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", f"{folder}/own")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/started"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def _that_xla_takes(flags: Sequence[str]) -> list[str]:
    """XLA ends the process at a flag that it does not know, so other ones ask."""
    program = [sys.executable, "-c", "import jax; jax.devices()"]
    asked = []
    for flag in flags:
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
        asked.append(subprocess.Popen(program, env=env, stderr=subprocess.DEVNULL))
    return [flag for flag, process in zip(flags, asked, strict=True) if process.wait() == 0]


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
