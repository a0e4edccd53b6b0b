"""Ranking held-out targets among all items, without a sort.

A target's rank needs no order of the other items: it is the number of items that score above
it. Items of the user's history are left out of the count. Ties are broken at random, in
expectation: with t other items at the target's score, its rank is uniform over t + 1 places,
and every metric is its mean over them. A constant score therefore measures as a random one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dataset import Evaluation, distinct_pairs
from models.packing import Packed, pack

METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR@10")


class RankingData(NamedTuple):
    """M targets in chunks of C users, ready for the device."""

    values: jax.Array  # int32 [num_values], items of the histories
    starts: jax.Array  # int32 [chunks, C], where the model's input begins in `values`
    lengths: jax.Array  # int32 [chunks, C], at most the model's maximal length
    users: jax.Array  # int32 [chunks, C]
    targets: jax.Array  # int32 [chunks, C], items
    masked_rows: jax.Array  # int32 [chunks, P], place in the chunk; C for an unused entry
    masked_items: jax.Array  # int32 [chunks, P], distinct items of the row's history


class Histories(NamedTuple):
    """What a model may know of the C users of a chunk."""

    values: jax.Array  # int32 [num_values], items
    starts: jax.Array  # int32 [C]
    lengths: jax.Array  # int32 [C]
    users: jax.Array  # int32 [C]

    def pack(self, num_slots: int, num_special: int = 1) -> tuple[Packed, jax.Array]:
        """The histories in one stream, and its table rows `[num_slots]`, 0 where unused."""
        stream = pack(self.starts, self.lengths, num_slots)
        values = self.values[jnp.minimum(stream.index, len(self.values) - 1)]
        return stream, jnp.where(stream.used, values + num_special, 0)


class Ranks(NamedTuple):
    """Where each target stands among the items that its user has not had."""

    above: np.ndarray  # int32 [..., M], items that score above the target
    ties: np.ndarray  # int32 [..., M], other items that score the same


def ranking_data(
    parts: Sequence[Evaluation], *, max_length: int, chunk_size: int = 512
) -> tuple[list[RankingData], int]:
    """Lays out evaluation parts for `rank_targets`, all in equal shapes.

    Equal shapes let all parts share one compiled program.

    Args:
      parts: what to rank, as `Split.evaluation` gives it.
      max_length: the model sees at most this many of a history's newest items.
      chunk_size: C, the users scored at a time; the scores take C x num_items floats.

    Returns:
      The data of every part, and the number of slots that the longest packed chunk takes.
    """
    chunks = max(-(-len(part.targets) // chunk_size) for part in parts)
    laid_out = [_lay_out(part, max_length, chunks, chunk_size) for part in parts]
    num_masked = max(len(items) for *_, masked in laid_out for items in masked)
    num_values = max(len(part.history_values) for part in parts)
    num_slots = max(int(lengths.sum(axis=1).max()) for _, lengths, *_ in laid_out)
    data = []
    for part, (starts, lengths, targets, masked) in zip(parts, laid_out, strict=True):
        pairs = np.full((2, chunks, num_masked), chunk_size)
        pairs[1] = 0
        for chunk, found in enumerate(masked):
            pairs[:, chunk, : len(found)] = found.T
        values = np.zeros(num_values)
        values[: len(part.history_values)] = part.history_values
        users = np.zeros(chunks * chunk_size, np.int64)
        users[: len(part.users)] = part.users
        arrays = (values, starts, lengths, users.reshape(chunks, -1), targets, *pairs)
        data.append(RankingData(*(jnp.asarray(a, jnp.int32) for a in arrays)))
    return data, num_slots


def _lay_out(part: Evaluation, max_length: int, chunks: int, chunk_size: int):
    num = len(part.targets)
    if num == 0:
        raise ValueError(
            "there is no held-out target to rank: every user has three interactions or fewer, "
            "or none lies in the periods of `split_times`."
        )
    history = np.diff(part.history_splits)
    length = np.minimum(history, max_length)

    def chunked(array: np.ndarray) -> np.ndarray:
        padded = np.zeros(chunks * chunk_size, np.int64)
        padded[:num] = array
        return padded.reshape(chunks, chunk_size)

    pairs = np.stack(distinct_pairs(part.history_values, part.history_splits), axis=1)
    borders = np.searchsorted(pairs[:, 0], np.arange(1, chunks) * chunk_size)
    masked = np.split(pairs - (pairs[:, :1] // chunk_size) * [chunk_size, 0], borders)
    starts = part.history_splits[1:] - length
    return chunked(starts), chunked(length), chunked(part.targets), masked


def rank_by_popularity(part: Evaluation, popularity: np.ndarray) -> Ranks:
    """Ranks of the targets where the most popular items come first, for every user.

    The floor of what is learned. Items of the history are left out, as in `rank_targets`.

    Args:
      part: of a split.
      popularity: how often each item is in training `[num_items]`.
    """
    num_items, of_target = len(popularity), popularity[part.targets]
    ascending = np.sort(popularity)
    not_above = np.searchsorted(ascending, of_target, "right")
    above = num_items - not_above
    ties = not_above - np.searchsorted(ascending, of_target, "left") - 1  # but the target
    rows, items = distinct_pairs(part.history_values, part.history_splits)
    seen, limits = popularity[items], of_target[rows]
    above -= np.bincount(rows[seen > limits], minlength=len(above))
    ties -= np.bincount(rows[seen == limits], minlength=len(above))
    own = np.isin(np.arange(len(above)), rows[items == part.targets[rows]])
    return Ranks(np.where(own, num_items - 1, above), np.where(own, 0, ties))


def rank_targets(
    scores_of: Callable[[Histories], jax.Array],
    data: RankingData,
    *,
    mask_history: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Counts, for every target, the items above it and those level with it.

    Args:
      scores_of: takes the histories of C users and returns scores `[C, num_items]`.
      data: from `ranking_data`.
      mask_history: leave out the items of the history. A target that is in its own history
        then counts as ranked last. An item whose score is not a number ranks above, a target
        whose score is not a number ranks last: a broken model never looks good.

    Returns:
      `(above, ties)`, int32 `[chunks, C]` each; `collect` drops the unused places.
    """

    def chunk(_, data_chunk):
        starts, lengths, users, targets, rows, items = data_chunk
        scores = scores_of(Histories(data.values, starts, lengths, users))
        target_scores = jnp.take_along_axis(scores, targets[:, None], axis=1)
        above = (~(scores <= target_scores)).sum(axis=1, dtype=jnp.int32)
        level = (scores == target_scores).sum(axis=1, dtype=jnp.int32)
        missing = jnp.isnan(target_scores[:, 0])
        if mask_history:
            safe = jnp.minimum(rows, len(targets) - 1)
            masked_scores, limits = scores[safe, items], target_scores[safe, 0]
            above = above.at[rows].add(
                -(~(masked_scores <= limits)).astype(jnp.int32), mode="drop"
            )
            level = level.at[rows].add(
                -(masked_scores == limits).astype(jnp.int32), mode="drop"
            )
            own = (items == targets[safe]).astype(jnp.int32)
            missing |= jnp.zeros_like(targets).at[rows].max(own, mode="drop") > 0
        num_items = scores.shape[1]
        above = jnp.where(missing, num_items - 1, above)
        return None, (above, jnp.where(missing, 0, level - 1))

    _, counts = jax.lax.scan(
        chunk,
        None,
        data[1:],
    )
    return counts


def collect(counts: tuple[jax.Array, jax.Array], num_targets: int) -> Ranks:
    """Ranks on the host `[..., num_targets]` from the counts `[..., chunks, C]`."""
    return Ranks(*(np.asarray(c).reshape(*c.shape[:-2], -1)[..., :num_targets] for c in counts))


def hit_rate(ranks: Ranks, k: int) -> np.ndarray:
    """Probability that the target is among the first k, float64 `[..., M]`."""
    return _expectation(ranks, np.ones(k))


def ndcg(ranks: Ranks, k: int) -> np.ndarray:
    """1 / log2(rank + 1) if the target is among the first k, else 0; `[..., M]`."""
    return _expectation(ranks, 1 / np.log2(np.arange(2, k + 2)))


def mrr(ranks: Ranks, k: int) -> np.ndarray:
    """1 / rank if the target is among the first k, else 0; `[..., M]`."""
    return _expectation(ranks, 1 / np.arange(1, k + 1))


def _expectation(ranks: Ranks, gains: np.ndarray) -> np.ndarray:
    """Mean gain over the places above + 1 .. above + ties + 1 that ties leave open."""
    if len(gains) < 1:
        raise ValueError(f"`k` must be at least 1, got {len(gains)}.")
    total = np.concatenate([[0.0], np.cumsum(gains)])
    first = np.minimum(ranks.above, len(gains))
    last = np.minimum(ranks.above + ranks.ties + 1, len(gains))
    return (total[last] - total[first]) / (ranks.ties + 1)


def metrics(ranks: Ranks, names: Sequence[str] = METRICS) -> dict[str, np.ndarray]:
    """Means over the targets of metrics named `HR@k`, `NDCG@k` or `MRR@k`, `[...]` each."""
    kinds = {"HR": hit_rate, "NDCG": ndcg, "MRR": mrr}
    found = {}
    for name in names:
        kind, _, k = name.partition("@")
        if kind not in kinds or not k.isdigit():
            raise ValueError(f"`names` must be like HR@10, NDCG@10 or MRR@10, got {name!r}.")
        found[name] = kinds[kind](ranks, int(k)).mean(axis=-1)
    return found
