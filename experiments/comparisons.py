"""Which runs can be compared, and how they compare: functions of records and ranks alone."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.config import PRESETS, SEVO_ONLY, Config, Optimizer, known_name, preset
from experiments.per_user import UserRanks, align, combine, per_user, read_ranks
from experiments.published import has_other_sizes
from experiments.report import SEEDS
from experiments.statistics import (
    SeedTest,
    UserTest,
    benjamini_hochberg,
    holm,
    paired_bootstrap,
    paired_t,
)
from experiments.tables import Records, config_of, data_of, name_of, sort_key

_RATES = {"learning_rate", "weight_decay", "b1", "b2", "eps", "momentum"}


class Run(NamedTuple):
    """All tested seeds of one configuration on one dataset, from any number of files."""

    name: str
    data: str
    sizes: tuple[tuple[str, object], ...]  # what the records say of the dataset's size
    config: Config
    tests: dict[int, dict[str, float]]  # by seed, the metrics at the best validation
    ranks: UserRanks | None  # where a folder keeps them

    def mean(self, metric: str, seeds: Iterable[int] | None = None) -> float:
        values = [self.tests[seed][metric] for seed in (self.tests if seeds is None else seeds)]
        return sum(values) / len(values)


class Comparison(NamedTuple):
    """One run against another, over the seeds that both have."""

    first: Run
    second: Run
    baseline: str  # "same optimizer" without SEvo, "adam" as the paper's Table 2 has, "other"
    seeds: list[int]
    means: tuple[float, float]
    over_seeds: SeedTest | None  # None for a single seed
    over_users: UserTest | None  # None without ranks of both
    holm: float | None = None  # the p values of `over_seeds`, corrected
    fdr: float | None = None
    users_holm: float | None = None  # the p value of `over_users`, corrected
    users_fdr: float | None = None


class Missing(NamedTuple):
    """A preset that has not been tested with as many seeds as the published runs."""

    data: str
    config: Config
    done: int  # seeds
    seeds: list[int]  # to run


def gather(found: Iterable[tuple[Path, Records]]) -> list[Run]:
    """Joins the files of each configuration; reads `ranks.npz` beside them where there is one.

    Args:
      found: as `report.tested` gives it.

    Returns:
      The runs, ordered by dataset and model, those without SEvo first.
    """
    groups: dict[object, list[tuple[Path, Records]]] = defaultdict(list)
    for path, records in sorted(found, key=lambda pair: sort_key(pair[1])):
        groups[config_of(records), data_of(records), _sizes(records)].append((path, records))
    runs = []
    for files in groups.values():
        records = files[0][1]
        tests: dict[int, dict[str, float]] = {}
        for record in (r for _, part in files for r in part if r["kind"] == "test"):
            tests.setdefault(record["seed"], record)
        kept = [path.with_name("ranks.npz") for path, _ in files]
        parts = [read_ranks(path) for path in kept if path.exists()]
        named = (name_of(records), data_of(records), _sizes(records), config_of(records))
        runs.append(Run(*named, tests, combine(parts) if parts else None))
    return runs


def compare(
    runs: Sequence[Run], metric: str = "NDCG@10", *, samples: int = 10_000
) -> list[Comparison]:
    """Compares all pairs that differ in the optimizer alone; p values are corrected together.

    Of a pair, the settings that both optimizers have must agree, and so must the data. The
    later of two runs is stated against the earlier one.

    Args:
      runs: from `gather`; one family of comparisons for the corrections.
      metric: of the tests.
      samples: of the bootstrap.
    """
    pairs = [
        _compared(first, second, metric, samples)
        for i, first in enumerate(runs)
        for second in runs[:i]
        if _comparable(first, second) and first.tests.keys() & second.tests.keys()
    ]
    over_seeds = [pair.over_seeds for pair in pairs]
    over_users = [pair.over_users for pair in pairs]
    corrected = (*_corrected(over_seeds), *_corrected(over_users))
    return [
        pair._replace(holm=a, fdr=b, users_holm=c, users_fdr=d)
        for pair, a, b, c, d in zip(pairs, *corrected, strict=True)
    ]


def missing(runs: Iterable[Run]) -> list[Missing]:
    """The presets, with SEvo-AdamW, AdamW and Adam, that lack seeds."""
    done: dict[object, set[int]] = defaultdict(set)
    for run in runs:
        if not has_other_sizes({"name": run.data, **dict(run.sizes)}):
            done[known_name(run.data), run.config] |= run.tests.keys()
    found = []
    optimizers: tuple[Optimizer, ...] = ("sevo_adamw", "adamw", "adam")
    for model, data in PRESETS:
        for optimizer in optimizers:
            config = preset(model, data, optimizer)
            have = done.get((data, config), set())
            seeds = [seed for seed in range(SEEDS) if seed not in have][: SEEDS - len(have)]
            if len(have) < SEEDS:
                found.append(Missing(data, config, len(have), seeds))
    return sorted(found, key=lambda row: row.data == "synthetic")


def _sizes(records: Records) -> tuple[tuple[str, object], ...]:
    data = next(r["data"] for r in records if "data" in r)
    return tuple(sorted((k, v) for k, v in data.items() if k not in ("name", "source")))


def _comparable(first: Run, second: Run) -> bool:
    if (first.data, first.sizes) != (second.data, second.sizes):
        return False
    ignored = {"optimizer"}
    if _base(first) != _base(second):
        ignored |= _RATES
    ignored |= {"placement"} if _has_sevo(first) == _has_sevo(second) else set(SEVO_ONLY)
    one, other = asdict(first.config), asdict(second.config)
    return all(one[name] == other[name] for name in one.keys() - ignored)


def _compared(first: Run, second: Run, metric: str, samples: int) -> Comparison:
    seeds = sorted(first.tests.keys() & second.tests.keys())
    values = [[run.tests[seed][metric] for seed in seeds] for run in (first, second)]
    over_seeds = over_users = None
    if len(seeds) > 1:
        over_seeds = paired_t(*map(np.array, values))
    if first.ranks and second.ranks:
        common = set(first.ranks.seeds.tolist()) & set(second.ranks.seeds.tolist())
        if common:
            ranks = align(first.ranks, second.ranks, sorted(common))
            over_users = paired_bootstrap(
                *(per_user(r, metric) for r in ranks), samples=samples
            )
    baseline = "other"
    if _has_sevo(first) and not _has_sevo(second):
        if _base(first) == _base(second):
            baseline = "same optimizer"
        elif second.config.optimizer == "adam":
            baseline = "adam"
    means = (first.mean(metric, seeds), second.mean(metric, seeds))
    return Comparison(first, second, baseline, seeds, means, over_seeds, over_users)


def _corrected(
    tests: Sequence[SeedTest | UserTest | None],
) -> tuple[list[float | None], list[float | None]]:
    p = [test.p for test in tests if test]
    columns = []
    for rule in (holm, benjamini_hochberg):
        values = iter(rule(p).tolist() if p else [])
        columns.append([next(values) if test else None for test in tests])
    return columns[0], columns[1]


def _base(run: Run) -> str:
    return run.config.optimizer.removeprefix("sevo_")


def _has_sevo(run: Run) -> bool:
    return run.config.optimizer.startswith("sevo_")
