"""One run: train the seeds of a configuration, validate, keep records and checkpoints, test.

A run lives in a folder: `run.json` (what was asked for), `records.jsonl`, `checkpoints/`,
`item_ids.npy` (external ids, for recommending) and at the end `ranks.npz` (the rank of every
test target). After every epoch the whole state is saved, so that a run that was interrupted
goes on from there and ends with the same bits as one that was not.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from experiments import records
from experiments.backbones import BACKBONES, make_optimizer, windows_per_step
from experiments.batching import training_data
from experiments.config import Config
from experiments.dataset import Dataset, Split
from experiments.ranking import Ranks, collect, metrics, ranking_data
from experiments.training import Trainer, TrainState
from models.losses import LOSSES
from sevo_jax import item_graph, normalized_adjacency

RUN = "run.json"
SELECTION = "NDCG@10"  # the validation metric that picks the best epoch


@dataclass
class Progress:
    """Where a run stands after an epoch; arrays have one entry for each seed.

    It is saved beside the parameters, so that a resumed run knows it too.
    """

    epoch: int  # -1 before the first validation, 0 before training
    loss: np.ndarray  # of the newest epoch; not a number before the first
    valid: np.ndarray  # NDCG@10 of the newest validation
    best: np.ndarray
    best_epoch: np.ndarray
    seconds: float = 0.0  # training, validation and saving, over all parts of a resumed run
    records_bytes: int = 0

    @classmethod
    def start(cls, num_seeds: int) -> "Progress":
        nothing = np.full(num_seeds, np.nan)
        return cls(-1, nothing, nothing, np.full(num_seeds, -1.0), np.zeros(num_seeds, int))

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        arrays: Any = {k: np.array(v) for k, v in values.items() if isinstance(v, list)}
        return cls(**(values | arrays))


@dataclass(frozen=True)
class Result:
    """Test metrics of a finished run, one entry for each seed."""

    config: Config
    seeds: tuple[int, ...]
    test: dict[str, np.ndarray]  # at the best validation
    last: dict[str, np.ndarray]  # after the last epoch
    best_epoch: np.ndarray
    seconds: float


def make_trainer(config: Config, split: Split) -> Trainer:
    """Builds the compiled training functions for a configuration on a split."""
    num_items = split.dataset.num_items
    build = BACKBONES[config.model]
    data = training_data(
        split.train, num_items, max_length=config.max_length, windows=config.windows
    )
    graph = None
    if config.optimizer.startswith("sevo_"):
        values, row_splits = split.train
        # Row 0 of the item table is padding, an isolated node.
        graph = normalized_adjacency(
            item_graph(
                (values + 1, row_splits),
                num_items + 1,
                window=config.graph_window,
                max_distance=config.graph_distance,
            )
        )
    return Trainer(
        lambda rngs: build(num_items, config, rngs),
        make_optimizer(config, graph),
        LOSSES[config.loss],
        graph,
        data,
        windows_per_step(config, data),
    )


def fit(
    config: Config,
    split: Split,
    seeds: Sequence[int],
    folder: str | Path,
    *,
    source: str = "",
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Trains all `seeds`, and tests each at its best validation and after the last epoch.

    Args:
      config: hyper-parameters.
      split: data.
      seeds: distinct integers; they train in one compiled program.
      folder: where the run is kept; made if missing.
      source: where the data came from, for the records.
      resume: go on from the folder's newest checkpoint. Without it, a folder that holds a run
        is an error. The settings must be the same; only `epochs` may differ.
      report: called after every epoch, and once before the first.

    Raises:
      ValueError: the folder holds a run, or one with other settings.
      FloatingPointError: the loss of a seed is not finite.
    """
    seeds = tuple(seeds)
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"`seeds` must be distinct and at least one, got {seeds}.")
    folder = Path(folder)
    trainer = make_trainer(config, split)
    parts = [split.evaluation("valid"), split.evaluation("test")]
    (valid_data, test_data), num_slots = ranking_data(parts, max_length=config.max_length)
    # Only now: data that cannot be trained on or ranked must not leave a folder behind.
    _claim(folder, config, split.dataset, seeds, source, resume)
    state = trainer.init(jax.vmap(jax.random.key)(jnp.asarray(seeds)))
    log = records.Log(folder, seeds, _described(config, split, seeds, source))

    def rank(params: Any, data: Any, part: int) -> Ranks:
        return collect(trainer.rank(params, data, num_slots), len(parts[part].targets))

    with _checkpoints(folder) as manager:
        progress = Progress.start(len(seeds))
        if resume and manager.latest_step() is not None:
            state, progress = _restore(manager, state)
        log.truncate(progress.records_bytes)
        started = time.perf_counter() - progress.seconds
        for epoch in range(progress.epoch + 1, config.epochs + 1):
            progress.epoch = epoch
            if epoch > 0:
                began = time.perf_counter()
                state, loss = trainer.epoch(state, epoch)
                progress.loss = np.asarray(loss, np.float64)
                _check_finite(progress.loss, seeds, epoch)
                log.add("epoch", epoch, {"loss": progress.loss}, time.perf_counter() - began)
            if epoch % config.eval_every == 0 or epoch == config.epochs:
                found = metrics(rank(state.params, valid_data, 0))
                progress.valid = found[SELECTION]
                improved = progress.valid > progress.best
                state = trainer.keep_best(state, improved)
                progress.best = np.where(improved, progress.valid, progress.best)
                progress.best_epoch = np.where(improved, epoch, progress.best_epoch)
                log.add("valid", epoch, found, time.perf_counter() - started)
            progress.records_bytes = log.flush()
            progress.seconds = time.perf_counter() - started
            _save(manager, epoch, state, progress)
            report(progress)
    best_ranks = rank(state.best_params, test_data, 1)
    test, last = metrics(best_ranks), metrics(rank(state.params, test_data, 1))
    log.add("test", progress.best_epoch, test, progress.seconds)
    log.add("last_test", progress.epoch, last, progress.seconds)
    log.flush()
    np.savez_compressed(
        folder / "ranks.npz", seeds=seeds, users=parts[1].users, **best_ranks._asdict()
    )
    return Result(config, seeds, test, last, progress.best_epoch, progress.seconds)


def load_run(folder: str | Path, seed: int | None = None) -> tuple[Any, np.ndarray, Config]:
    """The module of a run at its best validation so far.

    Args:
      folder: of a run that has at least one checkpoint.
      seed: one of the run's seeds; the first by default.

    Returns:
      The module, the external ids of its items `[num_items]`, and the settings.
    """
    folder = Path(folder)
    if not (folder / RUN).exists():
        raise ValueError(f"`folder` {folder} holds no run: there is no {RUN} in it.")
    held = json.loads((folder / RUN).read_text(encoding="utf-8"))
    config, seeds = Config(**held["config"]), held["seeds"]
    if seed is not None and seed not in seeds:
        raise ValueError(f"`seed` must be one of the run's {seeds}, got {seed}.")
    with _checkpoints(folder) as manager:
        if manager.latest_step() is None:
            raise ValueError(f"`folder` {folder} holds no checkpoint yet.")
        restored = manager.restore(
            manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore())
        )
    place = 0 if seed is None else seeds.index(seed)
    params = jax.tree.map(lambda leaf: leaf[place], restored["state"]["best_params"])
    build = BACKBONES[config.model]
    module = nnx.eval_shape(lambda: build(held["data"]["items"], config, nnx.Rngs(0)))
    graphdef = nnx.split(module)[0]
    return nnx.merge(graphdef, params), np.load(folder / "item_ids.npy"), config


def _claim(
    folder: Path,
    config: Config,
    dataset: Dataset,
    seeds: tuple[int, ...],
    source: str,
    resume: bool,
) -> None:
    """Makes the folder, or checks that it holds the run to resume."""
    wanted = {
        "config": asdict(config),
        "seeds": list(seeds),
        "data": {"name": dataset.name, "source": source, "items": dataset.num_items},
    }
    path = folder / RUN
    if path.exists():
        if not resume:
            raise ValueError(f"`folder` {folder} holds a run; resume it or choose another.")
        held = json.loads(path.read_text(encoding="utf-8"))
        for part in (held, wanted):
            part["config"] = {k: v for k, v in part["config"].items() if k != "epochs"}
        if held != wanted:
            names = [k for k in wanted if held.get(k) != wanted[k]]
            changed = {k: (held.get(k), wanted[k]) for k in names}
            raise ValueError(f"`folder` {folder} holds a run with other settings: {changed}.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "item_ids.npy", dataset.item_ids)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted, indent=2), encoding="utf-8")
    temporary.replace(path)


def _described(
    config: Config, split: Split, seeds: tuple[int, ...], source: str
) -> dict[str, Any]:
    """What every evaluation's record repeats, so that a line can be read alone."""
    dataset = split.dataset
    return {
        "config": asdict(config),
        "data": {
            "name": dataset.name,
            "source": source,
            "users": dataset.num_users,
            "items": dataset.num_items,
            "interactions": dataset.num_interactions,
            "train": split.num_train,
        },
        "num_seeds": len(seeds),
        **records.environment(),
    }


def _check_finite(losses: np.ndarray, seeds: tuple[int, ...], epoch: int) -> None:
    if not np.isfinite(losses).all():
        bad = [seed for seed, loss in zip(seeds, losses, strict=True) if not np.isfinite(loss)]
        raise FloatingPointError(
            f"the loss of seed {', '.join(map(str, bad))} is not finite in epoch {epoch}; the "
            "checkpoint of the epoch before is kept. Try a smaller learning rate."
        )


def _checkpoints(folder: Path) -> ocp.CheckpointManager:
    # Not in the background: a kill must lose no more than the epoch under way.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def _save(manager: Any, epoch: int, state: TrainState, progress: Progress) -> None:
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress.to_json())
    )
    manager.save(epoch, args=items)


def _restore(manager: Any, like: TrainState) -> tuple[TrainState, Progress]:
    items = ocp.args.Composite(
        state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore()
    )
    restored = manager.restore(manager.latest_step(), args=items)
    return restored["state"], Progress.from_json(restored["progress"])
