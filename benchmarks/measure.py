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
import jax.numpy as jnp
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
    rest: float = 0.3,
) -> dict[str, dict[str, float]]:
    """Seconds of a call of each function, taken in turns so that noise meets all alike.

    The first call of each, which compiles, does not count; the second tells how many calls
    make a turn of at least `least` seconds. An accelerator has the calls of a turn in its
    queue; the clock stops when all are done. Between turns it rests for `rest` seconds: the
    gigabytes that one function used go back to the system after its result is there, which
    would keep a core busy in the next one's time.

    Returns:
      By name the `"median"` and the `"min"` over `repeats` turns.
    """

    def seconds(function: Callable[[], Any], calls: int) -> float:
        began = clock()
        result = None
        for _ in range(calls):
            result = function()
            if not on_accelerator():
                jax.block_until_ready(result)
        _finish(result)
        return (clock() - began) / calls

    calls = {}
    for name, function in functions.items():
        _finish(function())
        calls[name] = max(1, round(least / max(seconds(function, 1), 1e-6)))
    taken = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            time.sleep(rest)
            taken[name].append(seconds(function, calls[name]))
    return {n: {"median": statistics.median(t), "min": min(t)} for n, t in taken.items()}


def on_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def _finish(result: Any) -> None:
    """Waits until a result of JAX is there, and all that PyTorch has given to a GPU is done."""
    jax.block_until_ready(result)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bandwidth() -> float:
    """GB/s read and written by the fastest of five copies: on all cores, or on the device."""
    if on_accelerator():
        table = jnp.ones(512 << 20)  # 2 GiB: beyond every cache
        copy = jax.jit(lambda x: x + 1)
        taken = turns({"copy": lambda: copy(table)}, 5)
        return 2 * table.nbytes / taken["copy"]["min"] / 1e9
    source = np.ones(512 << 17)
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


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """Of the processor, as the system tells it in the file `info`.

    With its family and model: a virtual machine's `AMD EPYC` may be one of several.
    """
    lines = info.read_text().splitlines() if info.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))  # the first core's come last
    told = {key.strip(): value.strip() for key, _, value in pairs}
    name = told.get("model name", platform.processor() or platform.machine())
    if {"cpu family", "model"} <= told.keys():
        name += f" (family {told['cpu family']}, model {told['model']})"
    return name


def is_cpu(record: Mapping[str, Any]) -> bool:
    """Whether a record was measured on a processor, and not on an accelerator."""
    return "cpu" in record["device"]


def machine(record: Mapping[str, Any]) -> str:
    """What a record was measured on, in words: the accelerator, or else the processor."""
    if not is_cpu(record):
        return record["device"]
    return f"{record['cpu']}, {record['cores']} cores"


def size_of(record: Mapping[str, Any]) -> str:
    """A record's size; one of Beauty's size that was generated is not Beauty."""
    generated = record["size"] == "beauty" and not record.get("real", True)
    return record["size"] + " (generated)" * generated


def keep(folder: Path, benchmark: str, size: str, repeats: int, values: Any) -> None:
    """Keeps a record, in place of an older one of that benchmark, size, log and machine."""
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

    def key(record: Mapping[str, Any]) -> tuple[Any, ...]:
        return size_of(record), machine(record)

    held = records.read(path) if path.exists() else []
    kept = [r for r in held if key(r) != key(record)]
    records.replace(path, records.lines([*kept, record]))
    print(f"{benchmark} {size}: {json.dumps(values)}", flush=True)


def _named(argument: str) -> str:
    """A path on this machine means nothing elsewhere."""
    return f"path/to/{Path(argument).name}" if os.path.isabs(argument) else argument
