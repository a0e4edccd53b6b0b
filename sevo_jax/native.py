"""Compressed rows with a compiled product for the CPU, from `native.cc`.

Opt-in: `python -m sevo_jax.compile` builds it once, and `layout="auto"` takes it from then on.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
from jax.custom_batching import custom_vmap

from sevo_jax.layouts import Rows, in_turn

SOURCE = Path(__file__).with_name("native.cc")
COMMAND = "python -m sevo_jax.compile"
_TARGETS = ("float32", "float64", "float32_bfloat16")
_registered: set[str] = set()  # names of libraries; the name tells what is inside


def library() -> Path:
    """Where the compiled library belongs: a file of this source, jaxlib and processor alone."""
    # Neither needs a home folder to exist, and so preparing a graph does not.
    cache = os.environ.get("XDG_CACHE_HOME", "")
    cache = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    parts = SOURCE.read_bytes(), jaxlib.__version__.encode(), _processor().encode()
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    return Path(cache) / "sevo_jax" / f"native-{name}.so"


@functools.cache
def _processor() -> str:
    """What the compiler may use of this very processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    abilities = next((s for s in lines if s.startswith(("flags", "Features"))), "")
    return platform.machine() + abilities


def is_built() -> bool:
    """Whether the command has been run, and for what is installed now."""
    path = library()
    return path.is_absolute() and path.exists()


def _register(path: Path) -> None:
    """Loads the library and makes its functions known to XLA, once in a process."""
    if not path.exists():
        raise RuntimeError(
            f'`layout="compiled"` needs a library that is not built. Run `{COMMAND}`, or '
            'take `layout="rows"`. An adjacency that was prepared where it is built needs it '
            "here, too."
        )
    # XLA takes no second library for a name, not even the same one from another cache folder.
    if path.name in _registered:
        return
    try:
        loaded = ctypes.cdll.LoadLibrary(str(path))
    except OSError as error:
        raise RuntimeError(
            f"The library of the compiled layout does not load ({error}). Delete {path} and "
            f'run `{COMMAND}` again, or take `layout="rows"`.'
        ) from error
    for target in _TARGETS:
        capsule = jax.ffi.pycapsule(getattr(loaded, f"sevo_polynomial_{target}"))
        jax.ffi.register_ffi_target(f"sevo_polynomial_{target}", capsule, platform="cpu")
    _registered.add(path.name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Compiled(Rows):
    """All layers of psi in one compiled call; elsewhere than on a CPU as `Rows`."""

    messages: str | None = dataclasses.field(default=None, metadata={"static": True})

    def one_table(self, coefficients: jax.Array, x: jax.Array) -> jax.Array:
        if not _compiles(coefficients, x):
            return super().one_table(coefficients, x)
        return jax.lax.platform_dependent(
            self, coefficients, x, cpu=_polynomial, default=Rows.one_table
        )

    def tables(self, coefficients: jax.Array, x: jax.Array) -> jax.Array:
        if not _compiles(coefficients, x):
            return super().tables(coefficients, x)
        return _tables(self, coefficients, x)


def _compiles(coefficients: jax.Array, x: jax.Array) -> bool:
    """Whether the library, which is then loaded, takes coefficients `[..., L + 1, 1, n]`."""
    if coefficients.shape[-3] == 1 or x.dtype not in (jnp.float32, jnp.float64):
        return False
    _register(library())
    return True


@custom_vmap
def _tables(adjacency: Compiled, coefficients: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        adjacency, coefficients, x, cpu=_polynomials, default=Rows.tables
    )


@_tables.def_vmap
def _more_tables(
    axis_size: int,
    in_batched: tuple[Compiled, bool, bool],
    adjacency: Compiled,
    coefficients: jax.Array,
    x: jax.Array,
) -> tuple[jax.Array, bool]:
    """A call takes any number of tables, but one graph."""
    if any(jax.tree.leaves(in_batched[0])):
        return in_turn(_tables, in_batched, (adjacency, coefficients, x)), True
    if not in_batched[1]:
        coefficients = jnp.broadcast_to(coefficients, (axis_size, *coefficients.shape))
    sizes = coefficients.shape[:2]
    number = sizes[0] * sizes[1]
    if in_batched[2] or len(x) != 1:  # otherwise one table serves all
        x = x if in_batched[2] else x[None]
        x = jnp.broadcast_to(x, (*sizes, *x.shape[2:])).reshape(number, *x.shape[2:])
    coefficients = coefficients.reshape(number, *coefficients.shape[2:])
    y = _tables(adjacency, coefficients, x)
    return y.reshape(*sizes, *y.shape[1:]), True


def _polynomial(adjacency: Compiled, coefficients: jax.Array, x: jax.Array) -> jax.Array:
    return _polynomials(adjacency, coefficients[None], x[None])[0]


def _polynomials(adjacency: Compiled, coefficients: jax.Array, x: jax.Array) -> jax.Array:
    number, terms, _, width = coefficients.shape
    dtype, shape = str(x.dtype), x.shape[1:]
    result, scratch = (
        jax.ShapeDtypeStruct((number, *shape), x.dtype),
        jax.ShapeDtypeStruct(shape, x.dtype),
    )
    if adjacency.messages == "bfloat16" and dtype == "float32":
        dtype += "_bfloat16"
        scratch = jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16)
    y, _ = jax.ffi.ffi_call(f"sevo_polynomial_{dtype}", (result, scratch))(
        adjacency.row_splits,
        adjacency.columns,
        adjacency.weights.astype(x.dtype),
        coefficients.astype(x.dtype).reshape(number, terms, width),
        x,
    )
    return y
