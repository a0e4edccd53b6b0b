"""The best next items for a history or a user, from a run's checkpoint."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import records
from experiments.backbones import BACKBONES, prepare, user_item_graph
from experiments.config import Config
from experiments.data import split_of
from experiments.dataset import Split
from experiments.options import Job, Recommend
from experiments.ranking import Histories
from experiments.run_folder import RUN, load_run
from models.layers import check_sizes


def top_items(
    folder: str | Path,
    history: Sequence[str] = (),
    top: int = 10,
    seed: int | None = None,
    *,
    user: str | None = None,
) -> list[tuple[str, float]]:
    """External ids and scores of the `top` items that are not in the history, best first.

    Args:
      folder: of a run.
      history: external item ids, oldest first, at least one. Not with `user`.
      top: how many items, at most all that are not in the history.
      seed: one of the run's seeds; the first by default.
      user: an external user id, in place of a history: the history is all that the user did in
        the data of the run, held out or not, which are read again. MF and LightGCN know users
        alone.

    Raises:
      ValueError: there is no such run, item or user, or the run's data are no longer there.
    """
    if isinstance(history, str):
        raise TypeError(f"`history` must be a sequence of ids, got the string {history!r}.")
    if (len(history) == 0) == (user is None):
        raise ValueError("give a `history` of at least one item or a `user`, and not both.")
    check_sizes(top=top)
    module, item_ids, config = load_run(folder, seed)
    row, context = 0, None
    if user is None:
        if config.windows == "users":
            raise ValueError(
                f"`folder` {folder} holds {config.model}, which knows no sequences; give a "
                "`user`."
            )
        items = _rows("item", history, item_ids)
    else:
        split = _split_of_run(Path(folder), config)
        (row,) = _rows("user", [user], split.dataset.user_ids)
        items = split.dataset.sequence(row)
        if config.model == "lightgcn":
            context = prepare(user_item_graph(split))
    objective = BACKBONES[config.model].objective(len(item_ids), config)
    newest = items[-(config.max_length - objective.num_queries) :]
    length, zero = jnp.array([len(newest)]), jnp.array([0])
    histories = Histories(jnp.asarray(newest, jnp.int32), zero, length, jnp.array([row]))
    scores = np.array(objective.scorer(module, len(newest), context)(histories)[0])
    scores[items] = -np.inf
    best = np.argsort(-scores, kind="stable")[: min(top, int(np.isfinite(scores).sum()))]
    return [(str(item_ids[item]), float(scores[item])) for item in best]


def _rows(kind: str, asked: Sequence[str], ids: np.ndarray) -> np.ndarray:
    """The rows of external ids of `"item"` or `"user"`."""
    known = {str(external): row for row, external in enumerate(ids)}
    if unknown := [str(external) for external in asked if str(external) not in known]:
        raise ValueError(
            f"the run does not know the {kind} {', '.join(unknown[:5])}. Its {len(ids):,} "
            f"{kind}s are named like {ids[0]}."
        )
    return np.array([known[str(external)] for external in asked])


def _split_of_run(folder: Path, config: Config) -> Split:
    """The data that a run was trained on, read again."""
    held = records.read_object(folder / RUN)["data"]
    if not held["source"] or "fingerprint" not in held:
        raise ValueError(f"`folder` {folder} does not say what its data are.")
    try:
        job = tyro.cli(
            Job, args=["--data", held["source"], *shlex.split(held.get("options", ""))]
        )
        split = split_of(job)[1].with_train_users(config.train_users)
    except FileNotFoundError:
        raise ValueError(
            f"{held['source']}, which {folder} was trained on, is not there; if that is a "
            "relative path, go to where training began."
        ) from None
    except SystemExit:  # from an option that another version had
        raise ValueError(
            f"{folder / RUN} has other options of data than this version."
        ) from None
    if split.fingerprint() != held["fingerprint"]:
        raise ValueError(f"{held['source']} is no longer what {folder} was trained on.")
    return split


def recommend(options: Recommend, console: Console | None = None) -> None:
    """Runs `python -m experiments recommend`."""
    table = Table("rank", "item", "score")
    found = top_items(
        options.run, options.history, options.top, options.seed, user=options.user
    )
    for rank, (item, score) in enumerate(found, start=1):
        table.add_row(str(rank), item, f"{score:.4f}")
    (console or Console()).print(table)
