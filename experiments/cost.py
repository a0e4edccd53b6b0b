"""What SEvo costs: the last lines of Table 2, and Table 3's claim of little overhead."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from rich.console import Console

from experiments.config import Config, Model
from experiments.data import split_of
from experiments.dataset import Dataset, Split, leave_one_out
from experiments.options import Ablate
from experiments.presets import preset, preset_name
from experiments.published import TRAINING_SECONDS
from experiments.ranking import ranking_data
from experiments.run import make_trainer, start
from experiments.study import Finding
from experiments.training import Trainer
from sevo_jax import item_graph, normalized_adjacency

NEEDS_DATA = True
ROUNDS = 5
OPTIMIZERS = ("adamw", "sevo_adamw")


class Size(NamedTuple):
    """Of a generated log whose item graph is as large as that of a real catalogue."""

    num_users: int
    num_items: int


# The catalogues of the paper's Table 3.
LARGE = {
    "electronics": Size(num_users=728_489, num_items=159_729),
    "clothing": Size(num_users=1_219_337, num_items=376_378),
}
LENGTH = 8  # of every generated sequence, about the mean of Amazon's


def study(options: Ablate, out: Path, console: Console) -> list[Finding]:
    """Seconds of an epoch and of ranking with and without SEvo, taken in turns.

    `--arms` names backbones, all by default, on the data of the options; `electronics` and
    `clothing` are SASRec on generated data of that size, a few steps, and take minutes.
    """
    models: tuple[str, ...] = get_args(Model)
    arms = options.arms or models
    if unknown := set(arms) - {*models, *LARGE}:
        raise ValueError(f"`arms` must be of {(*models, *LARGE)}, got {sorted(unknown)}.")
    seed, *more = options.seeds
    if options.model != "sasrec" or more:
        raise ValueError(
            "`cost` takes models as `arms` and one seed, got `model` "
            f"{options.model!r} and `seeds` {options.seeds}."
        )
    needs_data = bool(set(arms) & {*models})
    if not needs_data and (options.data != "synthetic" or options.data_options()):
        raise ValueError(
            f"`data` {options.data} and its options change nothing, as all `arms` are on data "
            "generated for them; leave them out."
        )
    split = split_of(options)[1] if needs_data else None
    configs = {}
    for arm in arms:
        model, data = "sasrec", "amazon_beauty"  # of the large sizes
        if split and arm in models:
            model, data = arm, preset_name(arm, split.dataset.name, options.preset)
        # LightGCN does in the network what SEvo does in training.
        names = OPTIMIZERS if model != "lightgcn" else OPTIMIZERS[:1]
        configs[arm] = [preset(model, data, name, **options.given_to(name)) for name in names]
    every = [config for of_arm in configs.values() for config in of_arm]
    options.check_given(every)
    if options.eval_every is not None:
        raise ValueError("`eval_every` changes nothing in `cost`; leave it out.")
    if options.epochs is not None and not any(
        config.schedule == "cosine" or config.placement == "switch" for config in every
    ):
        raise ValueError(
            "`epochs` changes nothing in `cost` without the `schedule` cosine or the "
            "`placement` switch; leave it out."
        )
    findings = []
    if split:
        chosen = {arm: of_arm for arm, of_arm in configs.items() if arm in models}
        findings.append(_backbones(chosen, split, seed, console))
    if sizes := {arm: of_arm for arm, of_arm in configs.items() if arm in LARGE}:
        findings.append(_large(sizes, console))
    return findings


def _backbones(
    configs: dict[str, list[Config]], split: Split, seed: int, console: Console
) -> Finding:
    rows = []
    for model, of_model in configs.items():
        epochs, rankings = _seconds(of_model, split, seed)
        row = [model, *_pair(epochs), *_pair(rankings)]
        if known := TRAINING_SECONDS.get(model):
            row += [f"{known[0]:,}", _percent(1 + known[1] / known[0])]
        rows.append(row + [""] * (9 - len(row)))
        console.print(f"{model}: {' '.join(f'{s:.3f}' for s in epochs)} s/epoch")
    head = ["model"]
    for what in ("s/epoch", "s/ranking"):
        head += [f"{what}, AdamW", f"{what}, SEvo", "overhead" if "epoch" in what else "more"]
    head += ["published training, s", "published overhead"]
    title = (
        f"Cost on {split.dataset.name}: medians of {ROUNDS} epochs, and of as many rankings of "
        "all validation users, with and without SEvo in turns"
    )
    return Finding(title, head, rows)


def _pair(seconds: Sequence[float]) -> list[str]:
    if len(seconds) < 2:
        return [f"{seconds[0]:.4f}", "", ""]
    return [*(f"{s:.4f}" for s in seconds), _percent(seconds[1] / seconds[0])]


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


class _Arm:
    """A trainer with its state: an epoch or a ranking at a call."""

    def __init__(self, trainer: Trainer, seed: int):
        self.trainer = trainer
        self.state = start(trainer, [seed])
        self.epochs = 0

    def epoch(self) -> Any:
        self.epochs += 1
        self.state, loss = self.trainer.epoch(self.state, self.epochs)
        return loss, self.state

    def rank(self, data: Any, num_slots: int) -> Any:
        return self.trainer.rank(self.state.params, data, num_slots)


def _seconds(
    configs: Sequence[Config], split: Split, seed: int
) -> tuple[list[float], list[float]]:
    """Median seconds of an epoch and of a ranking, for each configuration."""
    arms = [_Arm(make_trainer(config, split), seed) for config in configs]
    queries = arms[0].trainer.objective.num_queries
    (data,), num_slots = ranking_data(
        [split.evaluation("valid")], max_length=configs[0].max_length - queries
    )
    epochs = alternate([arm.epoch for arm in arms], ROUNDS)
    rankings = alternate([lambda arm=arm: arm.rank(data, num_slots) for arm in arms], ROUNDS)
    return epochs, rankings


def alternate(
    functions: Sequence[Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of each function, called in turns so that noise meets all alike.

    The first call of each, which compiles, does not count.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, taken in zip(functions, seconds, strict=True):
            began = clock()
            jax.block_until_ready(function())
            taken.append(clock() - began)
    return [statistics.median(taken[1:]) for taken in seconds]


def _large(configs: dict[str, list[Config]], console: Console) -> Finding:
    rows, num_steps = [], 0
    for name, of_size in configs.items():
        edges, num_steps, (plain, sevo) = steps(LARGE[name], of_size)
        cells = [f"{LARGE[name].num_items:,}", f"{edges:,}", f"{plain:.0f}", f"{sevo:.0f}"]
        rows.append([name, *cells, f"{sevo / plain:.2f}"])
        console.print(f"{name}: {plain:.0f} and {sevo:.0f} ms/step")
    head = ["size of", "items", "directed edges", "ms/step, AdamW", "ms/step, SEvo", "ratio"]
    title = (
        f"SASRec on generated data of large catalogues, medians of {ROUNDS} times {num_steps} "
        "steps"
    )
    return Finding(title, head, rows)


def steps(
    size: Size, configs: Sequence[Config], users: int = 5120
) -> tuple[int, int, list[float]]:
    """Milliseconds of a training step with each of the settings.

    Args:
      size: of the log that the graph is built of.
      configs: settings, of the same batch size.
      users: of the log that are trained on, all in every round.

    Returns:
      The number of directed edges, that of the steps in a round, and the times.
    """
    values, row_splits = sequences(size)
    graph = item_graph((values + 1, row_splits), size.num_items + 1)  # a row for padding
    edges, adjacency = len(graph.edges), normalized_adjacency(graph)  # type: ignore[arg-type]
    some = row_splits[: users + 1]
    split = leave_one_out(Dataset("generated", values[: some[-1]], some, size.num_items))
    arms = []
    for config in configs:
        trainer = make_trainer(config, split, graph=adjacency if config.has_sevo else None)
        arms.append(_Arm(trainer, 0))
    seconds = alternate([arm.epoch for arm in arms], ROUNDS)
    num_steps = arms[0].trainer.num_steps
    return edges, num_steps, [1000 * s / num_steps for s in seconds]


def sequences(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """A log `(values, row_splits)` whose items follow a power law, as catalogues do.

    Popularity falls with the square root of the rank: a few hubs, and a long tail.
    """
    rng = np.random.default_rng(0)
    drawn = rng.random(size.num_users * LENGTH) ** 2  # density ~ rank^(-1/2)
    values = (drawn * size.num_items).astype(np.int64)
    return values, np.arange(0, len(values) + 1, LENGTH)
