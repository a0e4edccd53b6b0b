"""The best next items for histories or users, from a run's checkpoint."""

import csv
import functools
import io
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
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

_CHUNK = 256  # histories that are scored at once, each with all items


class Recommender:
    """The best next items for histories or users, from a run's checkpoint that is read once.

    Args:
      folder: of a run.
      seed: one of the run's seeds; the first by default.

    Raises:
      ValueError: there is no such run, or it has no checkpoint yet.
    """

    def __init__(self, folder: str | Path, seed: int | None = None):
        self.folder = Path(folder)
        module, self.item_ids, self.config = load_run(folder, seed)
        self._items = _by_name(self.item_ids)
        objective = BACKBONES[self.config.model].objective(len(self.item_ids), self.config)
        self._longest = self.config.max_length - objective.num_queries
        graphdef, self._params = nnx.split(module)

        def scores(params: Any, histories: Histories, context: Any) -> jax.Array:
            num_slots = len(histories.values)
            module = nnx.merge(graphdef, params)
            return objective.scorer(module, num_slots, context)(histories)

        self._scores = jax.jit(scores)

    @functools.cached_property
    def _split(self) -> Split:
        return _split_of_run(self.folder, self.config)

    def for_histories(
        self, histories: Sequence[Sequence[str]], top: int = 10, *, exclude: Iterable[str] = ()
    ) -> list[list[tuple[str, float]]]:
        """External ids and scores of the `top` items that are not in each history, best first.

        Args:
          histories: of external item ids, oldest first, at least one each.
          top: how many items, at most all that are left.
          exclude: external ids of items that nobody shall get.

        Raises:
          ValueError: an item is not known, a history is empty, or the model knows users alone.
        """
        if self.config.windows == "users":
            raise ValueError(
                f"`folder` {self.folder} holds {self.config.model}, which knows no sequences; "
                "give a `user`."
            )
        items = []
        for history in histories:
            if isinstance(history, str):
                raise TypeError(
                    f"`history` must be a sequence of ids, got the string {history!r}."
                )
            if len(history) == 0:
                raise ValueError("give a `history` of at least one item.")
            items.append(_rows("item", history, self._items))
        return self._top(items, [0] * len(items), None, top, exclude)

    def for_users(
        self,
        users: Sequence[str] | None = None,
        top: int = 10,
        *,
        exclude: Iterable[str] = (),
    ) -> dict[str, list[tuple[str, float]]]:
        """The same for users of the run's data, by their external ids.

        A user's history is all that the user did in the data of the run, held out or not,
        which are read again.

        Args:
          users: external ids; all by default.
          top, exclude: see `for_histories`.

        Raises:
          ValueError: a user is not known, or the run's data are no longer there.
        """
        if isinstance(users, str):
            raise TypeError(f"`users` must be a sequence of ids, got the string {users!r}.")
        split = self._split
        known = split.dataset.user_ids
        rows = np.arange(len(known))
        if users is not None:
            rows = _rows("user", users, _by_name(known))
        is_graph = self.config.model == "lightgcn"
        context = prepare(user_item_graph(split)) if is_graph else None
        items = [split.dataset.sequence(int(row)) for row in rows]
        found = self._top(items, rows.tolist(), context, top, exclude)
        return dict(zip((str(known[row]) for row in rows), found, strict=True))

    def _top(
        self,
        histories: Sequence[np.ndarray],
        users: Sequence[int],
        context: Any,
        top: int,
        exclude: Iterable[str],
    ) -> list[list[tuple[str, float]]]:
        check_sizes(top=top)
        left_out = _rows("item", list(exclude), self._items)
        found = []
        # Two shapes at most, so that two programs are compiled: of one history, and of many.
        size = _CHUNK if len(histories) > 1 else 1
        for begin in range(0, len(histories), size):
            chunk = histories[begin : begin + size]
            newest = [items[-self._longest :] for items in chunk]
            lengths = np.zeros(size, np.int32)
            lengths[: len(chunk)] = [len(items) for items in newest]
            values = np.zeros(size * self.config.max_length, np.int32)
            values[: lengths.sum()] = np.concatenate(newest)
            rows = np.zeros(size, np.int32)
            rows[: len(chunk)] = users[begin : begin + size]
            starts = (np.cumsum(lengths) - lengths).astype(np.int32)
            asked = Histories(*map(jnp.asarray, (values, starts, lengths, rows)))
            for scores, items in zip(
                np.array(self._scores(self._params, asked, context)), chunk, strict=False
            ):
                scores[items] = scores[left_out] = -np.inf
                best = np.argsort(-scores, kind="stable")[:top]
                best = best[np.isfinite(scores[best])]
                found.append([(str(self.item_ids[i]), float(scores[i])) for i in best])
        return found


def top_items(
    folder: str | Path,
    history: Sequence[str] = (),
    top: int = 10,
    seed: int | None = None,
    *,
    user: str | None = None,
    exclude: Iterable[str] = (),
) -> list[tuple[str, float]]:
    """What `Recommender` has for one history, or in its place for one user of the run's data.

    MF and LightGCN know users alone. Of several, make a `Recommender`, which reads the
    checkpoint once.
    """
    if isinstance(history, str):
        raise TypeError(f"`history` must be a sequence of ids, got the string {history!r}.")
    if (len(history) == 0) == (user is None):
        raise ValueError("give a `history` of at least one item or a `user`, and not both.")
    recommender = Recommender(folder, seed)
    if user is None:
        return recommender.for_histories([history], top, exclude=exclude)[0]
    return recommender.for_users([user], top, exclude=exclude)[str(user)]


def _by_name(ids: np.ndarray) -> dict[str, int]:
    return {str(external): row for row, external in enumerate(ids)}


def _rows(kind: str, asked: Sequence[str], known: dict[str, int]) -> np.ndarray:
    """The rows of external ids of `"item"` or `"user"`."""
    if unknown := [str(external) for external in asked if str(external) not in known]:
        raise ValueError(
            f"the run does not know the {kind} {', '.join(unknown[:5])}. Its {len(known):,} "
            f"{kind}s are named like {next(iter(known))}."
        )
    return np.array([known[str(external)] for external in asked], np.int64)


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
    if sum((bool(options.history), bool(options.user), options.all_users)) != 1:
        raise ValueError("give one of `history`, `user` and `all_users`.")
    recommender = Recommender(options.run, options.seed)
    wanted: Any = {"top": options.top, "exclude": options.exclude}
    if options.history:
        found = {"": recommender.for_histories([options.history], **wanted)[0]}
    else:
        users = None if options.all_users else options.user
        found = recommender.for_users(users, **wanted)
    rows = [
        (user, str(rank), item, format(score, ".4f" if options.out is None else ".6g"))
        for user, best in found.items()
        for rank, (item, score) in enumerate(best, start=1)
    ]
    head = ("user", "rank", "item", "score")
    first = 1 if options.history else 0  # a history has no user
    console = console or Console()
    if options.out is not None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows(row[first:] for row in [head, *rows])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        records.replace(options.out, text.getvalue())
        console.print(f"{options.out}: {len(rows):,} rows")
        return
    table = Table(*head[first:])
    for row in rows:
        table.add_row(*row[first:])
    console.print(table)
