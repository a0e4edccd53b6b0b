"""Batches for next-item training, drawn on the device inside the compiled epoch.

All training data lives on the device as a few ragged arrays. A batch is a set of *windows*,
stretches of users' sequences in which every item is a target for the items before it; the
windows are packed into one stream (`models.packing`), and negatives are drawn uniformly from
the items that the user never trained on.
"""

from collections.abc import Callable
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import Windows
from experiments.dataset import distinct_pairs
from models.layers import check_sizes
from models.packing import Packed, pack


class TrainData(NamedTuple):
    """What an epoch is drawn from: W windows over `num_train` interactions of U users."""

    values: jax.Array  # int32 [num_train], items
    starts: jax.Array  # int32 [W], a window's first input in `values`
    lengths: jax.Array  # int32 [W], its number of inputs; the target of each is the next item
    warm_up: jax.Array  # int32 [W], inputs at the window's start whose targets do not count
    users: jax.Array  # int32 [W]
    seen_gaps: jax.Array  # int32 [sum of n_u], see `draw_negatives`
    seen_splits: jax.Array  # int32 [U + 1]
    num_items: jax.Array  # int32 []

    @property
    def num_windows(self) -> int:
        return self.starts.shape[0]

    @property
    def num_targets(self) -> jax.Array:
        """Targets that count in one epoch, int32 `[]`."""
        return (self.lengths - self.warm_up).sum()


class Batch(NamedTuple):
    """A packed stream of T slots with table rows (item + 1, 0 for an unused slot)."""

    stream: Packed
    inputs: jax.Array  # int32 [T]
    targets: jax.Array  # int32 [T]
    negatives: jax.Array  # int32 [T, n]; where all slots share them, [n]
    weights: jax.Array  # float32 [T], 1 where the target counts


def training_data(
    train: tuple[np.ndarray, np.ndarray],
    num_items: int,
    *,
    max_length: int,
    windows: Windows = "last",
) -> TrainData:
    """Lays out users' training sequences for `sample_batch`.

    Args:
      train: items and row splits, as `Split.train`.
      num_items: the size of the catalogue.
      max_length: the longest input.
      windows: `"last"` takes each user's last `max_length` inputs, in which every item is a
        target (SASRec). `"prefixes"` makes a window of every prefix of two items or more, cut
        to its last `max_length` inputs, and only its last target counts (GRU4Rec). `"whole"`
        covers the same targets in one pass over a sequence, several to a window: beyond the
        first `max_length` inputs, further windows begin half a length later each and count
        only the targets not yet counted, so that each has between half and a whole length of
        history. `"items"` takes each user's last `max_length` items as inputs that have no
        targets (BERT4Rec hides some of them), and `"users"` one place for each user, to draw
        positives for (MF-BPR).
    """
    check_sizes(num_items=num_items, max_length=max_length)
    values, splits = train
    num_inputs = np.maximum(np.diff(splits) - 1, 0)
    begin, end = splits[:-1], splits[:-1] + num_inputs
    if windows == "last":
        users = np.flatnonzero(num_inputs)
        start = np.maximum(begin, end - max_length)[users]
        length = end[users] - start
        warm_up = np.zeros(len(users))
    elif windows == "prefixes":
        users = np.repeat(np.arange(len(begin)), num_inputs)
        first_target = np.repeat(np.cumsum(num_inputs) - num_inputs, num_inputs)
        target = begin[users] + np.arange(len(users)) - first_target + 1
        start = np.maximum(begin[users], target - max_length)
        length = target - start
        warm_up = length - 1
    elif windows == "whole":
        hop = max(1, max_length // 2)
        extra = np.maximum(0, -(-(num_inputs - max_length) // hop))
        users = np.repeat(np.arange(len(begin)), np.where(num_inputs > 0, 1 + extra, 0))
        first = np.concatenate([[True], np.diff(users) > 0])
        place = np.arange(len(users)) - np.maximum.accumulate(
            np.where(first, np.arange(len(users)), 0)
        )
        start = begin[users] + place * hop
        length = np.minimum(end[users] - start, max_length)
        warm_up = np.where(first, 0, max_length - hop)
    elif windows in ("items", "users"):
        users = np.flatnonzero(np.diff(splits))
        length = np.minimum(np.diff(splits), max_length if windows == "items" else 1)[users]
        start = splits[1:][users] - length
        warm_up = np.zeros(len(users))
    else:
        raise ValueError(f"`windows` must be one of {get_args(Windows)}, got {windows!r}.")
    if len(users) == 0:
        raise ValueError(
            "no user has the two training interactions that a target needs, or none before the "
            "first of `split_times`."
        )
    gaps, gap_splits = _seen(values, splits)
    arrays = (values, start, length, warm_up, users, gaps, gap_splits, num_items)
    return TrainData(*(jnp.asarray(array, jnp.int32) for array in arrays))


def _seen(values: np.ndarray, splits: np.ndarray):
    """Each user's distinct items s_0 < s_1 < ... as s_j - j: the unseen items below s_j."""
    users, items = distinct_pairs(values, splits)
    seen_splits = np.searchsorted(users, np.arange(len(splits)))
    return items - (np.arange(len(items)) - seen_splits[users]), seen_splits


def check_negatives(data: TrainData) -> None:
    """Refuses data in which `draw_negatives` would find nothing to draw for some user.

    It looks at the numbers, so it must be asked outside compiled code.
    """
    seen, num_items = np.diff(np.asarray(data.seen_splits)), int(data.num_items)
    if seen.max() >= num_items:
        raise ValueError(
            f"user {seen.argmax()} (counted from 0 in the order of `Dataset.user_ids`) has "
            f"trained on all {num_items} items, so no negative can be drawn for it; leave it "
            "out, or let a sequence model take a `loss` that draws none for each user: "
            "sampled_softmax or cross_entropy."
        )


def epoch_order(
    key: jax.Array, data: TrainData, batch_size: int, workers: int = 1
) -> jax.Array:
    """A random partition of the windows, int32 `[steps, batch_size]`; see `in_batches`."""

    def shuffled(key: jax.Array) -> jax.Array:
        return jax.random.permutation(key, data.num_windows)

    return in_batches(shuffled, key, batch_size, workers, data.num_windows)


def in_batches(
    draw: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    batch_size: int,
    workers: int,
    free: int,
) -> jax.Array:
    """What is drawn for an epoch as batches, int32 `[steps, batch_size]`.

    Args:
      draw: windows `[n]` from a key.
      workers: with more than one, each draws for itself, keeps every so many-th window, and
        makes batches of these, which take turns: the loader of the official code. So a window
        may come several times in an epoch or not at all, and each worker's last batch is
        partial. One worker takes all windows.
      free: what stands in the free places of a partial batch, a window of length 0.
    """
    keys = [key] if workers == 1 else jax.random.split(key, workers)
    parts = []
    for worker in range(workers):
        part = draw(keys[worker])[worker::workers]
        missing = -len(part) % batch_size
        part = jnp.pad(part, (0, missing), constant_values=free)
        parts.append(part.reshape(-1, batch_size))
    turns = np.argsort(np.concatenate([np.arange(len(part)) for part in parts]), kind="stable")
    return jnp.concatenate(parts)[turns].astype(jnp.int32)


def most_slots(order: jax.Array, data: TrainData) -> jax.Array:
    """The slots that the longest batch of an epoch takes, or its longest stream; int32 `[]`."""
    return _padded(data.lengths)[order].sum(axis=-1).max()


def sample_batch(
    key: jax.Array,
    data: TrainData,
    windows: jax.Array,
    num_slots: int,
    num_negatives: int = 1,
) -> Batch:
    """Packs `windows` `[batch_size]` into `num_slots` slots and draws n negatives for each."""
    stream = pack(_padded(data.starts)[windows], _padded(data.lengths)[windows], num_slots)
    used = stream.used
    window = jnp.append(windows, data.num_windows)[stream.segment]
    counts = used & (stream.offset >= _padded(data.warm_up)[window])
    index = jnp.where(used, stream.index, 0)
    users = _padded(data.users)[window]
    negatives = draw_negatives(key, data, jnp.tile(users[:, None], num_negatives))
    return Batch(
        stream,
        jnp.where(used, data.values[index] + 1, 0),
        jnp.where(used, data.values[index + 1] + 1, 0),
        jnp.where(used[:, None], negatives + 1, 0),
        counts.astype(jnp.float32),
    )


def sample_items(
    data: TrainData, windows: jax.Array, num_slots: int, num_special: int
) -> tuple[Packed, jax.Array]:
    """Packs `windows` of the kind `"items"`: the stream and its table rows, 0 where unused."""
    stream = pack(_padded(data.starts)[windows], _padded(data.lengths)[windows], num_slots)
    values = data.values[jnp.where(stream.used, stream.index, 0)]
    return stream, jnp.where(stream.used, values + num_special, 0)


def draw_pairs(
    key: jax.Array, data: TrainData, windows: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A positive and a negative for each of `windows` of the kind `"users"`, `[batch_size]`.

    Returns:
      Users, positives uniform over the distinct items that the user trained on, negatives
      uniform over the others, and weights, 0 for the windows that fill a partial batch.
    """
    positive_key, negative_key = jax.random.split(key)
    users = _padded(data.users)[windows]
    first, end = data.seen_splits[users], data.seen_splits[users + 1]
    place = jax.random.randint(positive_key, users.shape, 0, end - first)
    positives = data.seen_gaps[first + place] + place
    weights = (windows < data.num_windows).astype(jnp.float32)
    return users, positives, draw_negatives(negative_key, data, users), weights


def draw_negatives(key: jax.Array, data: TrainData, users: jax.Array) -> jax.Array:
    """One item for each entry of `users` `[...]`, uniform over those the user has not seen.

    No rejection: the r-th unseen item is r plus the number of seen items s_j (ascending) with
    s_j - j <= r, found by a binary search in the user's row of `seen_gaps`.
    """
    first, end = data.seen_splits[users], data.seen_splits[users + 1]
    rank = jax.random.randint(key, users.shape, 0, data.num_items - (end - first))

    def halve(bounds):
        low, high = bounds
        middle = (low + high) // 2
        open_, below = low < high, data.seen_gaps[middle] <= rank
        return jnp.where(open_ & below, middle + 1, low), jnp.where(
            open_ & ~below, middle, high
        )

    def while_any_is_open(bounds):
        return jax.lax.while_loop(lambda b: (b[0] < b[1]).any(), halve, bounds)

    def as_often_as_any_could_need(bounds):
        # An accelerator's host would have to wait for it to learn whether to go on, and these
        # few steps fuse.
        for _ in range(len(data.seen_gaps).bit_length()):
            bounds = halve(bounds)
        return bounds

    found, _ = jax.lax.platform_dependent(
        (first, end), cpu=while_any_is_open, default=as_often_as_any_could_need
    )
    return rank + found - first


def _padded(array: jax.Array) -> jax.Array:
    """With a zero at the end, for the windows that fill up a partial batch."""
    return jnp.append(array, 0)
