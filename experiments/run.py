"""One run: train the seeds of a configuration, validate, keep records and checkpoints, test.

The whole state is saved as training goes on, so that a run that was interrupted goes on from
there and ends with the same bits as one that was not; on a GPU up to the order of sums.
`run_folder` says where.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from experiments import records
from experiments.backbones import (
    BACKBONES,
    SWEPT,
    fixed,
    make_graph,
    make_optimizer,
    prepare,
    smooth_tables,
    user_item_graph,
    windows_per_step,
)
from experiments.batching import training_data
from experiments.config import Config, check_seeds
from experiments.dataset import Split
from experiments.distillation import distilled, teacher_graph
from experiments.mesh import WHOLE, MeshTrainer, Streams, check_mesh, split_graph
from experiments.per_user import bucket_metrics, history_lengths, target_popularity
from experiments.ranking import Ranks, collect, metrics, ranking_data
from experiments.run_folder import Progress, checkpoints, claim, locked, restore, save
from experiments.training import Trainer, TrainState
from sevo_jax.sharding import shard_adjacency

SELECTION = "NDCG@10"  # the validation metric that picks the best epoch
SAVING = 0.05  # the share of the time that may go into checkpoints between the first and last


@dataclass(frozen=True)
class Result:
    """Test metrics of a finished run, one entry for each seed."""

    config: Config
    seeds: tuple[int, ...]
    test: dict[str, np.ndarray]  # at the best validation
    last: dict[str, np.ndarray]  # after the last epoch
    best_epoch: np.ndarray
    seconds: float


def make_trainer(
    config: Config,
    split: Split,
    swept: Mapping[str, Sequence[float]] | None = None,
    optimizer: Callable[[Any], optax.GradientTransformation] | None = None,
    graph: Any = None,
    mesh: Mesh | None = None,
    teacher: Any = None,
) -> Trainer:
    """Builds the compiled training functions for a configuration on a split.

    Args:
      config: settings.
      split: data.
      swept: by name, the values that the runs have of a setting, see `make_optimizer`.
      optimizer: makes the optimizer from the adjacency, in place of the one in `config`.
      graph: to smooth over, in place of that of the split.
      teacher: a trained module, where `config` has one to learn from.
      mesh: devices to train on, see `experiments.mesh`; by default JAX's first.

    Raises:
      ValueError: the settings cannot train on the mesh, or lack a teacher.
    """
    if mesh is not None:
        check_mesh(config, mesh)
    split = split.with_train_users(config.train_users)
    dataset, backbone = split.dataset, BACKBONES[config.model]
    num_rows = dataset.num_items + backbone.module.num_special
    data = training_data(
        split.train, dataset.num_items, max_length=config.max_length, windows=config.windows
    )
    if config.has_teacher and teacher is None:
        name = "graph" if config.graph == "teacher" else "distil"
        raise ValueError(
            f"`{name}` {getattr(config, name)!r} needs a `teacher`, but got none; see `ablate "
            "distillation`."
        )
    if config.graph == "teacher" and graph is None:
        graph = teacher_graph(teacher)
    whole: Any = None
    if config.has_sevo:
        graph = make_graph(config, split) if graph is None else graph
        if mesh is None or config.smooth_start:  # what begins smoothed is not split yet
            whole = prepare(graph)
        graph = whole if mesh is None else split_graph(graph, num_rows, mesh)
    objective = backbone.objective(dataset.num_items, config)
    context = None
    if config.model == "lightgcn":
        context = user_item_graph(split)
        context = prepare(context) if mesh is None else shard_adjacency(context, mesh)
    elif config.distil != "none":
        objective, context = distilled(objective, config, teacher)
    make: Any = Trainer
    if config.streams > 1 or mesh is not None:
        objective = Streams(objective, config.streams, mesh)
    if mesh is not None:
        make = functools.partial(MeshTrainer, mesh, num_rows)
    objective.check(data)
    batch_size = windows_per_step(config, data)
    if mesh is not None:
        data = jax.device_put(data, NamedSharding(mesh, WHOLE))
    order = jax.eval_shape(lambda: objective.order(jax.random.key(0), data, batch_size))

    def build(rngs: nnx.Rngs) -> Any:
        module = backbone.build(dataset.num_users, dataset.num_items, config, rngs)
        if config.smooth_start:
            smooth_tables(module, config, whole)
        return module

    return make(
        build,
        optimizer(graph)
        if optimizer
        else make_optimizer(config, graph, swept, steps_per_epoch=order.shape[0]),
        objective,
        graph,
        data,
        batch_size,
        context,
        touched=config.touched == "batch",
    )


def start(
    trainer: Trainer, seeds: Sequence[int], swept: Mapping[str, Sequence[float]] | None = None
) -> TrainState:
    """The state of R runs before training.

    Args:
      trainer: from `make_trainer`, made for this `swept`.
      seeds: of each run `[R]`.
      swept: by name, the value that each run has of a setting `[R]`.
    """
    state = trainer.init(jax.vmap(jax.random.key)(jnp.array(seeds)))
    if not swept:
        return state
    values = {name: jnp.array(column, jnp.float32) for name, column in swept.items()}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=values))  # type: ignore


def fit(
    config: Config,
    split: Split,
    seeds: Sequence[int],
    folder: str | Path,
    *,
    source: str = "",
    data_options: str = "",
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    mesh: Mesh | None = None,
) -> Result:
    """Trains all `seeds`, and tests each at its best validation and after the last epoch.

    Args:
      config: hyper-parameters.
      split: data.
      seeds: distinct integers; they train in one compiled program.
      folder: where the run is kept; made if missing.
      source: where the data came from, for the records.
      data_options: how it was chosen from there, as `train` takes it on the command line.
      resume: go on from the folder's newest checkpoint. Without it, a folder that holds a run
        is an error. Data must be the same, and settings that change anything. `epochs` alone
        may be more, unless the schedule or the placement depends on it; the validation after
        what was the last epoch then stays, whatever `eval_every`.
      report: called after every epoch, and once before the first.
      mesh: devices to train on, see `experiments.mesh`; a run may go on on others. Of several
        processes all call this, see the same folder, and the first writes.

    Raises:
      ValueError: the folder holds a run, or one with other settings, or another process
        trains in it.
      TypeError: `split` or `config` is something else.
      FloatingPointError: the loss of a seed is not finite.
    """
    (result,) = fit_sweep(
        {"": config},
        split,
        seeds,
        folder,
        source=source,
        data_options=data_options,
        resume=resume,
        report=report,
        mesh=mesh,
    )
    return result


def fit_sweep(
    configs: Mapping[str, Config],
    split: Split,
    seeds: Sequence[int],
    folder: str | Path,
    *,
    source: str = "",
    data_options: str = "",
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    notes: Mapping[str, dict[str, Any]] | None = None,
    mesh: Mesh | None = None,
    teacher: Any = None,
) -> list[Result]:
    """`fit` for several settings at once, one compilation for all of them.

    Args:
      configs: settings by name, which differ in the optimizer's `backbones.SWEPT` alone. Each
        is kept in the folder of its name below `folder`.
      split, seeds, folder, source, data_options, resume, report, mesh: see `fit`; `report`
        gets arrays `[len(configs) * len(seeds)]`, the seeds of a setting next to each other.
      notes: by name, what the records of a setting's evaluations say besides.
      teacher: see `make_trainer`.
    """
    if not isinstance(split, Split):
        raise TypeError(f"`split` must be of type Split, got {type(split).__name__}.")
    for one in configs.values():
        if not isinstance(one, Config):
            raise TypeError(f"`config` must be of type Config, got {type(one).__name__}.")
    seeds = check_seeds(seeds)
    folder = Path(folder)
    config = next(iter(configs.values()))
    for name, other in configs.items():
        if fixed(other) != fixed(config):
            raise ValueError(
                f"`configs` may differ in {SWEPT} alone, all or none of them may have a "
                "`residual_decay`, and `num_layers` is the same for the exact inverse, the "
                f"placement 'switch' and a `smooth_start`, but {name!r} does not fit."
            )
    runs = [(label, seed) for label in configs for seed in seeds]
    values = {name: [getattr(configs[label], name) for label, _ in runs] for name in SWEPT}
    swept = {name: column for name, column in values.items() if len(set(column)) > 1}
    split = split.with_train_users(config.train_users)  # what the records shall count
    trainer = make_trainer(config, split, swept, mesh=mesh, teacher=teacher)
    ranker = _Ranker(trainer, split, config.max_length)
    state = start(trainer, [seed for _, seed in runs], swept)
    # Only now: what cannot be trained or ranked must not leave a folder behind.
    data = {"name": split.dataset.name, "source": source}
    data |= {"options": data_options} if data_options else {}
    with locked(folder):
        claim(folder, configs, split, seeds, data, resume)
        common = {
            label: _described(one, split, seeds, data) | (notes or {}).get(label, {})
            for label, one in configs.items()
        }
        log = records.SweepLog(folder, seeds, common)
        with checkpoints(folder) as manager:
            progress = Progress.start(len(runs))
            if resume and manager.latest_step() is not None:
                state, progress = restore(manager, state)
            if progress.epoch > config.epochs:
                raise ValueError(
                    f"`epochs` is {config.epochs}, but the run in {folder} has come to "
                    f"epoch {progress.epoch} already."
                )
            log.truncate(progress.records_bytes or [0] * len(configs))
            state = _train(config, ranker, state, progress, log, manager, report)
        return _test(configs, split, ranker, state, progress, log, folder)


class _Ranker:
    """Ranks the held-out targets of a split by the tables of several runs."""

    def __init__(self, trainer: Trainer, split: Split, max_length: int):
        self.trainer = trainer
        self.parts = {part: split.evaluation(part) for part in ("valid", "test")}
        data, self.num_slots = ranking_data(
            list(self.parts.values()), max_length=max_length - trainer.objective.num_queries
        )
        self.data = dict(zip(self.parts, data, strict=True))

    def __call__(self, params: Any, part: str) -> Ranks:
        """Ranks `[R, num_targets]` of `"valid"` or `"test"`."""
        found = self.trainer.rank(params, self.data[part], self.num_slots)
        return collect(found, len(self.parts[part].targets))


def _train(
    config: Config,
    ranker: _Ranker,
    state: TrainState,
    progress: Progress,
    log: records.SweepLog,
    manager: Any,
    report: Callable[[Progress], None],
) -> TrainState:
    """Trains from where `progress` stands to the last epoch, and moves it on."""
    trainer = ranker.trainer
    started, next_save = time.perf_counter() - progress.seconds, 0.0
    for epoch in range(progress.epoch + 1, config.epochs + 1):
        progress.epoch = epoch
        if epoch > 0:
            began = time.perf_counter()
            state, loss = trainer.epoch(state, epoch)
            progress.loss = np.asarray(loss, np.float64)
            _check_finite(progress.loss, log.runs, epoch)
            # A setting's record has its share of the time.
            seconds = (time.perf_counter() - began) / len(log.logs)
            log.add("epoch", epoch, {"loss": progress.loss}, seconds)
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            found = metrics(ranker(state.evaluated, "valid"))
            progress.valid = found[SELECTION]
            improved = progress.valid > progress.best
            state = trainer.keep_best(state, improved)
            progress.best = np.where(improved, progress.valid, progress.best)
            progress.best_epoch = np.where(improved, epoch, progress.best_epoch)
            log.add("valid", epoch, found, time.perf_counter() - started)
        progress.records_bytes = log.flush()
        progress.seconds = time.perf_counter() - started
        # Of several processes each has its own clock, but all must save together.
        if (
            epoch == config.epochs
            or time.perf_counter() >= next_save
            or jax.process_count() > 1
        ):
            began = time.perf_counter()
            save(manager, epoch, state, progress)
            saved = time.perf_counter()
            next_save = saved + (saved - began) / SAVING
        report(progress)
    return state


def _test(
    configs: Mapping[str, Config],
    split: Split,
    ranker: _Ranker,
    state: TrainState,
    progress: Progress,
    log: records.SweepLog,
    folder: Path,
) -> list[Result]:
    """Tests every run at its best validation and as it is now; keeps metrics and ranks."""
    best_ranks = ranker(state.best_params, "test")
    test, last = metrics(best_ranks), metrics(ranker(state.evaluated, "test"))
    log.add("test", progress.best_epoch, test, progress.seconds)
    log.add("last_test", progress.epoch, last, progress.seconds)
    kinds = {"popularity": target_popularity(split), "history": history_lengths(split)}
    for by, values in kinds.items():
        for bucket in bucket_metrics(best_ranks, values):
            span = {"by": by, "low": bucket.low, "high": bucket.high}
            span["targets"] = bucket.num_targets
            log.add("bucket", progress.best_epoch, bucket.metrics, progress.seconds, **span)
    results = []
    for label, config in configs.items():
        part = log.runs_of[label]
        if jax.process_index() == 0:
            ranks = {name: values[part] for name, values in best_ranks._asdict().items()}
            users = ranker.parts["test"].users
            temporary = folder / label / "ranks.tmp.npz"
            np.savez_compressed(temporary, seeds=log.seeds, users=users, **ranks)
            temporary.replace(folder / label / "ranks.npz")
        best, newest = ({k: v[part] for k, v in found.items()} for found in (test, last))
        epochs = progress.best_epoch[part]
        results.append(Result(config, log.seeds, best, newest, epochs, progress.seconds))
    log.flush()  # the tests, which make it a finished run
    return results


def _described(
    config: Config, split: Split, seeds: tuple[int, ...], data: dict[str, str]
) -> dict[str, Any]:
    """What every evaluation's record repeats, so that a line can be read alone."""
    dataset = split.dataset
    return {
        "config": asdict(config),
        "data": data
        | {
            "users": dataset.num_users,
            "items": dataset.num_items,
            "interactions": dataset.num_interactions,
            "train": split.num_train,
        },
        "num_seeds": len(seeds),
        **records.environment(),
    }


def _check_finite(losses: np.ndarray, runs: list[tuple[str, int]], epoch: int) -> None:
    if not np.isfinite(losses).all():
        bad = [run for run, loss in zip(runs, losses, strict=True) if not np.isfinite(loss)]
        named = ", ".join(f"{seed} of {label}" if label else str(seed) for label, seed in bad)
        raise FloatingPointError(
            f"the loss of seed {named} is not finite in epoch {epoch}; the newest "
            "checkpoint is kept. Try a smaller learning rate."
        )
