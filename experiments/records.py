"""Records: one JSON line per epoch and evaluation. Tables and figures are made from these."""

import functools
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sevo_jax import __version__

FILE = "records.jsonl"


def environment() -> dict[str, Any]:
    """Versions and device, for every evaluation's record."""
    packages = ("jax", "flax", "optax", "numpy")
    versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
    device = jax.devices()[0]
    affinity = getattr(os, "sched_getaffinity", None)  # on Linux, the cores that we may use
    return {
        "versions": versions | {"sevo_jax": _own_version()},
        "device": f"{jax.device_count()} {device.platform} ({device.device_kind})",
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
    }


@functools.cache  # the code that runs is that of the start
def _own_version() -> str:
    """The project's version, with the commit where it runs from a clone that Git can read.

    As in `1.0+g2a9bf11f4`, with `.dirty` where code is not that commit's.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    try:
        # A copy may lie within a repository that is not the project's.
        git("ls-files", "--error-unmatch", here.name)
        commit = git("rev-parse", "--short=9", "HEAD").strip()
        changed = git("status", "--porcelain", "--", ":/*.py", ":/*.cc")
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__}+g{commit}{'.dirty' if changed else ''}"


def append(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Adds records to a file and returns its new length in bytes.

    Of several processes, which all have the same records, the first writes.
    """
    if jax.process_index() > 0:
        return 0
    with path.open("a", encoding="utf-8") as file:
        file.write(lines(records))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def lines(records: Iterable[dict[str, Any]]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)


def replace(path: Path, text: str) -> None:
    """Makes `text` the whole of a file, which stays as it was until that is written."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Log:
    """Collects an epoch's records of several seeds and writes them together.

    Args:
      folder: of the run.
      seeds: in the order of the values to come.
      common: what the record of an evaluation repeats.
    """

    def __init__(self, folder: Path, seeds: tuple[int, ...], common: dict[str, Any]):
        self.path = folder / FILE
        self.seeds = seeds
        self.common = common
        self.pending: list[dict[str, Any]] = []

    def add(
        self,
        kind: str,
        epoch: int | np.ndarray,
        values: dict[str, np.ndarray],
        seconds: float,
        **what: Any,
    ) -> None:
        """One record for each seed.

        Args:
          kind: `"epoch"`, `"valid"`, `"test"`, `"last_test"` or `"bucket"`.
          epoch: of all, or `[num_seeds]`.
          values: an entry `[num_seeds]` for each name.
          seconds: since the start, or of an epoch.
          what: the same for all seeds.
        """
        epochs = np.broadcast_to(epoch, len(self.seeds))
        for i, seed in enumerate(self.seeds):
            record = {
                "kind": kind,
                "seed": seed,
                "epoch": int(epochs[i]),
                "seconds": round(seconds, 3),
                **what,
                **{name: float(value[i]) for name, value in values.items()},
            }
            self.pending.append(record if kind == "epoch" else record | self.common)

    def flush(self) -> int:
        """Writes what was added; returns the file's length in bytes."""
        length = append(self.path, self.pending)
        self.pending = []
        return length

    def truncate(self, length: int) -> None:
        """Drops what was written after the checkpoint that the run goes on from.

        Raises:
          ValueError: the file is shorter than it was then.
        """
        if jax.process_index() > 0:
            return
        held = self.path.stat().st_size if self.path.exists() else 0
        if held < length:
            raise ValueError(
                f"{self.path} has {held} bytes, but had {length} when the checkpoint was "
                "saved. Put the lost records back, or start the run anew in another folder."
            )
        with self.path.open("ab") as file:
            file.truncate(length)


class SweepLog:
    """A `Log` for each of several settings.

    `runs` are setting and seed of each run, in the order of the values to come and of the
    checkpoint's: the seeds of a setting stand next to each other.

    Args:
      folder: of the sweep; each setting has the folder of its name below.
      seeds: of each setting.
      common: by setting, what the record of an evaluation repeats.
    """

    def __init__(
        self, folder: Path, seeds: tuple[int, ...], common: Mapping[str, dict[str, Any]]
    ):
        self.seeds = seeds
        self.logs = {label: Log(folder / label, seeds, one) for label, one in common.items()}
        self.runs = [(label, seed) for label in self.logs for seed in seeds]
        self.runs_of = {
            label: slice(place * len(seeds), (place + 1) * len(seeds))
            for place, label in enumerate(self.logs)
        }

    def add(
        self,
        kind: str,
        epoch: int | np.ndarray,
        values: dict[str, np.ndarray],
        seconds: float,
        **what: Any,
    ) -> None:
        """One record for each run; see `Log.add`, with an entry for each of `runs`."""
        epochs = np.broadcast_to(epoch, len(self.runs))
        for label, log in self.logs.items():
            part = self.runs_of[label]
            mine = {name: value[part] for name, value in values.items()}
            log.add(kind, epochs[part], mine, seconds, **what)

    def flush(self) -> list[int]:
        """Writes what was added; returns the length of each setting's file in bytes."""
        return [log.flush() for log in self.logs.values()]

    def truncate(self, lengths: Sequence[int]) -> None:
        """See `Log.truncate`; a length for each setting."""
        for log, length in zip(self.logs.values(), lengths, strict=True):
            log.truncate(length)


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file; a line that is no JSON object is an error that names it."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        records.append(_object(line, f"{path}, line {number}: not a record"))
    return records


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that is the whole of a file; an error names the file."""
    return _object(path.read_bytes(), f"{path} is no JSON object")


def _object(text: bytes, wrong: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except ValueError as error:
        raise ValueError(f"{wrong} ({error}).") from None
    return found
