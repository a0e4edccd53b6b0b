"""RESULTS.md from records: tables of tests, learning curves and ablations, and the commands.

Every number is computed from the records of runs; what the page says around them stands
outside of the generated part and is left as it is.
"""

import itertools
import json
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import records, study
from experiments.comparisons import compare_each, gains_table, gather
from experiments.ranking import METRICS
from experiments.tables import (
    Records,
    Table,
    ablation_of,
    ablation_table,
    bucket_tables,
    by_place,
    command_of,
    commands,
    config_of,
    curves_table,
    described,
    reproduction_table,
    sort_key,
    tests_table,
    versions_of,
)
from experiments.tuning import HOW_CHOSEN, tuned_table

_HOW_COMPARED = """Each SEvo run against the same optimizer without SEvo, and against Adam,
whose baselines the paper's Table 2 reports; over the seeds that both have. Baselines may have
been trained as an ablation's arms. d_z is the mean
difference over its standard deviation, p Student's paired test, by Holm's rule for all pairs of
a dataset and model. Where two devices stand, a part of a difference may be theirs:"""
BEGIN, END = "<!-- generated: tables -->", "<!-- end of the generated part -->"


def write_report(folders: Iterable[str | Path], page: str | Path) -> int:
    """Replaces the generated part of `page` by the tables of all runs below `folders`.

    Args:
      folders: searched for `*.jsonl` files of records.
      page: a Markdown file with the two marks; made if missing.

    Returns:
      The number of runs and studies found.
    """
    page = Path(page)
    found, kept = list(tested(folders)), [k for _, k in study.read(folders)]
    runs = [run for _, run in found]
    if not runs and not kept:
        raise ValueError(f"`folders` {[str(f) for f in folders]} hold no tested run.")
    text = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"`page` {page} must hold the lines {BEGIN} and {END}.")
    runs.sort(key=sort_key)
    presets = [run for run in runs if not ablation_of(run)]
    parts = [BEGIN]
    if (beside := reproduction_table(presets)).rows:
        parts += ["Measured beside published:", _markdown(beside)]
    compared = compare_each(gather(found))
    if (gains := gains_table(itertools.chain(*compared.values()))).rows:
        parts += [_HOW_COMPARED, _markdown(gains)]
    if (tuned := tuned_table(runs)).rows:
        parts += [f"{HOW_CHOSEN}:", _markdown(tuned)]
    if presets:
        parts += ["All runs that are no ablation's:"]
        parts += [_markdown(tests_table(presets)), _markdown(curves_table(presets))]
        parts.append(commands(presets))
        for title, group in by_place(presets):
            parts += _buckets(group, title)
    parts += [*ablations(runs), *studies(kept), END]
    page.parent.mkdir(parents=True, exist_ok=True)
    # The prose around the tables is nowhere else.
    records.replace(page, before + "\n\n".join(parts) + after)
    return len(runs) + len(kept)


def ablations(runs: Sequence[Records]) -> Iterator[str]:
    """A heading, a table and the command of each ablation among `runs`, which are sorted."""
    for title, arms in by_place(filter(ablation_of, runs)):
        table = ablation_table(arms)
        yield f"### {title}"
        if "p" in table.head:
            yield "p is Student's paired test over seeds, by Holm's rule for the table:"
        yield _markdown(table)
        yield from _buckets(arms, ablation_of(arms[0]))
        # Not the seconds: arms that were compiled together share theirs.
        made = sorted({f"- `{command_of(arm)}` ({versions_of(arm)})" for arm in arms})
        yield "\n".join(made)


def _buckets(runs: Iterable[Records], title: str) -> Iterator[str]:
    for caption, table in bucket_tables(runs):
        yield f"{caption}, {title}:"
        yield _markdown(table)


def studies(found: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A heading, the tables and the command of each study."""
    for kept in found:
        yield f"### {study.title_of(kept)}"
        for finding in kept["findings"]:
            yield f"{finding['title']}:"
            yield _markdown(Table(finding["head"], finding["rows"]))
        yield f"- {made_of(kept)}"


def made_of(kept: dict[str, Any]) -> str:
    """The command of a study, how long it took, on what."""
    where = f"{kept['device']}, {kept['cores']} core(s)"
    versions = versions_of([kept])
    return f"`{study.command_of(kept)}` ({kept['seconds']:,.0f} s; {where}; {versions})"


def keep(folders: Iterable[str | Path], into: str | Path) -> None:
    """Copies tested runs' records below `into`, thinned so that a repository can hold them.

    Tests stay whole, but for the folders that the data lay in; of curves of more than 30
    epochs, 1, 5, 10, every 20th and the best stay. These and the buckets leave out the
    settings, which each test repeats. A run `DATA-MODEL/OPTIMIZER` becomes one file of that
    name, and so does an arm of an ablation. Seeds of one configuration and dataset that were
    trained apart, in folders of these names, are joined, and so are those that are kept
    already. Studies are copied with their pictures, in place of older ones of the same command.

    Raises:
      ValueError: two runs or studies that differ would be kept in the same place.
    """
    into = Path(into)
    folders = list(folders)
    _keep_studies(folders, into)
    parts: dict[Path, list[tuple[Path, Records]]] = defaultdict(list)
    for path, run in tested(folders):
        if _lies_in(into, path):
            continue  # what is kept stays
        # An arm of an ablation lies one folder deeper, in that of its compiled program.
        place = path.resolve().parents[2 if ablation_of(run) else 1].name
        parts[into / place / f"{path.resolve().parent.name}.jsonl"].append((path, run))
    for target, found in parts.items():
        # Seeds that were trained apart are kept together; of those kept before, the others.
        (first, run), *others = found
        for path, other in others:
            if not _same_settings(run, other) or _seeds(run) & _seeds(other):
                raise ValueError(
                    f"{first} and {path} would both be kept as {target}, but have other "
                    "settings or data, or a seed in common. Rename their folders."
                )
            run = run + other
        held = records.read(target) if target.exists() else []
        if held and not _same_settings(run, held):
            raise ValueError(
                f"{target} keeps other settings or data than {first}; rename one of them."
            )
        run = [r for r in held if r["seed"] not in _seeds(run)] + run
        target.parent.mkdir(parents=True, exist_ok=True)
        short = max(r["epoch"] for r in run) <= 30
        best = {(r["seed"], r["epoch"]) for r in run if r["kind"] == "test"}
        kept = (r for r in run if short or _stays(r) or (r["seed"], r["epoch"]) in best)
        records.replace(target, records.lines(map(_slim, kept)))


def _keep_studies(folders: Iterable[str | Path], into: Path) -> None:
    chosen: dict[Path, Path] = {}
    for path, kept in study.read(folders):
        if _lies_in(into, path):
            continue
        target = into / path.resolve().parent.name
        held = target / study.FILE
        if target in chosen:
            raise ValueError(
                f"{chosen[target]} and {path} would both be kept as {target}. Rename one of "
                "their folders."
            )
        if held.exists():
            older = study.command_of(records.read_object(held))
            if older != study.command_of(kept):
                raise ValueError(
                    f"{target} keeps another study than {path}: `{older}`; rename one of them."
                )
        chosen[target] = path
    for target, path in chosen.items():
        target.mkdir(parents=True, exist_ok=True)
        for part in (path, *path.parent.glob("*.png")):
            shutil.copyfile(part, target / part.name)


def _lies_in(folder: Path, path: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _same_settings(run: Records, other: Records) -> bool:
    def settings(run: Records) -> tuple[Any, ...]:
        # The same data may lie elsewhere.
        data = {k: v for k, v in _without_folders(described(run)).items() if k != "source"}
        return config_of(run), ablation_of(run), data

    return settings(run) == settings(other)


def _without_folders(data: dict[str, Any]) -> dict[str, Any]:
    """What records say of the data, without the folders where it lay."""
    found = data | {"source": Path(data["source"]).name}
    if words := shlex.split(data.get("options", "")):
        # Of `--items`, the only one of these options that is a path, the name.
        pairs = zip(["", *words], words, strict=False)
        words = [Path(word).name if before == "--items" else word for before, word in pairs]
        found["options"] = shlex.join(words)
    return found


def _seeds(run: Records) -> set[int]:
    return {record["seed"] for record in run}


def tested(folders: Iterable[str | Path]) -> Iterator[tuple[Path, Records]]:
    """The files of records below `folders` that hold a test, with the records."""
    return ((path, run) for path, run in _recorded(folders) if _is_tested(run))


def untested(folders: Iterable[str | Path]) -> list[Path]:
    """The files of records below `folders` without a test: of runs that have not ended."""
    return [path for path, run in _recorded(folders) if not _is_tested(run)]


def _is_tested(run: Records) -> bool:
    return any(record["kind"] == "test" for record in run)


def _recorded(folders: Iterable[str | Path]) -> Iterator[tuple[Path, Records]]:
    seen = set()  # folders may overlap
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.jsonl")):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            if not _holds_records(path):
                continue  # of another program
            run = records.read(path)
            for number, record in enumerate(run, start=1):
                if missing := {"kind", "seed", "epoch"} - record.keys():
                    raise ValueError(f"{path}, line {number}: no record without {missing}.")
            yield path, run


def _holds_records(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline()
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and "kind" in record


def _stays(record: dict[str, Any]) -> bool:
    return record["kind"] not in ("epoch", "valid") or (
        record["epoch"] in (1, 5, 10) or record["epoch"] % 20 == 0
    )


def _slim(record: dict[str, Any]) -> dict[str, Any]:
    if "test" in record["kind"]:
        return record | {"data": _without_folders(record["data"])}
    names = (
        "kind",
        "seed",
        "epoch",
        "seconds",
        "loss",
        "by",
        "low",
        "high",
        "targets",
        *METRICS,
    )
    return {name: record[name] for name in names if name in record}


def _markdown(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
