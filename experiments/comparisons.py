"""Which runs can be compared, and how they compare: functions of records and ranks alone."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import false_discovery_control

from experiments.config import SEVO_ONLY, Config, Optimizer
from experiments.per_user import UserRanks, align, choose, combine, per_user, read_ranks
from experiments.presets import PRESETS, known_name, preset
from experiments.published import SEEDS, has_other_sizes, published
from experiments.statistics import SeedTest, UserTest, by_seed, holm, paired_bootstrap
from experiments.tables import (
    Place,
    Records,
    Table,
    ablation_of,
    config_of,
    data_names,
    described,
    device_of,
    gain,
    in_order,
    place_of,
    settings_of,
    sort_key,
    usual_of,
)

_RATES = {"learning_rate", "weight_decay", "b1", "b2", "eps", "momentum"}


class Run(NamedTuple):
    """All tested seeds of one configuration on one dataset, from any number of files."""

    name: str
    place: Place
    data: dict[str, Any]  # what the records say of it
    config: Config
    usual: Config  # the preset that it began with
    device: str
    tests: dict[int, dict[str, float]]  # by seed, the metrics at the best validation
    ranks: UserRanks | None  # of those of these tests whose folder keeps them


class Comparison(NamedTuple):
    """One run against another, over the seeds that both have."""

    first: Run
    second: Run
    baseline: str  # "same optimizer" without SEvo, "adam" as the paper's Table 2 has, "other"
    seeds: list[int]
    means: tuple[float, float]
    over_seeds: SeedTest | None  # None for a single seed
    over_users: UserTest | None  # over those of the seeds whose ranks both have, if any
    user_seeds: list[int]  # these
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

    Seeds count wherever they were trained, on their own or as an ablation's arm. An arm that
    smooths and was never trained on its own is left to the ablation's table; one that does not
    may be the baseline of others.

    Args:
      found: as `report.tested` gives it.

    Returns:
      The runs, ordered by dataset and model, those without SEvo first.
    """
    groups: dict[tuple[Config, Place], list[tuple[Path, Records]]] = defaultdict(list)
    alone = set()
    for path, records in sorted(found, key=lambda pair: sort_key(pair[1])):
        key = config_of(records), place_of(records)._replace(ablation="")
        groups[key].append((path, records))
        if not ablation_of(records) or not smooths(key[0]):
            alone.add(key)
    runs = [_joined(files) for key, files in groups.items() if key in alone]
    return sorted(runs, key=lambda run: (run.place, smooths(run.config), in_order(run.name)))


def _joined(files: list[tuple[Path, Records]]) -> Run:
    """Of a seed that several files have, the one with more seeds counts, with its ranks."""
    tests: dict[int, dict[str, float]] = {}
    parts, taken = [], []
    for path, records in sorted(files, key=lambda pair: -len(_tests(pair[1]))):
        new = {seed: r for seed, r in _tests(records).items() if seed not in tests}
        tests |= new
        taken += new.values()
        kept = path.with_name("ranks.npz")
        if new and kept.exists():
            ranks = read_ranks(kept)
            parts.append(choose(ranks, [s for s in ranks.seeds.tolist() if s in new]))
    records = files[0][1]
    return Run(
        settings_of(records),
        place_of(records)._replace(ablation=""),
        described(records),
        config_of(records),
        usual_of(records),
        device_of(taken),
        tests,
        combine(parts) if parts else None,
    )


def _tests(records: Records) -> dict[int, dict[str, Any]]:
    return {r["seed"]: r for r in records if r["kind"] == "test"}


def compare(
    runs: Sequence[Run], metric: str = "NDCG@10", *, samples: int = 10_000
) -> list[Comparison]:
    """Compares all pairs that differ in the optimizer alone; p values are corrected together.

    Of a pair, the settings that both optimizers have must agree, and so must the data. Of two
    optimizers that differ in more than SEvo, such as SEvo-AdamW and Adam, the weight decay must
    be that of their presets, and the other rates, too, or else equal. The later of two runs is
    stated against the earlier one.

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


def compare_each(runs: Iterable[Run], metric: str = "NDCG@10") -> dict[Place, list[Comparison]]:
    """The comparisons of each dataset and model, a family of their own for the corrections."""
    places = groupby(sorted(runs, key=lambda run: run.place), key=lambda run: run.place)
    return {place: compare(list(group), metric) for place, group in places}


def gains_table(pairs: Iterable[Comparison], metric: str = "NDCG@10") -> Table:
    """Each SEvo run against the same optimizer without SEvo, and against Adam.

    The p values are Holm's, within one dataset and model; a column without a cell is left out.
    """
    head = ["data", "model", "run", "against", "baseline", "seeds", metric, "of the other"]
    head += ["gain", "published gain", "d_z", "p, seeds", "p, users", "device"]
    rows = []
    pairs = [pair for pair in pairs if pair.baseline != "other"]
    names = data_names(pair.first.place for pair in pairs)
    for pair, data in zip(pairs, names, strict=True):
        first, second = pair.first, pair.second
        known = [published(run.config, run.data) for run in (first, second)]
        claimed = known[0] and known[1] and gain(known[0][metric][0], known[1][metric][0])
        rows.append(
            [
                data,
                first.config.model,
                first.name,
                second.name,
                pair.baseline,
                str(len(pair.seeds)),
                *(f"{mean:.4f}" for mean in pair.means),
                gain(*pair.means),
                claimed or "",
                f"{pair.over_seeds.effect:.2f}" if pair.over_seeds else "",
                p_value(pair.holm),
                p_value(pair.users_holm),
                devices(pair),
            ]
        )
    full = [i for i, _ in enumerate(head) if any(row[i] for row in rows)]
    return Table([head[i] for i in full], [[row[i] for i in full] for row in rows])


def devices(pair: Comparison) -> str:
    """What both runs were tested on, or the first against the second."""
    first, second = pair.first.device, pair.second.device
    return first if first == second else f"{first} against {second}"


def p_value(value: float | None) -> str:
    """As a table shows it."""
    return "" if value is None else f"{value:.2g}"


def missing(runs: Iterable[Run]) -> list[Missing]:
    """The presets of the runs' data that lack seeds: with SEvo-AdamW, AdamW and Adam, of
    LightGCN with Adam alone."""
    done: dict[object, set[int]] = defaultdict(set)
    runs = list(runs)
    held = {known_name(run.data["name"]) for run in runs}
    for run in runs:
        if not has_other_sizes(run.data):
            # However often it was validated.
            config = replace(run.config, eval_every=run.usual.eval_every)
            done[known_name(run.data["name"]), config] |= run.tests.keys()
    found = []
    optimizers: tuple[Optimizer, ...] = ("sevo_adamw", "adamw", "adam")
    for model, data in PRESETS:
        if data not in held:
            continue
        for optimizer in optimizers if model != "lightgcn" else optimizers[2:]:
            config = preset(model, data, optimizer)
            have = done.get((data, config), set())
            seeds = [seed for seed in range(SEEDS) if seed not in have][: SEEDS - len(have)]
            if len(have) < SEEDS:
                found.append(Missing(data, config, len(have), seeds))
    return sorted(found, key=lambda row: row.data == "synthetic")


def _comparable(first: Run, second: Run) -> bool:
    if first.place != second.place:
        return False
    ignored = {"optimizer"}
    if first.config.base != second.config.base:
        changed = _changed_rates(first) | _changed_rates(second)
        if "weight_decay" in changed:  # the same number means another thing to the other
            return False
        ignored |= {"weight_decay"} if changed else _RATES
    plain = [run.config for run in (first, second) if not smooths(run.config)]
    ignored |= set(SEVO_ONLY) if plain else {"placement"}
    if len(plain) == 1 and plain[0].has_sevo:  # it may have a smoothed start
        ignored -= {"smooth_start"}
    one, other = asdict(first.config), asdict(second.config)
    return all(one[name] == other[name] for name in one.keys() - ignored)


def smooths(config: Config) -> bool:
    """Whether psi does anything to steps: at beta 0 on the gradient it may act at the start
    alone, and the optimizer is the plain one."""
    idle = config.placement == "gradient" and config.beta == 0 and not config.beta_ramp
    return config.has_sevo and not idle


def _changed_rates(run: Run) -> set[str]:
    return _RATES & run.config.changes(run.usual).keys()


def _compared(first: Run, second: Run, metric: str, samples: int) -> Comparison:
    values = ({seed: r[metric] for seed, r in run.tests.items()} for run in (first, second))
    seeds, means, over_seeds = by_seed(*values)
    over_users, user_seeds = None, []
    if first.ranks and second.ranks:
        kept = (set(run.ranks.seeds.tolist()) for run in (first, second) if run.ranks)
        if user_seeds := sorted(set.intersection(*kept)):
            ranks = align(first.ranks, second.ranks, user_seeds)
            over_users = paired_bootstrap(
                *(per_user(r, metric) for r in ranks), samples=samples
            )
    baseline = "other"
    if smooths(first.config) and not smooths(second.config):
        if first.config.base == second.config.base:
            baseline = "same optimizer"
        elif second.config.optimizer == "adam":
            baseline = "adam"
    return Comparison(first, second, baseline, seeds, means, over_seeds, over_users, user_seeds)


def _corrected(
    tests: Sequence[SeedTest | UserTest | None],
) -> tuple[list[float | None], list[float | None]]:
    p = [test.p for test in tests if test]
    columns = []
    for rule in (holm, false_discovery_control):
        values = iter(rule(p).tolist() if p else [])
        columns.append([next(values) if test else None for test in tests])
    return columns[0], columns[1]
