"""Interaction data: one immutable, validated object, and the ways to split it.

A `Dataset` holds every user's sequence of items, oldest first, as a ragged array. It is
checked when built, so that nothing after it looks again. A `Split` marks which part of each
sequence may be trained on and which positions are held out for ranking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl

Repeats = Literal["keep", "first", "last"]
Order = Literal["timestamp", "position", "file"]


@dataclass(frozen=True, eq=False)
class Attributes:
    """What is known of items beside who chose them: genres, categories, a community.

    Item i has the attributes `names[a]` for a in `values[row_splits[i]:row_splits[i + 1]]`,
    which ascend; an item may have none. The arrays are read-only copies.
    """

    names: tuple[str, ...]  # distinct
    values: np.ndarray  # int32 [number of pairs of an item and an attribute]
    row_splits: np.ndarray  # int64 [num_items + 1]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        for name, dtype in (("values", np.int32), ("row_splits", np.int64)):
            array = _read_only(_integers(name, getattr(self, name), dtype))
            object.__setattr__(self, name, array)
        values, splits = self.values, self.row_splits
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"`names` of attributes must be distinct, got {self.names}.")
        if len(splits) < 1 or splits[0] != 0 or splits[-1] != len(values):
            raise ValueError(
                f"`row_splits` of attributes must run from 0 to the {len(values)} values, got "
                f"{splits[:3]}...{splits[-1:]} ({len(splits)} entries)."
            )
        if len(values) and not 0 <= values.min() <= values.max() < len(self.names):
            raise ValueError(
                f"`values` of attributes must be places in the {len(self.names)} `names`, got "
                f"{values.min()} to {values.max()}."
            )
        items = np.repeat(np.arange(self.num_items), np.maximum(np.diff(splits), 0))
        if np.any(np.diff(splits) < 0) or np.any(np.diff(items * len(self.names) + values) < 1):
            raise ValueError("`values` of attributes must ascend within each item.")

    @property
    def num_items(self) -> int:
        return len(self.row_splits) - 1

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell who shares what from other attributes."""
        return _digest(self.values, self.row_splits)

    def of_items(self, items: np.ndarray) -> Attributes:
        """The attributes of `items` `[n]` alone, in this order, under the same names."""
        return Attributes(
            self.names,
            *_slices(self.values, self.row_splits[items], self.row_splits[items + 1]),
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Users' item sequences, oldest first; the arrays are read-only copies.

    User and item ids are contiguous from 0; `user_ids[u]` and `item_ids[i]` are the ids that
    the source gave them. User u's sequence is `values[row_splits[u]:row_splits[u + 1]]`, and
    every user has at least one interaction. `order` says what tells that the last item is the
    newest: a column of times or of positions, or nothing but the order of the source's rows.
    """

    name: str
    values: np.ndarray  # int32 [num_interactions], item ids
    row_splits: np.ndarray  # int64 [num_users + 1]
    num_items: int
    user_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # [num_users]
    item_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # [num_items]
    timestamps: np.ndarray | None = None  # int64 or float64 [num_interactions]
    drops: Mapping[str, int] = field(default_factory=dict)  # reason -> interactions left out
    attributes: Attributes | None = None  # of the items, where the source has any
    order: Order = "file"  # to be shown, and no part of what a run must agree with

    def __post_init__(self) -> None:
        # A frozen dataclass is filled through `object.__setattr__`.
        def set_array(name: str, array: np.ndarray) -> None:
            object.__setattr__(self, name, _read_only(array))

        set_array("values", _integers("values", self.values, np.int32))
        set_array("row_splits", _integers("row_splits", self.row_splits, np.int64))
        splits, num_values = self.row_splits, len(self.values)
        if len(splits) < 2 or splits[0] != 0 or splits[-1] != num_values:
            raise ValueError(
                f"`row_splits` must run from 0 to the {num_values} values over at least one "
                f"user, got {splits[:3]}...{splits[-1:]} ({len(splits)} entries)."
            )
        if np.any(np.diff(splits) < 1):
            user = int(np.flatnonzero(np.diff(splits) < 1)[0])
            raise ValueError(f"`row_splits`: user {user} has no interaction; leave it out.")
        if self.values.min() < 0 or self.values.max() >= self.num_items:
            raise ValueError(
                f"`values` must be item ids from 0 to num_items - 1 = {self.num_items - 1}, "
                f"got {self.values.min()} to {self.values.max()}."
            )
        set_array("user_ids", _external("user_ids", self.user_ids, self.num_users))
        set_array("item_ids", _external("item_ids", self.item_ids, self.num_items))
        if self.timestamps is not None:
            set_array("timestamps", self._checked_timestamps(np.asarray(self.timestamps)))
        object.__setattr__(self, "drops", MappingProxyType(dict(self.drops)))
        if self.attributes is not None and self.attributes.num_items != self.num_items:
            raise ValueError(
                f"`attributes` must be those of the {self.num_items} items, got "
                f"{self.attributes.num_items}."
            )
        if self.order not in get_args(Order):
            raise ValueError(
                f"`order` must be one of {', '.join(get_args(Order))}, got {self.order!r}."
            )

    def _checked_timestamps(self, times: np.ndarray) -> np.ndarray:
        if times.dtype.kind not in "iuf":
            raise TypeError(f"`timestamps` must be numbers, got dtype {times.dtype}.")
        if times.shape != self.values.shape or not np.all(np.isfinite(times)):
            raise ValueError(
                f"`timestamps` must be {self.num_interactions} finite numbers, one for each "
                f"interaction, got shape {times.shape}."
            )
        backwards = times[1:] < times[:-1]  # a difference could overflow
        backwards[self.row_splits[1:-1] - 1] = False  # from one user to the next
        if np.any(backwards):
            user = int(self.users[np.flatnonzero(backwards)[0]])
            raise ValueError(
                f"`timestamps` of user {user} (id {self.user_ids[user]}) decrease; sequences "
                "are oldest first, and `Dataset.from_interactions` sorts them."
            )
        if times.dtype.kind == "f":
            return times.astype(np.float64)
        return _integers("timestamps", times, np.int64)

    @property
    def num_users(self) -> int:
        return len(self.row_splits) - 1

    @property
    def num_interactions(self) -> int:
        return len(self.values)

    @property
    def users(self) -> np.ndarray:
        """The user of each interaction, int64 `[num_interactions]`."""
        return np.repeat(np.arange(self.num_users), np.diff(self.row_splits))

    def sequence(self, user: int) -> np.ndarray:
        """The items of internal user `user`, int32 `[length]`, oldest first."""
        if not 0 <= user < self.num_users:
            raise IndexError(f"`user` must be from 0 to {self.num_users - 1}, got {user}.")
        return self.values[self.row_splits[user] : self.row_splits[user + 1]]

    def known_attributes(self) -> Attributes:
        """The attributes of the items; `ValueError` if the source has none."""
        if self.attributes is None or not len(self.attributes.values):
            raise ValueError(
                f"the items of {self.name!r} have no attributes, such as genres: their file, "
                "such as items.csv beside interactions.csv, is missing (name it with `items`) "
                "or has no such column (name it with `columns`: attributes), or "
                "all are empty."
            )
        return self.attributes

    @classmethod
    def from_interactions(
        cls,
        users: Any,
        items: Any,
        *,
        timestamps: Any = None,
        positions: Any = None,
        name: str = "interactions",
        drops: Mapping[str, int] | None = None,
    ) -> Dataset:
        """Builds a dataset from rows in any order.

        External ids become contiguous ones in ascending order, integers by value and strings
        by code point, so the numbering depends on the set of ids alone and not on the order
        of rows. A user's interactions are sorted by `positions` if given, else by
        `timestamps`, else left in the order of rows; the sort is stable, so equal keys keep
        the order of rows.

        Args:
          users, items: external ids, integers or strings, `[num_interactions]` each.
          timestamps: numbers `[num_interactions]`, kept in the dataset.
          positions: numbers `[num_interactions]`, the place in the user's sequence.
          name: what to call the dataset in records and tables.
          drops: interactions already left out, by reason.
        """
        user_ids, user = _contiguous("users", users)
        item_ids, item = _contiguous("items", items)
        keys = {"items": item, "timestamps": timestamps, "positions": positions}
        arrays = {key: np.asarray(a) for key, a in keys.items() if a is not None}
        for key, array in arrays.items():
            if array.shape != user.shape:
                raise ValueError(
                    f"`{key}` must have the {len(user)} rows of `users`, got {array.shape}."
                )
        by = arrays.get("positions", arrays.get("timestamps"))
        told: Order = "file" if by is None else "timestamp" if positions is None else "position"
        order = np.argsort(user, kind="stable") if by is None else np.lexsort((by, user))
        times = arrays.get("timestamps")
        return cls(
            name=name,
            values=item[order],
            row_splits=np.searchsorted(user[order], np.arange(len(user_ids) + 1)),
            num_items=len(item_ids),
            user_ids=user_ids,
            item_ids=item_ids,
            timestamps=None if times is None else times[order],
            drops=drops or {},
            order=told,
        )


def k_core(dataset: Dataset, k: int) -> Dataset:
    """Leaves out users and items with fewer than `k` interactions until none is left.

    Ids are made contiguous again in the same order; the interactions lost are counted in
    `drops["k_core"]`.
    """
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise ValueError(f"`k` of `k_core` must be an integer of at least 1, got {k!r}.")
    users, items = dataset.users, dataset.values
    kept = np.arange(dataset.num_interactions)
    while True:
        few_users = np.bincount(users[kept], minlength=dataset.num_users) < k
        few_items = np.bincount(items[kept], minlength=dataset.num_items) < k
        lost = few_users[users[kept]] | few_items[items[kept]]
        if not lost.any():
            return _select(dataset, kept, "k_core")
        kept = kept[~lost]


def drop_repeats(dataset: Dataset, keep: Repeats) -> Dataset:
    """Keeps a user's `"first"` or `"last"` interaction with an item; `"keep"` keeps all.

    The interactions lost are counted in `drops["repeats"]`.
    """
    if keep not in ("keep", "first", "last"):
        raise ValueError(f'`repeats` must be "keep", "first" or "last", got {keep!r}.')
    if keep == "keep":
        return dataset
    pairs = dataset.users * dataset.num_items + dataset.values
    if keep == "first":
        kept = np.unique(pairs, return_index=True)[1]
    else:
        kept = len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1]
    return _select(dataset, np.sort(kept), "repeats")


class Evaluation(NamedTuple):
    """What to rank: M held-out targets and the histories before them."""

    users: np.ndarray  # int32 [M], internal users
    targets: np.ndarray  # int32 [M], items
    history_values: np.ndarray  # int32 [sum of lengths], items, oldest first
    history_splits: np.ndarray  # int64 [M + 1]

    @property
    def num_repeated(self) -> int:
        """How many targets are in their own history: they count as ranked last."""
        lengths = np.diff(self.history_splits)
        repeated = self.history_values == np.repeat(self.targets, lengths)
        return len(np.unique(np.repeat(np.arange(len(self.targets)), lengths)[repeated]))


@dataclass(frozen=True, eq=False)
class Split:
    """Which interactions are trained on, and which are held out.

    User u trains on `values[row_splits[u]:train_end[u]]`. A held-out target is a position p
    in `values`; its history is all that its user did before, `values[row_splits[u]:p]`.
    Every user has at most one target in each part, and the validation target comes first.
    """

    dataset: Dataset
    train_end: np.ndarray  # int64 [num_users]
    valid: np.ndarray  # int64 [number of validation targets], ascending
    test: np.ndarray  # int64 [number of test targets], ascending

    def __post_init__(self) -> None:
        for name in ("train_end", "valid", "test"):
            array = _read_only(_integers(name, getattr(self, name), np.int64))
            object.__setattr__(self, name, array)
        splits = self.dataset.row_splits
        if self.train_end.shape != (self.dataset.num_users,) or not np.all(
            (splits[:-1] <= self.train_end) & (self.train_end <= splits[1:])
        ):
            raise ValueError("`train_end` must hold one position inside each user's sequence.")
        earliest = self.train_end
        for name in ("valid", "test"):
            targets = getattr(self, name)
            if np.any((targets < 0) | (targets >= self.dataset.num_interactions)):
                raise ValueError(f"`{name}` must hold positions in `dataset.values`.")
            users = self._users_of(targets)
            if np.any(np.diff(users) < 1):
                raise ValueError(f"`{name}` must be ascending, at most one for each user.")
            if np.any(targets < earliest[users]):
                raise ValueError(
                    f"`{name}` holds a position that is trained on or, for `test`, not after "
                    "the user's validation target."
                )
            earliest = earliest.copy()
            earliest[users] = targets + 1

    def _users_of(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.dataset.row_splits, positions, side="right") - 1

    @cached_property
    def train(self) -> tuple[np.ndarray, np.ndarray]:
        """The training parts as `(values int32 [num_train], row_splits int64 [num_users + 1])`.

        Read-only copies that hold nothing of the held-out part.
        """
        values, splits = _slices(
            self.dataset.values, self.dataset.row_splits[:-1], self.train_end
        )
        return _read_only(values), _read_only(splits)

    @property
    def num_train(self) -> int:
        return len(self.train[0])

    @cached_property
    def popularity(self) -> np.ndarray:
        """How often each item is trained on, int64 `[num_items]`; read-only."""
        return _read_only(np.bincount(self.train[0], minlength=self.dataset.num_items))

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell this split of this data from others."""
        splits = self.dataset.row_splits
        return _digest(self.dataset.values, splits, self.train_end, self.valid, self.test)

    def with_train_users(self, fraction: float) -> Split:
        """The split that trains on a share of the users alone, and ranks for all as before.

        Args:
          fraction: in (0, 1], of the users that train. They are drawn once and for all: those
            of a smaller fraction are among those of a larger one.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must be in (0, 1], got {fraction}.")
        starts, num_users = self.dataset.row_splits[:-1], self.dataset.num_users
        # Of all users, whether they train or not: the same share of the result is the result.
        drawn = np.random.default_rng(0).permutation(num_users)
        left_out = drawn[max(1, round(fraction * num_users)) :]
        train_end = self.train_end.copy()
        train_end[left_out] = starts[left_out]
        return replace(self, train_end=train_end)

    def evaluation(self, part: Literal["valid", "test"]) -> Evaluation:
        """The targets of `part` with the histories to rank them from."""
        if part not in ("valid", "test"):
            raise ValueError(f'`part` must be "valid" or "test", got {part!r}.')
        positions = self.valid if part == "valid" else self.test
        users = self._users_of(positions)
        values, starts = self.dataset.values, self.dataset.row_splits[users]
        return Evaluation(
            users.astype(np.int32), values[positions], *_slices(values, starts, positions)
        )


def leave_one_out(dataset: Dataset) -> Split:
    """Each user's last item tests, the one before it validates, all earlier ones train.

    Users with three interactions or fewer go wholly to training.
    """
    ends = dataset.row_splits[1:]
    held_out = np.diff(dataset.row_splits) > 3
    last = ends[held_out]
    return Split(dataset, np.where(held_out, ends - 2, ends), last - 2, last - 1)


def global_time_split(dataset: Dataset, valid_from: float, test_from: float) -> Split:
    """Trains strictly before `valid_from`; validates up to `test_from`, and tests from there.

    A user's target is its first interaction in the period, with everything before it as
    history. Users without any history at that point are not ranked.
    """
    times = dataset.timestamps
    if times is None:
        raise ValueError(f"`dataset` {dataset.name!r} has no timestamps; use `leave_one_out`.")
    if not valid_from < test_from:
        raise ValueError(
            f"`valid_from` must be before `test_from`, got {valid_from} and {test_from}."
        )
    starts, ends = dataset.row_splits[:-1], dataset.row_splits[1:]

    def first_from(time: float) -> np.ndarray:
        """The position of each user's first interaction at or after `time`, [num_users]."""
        before = np.concatenate([[0], np.cumsum(times < time)])
        return starts + before[ends] - before[starts]

    train_end, test = first_from(valid_from), first_from(test_from)
    return Split(
        dataset,
        train_end,
        valid=train_end[(train_end < test) & (train_end > starts)],
        test=test[(test < ends) & (test > starts)],
    )


def distinct_pairs(values: np.ndarray, row_splits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and items of a ragged array, ascending; an item that a row repeats counts once.

    Args:
      values: items, integers of at least 0 `[num_values]`.
      row_splits: where each row begins and the last one ends `[num_rows + 1]`.

    Returns:
      int64 `[num_pairs]` both.
    """
    rows = np.repeat(np.arange(len(row_splits) - 1), np.diff(row_splits))
    count = int(values.max(initial=0)) + 1  # pairs as numbers: sorting pairs takes longer
    return np.divmod(np.unique(rows * count + values), count)


def _slices(
    values: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Copies `values[starts[i]:ends[i]]` for every i into one ragged (values, row_splits)."""
    splits = np.concatenate([[0], np.cumsum(ends - starts)])
    shift = np.repeat(starts - splits[:-1], ends - starts)
    return values[np.arange(splits[-1]) + shift], splits


def _select(dataset: Dataset, kept: np.ndarray, reason: str) -> Dataset:
    """Keeps the interactions at the ascending positions `kept`, counting the rest."""
    lost = dataset.num_interactions - len(kept)
    if lost == dataset.num_interactions:
        raise ValueError(f"`{reason}` leaves no interaction of {dataset.name!r}.")
    users, row = np.unique(dataset.users[kept], return_inverse=True)
    items, values = np.unique(dataset.values[kept], return_inverse=True)
    return replace(
        dataset,
        values=values,
        row_splits=np.searchsorted(row, np.arange(len(users) + 1)),
        num_items=len(items),
        user_ids=dataset.user_ids[users],
        item_ids=dataset.item_ids[items],
        timestamps=None if dataset.timestamps is None else dataset.timestamps[kept],
        attributes=dataset.attributes and dataset.attributes.of_items(items),
        drops={**dataset.drops, reason: dataset.drops.get(reason, 0) + lost},
    )


def _contiguous(name: str, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids in ascending order, and the place among them of every row's id."""
    series = ids if isinstance(ids, pl.Series) else pl.Series(np.asarray(ids))
    if len(series) == 0 or series.null_count():
        raise ValueError(f"`{name}` must hold at least one row and no missing id.")
    if not (series.dtype.is_integer() or series.dtype == pl.String):
        raise TypeError(f"`{name}` must be integers or strings, got {series.dtype}.")
    distinct = series.unique().sort()
    index = series.rank("dense").to_numpy().astype(np.int64) - 1
    # Strings become fixed-width ones, which NumPy can compare and sort.
    text = distinct.dtype == pl.String
    return np.array(distinct.to_list()) if text else distinct.to_numpy(), index


def _integers(name: str, array: Any, dtype: type) -> np.ndarray:
    array = np.asarray(array)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must be integers, got dtype {array.dtype}.")
    if array.ndim != 1:
        raise ValueError(f"`{name}` must have one dimension, got shape {array.shape}.")
    if array.size and (array.min() < np.iinfo(dtype).min or array.max() > np.iinfo(dtype).max):
        raise ValueError(f"`{name}` must fit {np.dtype(dtype)}, got up to {array.max()}.")
    return array.astype(dtype)


def _external(name: str, ids: np.ndarray, count: int) -> np.ndarray:
    """External ids, or 0..count-1 where none were given."""
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.arange(count)
    if ids.shape != (count,) or len(np.unique(ids)) != count:
        raise ValueError(f"`{name}` must be {count} distinct ids, got shape {ids.shape}.")
    return ids


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes() + b".")
    return digest.hexdigest()[:16]


def _read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array
