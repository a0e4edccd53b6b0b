"""Per-user ranks of finished runs: read, aligned, and measured by kind of target or user."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.dataset import Split
from experiments.ranking import METRICS, Ranks, metrics


class UserRanks(NamedTuple):
    """The rank of each user's test target at each seed's best validation."""

    seeds: np.ndarray  # int64 [num_seeds], distinct
    users: np.ndarray  # int32 [num_users], distinct
    ranks: Ranks  # int32 [num_seeds, num_users] each


class Bucket(NamedTuple):
    """Metrics of the targets whose value is in low .. high, both included."""

    low: int
    high: int
    num_targets: int
    metrics: dict[str, np.ndarray]  # [...] each, the leading axes of the ranks


def read_ranks(path: str | Path) -> UserRanks:
    """The per-user ranks that a run keeps in its `ranks.npz`."""
    try:
        with Path(path).open("rb") as file, np.load(file) as held:
            found = {name: held[name] for name in held.files}
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"`path` {path} holds no ranks, or not all: {error}.") from None
    missing = {"seeds", "users", "above", "ties"} - set(found)
    if missing:
        raise ValueError(f"`path` {path} lacks {sorted(missing)}.")
    ranks = Ranks(found.pop("above"), found.pop("ties"))
    shape = (len(found["seeds"]), len(found["users"]))
    if ranks.above.shape != shape or ranks.ties.shape != shape:
        raise ValueError(f"`path` {path}: ranks must be {shape}, are {ranks.above.shape}.")
    return UserRanks(found["seeds"], found["users"], ranks)


def per_user(ranks: UserRanks, metric: str) -> np.ndarray:
    """A metric such as `NDCG@10` of every seed and user, float64 `[num_seeds, num_users]`."""
    alone = Ranks(*(part[..., None] for part in ranks.ranks))  # a mean over one target
    return metrics(alone, (metric,))[metric]


def align(
    first: UserRanks, second: UserRanks, seeds: Sequence[int] | None = None
) -> tuple[UserRanks, UserRanks]:
    """Both runs with the same users and seeds at the same places, users ascending.

    Args:
      first, second: two runs on the same data.
      seeds: which to keep; by default all, and both must then have the same.

    Raises:
      ValueError: the users differ, or a run lacks a seed.
    """
    if seeds is None:
        seeds = sorted(first.seeds.tolist())
        if seeds != sorted(second.seeds.tolist()):
            raise ValueError(
                f"the runs have other seeds: {seeds} and {sorted(second.seeds.tolist())}; "
                "pass `seeds` that both have."
            )
    only = [np.setdiff1d(a.users, b.users) for a, b in ((first, second), (second, first))]
    if len(only[0]) or len(only[1]):
        raise ValueError(
            f"the runs rank other users: {len(only[0])} are in the first alone, "
            f"{len(only[1])} in the second alone."
        )
    return choose(first, seeds), choose(second, seeds)


def combine(parts: Sequence[UserRanks]) -> UserRanks:
    """The seeds of several runs of one configuration together, users ascending.

    Args:
      parts: at least one; of a seed that several have, the first counts.

    Raises:
      ValueError: the users differ.
    """
    whole, *others = (choose(part, part.seeds.tolist()) for part in parts)
    for part in others:
        if not np.array_equal(part.users, whole.users):
            raise ValueError(
                f"runs of one configuration rank other users: {len(whole.users)} and "
                f"{len(part.users)}, not all the same."
            )
        new = ~np.isin(part.seeds, whole.seeds)
        ranks = Ranks(
            *(np.concatenate([a, b[new]]) for a, b in zip(whole.ranks, part.ranks, strict=True))
        )
        whole = whole._replace(seeds=np.append(whole.seeds, part.seeds[new]), ranks=ranks)
    return whole


def target_popularity(split: Split) -> np.ndarray:
    """How often training meets each target of the test, int64 `[num_targets]`; 0 is cold."""
    return split.popularity[split.evaluation("test").targets]


def history_lengths(split: Split) -> np.ndarray:
    """Interactions before each target of the test, int64 `[num_targets]`."""
    return np.diff(split.evaluation("test").history_splits)


def bucket_starts(values: np.ndarray, num: int = 5) -> np.ndarray:
    """Smallest values of about equally full buckets, ascending; at most `num` + 1 of them.

    Zero has a bucket of its own (cold items, users without history), the others are cut at
    quantiles. Equal values stay together, so that there may be fewer buckets than asked for.
    """
    values = np.sort(np.asarray(values).ravel())
    if not len(values) or values[0] < 0 or num < 1:
        raise ValueError("`values` must hold counts, at least one, and `num` must be positive.")
    some = values[values > 0]
    starts = some[np.arange(num) * len(some) // num] if len(some) else some
    return np.unique(np.concatenate([values[:1] * 0, starts] if values[0] == 0 else [starts]))


def bucket_metrics(
    ranks: Ranks,
    values: np.ndarray,
    *,
    starts: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] = METRICS,
) -> list[Bucket]:
    """Metrics by a property of the targets, such as popularity or length of history.

    Args:
      ranks: `[..., num_targets]`.
      values: integers `[num_targets]`, as `target_popularity` or `history_lengths` gives them.
      starts: smallest value of each bucket, ascending; `bucket_starts` by default.
      names: of the metrics.

    Returns:
      The buckets that hold a target, ascending.
    """
    values = np.asarray(values)
    if values.shape != ranks.above.shape[-1:]:
        raise ValueError(f"`values` must be {ranks.above.shape[-1:]}, got {values.shape}.")
    starts = bucket_starts(values) if starts is None else np.asarray(starts)
    if not len(starts) or np.any(np.diff(starts) <= 0) or starts[0] > values.min():
        raise ValueError(
            f"`starts` must ascend from at most the smallest value {values.min()}, "
            f"got {np.asarray(starts).tolist()}."
        )
    place = np.searchsorted(starts, values, side="right") - 1
    found = []
    for i in np.unique(place):
        inside = place == i
        chosen = Ranks(*(part[..., inside] for part in ranks))
        low, high = int(values[inside].min()), int(values[inside].max())
        found.append(Bucket(low, high, int(inside.sum()), metrics(chosen, names)))
    return found


def choose(held: UserRanks, seeds: Sequence[int]) -> UserRanks:
    """Those of `seeds`, in this order, users ascending.

    Raises:
      ValueError: a seed is not there.
    """
    have = held.seeds.tolist()
    if lacking := [seed for seed in seeds if seed not in have]:
        raise ValueError(f"a run has the seeds {have}, not {lacking}.")
    rows, order = [have.index(seed) for seed in seeds], np.argsort(held.users, kind="stable")
    ranks = Ranks(*(part[rows][:, order] for part in held.ranks))
    return UserRanks(np.asarray(seeds), held.users[order], ranks)
