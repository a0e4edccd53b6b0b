"""The folder of a run: who holds it, its checkpoints, and the module that they keep.

It has `run.json` (what was asked for), `records.jsonl`, `checkpoints/`, `item_ids.npy` and
`user_ids.npy` (external ids; `module.items()` has the items in this order, while their table
begins with `num_special` other rows) and at the end `ranks.npz` (the rank of every test
target). A sweep trains several settings in one compiled program; each has such a
folder of its own, but for the checkpoints, which are in the folder above.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental.multihost_utils import broadcast_one_to_all, sync_global_devices

from experiments import records
from experiments.backbones import BACKBONES
from experiments.config import Config
from experiments.dataset import Split
from experiments.mesh import trim
from experiments.training import TrainState

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

RUN = "run.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"


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


def claim(
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
    if any(config.has_sevo and config.graph == "attributes" for config in configs.values()):
        held_out["attributes"] = dataset.known_attributes().fingerprint()
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
        if jax.process_index() > 0:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.parent / "user_ids.npy", dataset.user_ids)  # runs of before have none
        if path.exists():
            held = _read_run(path)
            if run["config"]["epochs"] > held["config"]["epochs"]:  # it goes on for more
                held["config"]["epochs"] = run["config"]["epochs"]
                records.replace(path, json.dumps(held, indent=2))
            continue
        np.save(path.parent / "item_ids.npy", dataset.item_ids)
        records.replace(path, json.dumps(run, indent=2))
    sync_global_devices("the folder is made")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder of runs: a second process would write its records between ours.

    The system lets go of it when the process ends, however it does. Of several processes the
    first holds it. There is no lock on Windows, nor where the file system has none.
    """
    is_ours = True
    with ExitStack() as stack:
        if fcntl is not None and jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / LOCK).open("ab"))  # NFS wants it writable
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                is_ours = False
            except OSError:
                pass
        if not broadcast_one_to_all(np.array(is_ours)):
            raise ValueError(
                f"`folder` {folder} is one that another process trains in right now."
            )
        yield


def _read_run(path: Path) -> dict[str, Any]:
    held = records.read_object(path)
    if unknown := set(held.get("config", {})) - {one.name for one in fields(Config)}:
        raise ValueError(f"{path} has settings that this version lacks: {sorted(unknown)}.")
    return held


def _check_same(path: Path, wanted: dict[str, Any]) -> None:
    held = _read_run(path)
    config = Config(**held["config"])
    held["config"] = asdict(config)  # settings newer than the run among them
    idle = config.without_effect() & Config(**wanted["config"]).without_effect()
    if "fingerprint" not in held["data"]:  # runs of an earlier version
        wanted = wanted | {"data": {k: wanted["data"].get(k) for k in held["data"]}}
    else:  # it tells that the data are the same, wherever they lie now
        wanted = wanted | {"data": wanted["data"] | {"source": held["data"]["source"]}}
    if config.schedule == "constant" and config.placement != "switch":
        held, wanted = (
            part | {"config": {k: v for k, v in part["config"].items() if k != "epochs"}}
            for part in (held, wanted)
        )
    if "attributes" not in held["data"]:  # runs of an earlier version
        wanted["data"].pop("attributes", None)
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
        if held.get(k) != wanted.get(k) and k not in idle
    ]
    if changed:
        raise ValueError(
            f"`folder` {path.parent} holds a run with other settings: {'; '.join(changed)}."
        )


def checkpoints(folder: Path) -> ocp.CheckpointManager:
    # Not in the background: what is said to be saved is on the disk.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), options=options)


def save(manager: Any, epoch: int, state: TrainState, progress: Progress) -> None:
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress.to_json())
    )
    manager.save(epoch, args=items)


def restore(manager: Any, like: TrainState) -> tuple[TrainState, Progress]:
    items = ocp.args.Composite(
        # Not strict: other devices may take more or fewer free rows, which hold zeros.
        state=ocp.args.StandardRestore(like, strict=False),
        progress=ocp.args.JsonRestore(),
    )
    restored = manager.restore(manager.latest_step(), args=items)
    return restored["state"], Progress.from_json(restored["progress"])


def load_run(folder: str | Path, seed: int | None = None) -> tuple[Any, np.ndarray, Config]:
    """The module of a run at its best validation so far.

    Args:
      folder: of a run that has at least one checkpoint.
      seed: one of the run's seeds; the first by default.

    Returns:
      The module; the external ids of its items `[num_items]`, in the order of `module.items()`,
      their embeddings (of BERT4Rec with biases, of STOSA two arrays, of LightGCN before
      propagation); and the settings.
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
    with checkpoints(folder / held["checkpoints"]) as manager:
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
