"""RESULTS.md from records: a table of tests, one of learning curves, and the commands.

Every number is computed from the records of runs; what the page says around them stands
outside of the generated part and is left as it is.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments import records
from experiments.config import Config, preset
from experiments.published import CURVES, published
from experiments.ranking import METRICS

BEGIN, END = "<!-- generated: tables -->", "<!-- end of the generated part -->"
Records = list[dict[str, Any]]
SEEDS = 5  # of the published runs, and what a measured row should have


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]  # as many cells each as the head has


def write_report(folders: Iterable[str | Path], page: str | Path) -> int:
    """Replaces the generated part of `page` by the tables of all runs below `folders`.

    Args:
      folders: searched for `*.jsonl` files of records.
      page: a Markdown file with the two marks; made if missing.

    Returns:
      The number of runs found.
    """
    page = Path(page)
    runs = [run for _, run in tested(folders)]
    if not runs:
        raise ValueError(f"`folders` {[str(f) for f in folders]} hold no tested run.")
    text = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"`page` {page} must hold the lines {BEGIN} and {END}.")
    runs.sort(key=sort_key)
    tests, curves = _markdown(tests_table(runs)), _markdown(curves_table(runs))
    parts = (BEGIN, tests, curves, commands(runs), END)
    page.write_text(before + "\n\n".join(parts) + after, encoding="utf-8")
    return len(runs)


def keep(folders: Iterable[str | Path], into: str | Path) -> None:
    """Copies tested runs' records below `into`, thinned so that a repository can hold them.

    Tests stay whole; of the curves, epochs 1, 5, 10 and every 20th stay, without the settings,
    which each test repeats. A run `DATA-MODEL/OPTIMIZER` becomes one file of that name.
    """
    for path, run in tested(folders):
        target = Path(into) / path.parent.parent.name / f"{path.parent.name}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        records.append(target, filter(None, map(_thin, run)))


def tested(folders: Iterable[str | Path]) -> Iterator[tuple[Path, Records]]:
    """The files of records below `folders` that hold a test, with the records."""
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.jsonl")):
            run = records.read(path)
            if any(record["kind"] == "test" for record in run):
                yield path, run


def _thin(record: dict[str, Any]) -> dict[str, Any] | None:
    if "test" in record["kind"]:
        return record
    if record["epoch"] not in (1, 5, 10) and record["epoch"] % 20:
        return None
    names = ("kind", "seed", "epoch", "seconds", "loss", *METRICS)
    return {name: record[name] for name in names if name in record}


def tests_table(runs: Iterable[Records]) -> Table:
    """Test metrics at the best validation epoch: mean ± standard deviation over seeds."""
    names = [name for name in METRICS if not name.startswith("MRR")]
    head = ["data", "model", "optimizer", "seeds", *names, "best epochs", "s/epoch", "device"]
    rows = []
    for run in runs:
        tests = [r for r in run if r["kind"] == "test"]
        config, data = config_of(run), data_of(run)
        # Of one seed; a file may hold seeds that were trained apart.
        together = {r["seed"]: r["num_seeds"] for r in tests}
        epochs = [r["seconds"] / together[r["seed"]] for r in run if r["kind"] == "epoch"]
        rows.append(
            [
                data,
                config.model,
                name_of(run),
                str(len(tests)),
                *(_mean(r[name] for r in tests) for name in names),
                " ".join(str(r["epoch"]) for r in tests),
                f"{statistics.median(epochs):.2f}" if epochs else "",
                f"{tests[0]['device']}, {tests[0]['cores']} core(s)",
            ]
        )
        if known := published(config, data):
            cells = [f"{m:.4f}" + (f" ± {s:.4f}" if s else "") for m, s in known.values()]
            rows.append(
                [data, config.model, f"*published {config.label}*", "5", *cells, "", "", ""]
            )
    return Table(head, rows)


def curves_table(runs: Iterable[Records]) -> Table:
    """Training loss and validation NDCG@10 along the way, beside the official five seeds."""
    head = [
        "data",
        "model",
        "optimizer",
        "epoch",
        "loss",
        "official",
        "valid NDCG@10",
        "official",
    ]
    rows = []
    for run in runs:
        config, data = config_of(run), data_of(run)
        official = CURVES.get((config.model, data), {}) if published(config, data) else {}
        if config.optimizer != "sevo_adamw":
            official = {}
        losses, valid = by_epoch(run, "epoch", "loss"), by_epoch(run, "valid", "NDCG@10")
        for epoch in (1, 5, 10, 20, 40, 100, 200, 300, 500, 1000):
            if epoch not in losses:
                continue
            loss, low, high = official.get(epoch, (None, None, None))
            rows.append(
                [
                    data,
                    config.model,
                    name_of(run),
                    str(epoch),
                    _mean(losses[epoch]),
                    f"{loss:.3f}" if loss else "",
                    _mean(valid[epoch]) if epoch in valid else "",
                    f"{low:.4f} to {high:.4f}" if low else "",
                ]
            )
    return Table(head, rows)


def commands(runs: Iterable[Records]) -> str:
    """What to type to get each row again, and how long it took."""
    lines = ["Each row is one command; seconds are of the whole run, all seeds.", ""]
    for run in runs:
        test = next(r for r in run if r["kind"] == "test")
        versions = ", ".join(f"{k} {v}" for k, v in test["versions"].items())
        lines.append(f"- `{command_of(run)}` ({test['seconds']:,.0f} s; {versions})")
    return "\n".join(lines)


def command_of(run: Records) -> str:
    """What to type to get a run again."""
    seeds = [r["seed"] for r in run if r["kind"] == "test"]
    return train_command(config_of(run), data_of(run), seeds)


def train_command(config: Config, data: str, seeds: Iterable[int]) -> str:
    """The `train` command of a configuration, with the options that the preset lacks."""
    parts = [
        "python -m experiments train",
        f"--data {data}",
        f"--model {config.model}",
        f"--optimizers {config.optimizer}",
        f"--seeds {' '.join(map(str, seeds))}",
    ]
    for name, value in overrides(config, data).items():
        parts.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(parts)


def overrides(config: Config, data: str) -> dict[str, Any]:
    """The settings in which a configuration is not the preset's."""
    usual = preset(config.model, data, config.optimizer)
    return {k: v for k, v in vars(config).items() if v != getattr(usual, k)}


def name_of(run: Records) -> str:
    """The optimizer's label and what is not as in the preset: `sevo_adamw, beta 0.5`."""
    config = config_of(run)
    changed = overrides(config, data_of(run))
    changed.pop("placement", None)  # part of the label
    return ", ".join([config.label, *(f"{k} {v}" for k, v in changed.items())])


def config_of(run: Records) -> Config:
    """The settings of a run."""
    return Config(**next(r["config"] for r in run if "config" in r))


def data_of(run: Records) -> str:
    """The name of a run's dataset."""
    return next(r["data"]["name"] for r in run if "data" in r)


def sort_key(run: Records) -> tuple[str, str, bool, str]:
    """Orders runs by dataset and model, those without SEvo first."""
    config = config_of(run)
    return data_of(run), config.model, config.optimizer.startswith("sevo_"), name_of(run)


def by_epoch(run: Records, kind: str, name: str) -> dict[int, list[float]]:
    """The values that a run's records of a kind have at each epoch, one for each seed."""
    found = defaultdict(list)
    for record in run:
        if record["kind"] == kind:
            found[record["epoch"]].append(record[name])
    return found


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def _markdown(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
