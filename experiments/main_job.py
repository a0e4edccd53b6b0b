"""The main job: train every optimizer asked for, show how it goes, compare at the end."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from experiments.config import Config
from experiments.data import split_of
from experiments.mesh import make_mesh
from experiments.options import Train
from experiments.plots import plot_run
from experiments.presets import known_name
from experiments.published import SIZES, has_other_sizes, published
from experiments.ranking import METRICS, metrics, rank_by_popularity
from experiments.run import SELECTION, Result, fit
from experiments.run_folder import Progress, check_free
from experiments.statistics import spread

ORDERS = {
    "timestamp": "by timestamp",
    "position": "by position",
    "file": "as the file has them; no column tells another order",
}


def train(options: Train, console: Console | None = None) -> list[Result]:
    """Runs `python -m experiments train`."""
    mesh = join_mesh(options)
    first = jax.process_index() == 0  # it alone writes
    # In a file or a pipe nothing says how wide the table may be.
    console = console or Console(width=None if sys.stdout.isatty() else 140, quiet=not first)
    dataset, split = split_of(options)
    out = options.out or Path("runs") / f"{dataset.name}-{options.model}"
    console.print(
        f"{dataset.name}: {dataset.num_users:,} users, {dataset.num_items:,} items, "
        f"{dataset.num_interactions:,} interactions, {split.num_train:,} of them for training"
    )
    for reason, count in dataset.drops.items():
        console.print(f"left out: {count:,} interactions ({reason})")
    if options.data != "synthetic":
        console.print(f"sequences: {ORDERS[dataset.order]}")
    data = {"name": dataset.name, "items": dataset.num_items, "train": split.num_train}
    popularity = split.with_train_users(options.train_users or 1.0).popularity
    if len((part := split.evaluation("test")).targets):
        floor = metrics(rank_by_popularity(part, popularity), (SELECTION,))[SELECTION]
        console.print(f"the most popular items, to everyone: test {SELECTION} {floor:.4f}")
        if lost := part.num_repeated:
            console.print(
                f"{lost:,} of {len(part.targets):,} test targets are in their user's history "
                "and count as ranked last; `--repeats first` keeps the first of each item alone"
            )
    if has_other_sizes(data):
        name = known_name(dataset.name)
        items, interactions = SIZES[name]
        console.print(
            f"the published runs of {name} have {items:,} items and {interactions:,} "
            "interactions for training; their numbers are not shown beside these"
        )
    usual = options.preset_name(dataset.name)
    console.print(f"settings that are not given: those of {options.model} on {usual}")
    asked = options.optimizers
    if not asked or len(set(asked)) < len(asked):
        raise ValueError(f"`optimizers` must be at least one, each once, got {asked}.")
    configs = [options.config(optimizer, dataset.name) for optimizer in asked]
    options.check_given(configs)
    if options.graph == "attributes":
        # Missing ones, or ids that do not fit, shall not come to light after hours.
        described = np.diff(dataset.known_attributes().row_splits) > 0
        console.print(f"{described.sum():,} of {len(described):,} items have attributes")
    check_out(out, (out / config.label for config in configs), options.resume, console)
    results = []
    for config in configs:
        folder = out / config.label
        with show(console, config.label, config) as report:
            results.append(
                fit(
                    config,
                    split,
                    options.seeds,
                    folder,
                    source=options.data,
                    data_options=options.data_options(),
                    resume=options.resume,
                    report=report,
                    mesh=mesh,
                )
            )
        if first:
            plot_run(folder)
        console.print(f"{config.label}: records, checkpoint and curves.png are in {folder}")
    console.print(results_table(results, data))
    return results


def join_mesh(options: Train) -> Mesh | None:
    """The mesh that the options ask for; joins the processes that share it."""
    if options.coordinator is None:
        if options.num_processes is not None or options.process_id is not None:
            raise ValueError("`num_processes` and `process_id` need a `coordinator`.")
    elif options.mesh is None:
        raise ValueError("`coordinator` needs a `mesh`, of the devices of all processes.")
    else:
        address = None if options.coordinator == "auto" else options.coordinator
        if address and not re.fullmatch(r".+:\d+", address):
            raise ValueError(f"`coordinator` must be HOST:PORT or auto, got {address!r}.")
        try:
            jax.distributed.initialize(address, options.num_processes, options.process_id)
        except RuntimeError as error:
            raise OSError(f"the coordinator {options.coordinator} failed: {error}") from None
    return None if options.mesh is None else make_mesh(options.mesh)


def check_out(out: Path, runs: Iterable[Path], resume: bool, console: Console) -> None:
    """Refuses folders that hold a run already; to resume, says where there is nothing."""
    if not resume:
        check_free(runs)
    elif not out.exists():
        console.print(f"{out}: nothing to go on from, so training starts anew")


class show:
    """A live line on a terminal; a plain line for every validation elsewhere."""

    def __init__(self, console: Console, title: str, config: Config):
        self.console, self.title, self.config = console, title, config
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}"),
        )
        self.bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(title, total=config.epochs, state="compiling")
        self.start, self.reports, self.validated = (0, 0.0), 0, False

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        epoch, epochs = progress.epoch, self.config.epochs
        validated = epoch % self.config.eval_every == 0 or epoch == epochs
        # What comes first, after a start or a resumption, includes the compilation.
        if self.reports < 2 or (validated and not self.validated):
            self.start = (epoch, progress.seconds)
        self.reports += 1
        self.validated |= validated
        done = epoch - self.start[0]
        per_epoch = (progress.seconds - self.start[1]) / done if done else float("nan")
        state = (
            f"epoch {epoch}/{epochs}  loss {_mean(progress.loss)}  "
            f"valid {SELECTION} {_mean(progress.valid)} (best {_mean(progress.best)})  "
            f"{_speed(per_epoch)}  {_clock(per_epoch * (epochs - epoch))} left"
        )
        self.bar.update(self.task, completed=epoch, state=state)
        if not self.console.is_terminal and validated:
            self.console.print(f"{self.title}  {state}", soft_wrap=True)


def _mean(values: np.ndarray) -> str:
    return "-" if np.isnan(values).any() else f"{values.mean():.4f}"


def _speed(per_epoch: float) -> str:
    return "- s/epoch" if per_epoch != per_epoch else f"{per_epoch:.2f} s/epoch"


def _clock(seconds: float) -> str:
    if seconds != seconds:
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def results_table(results: list[Result], data: dict[str, Any]) -> Table:
    """Test metrics, mean and spread over seeds, beside published ones and the gain.

    Args:
      results: of runs on the same data.
      data: its `name`, and the numbers of `items` and of interactions to `train` on.
    """
    columns: dict[str, list[str]] = {}
    plain = {result.config.optimizer: result for result in results}
    for result in results:
        label = result.config.label
        columns[label] = [spread(result.test[name]) for name in METRICS]
        columns[label].append(" ".join(map(str, result.best_epoch)))
        if known := published(result.config, data):
            columns[f"published {label}"] = [_published(known.get(name)) for name in METRICS]
        base = plain.get(result.config.base, result)
        if base is not result:
            means = [(result.test[n].mean(), base.test[n].mean()) for n in METRICS]
            columns[f"gain over {base.config.label}"] = [
                f"{ours / theirs - 1:+.1%}" if theirs else "-" for ours, theirs in means
            ]
    table = Table(title="Test, mean ± spread")
    table.add_column("metric", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row, name in enumerate((*METRICS, "best epoch")):
        table.add_row(name, *("".join(cells[row : row + 1]) for cells in columns.values()))
    return table


def _published(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    mean, spread = value
    return f"{mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
