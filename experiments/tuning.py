"""How far each arm was tuned, and how the best settings of each, by validation, compare."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from experiments.comparisons import smooths
from experiments.config import Config
from experiments.statistics import spread
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
NDCG@10, among all that were tried with that data, model, loss and optimizer, an ablation's arms
too. Gains are over the seeds that both have. Fewer settings are a smaller budget, and settings
of one seed are easily lucky:"""


class Setting(NamedTuple):
    """What one configuration reached, by seed."""

    name: str
    valid: dict[int, float]  # NDCG@10 at the best validation that the records keep
    test: dict[int, float]

    @property
    def mean_valid(self) -> float:
        return sum(self.valid.values()) / len(self.valid)


def tuned_table(found: Iterable[Records]) -> Table:
    """The best settings with and without SEvo beside each other, and out of how many.

    Runs that know more than who took what count as none: those with attributes, a teacher, or
    a part of the users.

    Args:
      found: of tested runs, arms of ablations among them.

    Returns:
      A row for each data, model, loss and optimizer of which both arms ran, and one of them
      with several settings.
    """
    groups: dict[tuple[Place, str, str], tuple[dict, dict]] = defaultdict(lambda: ({}, {}))
    for run in found:
        config = config_of(run)
        if config.graph == "attributes" or config.has_teacher or config.train_users < 1:
            continue
        place = place_of(run)._replace(ablation="")
        arm = groups[place, config.loss, config.base][smooths(config)]
        _add(arm, replace(config, eval_every=1), run)
    rows = []
    names = data_names(place for place, _, _ in groups)
    for ((place, loss, base), arms), data in sorted(
        zip(groups.items(), names, strict=True), key=lambda pair: pair[0][0]
    ):
        tried = [[setting for setting in arm.values() if setting.valid] for arm in arms]
        if not all(tried) or max(map(len, tried)) == 1:
            continue
        plain, sevo = (max(arm, key=lambda setting: setting.mean_valid) for arm in tried)
        seeds = sorted(plain.test.keys() & sevo.test.keys())
        means = [sum(s.test[seed] for seed in seeds) for s in (sevo, plain)]
        row = [data, place.model, loss, base]
        for arm, best in zip(tried, (plain, sevo), strict=True):
            row += [str(len(arm)), best.name, spread(best.valid.values())]
            row += [spread(best.test.values())]
        rows.append([*row, gain(*means) if seeds else "", str(len(seeds))])
    head = ["data", "model", "loss", "optimizer", "settings without SEvo", "the best", "valid"]
    head += ["test", "settings with SEvo", "the best", "valid", "test", "gain", "seeds"]
    return Table(head, rows)


def _add(arm: dict[Config, Setting], key: Config, run: Records) -> None:
    """Adds a run's seeds to those of its settings; a seed that is there already stays."""
    setting = arm.setdefault(key, Setting(settings_of(run), {}, {}))
    valid: dict[int, float] = {}
    for record in run:
        if record["kind"] == "valid":
            seed = record["seed"]
            valid[seed] = max(valid.get(seed, 0.0), record["NDCG@10"])
    for record in run:
        if record["kind"] == "test" and record["seed"] in valid:
            setting.test.setdefault(record["seed"], record["NDCG@10"])
            setting.valid.setdefault(record["seed"], valid[record["seed"]])
