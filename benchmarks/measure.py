"""How things are timed, and the records that are kept of it."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import records

FOLDER = Path(__file__).with_name("records")
# glibc then keeps large buffers instead of returning them to the system after every use. It
# reads these when a process starts. PyTorch's padded batches need them more than we do.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def keep_buffers() -> None:
    """Starts the command again under `ALLOCATOR`, for this project and its peers alike."""
    if not ALLOCATOR.items() <= os.environ.items():
        command = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | ALLOCATOR)


def turns(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    least: float = 0.05,
) -> dict[str, dict[str, float]]:
    """Seconds of a call of each function, taken in turns so that noise meets all alike.

    The first call of each, which compiles, does not count; the second tells how many calls
    make a turn of at least `least` seconds.

    Returns:
      By name the `"median"` and the `"min"` over `repeats` turns.
    """

    def seconds(function: Callable[[], Any], calls: int) -> float:
        began = clock()
        for _ in range(calls):
            jax.block_until_ready(function())
        return (clock() - began) / calls

    calls = {}
    for name, function in functions.items():
        jax.block_until_ready(function())
        calls[name] = max(1, round(least / max(seconds(function, 1), 1e-6)))
    taken = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            taken[name].append(seconds(function, calls[name]))
    return {n: {"median": statistics.median(t), "min": min(t)} for n, t in taken.items()}


def copy_bandwidth(megabytes: int = 512) -> float:
    """GB/s read and written by the fastest of five copies on all cores."""
    source = np.ones(megabytes << 17)
    target = np.zeros_like(source)
    cores = records.environment()["cores"]
    pairs = list(zip(np.array_split(target, cores), np.array_split(source, cores), strict=True))
    fastest = float("inf")
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
            fastest = min(fastest, time.perf_counter() - began)
    return 2 * source.nbytes / fastest / 1e9


def cpu_name() -> str:
    """Of the processor, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (s.partition(":")[2].strip() for s in lines if s.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def keep(folder: Path, benchmark: str, size: str, repeats: int, values: Any) -> None:
    """Keeps a record, in place of an older one of that benchmark and size."""
    made_on = records.environment()
    for package in ("jaxlib", "torch", "torch_geometric", "torch_sparse"):
        try:
            made_on["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    record = {
        "benchmark": benchmark,
        "size": size,
        "repeats": repeats,
        "date": date.today().isoformat(),
        "command": " ".join(["python -m benchmarks", *map(_named, sys.argv[1:])]),
        "cpu": cpu_name(),
        **made_on,
        **values,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}.jsonl"
    kept = [r for r in records.read(path) if r["size"] != size] if path.exists() else []
    lines = (json.dumps(r, sort_keys=True) + "\n" for r in [*kept, record])
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{benchmark} {size}: {json.dumps(values)}", flush=True)


def _named(argument: str) -> str:
    """A path on this machine means nothing elsewhere."""
    return f"path/to/{Path(argument).name}" if os.path.isabs(argument) else argument
