"""The command line, `python -m benchmarks NAME`.

`all` runs every benchmark, each size in a process of its own, and writes the page; `page` only
writes it; `aot` compiles the training loop for devices that are not there.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

from benchmarks import measure

Name = Literal["psi", "seeds", "growth", "optimizer", "step", "epoch", "build", "all", "page"]
LARGE = ("beauty", "electronics", "clothing", "1m")
# By benchmark its sizes, and how often each is measured unless `--repeats` says otherwise.
DEFAULTS: dict[str, dict[str, int]] = {
    "psi": {"small": 15} | dict(zip(LARGE, (15, 9, 7, 5), strict=True)),
    "seeds": {"beauty": 15, "electronics": 3},
    "growth": {"all": 5},
    "optimizer": {"beauty": 15, "clothing": 5},
    "step": dict(zip(LARGE, (3, 3, 2, 1), strict=True)),
    "epoch": {"beauty": 3},
    "build": {"1M": 1, "10M": 1},
}
FULL_SIZE = {"build": {"100M": 1}}  # with `--full`


@dataclass(frozen=True)
class Options:
    """Benchmarks against public tools; each keeps its records, of which the page is made.

    `python -m benchmarks aot --help` tells of the training loop compiled ahead of time.
    """

    name: Positional[Name]
    sizes: tuple[str, ...] = ()
    """`tiny`, `small`, `beauty`, `electronics`, `clothing`, `1m`; of `build` `1M`, `10M` and
    `100M`."""
    data: Path | None = None
    """The folder of Amazon Beauty; without it, a generated log of its size."""
    repeats: int | None = None
    records: Path = measure.FOLDER
    """Where the records are kept."""
    full: bool = False
    """Also the graph of 100 million interactions, and PyTorch's step at a million items."""


def main() -> None:
    """Runs the command of `sys.argv`; bad input ends with a message and exit status 2."""
    if sys.argv[1:2] == ["aot"]:
        from benchmarks import aot

        aot.main(sys.argv[2:])
        return
    options = tyro.cli(Options, prog="python -m benchmarks", description=__doc__)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(options: Options) -> None:
    from benchmarks import page

    if options.name == "page":
        page.write(options.records)
        return
    names = list(DEFAULTS) if options.name == "all" else [options.name]
    plan = [(name, size) for name in names for size in sizes_of(name, options)]
    if len(plan) == 1:
        ((name, size),) = plan
        if name != "build":  # which has no peer, and tells its memory
            measure.keep_buffers()
        _one(name, size, options)
        if options.name == "all":
            page.write(options.records)
        return
    # The rest of the arguments, without the name and the sizes, hold for each of them.
    rest = ["--data", str(options.data)] if options.data else []
    rest += ["--repeats", str(options.repeats)] if options.repeats else []
    rest += ["--records", str(options.records)] if options.records != measure.FOLDER else []
    rest += ["--full"] * options.full
    for name, size in plan:
        command = [sys.executable, "-m", "benchmarks", name, "--sizes", size, *rest]
        subprocess.run(command, check=False)  # what fails says so, and the others go on
    page.write(options.records)


def sizes_of(name: str, options: Options) -> list[str]:
    """The sizes asked for, or all; of `all`, those asked for that the benchmark has."""
    known = list(DEFAULTS[name] | (FULL_SIZE.get(name, {}) if options.full else {}))
    if not options.sizes:
        return known
    allowed = [*known, *FULL_SIZE.get(name, {}), *(["tiny"] if name != "build" else [])]
    if options.name == "all":
        return [size for size in options.sizes if size in allowed]
    if unknown := set(options.sizes) - set(allowed):
        raise ValueError(f"`sizes` of {name} must be of {allowed}, got {sorted(unknown)}.")
    return list(options.sizes)


def _one(name: str, size: str, options: Options) -> None:
    # Imported when needed: after the process has its allocator's settings.
    repeats = options.repeats or DEFAULTS[name].get(size, 3)
    if name == "build":
        from benchmarks.build import build

        repeats, values = 1, build(size)
    elif name == "step":
        from benchmarks.step import steps

        values = steps(size, options.data, repeats, options.full or size != "1m")
    elif name == "optimizer":
        from benchmarks.optimizer import updates

        values = updates(size, options.data, repeats)
    elif name == "epoch":
        from benchmarks.epoch import epoch

        values = epoch(size, options.data, repeats)
    else:
        from benchmarks import psi

        if name == "growth":
            values = psi.growth(repeats, 0.01 if size == "tiny" else 1.0)
        else:
            function = psi.alone if name == "psi" else psi.seeds
            values = function(size, options.data, repeats)
    measure.keep(options.records, name, size, repeats, values)
