"""Experiments that are more than a comparison of runs: what they find, and how it is kept.

A study is a module with a function `study(options, out, console)` that returns findings. They
are kept as `study.json` in the folder `out`, from which the report makes tables; a picture
beside it, `NAME.png`, becomes a figure of the HTML page.
"""

import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.table
from rich.console import Console

from experiments import records
from experiments.config import check_seeds
from experiments.options import Ablate
from experiments.run_folder import check_free
from experiments.tables import ablate_command, with_given

FILE = "study.json"
# By name, the module. Imported when asked for: some need packages that others do not.
STUDIES = {
    "smoothness": "experiments.smoothness",
    "theory": "experiments.theory",
    "cost": "experiments.cost",
    "embeddings": "experiments.embeddings",
}


class Finding(NamedTuple):
    """A table of what was measured, as it will be printed."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]  # as many cells each as the head has


def run(options: Ablate, console: Console) -> list[Finding]:
    """Runs the study that `options` name, prints what it finds and keeps it.

    Raises:
      ValueError: the folder holds a study or a run already, or cannot be made.
    """
    check_seeds(options.seeds)
    if options.resume:
        raise ValueError("`resume` is for runs; a study starts anew.")
    module = importlib.import_module(STUDIES[options.name])
    # As `loaders.load` calls it.
    data = Path(options.data).resolve().name.split(".")[0] if module.NEEDS_DATA else None
    place = f"{data}-{options.model}-{options.name}" if data else options.name
    out = options.out or Path("runs") / place
    if (out / FILE).exists():
        raise ValueError(f"`out` {out} holds a study; choose another folder.")
    check_free([out])
    began = time.perf_counter()
    # After an error nothing is left. It lies where `out` will be made, so that a place that
    # takes no files is found out before the work and not after it.
    above = next(parent for parent in out.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".study-", dir=above) as folder:
        findings: list[Finding] = module.study(options, Path(folder), console)
        out.mkdir(parents=True, exist_ok=True)
        for picture in Path(folder).iterdir():
            shutil.move(picture, out / picture.name)
    seconds = time.perf_counter() - began
    for title, head, rows in findings:
        table = rich.table.Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    kept = {
        "study": options.name,
        "model": options.model,
        "data": data,
        "source": Path(options.data).name if data else None,
        "seeds": list(options.seeds),
        "arms": list(options.arms),
        "settings": options.given(),
        "data_options": options.data_options() if data else "",
        "seconds": round(seconds, 1),
        **records.environment(),
        "findings": [finding._asdict() for finding in findings],
    }
    records.replace(out / FILE, json.dumps(kept, indent=1))
    console.print(f"{out / FILE} keeps these tables")
    return findings


def read(folders: Iterable[str | Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The studies kept below `folders`, by name, dataset and model."""
    paths = {path.resolve(): path for folder in folders for path in Path(folder).rglob(FILE)}
    found = [(path, records.read_object(path)) for path in paths.values()]
    yield from sorted(found, key=lambda pair: (title_of(pair[1]), pair[0]))


def title_of(kept: dict[str, Any]) -> str:
    """A heading for a study: `smoothness, epochs 40: sasrec on amazon_beauty`."""
    named = with_given(kept["study"], kept["settings"])
    if not kept["data"]:
        return named
    # The models of `cost` are its arms.
    models = ", ".join(kept["arms"]) or "all models"
    return f"{named}: {models if kept['study'] == 'cost' else kept['model']} on {kept['data']}"


def command_of(kept: dict[str, Any]) -> str:
    """The command that makes such a study again."""
    return ablate_command(
        kept["study"],
        kept.get("source", kept["data"]),
        kept["model"],
        kept["seeds"],
        kept["settings"],
        kept["arms"],
        kept.get("data_options", ""),
    )
