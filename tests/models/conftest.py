"""Compiles the models' tests with little optimisation, which halves their time.

Formulas are under test here, on a handful of numbers; whole runs compile as users do.
"""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
