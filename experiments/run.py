"""One run: train the seeds of a configuration, validate, keep records and checkpoints, test.

A run lives in a folder: `run.json` (what was asked for), `records.jsonl`, `checkpoints/`,
`item_ids.npy` (external ids, for recommending) and at the end `ranks.npz` (the rank of every
test target). A sweep trains several settings in one compiled program; each has such a folder
of its own, but for the checkpoints, which are in the folder above. The whole state is saved as
training goes on, so that a run that was interrupted goes on from there and ends with the same
bits as one that was not; on a GPU up to the order of sums.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh

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
from experiments.mesh import MeshTrainer, Streams, check_mesh, split_graph, trim
from experiments.per_user import bucket_metrics, history_lengths, target_popularity
from experiments.ranking import Ranks, collect, metrics, ranking_data
from experiments.training import Trainer, TrainState

RUN = "run.json"
CHECKPOINTS = "checkpoints"
SELECTION = "NDCG@10"  # the validation metric that picks the best epoch
SAVING = 0.05  # the share of the time that may go into checkpoints between the first and last


@dataclass
class Progress:
    """Where a run stands after an epoch; arrays have an entry for each setting and seed.

    It is saved beside the parameters, so that a resumed run knows it too.
    """

    epoch: int  # -1 before the first validation, 0 before training
    loss: np.ndarray  # of the newest epoch; not a number before the first
    valid: np.ndarray  # NDCG@10 of the newest validation
    best: np.ndarray
    best_epoch: np.ndarray
    seconds: float = 0.0  # training, validation and saving, over all parts of a resumed run
    records_bytes: list[int] = field(default_factory=list)  # of each setting's file

    @classmethod
    def start(cls, num_runs: int) -> "Progress":
        nothing = np.full(num_runs, np.nan)
        return cls(-1, nothing, nothing, np.full(num_runs, -1.0), np.zeros(num_runs, int))

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        names = ("loss", "valid", "best", "best_epoch")
        arrays: Any = {name: np.array(values[name]) for name in names}
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


def make_trainer(
    config: Config,
    split: Split,
    swept: Sequence[str] = (),
    optimizer: Callable[[Any], optax.GradientTransformation] | None = None,
    graph: Any = None,
    mesh: Mesh | None = None,
    teacher: Any = None,
) -> Trainer:
    """Builds the compiled training functions for a configuration on a split.

    Args:
      config: settings.
      split: data.
      swept: settings that each run has its own values of, see `make_optimizer`.
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
        # On a mesh it stays a list of edges, whose sums the partitioner understands.
        context = prepare(context) if mesh is None else context
    elif config.distil != "none":
        objective, context = distilled(objective, config, teacher)
    make: Any = Trainer
    if config.streams > 1 or mesh is not None:
        objective = Streams(objective, config.streams, mesh)
    if mesh is not None:
        make = functools.partial(MeshTrainer, mesh, num_rows)
    batch_size = windows_per_step(config, data)
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
      trainer: from `make_trainer`, made for the names of `swept`.
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
        is an error. Data and settings must be the same. `epochs` alone may be more, unless the
        schedule or the placement depends on it; the validation after what was the last epoch
        then stays, whatever `eval_every`.
      report: called after every epoch, and once before the first.
      mesh: devices to train on, see `experiments.mesh`; a run may go on on others. Of several
        processes all call this, see the same folder, and the first writes.

    Raises:
      ValueError: the folder holds a run, or one with other settings.
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
    seeds = check_seeds(seeds)
    folder = Path(folder)
    config, *others = configs.values()
    swept = [
        name
        for name in SWEPT
        if any(getattr(other, name) != getattr(config, name) for other in others)
    ]
    for name, other in configs.items():
        if fixed(other) != fixed(config):
            raise ValueError(
                f"`configs` may differ in {SWEPT} alone, and all or none of them may have a "
                f"`residual_decay`, but {name!r} does not."
            )
    split = split.with_train_users(config.train_users)  # what the records shall count
    trainer = make_trainer(config, split, swept, mesh=mesh, teacher=teacher)
    parts = [split.evaluation("valid"), split.evaluation("test")]
    (valid_data, test_data), num_slots = ranking_data(
        parts, max_length=config.max_length - trainer.objective.num_queries
    )
    runs = [(label, seed) for label in configs for seed in seeds]
    values = {name: [getattr(configs[label], name) for label, _ in runs] for name in swept}
    state = start(trainer, [seed for _, seed in runs], values)
    # Only now: what cannot be trained or ranked must not leave a folder behind.
    data = {"name": split.dataset.name, "source": source}
    data |= {"options": data_options} if data_options else {}
    _claim(folder, configs, split, seeds, data, resume)
    logs = [
        records.Log(
            folder / label,
            seeds,
            _described(one, split, seeds, data) | (notes or {}).get(label, {}),
        )
        for label, one in configs.items()
    ]

    def log(
        kind: str, epoch: Any, found: dict[str, np.ndarray], seconds: float, **what: Any
    ) -> None:
        epochs = np.broadcast_to(epoch, len(runs)).reshape(len(logs), -1)
        for i, one in enumerate(logs):
            part = slice(i * len(seeds), (i + 1) * len(seeds))
            one.add(kind, epochs[i], {k: v[part] for k, v in found.items()}, seconds, **what)

    def rank(params: Any, data: Any, part: int) -> Ranks:
        return collect(trainer.rank(params, data, num_slots), len(parts[part].targets))

    with _checkpoints(folder) as manager:
        progress = Progress.start(len(runs))
        if resume and manager.latest_step() is not None:
            state, progress = _restore(manager, state)
            if progress.epoch > config.epochs:
                raise ValueError(
                    f"`epochs` is {config.epochs}, but the run in {folder} has come to epoch "
                    f"{progress.epoch} already."
                )
        for one, length in zip(logs, progress.records_bytes or [0] * len(logs), strict=True):
            one.truncate(length)
        started, next_save = time.perf_counter() - progress.seconds, 0.0
        for epoch in range(progress.epoch + 1, config.epochs + 1):
            progress.epoch = epoch
            if epoch > 0:
                began = time.perf_counter()
                state, loss = trainer.epoch(state, epoch)
                progress.loss = np.asarray(loss, np.float64)
                _check_finite(progress.loss, runs, epoch)
                # A setting's record has its share of the time.
                seconds = (time.perf_counter() - began) / len(logs)
                log("epoch", epoch, {"loss": progress.loss}, seconds)
            if epoch % config.eval_every == 0 or epoch == config.epochs:
                found = metrics(rank(state.evaluated, valid_data, 0))
                progress.valid = found[SELECTION]
                improved = progress.valid > progress.best
                state = trainer.keep_best(state, improved)
                progress.best = np.where(improved, progress.valid, progress.best)
                progress.best_epoch = np.where(improved, epoch, progress.best_epoch)
                log("valid", epoch, found, time.perf_counter() - started)
            progress.records_bytes = [one.flush() for one in logs]
            progress.seconds = time.perf_counter() - started
            # Of several processes each has its own clock, but all must save together.
            if (
                epoch == config.epochs
                or time.perf_counter() >= next_save
                or jax.process_count() > 1
            ):
                began = time.perf_counter()
                _save(manager, epoch, state, progress)
                saved = time.perf_counter()
                next_save = saved + (saved - began) / SAVING
            report(progress)
    best_ranks = rank(state.best_params, test_data, 1)
    test, last = metrics(best_ranks), metrics(rank(state.evaluated, test_data, 1))
    log("test", progress.best_epoch, test, progress.seconds)
    log("last_test", progress.epoch, last, progress.seconds)
    kinds = {"popularity": target_popularity(split), "history": history_lengths(split)}
    for by, values in kinds.items():
        for bucket in bucket_metrics(best_ranks, values):
            span = {"by": by, "low": bucket.low, "high": bucket.high}
            span["targets"] = bucket.num_targets
            log("bucket", progress.best_epoch, bucket.metrics, progress.seconds, **span)
    results = []
    for i, (label, one) in enumerate(configs.items()):
        part = slice(i * len(seeds), (i + 1) * len(seeds))
        ranks = {name: values[part] for name, values in best_ranks._asdict().items()}
        if jax.process_index() == 0:
            temporary = folder / label / "ranks.tmp.npz"
            np.savez_compressed(temporary, seeds=seeds, users=parts[1].users, **ranks)
            temporary.replace(folder / label / "ranks.npz")
        logs[i].flush()  # the tests, which make it a finished run
        best, newest = ({k: v[part] for k, v in found.items()} for found in (test, last))
        results.append(
            Result(one, seeds, best, newest, progress.best_epoch[part], progress.seconds)
        )
    return results


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
        below = ", ".join(str(path.parent) for path in sorted(folder.glob(f"*/{RUN}")))
        hint = f" Runs are in {below}." if below else ""
        raise ValueError(f"`folder` {folder} holds no run: there is no {RUN} in it.{hint}")
    held = _read_run(folder / RUN)
    config, seeds, data = Config(**held["config"]), held["seeds"], held["data"]
    if seed is not None and seed not in seeds:
        raise ValueError(f"`seed` must be one of the run's {seeds}, got {seed}.")
    with _checkpoints(folder / held["checkpoints"]) as manager:
        if manager.latest_step() is None:
            raise ValueError(f"`folder` {folder} holds no checkpoint yet.")
        # On the first device, where the run may have had several.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        state = ocp.args.StandardRestore(fallback_sharding=here)
        restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(state=state))
    place = held["first"] + (0 if seed is None else seeds.index(seed))
    build = BACKBONES[config.model].build
    module = nnx.eval_shape(lambda: build(data["users"], data["items"], config, nnx.Rngs(0)))
    graphdef, variables = nnx.split(module)
    best = jax.tree.map(lambda leaf: leaf[place], restored["state"]["best_params"])
    params = trim(best, nnx.to_pure_dict(variables))
    return nnx.merge(graphdef, params), np.load(folder / "item_ids.npy"), config


def check_free(folders: Iterable[Path]) -> None:
    """Refuses folders that hold a run, or lie in a file; to be asked before the first run."""
    for folder in folders:
        for path in (folder, *folder.parents):
            if path.is_file():
                raise ValueError(
                    f"`folder` {folder} cannot be made, since {path} is a file; choose another "
                    "(--out)."
                )
        if (folder / RUN).exists():
            raise ValueError(
                f"`folder` {folder} holds a run: resume it (--resume) or choose another "
                "(--out)."
            )


def _claim(
    folder: Path,
    configs: Mapping[str, Config],
    split: Split,
    seeds: tuple[int, ...],
    data: dict[str, str],
    resume: bool,
) -> None:
    """Makes the folder of each setting, or checks that it holds the run to resume."""
    dataset = split.dataset
    counts = {"users": dataset.num_users, "items": dataset.num_items}
    held_out = {"fingerprint": split.fingerprint()}
    wanted = {
        folder / label / RUN: {
            "config": asdict(config),
            "seeds": list(seeds),
            "data": data | counts | held_out,
            "checkpoints": os.path.relpath(folder, folder / label),
            "first": place * len(seeds),  # of the checkpoint's runs
            "together": len(configs) * len(seeds),
        }
        for place, (label, config) in enumerate(configs.items())
    }
    held = [path for path in wanted if path.exists()]
    if len(held) < len(wanted) and (folder / CHECKPOINTS).exists():
        raise ValueError(
            f"`folder` {folder} holds checkpoints of other settings, or their {RUN} is gone."
        )
    for path in held:
        if not resume:
            check_free([path.parent])
        _check_same(path, wanted[path])
    sync_global_devices("every process has looked")
    for path, run in wanted.items():
        if path.exists() or jax.process_index() > 0:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.parent / "item_ids.npy", dataset.item_ids)
        records.replace(path, json.dumps(run, indent=2))
    sync_global_devices("the folder is made")


def _read_run(path: Path) -> dict[str, Any]:
    held = records.read_object(path)
    if unknown := set(held.get("config", {})) - {one.name for one in fields(Config)}:
        raise ValueError(f"{path} has settings that this version lacks: {sorted(unknown)}.")
    return held


def _check_same(path: Path, wanted: dict[str, Any]) -> None:
    held = _read_run(path)
    config = Config(**held["config"])
    held["config"] = asdict(config)  # settings newer than the run among them
    if "fingerprint" not in held["data"]:  # runs of an earlier version
        wanted = wanted | {"data": {k: wanted["data"].get(k) for k in held["data"]}}
    else:  # it tells that the data are the same, wherever they lie now
        wanted = wanted | {"data": wanted["data"] | {"source": held["data"]["source"]}}
    if config.schedule == "constant" and config.placement != "switch":
        held, wanted = (
            part | {"config": {k: v for k, v in part["config"].items() if k != "epochs"}}
            for part in (held, wanted)
        )
    # Settings and data one by one: all of them would hide the one that differs.
    held, wanted = (
        {k: v for k, v in part.items() if not isinstance(v, dict)}
        | part["config"]
        | part["data"]
        for part in (held, wanted)
    )
    changed = [
        f"{k} {held.get(k)!r} there, {wanted.get(k)!r} asked for"
        for k in {**wanted, **held}
        if held.get(k) != wanted.get(k)
    ]
    if changed:
        raise ValueError(
            f"`folder` {path.parent} holds a run with other settings: {'; '.join(changed)}."
        )


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


def _checkpoints(folder: Path) -> ocp.CheckpointManager:
    # Not in the background: what is said to be saved is on the disk.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), options=options)


def _save(manager: Any, epoch: int, state: TrainState, progress: Progress) -> None:
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress.to_json())
    )
    manager.save(epoch, args=items)


def _restore(manager: Any, like: TrainState) -> tuple[TrainState, Progress]:
    items = ocp.args.Composite(
        # Not strict: other devices may take more or fewer free rows, which hold zeros.
        state=ocp.args.StandardRestore(like, strict=False),
        progress=ocp.args.JsonRestore(),
    )
    restored = manager.restore(manager.latest_step(), args=items)
    return restored["state"], Progress.from_json(restored["progress"])
