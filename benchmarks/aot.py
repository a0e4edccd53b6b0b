"""The training loop compiled for TPUs and GPUs that are not there: memory, collectives, cost.

    pip install "jax[tpu]" jax-cuda13-plugin nvidia-cuda-nvcc
    python -m benchmarks aot --targets v5e v5e-4x4 --out benchmarks/AOT.md

Compiles the epoch that `experiments train --mesh` runs, a loop over steps of SASRec +
SEvo-AdamW, for a described topology. Arguments are shapes alone: nothing is allocated, and
nothing is run. The item table, its moments and psi are split over the devices by
`sevo_jax.sharding`, the batch by users. The CUDA plugin must be of jax's own version.
"""

import importlib.metadata
import math
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import tyro

from benchmarks.mesh_epoch import Size, lower_epoch
from benchmarks.targets import SOURCES, TARGETS, mesh_of, missing
from experiments import records
from experiments.presets import preset

CONFIG = preset("sasrec", "amazon_beauty", "sevo_adamw")
# Users and interactions of the first are Beauty's, of the second those of the paper's
# Clothing; the others have as many for each edge as that has.
SIZES = {
    "beauty": Size(12_101, 218_852, 22_363, 153_776),
    "clothing": Size(376_378, 16_000_000, 1_219_337, 8_843_771),
    "1m": Size(1_000_000, 40_000_000, 3_000_000, 22_000_000),
    "10m": Size(10_000_000, 40_000_000, 3_000_000, 22_000_000),
}


class Use(NamedTuple):
    """What one device needs for training, in bytes, by the compiler's account."""

    arguments: float
    data: float  # those of the arguments of which a step reads little
    outputs: float
    reused: float  # outputs that take the place of donated arguments
    temporary: float
    code: float

    @property
    def total(self) -> float:
        return self.arguments + self.outputs - self.reused + self.temporary + self.code


@dataclass(frozen=True)
class Step:
    """A loop of steps as compiled for a target; without `use`, the compiler refused it."""

    target: str
    size: Size
    seconds: float  # of the compiler
    needed: float  # bytes of memory of one device, all together
    use: Use | None = None
    flops: float | None = None  # of one device; the CUDA compiler does not tell
    collectives: dict[str, tuple[int, int]] | None = None  # None if the compiler does not tell

    @property
    def fits(self) -> bool:
        return self.use is not None and self.needed <= 1e9 * TARGETS[self.target].device.memory


def compile_step(name: str, size: Size) -> Step:
    """Compiles the epoch of a size for the target of that name."""
    lowered = lower_epoch(size, mesh_of(TARGETS[name]), CONFIG)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"(?:Used |\()([\d.]+)([KMGT])\)? (?:of|exceeds)", str(error))
        if not used or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = float(used[1]) * 1024 ** (" KMGT".index(used[2]))
        return Step(name, size, time.perf_counter() - began, needed)
    seconds = time.perf_counter() - began
    parts = ("argument", "output", "alias", "temp", "generated_code")
    memory = compiled.memory_analysis()
    arguments, *others = (getattr(memory, f"{part}_size_in_bytes") for part in parts)
    data = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(lowered.args_info[0][2])
    )
    use = Use(arguments, data, *others)
    flops = (compiled.cost_analysis() or {}).get("flops")
    try:
        moved = collectives(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError:
        moved = None  # jaxlib 0.10 cannot print the asynchronous collectives of v5p
    return Step(name, size, seconds, use.total, use, flops, moved)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Number of collectives in a compiled program and bytes of their results on each device.

    One in a loop counts once. The TPU compiler cuts a collective into a chain of pieces that
    run beside other work; each piece names the whole result, and the chain counts once.

    Args:
      text: of the program after partitioning, as `compiled.as_text()` gives it.

    Returns:
      `(number, bytes)` by kind, such as `"all-to-all"`.
    """
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    found: dict[str, tuple[int, int]] = {}
    chains = set()
    # What begins with `-start` has operands among its results; its `-done` has not.
    for shapes, kind, rest in re.findall(rf"= (.*?) ({kinds})(?:-done)?\((.*)", text):
        chain = re.search(r'chain_id="(\d+)"', rest)
        if chain and (kind, chain[1]) in chains:
            continue
        if chain:
            chains.add((kind, chain[1]))
        number, size = found.get(kind, (0, 0))
        found[kind] = number + 1, size + _bytes(shapes)
    return found


def _bytes(shapes: str) -> int:
    """Of `f32[8,4]{1,0}` or a tuple of such; a bool takes one."""
    total = 0
    for name, bits, dims in re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shapes):
        width = 1 if name == "pred" else -(-int(bits) // 8)
        total += width * math.prod(int(n) for n in dims.split(",") if n)
    return total


HEAD = (
    "target",
    "items",
    "directed edges",
    "arguments",
    "temporary",
    "outputs, not in place",
    "all, with code",
    "fits",
    "GFLOPs",
    "collectives",
    "ms at least",
    "compiled in, s",
)


def row(step: Step) -> list[str]:
    """A line of the table; memory in GB of 10^9 bytes on each device."""
    device, use = TARGETS[step.target].device, step.use
    cells = [step.target, f"{step.size.num_items:,}", f"{step.size.num_edges:,}"]
    fits = f"{'yes' if step.fits else '**no**'}, of {device.memory:g}"
    end = f"{step.seconds:.0f}"
    if use is None:
        return [*cells, "", "", "", f"{step.needed / 1e9:.3f}", fits, "", "", "", end]
    memory = (use.arguments, use.temporary, use.outputs - use.reused, use.total)
    moved = "not told"
    if step.collectives is not None:
        moved = ", ".join(
            f"{number} {kind} ({size / 1e6:.3g} MB)"
            for kind, (number, size) in sorted(step.collectives.items())
        )
    flops = "" if step.flops is None else f"{step.flops / 1e9:.3g}"
    moved_at_least = use.arguments - use.data + use.outputs
    least = f"{moved_at_least / device.bandwidth / 1e6:.3g}"
    memory = [f"{part / 1e9:.3f}" for part in memory]
    return [*cells, *memory, fits, flops, moved or "none", least, end]


def page(steps: Iterable[Step], command: str) -> str:
    """The steps as a page of Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *map(row, steps)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    made_on = records.environment()
    versions = made_on["versions"]
    for package in ("libtpu", "jax-cuda13-plugin"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"""# The training loop compiled ahead of time

The epoch that `experiments train --mesh` runs, of SASRec + SEvo-AdamW: a loop over steps that
draws a batch and negatives, then forward, backward, Adam with corrected moments, psi, weight
decay. Compiled for devices that were not there; **nothing here ran on a TPU or a GPU.** Made by

    {command}

on {made_on["device"]}, {made_on["cores"]} core(s):
{made}.

Batch {CONFIG.batch_size} users of {CONFIG.max_length} items each, the longest that there can
be; d = {CONFIG.dim}, float32, L = {CONFIG.num_layers}. On several devices the item table,
Adam's moments and psi are split by `sevo_jax.sharding`, the batch by users; every device holds
the whole graph and all training data.

{table}

- Memory is in GB on each device, by the compiler's account. Parameters and moments are donated:
  outputs take their place. An epoch fits if all of it is within the device's memory, of which
  the runtime takes a little for itself. Training also keeps the best parameters so far, a
  third of the parameters and moments.
- {SOURCES}
- GFLOPs are of one device, by the compiler's account, which takes the body of a loop once: a
  step, and what shuffles the users of an epoch. That for CUDA gives none.
- Collectives of one step: number, and bytes of the results on each device. psi has the
  all-to-alls; the rest are the look-up of the batch's rows, its gradient, and the gradients of
  the other parameters, as the partitioner arranges them.
- "ms at least" is the time to read all arguments but the training data and write all outputs
  once at the memory's full bandwidth. It is a bound for a step, no forecast: psi also reads a
  row for each edge and layer. [RESULTS.md](RESULTS.md) has the milliseconds that a packed step
  took on an H200, and the share of its bandwidth that psi reached.
- The last column is the compiler's time on the machine named above, whatever else ran there.
"""


@dataclass(frozen=True)
class Options:
    """Compile the training loop ahead of time for devices that are not there."""

    targets: tuple[str, ...] = tuple(TARGETS)
    """Of the table `TARGETS`."""
    sizes: tuple[str, ...] = tuple(SIZES)
    """Of the table `SIZES`."""
    out: Path | None = None
    """The page to write, rewritten after every epoch."""


def check(options: Options) -> None:
    """Raises a `ValueError` for unknown names, and where a compiler is missing."""
    for name, known in (("targets", TARGETS), ("sizes", SIZES)):
        given = getattr(options, name)
        if not given or not set(given) <= set(known):
            raise ValueError(f"`{name}` must be of {tuple(known)}, got {given}.")
    for name in options.targets:
        if package := missing(TARGETS[name]):
            raise ValueError(
                f"`targets`: {name} needs a compiler, the package {package}, which is not "
                'installed. `pip install "jax[tpu]"` brings that for TPUs, `pip install '
                "jax-cuda13-plugin nvidia-cuda-nvcc` that for GPUs."
            )


def main(args: Sequence[str] | None = None) -> None:
    """Compiles one epoch after the other; bad input ends with a message and exit status 2."""
    args = sys.argv[1:] if args is None else args
    options = tyro.cli(Options, prog="python -m benchmarks aot", args=args)
    try:
        check(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    jax.config.update("jax_platforms", "cpu")  # the compilers alone, not their devices
    command = f"python -m benchmarks aot {shlex.join(args)}".strip()
    steps = []
    for target in options.targets:
        for size in options.sizes:
            steps.append(compile_step(target, SIZES[size]))
            print(" | ".join(row(steps[-1])), flush=True)
            if options.out:
                options.out.write_text(page(steps, command), encoding="utf-8")
