"""Builds the compiled product of `sevo_jax.native`: `python -m sevo_jax.compile`."""

import argparse
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

from sevo_jax.native import SOURCE, library

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")


def find_compiler() -> str | None:
    """That of the environment variable `CXX`, or else `c++`, `g++` or `clang++`."""
    found = map(shutil.which, ("c++", "g++", "clang++"))
    return os.environ.get("CXX") or next(filter(None, found), None)


def compile_library() -> Path:
    """Compiles `native.cc` for this machine into the user's cache, unless it is there.

    Returns:
      The path of the library.

    Raises:
      RuntimeError: there is no compiler, or it fails; with what it said.
    """
    path = library()
    if not path.is_absolute():
        raise RuntimeError(
            f"Found no folder for the library: {path} is relative. Set XDG_CACHE_HOME, as this "
            "user has no home folder."
        )
    if path.exists():
        return path
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError(
            "Found no C++ compiler: neither `CXX` in the environment nor c++, g++ or clang++. "
            "Without one everything works as before."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Moved to its place when it is whole, so that no process ever loads half of it.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [
            *shlex.split(compiler),  # as in CXX="ccache g++"
            *_FLAGS,
            f"-I{jax.ffi.include_dir()}",
            str(SOURCE),
            "-o",
            str(made),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"The compiler {compiler!r} does not start: {error}") from None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        made.replace(path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Compiles psi for this machine into the user's cache, unless it is there."
    )
    parser.parse_args()
    try:
        print(compile_library())
    except (OSError, RuntimeError) as error:
        parser.exit(1, f"{error}\n")
