"""Neighbours in a table of fixed width: sums by gathers in a fixed order, without a scatter."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from sevo_jax.layouts import Adjacency, isolated_rows

# Of a node's edges, and of the sums of the rows that a node with more edges is split into. A
# narrow table has less padding but more splits, which take memory: compiled for an H200 at 376k
# nodes and 16 million edges, 16 took the temporary space of 8.6 tables, and 32 of 6.2 (`Edges`
# of 3).
_WIDTHS = 32, 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Padded(Adjacency):
    """Neighbours in rows of fixed width, summed in a fixed order on every backend.

    Segment sums over edges run there as atomic additions, whose order differs from run to run.
    Here node i has row i for its first edges and as many further rows as it needs. These are
    summed in the same manner, level by level, until no node has more than one.
    """

    # For each level, with G groups (at first the nodes) and S further rows:
    senders: tuple[jax.Array, ...]  # [G + S, width] int32, nodes or further rows before
    weights: tuple[jax.Array, ...]  # [G + S, width], of edges, then 1; 0 in free places
    groups: tuple[jax.Array, ...]  # [S] int32, to which group the next level's sums belong
    isolated: jax.Array  # [num_nodes] bool

    @classmethod
    def from_edges(
        cls, receivers: np.ndarray, senders: np.ndarray, weights: np.ndarray, num_nodes: int
    ) -> Self:
        isolated = isolated_rows(receivers, weights, num_nodes)
        # A free place multiplies a number of its own node by zero, so no NaN gets elsewhere.
        own = np.arange(num_nodes)
        levels = []
        capacity, num_groups, width = len(senders), num_nodes, _WIDTHS[0]
        while True:
            num_splits = capacity // width  # enough, whatever the degrees
            row, place, split_of = _rows(receivers, num_groups, width)
            table = np.zeros((num_groups + num_splits, width), np.int32)
            table[:num_groups] = own[:, None]
            table[num_groups:][: len(split_of)] = own[split_of, None]
            factors = np.zeros(table.shape, weights.dtype)
            table[row, place], factors[row, place] = senders, weights
            # The further rows are the next level's senders, and whose they are its groups.
            # A group that is not needed lies beyond the end, where an addition is dropped.
            split, receivers = np.unique(split_of, return_inverse=True)
            groups = num_groups + np.arange(num_splits, dtype=np.int32)
            groups[: len(split)] = split
            levels.append((table, factors, groups))
            if not num_splits:
                break
            senders, weights = np.arange(len(split_of)), np.ones(len(split_of), weights.dtype)
            own = np.zeros(num_splits, np.int32)
            own[receivers] = senders
            capacity, num_groups, width = num_splits, num_splits, _WIDTHS[1]
        tables, all_factors, all_groups = (
            tuple(map(jnp.asarray, column)) for column in zip(*levels, strict=True)
        )
        return cls(tables, all_factors, all_groups, jnp.asarray(isolated))

    def matmul(self, x: jax.Array) -> jax.Array:
        return _sums(self, x)


@jax.jit  # or a call outside of `jit` would run every place by itself
def _sums(adjacency: Padded, x: jax.Array) -> jax.Array:
    sums = []
    for senders, weights, groups in zip(
        adjacency.senders, adjacency.weights, adjacency.groups, strict=True
    ):
        weights = weights.astype(x.dtype)
        # One gather for each place, fused with the sum: an edges x d array never exists.
        rows = weights[:, :1] * x[senders[:, 0]]
        for place in range(1, senders.shape[1]):
            rows += weights[:, place, None] * x[senders[:, place]]
        num_groups = len(rows) - len(groups)
        sums.append(rows[:num_groups])
        x = rows[num_groups:]
    y = sums.pop()
    for groups in adjacency.groups[-2::-1]:
        y = sums.pop().at[groups].add(y, mode="drop", unique_indices=True)
    return y


def _rows(
    receivers: np.ndarray, num_groups: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where edges `[n]`, sorted by receiver, go: row and place `[n]`; and whose the rows after
    the first `num_groups` are."""
    first = np.searchsorted(receivers, np.arange(num_groups))
    chunk, place = np.divmod(np.arange(len(receivers)) - first[receivers], width)
    opens = (chunk > 0) & (place == 0)
    row = np.where(chunk > 0, num_groups - 1 + np.cumsum(opens), receivers)
    return row, place, receivers[opens]
