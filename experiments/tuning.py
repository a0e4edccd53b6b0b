"""How far each arm was tuned, and how the best settings of each, by validation, compare."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from experiments.comparisons import p_value, smooths
from experiments.config import Config
from experiments.statistics import by_seed, holm, spread
from experiments.tables import (
    Place,
    Records,
    Table,
    config_of,
    data_names,
    gain,
    place_of,
    settings_of,
)

HOW_CHOSEN = """The best settings of each arm, by the mean over seeds of the best validation
NDCG@10 that the records keep, among all that were tried with that data, model, loss and
optimizer, an ablation's arms too. A smoothed start counts as SEvo. Runs with attributes, a
teacher, a part of the users or several workers of the loader are left out. Gains are over the
seeds that both have; d_z is the mean difference over its standard deviation, p Student's paired
test by Holm's rule for all rows of this table, and neither takes account of the choice.

More settings are a larger budget. The gain at equal budgets is what to expect if of each arm as
many settings had been drawn, from those that train as many epochs as its best, and the best of
them by validation taken (as Dodge et al., Show Your Work, 2019, for validation); "2 of 3 and 9"
is two of AdamW's three and of SEvo's nine. The settings were not drawn at random in truth: an
ablation's poor arms lower this gain, and what was added because others had won raises it.
Settings of one seed are easily lucky"""


class Setting(NamedTuple):
    """What one configuration reached, by seed."""

    name: str
    epochs: int
    valid: dict[int, float]  # NDCG@10 at the best validation
    test: dict[int, float]

    @property
    def mean_valid(self) -> float:
        return sum(self.valid.values()) / len(self.valid)


def chances(settings: Sequence[Setting], budget: int) -> list[tuple[Setting, float]]:
    """How likely each is the best by validation of `budget` of them, drawn at random.

    Args:
      settings: of which no two have the same mean validation.
      budget: from 1 to their number.

    References:
      Dodge et al, `Show Your Work <https://arxiv.org/abs/1909.03004>`_, EMNLP 2019, who draw
      with replacement.
    """
    if not 1 <= budget <= len(settings):
        raise ValueError(f"`budget` must be from 1 to {len(settings)}, got {budget}.")
    ranked = sorted(settings, key=lambda setting: -setting.mean_valid)
    draws = math.comb(len(ranked), budget)
    # It is the best where all others are of those after it.
    return [
        (setting, math.comb(len(ranked) - 1 - i, budget - 1) / draws)
        for i, setting in enumerate(ranked)
    ]


def _at_equal_budgets(arms: Sequence[list[Setting]], best: Sequence[Setting]) -> list[str]:
    """The budget, and the gain of the second arm; each pair counts over the seeds of both."""
    pools = [
        [setting for setting in arm if setting.epochs == winner.epochs]
        for arm, winner in zip(arms, best, strict=True)
    ]
    budget = min(map(len, pools))
    totals = [0.0, 0.0]
    for (plain, p), (sevo, q) in itertools.product(*(chances(pool, budget) for pool in pools)):
        pair = by_seed(sevo.test, plain.test)
        if pair.seeds:
            totals = [
                total + p * q * mean for total, mean in zip(totals, pair.means, strict=True)
            ]
    return [f"{budget} of {len(pools[0])} and {len(pools[1])}", gain(*totals)]


def tuned_table(found: Iterable[Records]) -> Table:
    """The best settings with and without SEvo beside each other, and out of how many.

    Left out are runs with attributes, a teacher, a part of the users, or several workers.

    Args:
      found: of tested runs, arms of ablations among them.

    Returns:
      A row for each data, model, loss and optimizer of which both arms ran, and one of them
      with several settings: both best ones, the gain at equal budgets and between these, and a
      paired test of it where they have two seeds or more in common.
    """
    groups: dict[tuple[Place, str, str], tuple[dict, dict]] = defaultdict(lambda: ({}, {}))
    # Of a seed that several runs have, the one with more seeds counts, as in other tables.
    for run in sorted(found, key=lambda run: -sum(r["kind"] == "test" for r in run)):
        config = config_of(run)
        if config.graph == "attributes" or config.has_teacher:
            continue
        if config.train_users < 1 or config.loader_workers > 1:
            continue
        place = place_of(run)._replace(ablation="")
        with_sevo = smooths(config) or config.smooth_start > 0
        arm = groups[place, config.loss, config.base][with_sevo]
        _add(arm, replace(config, eval_every=1), run)
    rows, tests = [], []
    names = data_names(place for place, _, _ in groups)
    for ((place, loss, base), arms), data in sorted(
        zip(groups.items(), names, strict=True), key=lambda pair: pair[0][0]
    ):
        known = [[setting for setting in arm.values() if setting.valid] for arm in arms]
        if not all(known) or max(map(len, arms)) == 1:
            continue
        plain, sevo = (max(arm, key=lambda setting: setting.mean_valid) for arm in known)
        pair = by_seed(sevo.test, plain.test)
        tests.append(pair.test)
        row = [data, place.model, loss, base]
        for arm, best in zip(arms, (plain, sevo), strict=True):
            row += [str(len(arm)), best.name, spread(best.valid.values())]
            row += [spread(best.test.values())]
        row += _at_equal_budgets(known, (plain, sevo))
        row += [gain(*pair.means) if pair.seeds else "", str(len(pair.seeds))]
        rows.append(row)
    corrected = iter(holm([test.p for test in tests if test]))
    for row, test in zip(rows, tests, strict=True):
        row += [f"{test.effect:.2f}", p_value(next(corrected))] if test else ["", ""]
    head = ["data", "model", "loss", "optimizer", "settings without SEvo", "the best", "valid"]
    head += ["test", "settings with SEvo", "the best", "valid", "test"]
    head += ["budget", "gain, equal budgets", "gain", "seeds"]
    head += ["d_z", "p"]
    return Table(head, rows)


def _add(arm: dict[Config, Setting], key: Config, run: Records) -> None:
    """Adds a run's seeds to those of its settings; a seed that is there already stays.

    Older records of long runs lack the best validation: the best of those that are kept stands
    for it, unless that is none but the one before training.
    """
    setting = arm.setdefault(key, Setting(settings_of(run), key.epochs, {}, {}))
    valid: dict[int, dict[int, float]] = defaultdict(dict)
    for record in run:
        if record["kind"] == "valid":
            valid[record["seed"]][record["epoch"]] = record["NDCG@10"]
    for record in run:
        if record["kind"] != "test":
            continue
        seed, epoch = record["seed"], record["epoch"]
        kept = {at: v for at, v in valid[seed].items() if at > 0 or epoch == 0}
        if kept:
            setting.test.setdefault(seed, record["NDCG@10"])
            setting.valid.setdefault(seed, kept.get(epoch, max(kept.values())))
