"""Tables from the records of runs: tests, learning curves, ablations, and what made them."""

import itertools
import re
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from experiments.config import SEVO_NEEDED, SEVO_ONLY, Config
from experiments.presets import preset
from experiments.published import official_curve, published, published_arm
from experiments.ranking import METRICS
from experiments.statistics import by_seed, holm, spread

Records = list[dict[str, Any]]
SHOWN = [name for name in METRICS if not name.startswith("MRR")]


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]  # as many cells each as the head has


def tests_table(runs: Iterable[Records]) -> Table:
    """Test metrics at the best validation epoch: mean ± standard deviation over seeds."""
    head = ["data", "model", "optimizer", "seeds", *SHOWN, "best epochs", "s/epoch", "device"]
    rows = []
    runs = list(runs)
    for run, data in zip(runs, data_names(map(place_of, runs)), strict=True):
        config = config_of(run)
        rows.append([data, config.model, name_of(run), *_scores(run), *_conditions(run)])
        if known := published(config, described(run)):
            cells = [f"{m:.4f}" + (f" ± {s:.4f}" if s else "") for m, s in known.values()]
            rows.append(
                [data, config.model, f"*published {config.label}*", "5", *cells, "", "", ""]
            )
    return Table(head, rows)


def reproduction_table(runs: Iterable[Records]) -> Table:
    """Test NDCG@10 beside what is published, and how far apart they are.

    The last column counts the published standard deviations (none for Adam's baselines).
    """
    head = ["data", "model", "optimizer", "seeds", "NDCG@10", "published", "difference"]
    rows = []
    for run in runs:
        config = config_of(run)
        known = published(config, described(run))
        if not known:
            continue
        scores = [r["NDCG@10"] for r in run if r["kind"] == "test"]
        mean, deviation = known["NDCG@10"]
        away = statistics.mean(scores) - mean
        rows.append(
            [
                data_of(run),
                config.model,
                name_of(run),
                str(len(scores)),
                spread(scores),
                f"{mean:.4f}" + (f" ± {deviation:.4f}" if deviation else ""),
                gain(mean + away, mean),
                f"{away / deviation:+.1f}" if deviation else "",
                device_of(run),
            ]
        )
    return Table([*head, "in its ±", "device"], rows)


def _scores(run: Records) -> list[str]:
    """The number of seeds, and the metrics of their tests."""
    tests = [r for r in run if r["kind"] == "test"]
    return [str(len(tests)), *(spread(r[name] for r in tests) for name in SHOWN)]


def _conditions(run: Records) -> list[str]:
    """Best epochs, seconds of an epoch and the device."""
    tests = [r for r in run if r["kind"] == "test"]
    # Of one seed; a file may hold seeds that were trained apart.
    together = {r["seed"]: r["num_seeds"] for r in tests}
    trained = [r for r in run if r["kind"] == "epoch"]
    warm = [r for r in trained if r["epoch"] > 1]  # the first includes the compilation
    epochs = [r["seconds"] / together[r["seed"]] for r in warm or trained]
    return [
        " ".join(str(r["epoch"]) for r in tests),
        f"{statistics.median(epochs):.2f}" if epochs else "",
        device_of(run),
    ]


def device_of(run: Records) -> str:
    """What the seeds were tested on; several where they were trained apart."""
    tests = [r for r in run if r["kind"] == "test"]
    return " / ".join(dict.fromkeys(f"{r['device']}, {r['cores']} core(s)" for r in tests))


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
    runs = list(runs)
    for run, data in zip(runs, data_names(map(place_of, runs)), strict=True):
        config = config_of(run)
        official = official_curve(config, described(run))
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
                    spread(losses[epoch]),
                    f"{loss:.3f}" if loss else "",
                    spread(valid[epoch]) if epoch in valid else "",
                    f"{low:.4f} to {high:.4f}" if low else "",
                ]
            )
    return Table(head, rows)


def ablation_table(runs: Sequence[Records]) -> Table:
    """The arms of one ablation at the best validation epoch, and their gains over others.

    What an arm is compared with is `bases`'s, over the seeds that both have. Below an arm stand
    its published means, where there are any.
    """
    head = ["arm", "seeds", *SHOWN, "NDCG@10 gain", "over", "d_z", "p", "best epochs"]
    head += ["s/epoch", "device"]
    scores = [{r["seed"]: r["NDCG@10"] for r in run if r["kind"] == "test"} for run in runs]
    known = [_published(run) for run in runs]
    over = bases([config_of(run) for run in runs])
    pairs = [
        by_seed(scores[arm], scores[base] if arm != base else {})
        for arm, base in enumerate(over)
    ]
    gains = [gain(*pair.means) if pair.seeds else "" for pair in pairs]
    tests = [pair.test for pair in pairs]
    corrected = iter(holm([test.p for test in tests if test]))
    rows = []
    for arm, run in enumerate(runs):
        base, test = over[arm], tests[arm]
        against = name_of(runs[base]) if gains[arm] else ""
        chance = [f"{test.effect:.2f}", f"{next(corrected):.2g}"] if test else ["", ""]
        row = [name_of(run), *_scores(run), gains[arm], against, *chance, *_conditions(run)]
        rows.append(row)
        if theirs := known[arm]:
            cells = [f"{theirs[name]:.4f}" for name in SHOWN]
            below = known[base] if arm != base else None
            claimed = gain(theirs["NDCG@10"], below["NDCG@10"]) if below else ""
            cells += [claimed, against if claimed else ""]
            rows.append([f"*published {name_of(run)}*", "5", *cells, *[""] * 5])
    shown = [i for i, name in enumerate(head) if name not in ("d_z", "p") or any(tests)]
    return Table([head[i] for i in shown], [[row[i] for i in shown] for row in rows])


def bases(arms: Sequence[Config]) -> list[int]:
    """The place of what each arm of an ablation is compared with.

    Of an arm with SEvo, the same settings without it, where there is such an arm; otherwise
    the first.
    """

    def apart(config: Config) -> dict[str, Any]:
        settings = {k: v for k, v in asdict(config).items() if k not in SEVO_ONLY}
        return settings | {"optimizer": config.base}

    plain = [(place, apart(arm)) for place, arm in enumerate(arms) if not arm.has_sevo]
    return [
        next((place for place, settings in plain if settings == apart(arm)), 0)
        if arm.has_sevo
        else 0
        for arm in arms
    ]


_BUCKETS = {
    "popularity": "interactions of the target in training (0: a cold item)",
    "history": "length of the user's history",
}
_Bucket = tuple[int, int, int]  # smallest value, largest value, number of targets


def bucket_tables(runs: Iterable[Records]) -> Iterator[tuple[str, Table]]:
    """Who gains: test NDCG@10 by popularity of the target and by length of the history.

    Yields a caption and a table with a row for each run, the mean over its seeds. Runs that
    were tested on other targets than the first are left out. A seed of one configuration that
    was run on two devices counts once, as in the run with more seeds.
    """
    runs = list(runs)
    for by, what in _BUCKETS.items():
        arms: dict[tuple[str, Config], list[dict[_Bucket, dict[int, float]]]] = {}
        for run in runs:
            found = defaultdict(dict)
            for r in run:
                if r["kind"] == "bucket" and r["by"] == by:
                    found[r["low"], r["high"], r["targets"]][r["seed"]] = r["NDCG@10"]
            first = next(iter(arms.values()), [found])[0]
            if found and set(found) == set(first):
                arms.setdefault((name_of(run), config_of(run)), []).append(found)
        if not arms:
            continue
        buckets = sorted(next(iter(arms.values()))[0])
        head = ["run (and targets)"]
        for low, high, targets in buckets:
            head.append(f"{f'{low} to {high}' if low < high else low} ({targets:,})")
        rows = []
        for (name, _), arm in arms.items():
            scores = []
            for bucket in buckets:
                parts = sorted((found[bucket] for found in arm), key=len)
                joined = {seed: score for part in parts for seed, score in part.items()}
                scores.append(spread(joined.values()))
            rows.append([name, *scores])
        yield f"Test NDCG@10 by {what}", Table(head, rows)


def _published(run: Records) -> dict[str, float] | None:
    """The published means of an ablation's arm."""
    arm, model = _arm(run), config_of(run).model
    if _asked(described(run)):
        return None
    return published_arm(arm["name"], model, described(run), arm["arm"], arm["given"])


def gain(value: float, baseline: float) -> str:
    """The relative gain in per cent; nothing over a baseline of zero."""
    return f"{100 * (value / baseline - 1):+.1f} %" if baseline else ""


def commands(runs: Iterable[Records]) -> str:
    """What to type to get each row again, and how long it took."""
    lines = ["Each row is one command; seconds are of all seeds, added up over processes.", ""]
    for run in runs:
        # Seeds that trained together share their seconds; others have their own.
        seconds = sum({r["seconds"] for r in run if r["kind"] == "test"})
        took = f"{seconds:,.0f} s; {versions_of(run)}"
        lines.append(f"- `{command_of(run)}` ({took})")
    return "\n".join(lines)


def versions_of(run: Records) -> str:
    """Python's version and those of the packages that a run was made with."""
    versions = _newest(run, "versions")
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def command_of(run: Records) -> str:
    """What to type to get a run again, or the ablation that it is an arm of."""
    seeds = [r["seed"] for r in run if r["kind"] == "test"]
    data, config = described(run), config_of(run)
    chosen = data.get("options", "")
    source = Path(data.get("source") or data["name"]).name  # a file may have another name
    if not (arm := _arm(run)):
        return train_command(config, source, seeds, usual_of(run), chosen)
    given = arm["given"]
    return ablate_command(arm["name"], source, config.model, seeds, given, arm["arms"], chosen)


def ablate_command(
    name: str,
    data: str | None,
    model: str,
    seeds: Iterable[int],
    given: dict[str, Any],
    arms: Sequence[str],
    data_options: str = "",
) -> str:
    """The `ablate` command with the settings that were given; `data` None if it needs none."""
    parts = [f"python -m experiments ablate {name}"]
    parts += [f"--data {shlex.quote(data)}", *filter(None, [data_options])] if data else []
    parts += [f"--model {model}"] if data else []
    parts.append(f"--seeds {' '.join(map(str, seeds))}")
    chosen = [f"--arms {shlex.join(arms)}"] if arms else []
    return " ".join(parts + _options(given) + chosen)


def train_command(
    config: Config, data: str, seeds: Iterable[int], usual: Config, data_options: str = ""
) -> str:
    """The `train` command of a configuration, with the options that `usual` lacks."""
    parts = [
        "python -m experiments train",
        f"--data {shlex.quote(data)}",
        *filter(None, [data_options]),
        f"--model {config.model}",
        f"--optimizers {config.optimizer}",
        f"--seeds {' '.join(map(str, seeds))}",
    ]
    return " ".join(parts + _options(config.changes(usual)))


def _options(settings: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]


def overrides(run: Records) -> dict[str, Any]:
    """The settings of a run that are not its preset's and have an effect."""
    return config_of(run).changes(usual_of(run))


def usual_of(run: Records) -> Config:
    """The preset that a run began with: of its data, or the one that was asked for."""
    config, data = config_of(run), described(run)
    return preset(config.model, _asked(data) or data["name"], config.optimizer)


def _asked(data: Mapping[str, Any]) -> str:
    """The dataset whose preset was asked for."""
    words = shlex.split(data.get("options", ""))
    return words[words.index("--preset") + 1] if "--preset" in words else ""


def name_of(run: Records) -> str:
    """The optimizer's label and what is not as in the preset: `sevo_adamw, beta 0.5`.

    Of an ablation's arm, the name that it has there, and in brackets what was given to this
    arm alone, as it has SEvo, or to the ablation but not to this arm.
    """
    if arm := _arm(run):
        config = config_of(run)
        own = {
            name: value
            for name in arm["given"]
            if ((value := getattr(config, name)) == arm["given"][name]) == (name in SEVO_NEEDED)
        }
        note = ", ".join(f"{k} {v}" for k, v in own.items())
        return f"{arm['arm']} ({note})" if note else arm["arm"]
    return settings_of(run)


def settings_of(run: Records) -> str:
    """The optimizer's label and what is not as in the preset, of an ablation's arm, too."""
    changed = overrides(run)
    changed.pop("placement", None)  # part of the label
    if asked := _asked(described(run)):
        changed = {"preset": asked, **changed}
    return ", ".join([config_of(run).label, *(f"{k} {v}" for k, v in changed.items())])


def _arm(run: Records) -> dict[str, Any]:
    return _newest(run, "ablation", {})


def ablation_of(run: Records) -> str:
    """The ablation that a run is an arm of, with what was given to all of its arms, those
    without SEvo too: `layers, epochs 40`."""
    if not (arm := _arm(run)):
        return ""
    shared = {name: value for name, value in arm["given"].items() if name not in SEVO_NEEDED}
    if asked := _asked(described(run)):
        shared = {"preset": asked, **shared}
    return with_given(arm["name"], shared)


def with_given(name: str, given: dict[str, Any]) -> str:
    """An ablation's name and the settings that were given to it: `layers, epochs 40`."""
    return ", ".join([name, *(f"{k} {v}" for k, v in given.items())])


def config_of(run: Records) -> Config:
    """The settings of a run."""
    return Config(**_newest(run, "config"))


def data_of(run: Records) -> str:
    """The name of a run's dataset, with the options that chose its interactions."""
    data = described(run)
    words = shlex.split(data.get("options", ""))
    chosen = []
    for at, word in enumerate(words):
        if word in ("--min-rating", "--repeats", "--k-core", "--split-times"):
            chosen += words[at : at + (3 if word == "--split-times" else 2)]
    return " ".join([data["name"], *chosen])


def sizes_of(run: Records) -> tuple[tuple[str, Any], ...]:
    """What a run's records say of its data's size: other data may have the same name.

    Without `train`, which is less where few of the users train.
    """
    data = described(run)
    return tuple((k, data[k]) for k in ("users", "items", "interactions") if k in data)


def described(run: Records) -> dict[str, Any]:
    """What a run's records say of its data: name, sizes, and the options that chose it."""
    return _newest(run, "data")


def _newest(run: Records, name: str, otherwise: Any = None) -> Any:
    """What the run's last record that has `name` says: of a run that was resumed for more
    epochs, the first still names fewer."""
    return next((r[name] for r in reversed(run) if name in r), otherwise)


class Place(NamedTuple):
    """Under which a run is reported."""

    data: str
    model: str
    ablation: str
    sizes: tuple[tuple[str, Any], ...]  # of the data


def place_of(run: Records) -> Place:
    """The dataset, the model and the ablation of a run."""
    return Place(data_of(run), config_of(run).model, ablation_of(run), sizes_of(run))


def data_names(places: Iterable[Place]) -> list[str]:
    """The name of each place's dataset, with its number of users where other data of these
    places has the same name."""
    found = [(place.data, place.sizes) for place in places]
    alike = Counter(name for name, _ in set(found))
    return [
        f"{name} of {dict(sizes).get('users', 0):,} users" if alike[name] > 1 else name
        for name, sizes in found
    ]


def by_place(runs: Iterable[Records]) -> Iterator[tuple[str, list[Records]]]:
    """Runs that are sorted by `sort_key`, with a title for those of each place."""
    groups = [(place, list(group)) for place, group in itertools.groupby(runs, place_of)]
    names = data_names(place for place, _ in groups)
    for (place, group), data in zip(groups, names, strict=True):
        title = f"{place.model} on {data}"
        yield f"{place.ablation}: {title}" if place.ablation else title, group


def sort_key(run: Records) -> tuple[Any, ...]:
    """Orders runs by dataset and model, those without SEvo first; then ablations by arm."""
    order, sevo = _arm(run).get("order", 0), config_of(run).has_sevo
    return place_of(run), order, sevo, in_order(name_of(run))


def in_order(name: str) -> list[Any]:
    """Sorts names with numbers in them: `every 4` before `every 16`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def by_epoch(run: Records, kind: str, name: str) -> dict[int, list[float]]:
    """The values that a run's records of a kind have at each epoch, one for each seed."""
    found = defaultdict(list)
    for record in run:
        if record["kind"] == kind:
            found[record["epoch"]].append(record[name])
    return found
