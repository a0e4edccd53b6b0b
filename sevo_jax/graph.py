"""Graphs of similar items, as `jraph.GraphsTuple`.

Every builder stores both directions of an edge, sorted by receiver and then sender, with
the raw weight in `edges`. Node ids are rows of the embedding table: whoever keeps a padding
row shifts the ids, and a row that never occurs becomes an isolated node.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jraph
import numpy as np
from numpy.typing import ArrayLike

from sevo_jax.ids import Ragged, check_choice, check_ids, check_positive, ragged


def item_graph(
    sequences: Ragged,
    num_nodes: int,
    *,
    window: int | None = 50,
    max_distance: int = 1,
    weighting: Literal["inverse_distance", "count"] = "inverse_distance",
    keep: Literal["last", "first"] = "last",
) -> jraph.GraphsTuple:
    r"""Co-occurrence graph of the items that follow each other in the sequences.

    .. math:: w_{ij} = \sum_{h=1}^{H} \frac{1}{h} \, |\{(s, p) : \{s_p, s_{p+h}\} = \{i, j\}\}|

    An item that follows itself at distance h adds 2/h to the diagonal, once for each
    direction, as in the official code.

    Args:
      sequences: item ids in order, oldest first: a list of integer arrays, or a tuple
        (values `[num_values]`, row_splits `[num_sequences + 1]`). Use training data only.
      num_nodes: rows of the embedding table.
      window: how many items of each sequence count (the paper's K), None for all.
      max_distance: the largest h (the paper's H).
      weighting: `"inverse_distance"` adds 1/h for a pair, `"count"` adds 1.
      keep: which end of the sequence the window keeps.

    Returns:
      A graph with `edges` float32 `[num_edges]`, `senders` and `receivers` int32.

    Examples:
      The paper's example keeps three items, so the leading 0 of the first does not count:

      >>> graph = item_graph([[0, 1, 2, 1], [1, 0, 2]], num_nodes=3, window=3)
      >>> for edge in zip(graph.receivers, graph.senders, graph.edges):
      ...   print(*edge)
      0 1 1.0
      0 2 1.0
      1 0 1.0
      1 2 2.0
      2 0 1.0
      2 1 2.0

    References:
      Xu et al, `SEvo <https://arxiv.org/abs/2310.03032>`_, NeurIPS 2024, Algorithm 4
    """
    check_choice("item_graph", "weighting", weighting, ("inverse_distance", "count"))
    check_choice("item_graph", "keep", keep, ("last", "first"))
    check_positive("item_graph", "max_distance", max_distance)
    if window is not None:
        check_positive("item_graph", "window", window)
    values, splits = ragged("item_graph", "sequences", sequences, num_nodes)
    values, splits = _crop(values, splits, window, keep)
    position = np.arange(len(values))
    remaining = np.repeat(splits[1:], np.diff(splits)) - position

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        for distance in range(1, max_distance + 1):
            left = np.flatnonzero(remaining > distance)
            weight = 1 / distance if weighting == "inverse_distance" else 1.0
            yield values[left], values[left + distance], weight

    return _graph(_count_pairs(pairs(), num_nodes), num_nodes)


def bipartite_graph(
    users: ArrayLike, items: ArrayLike, num_users: int, num_items: int
) -> jraph.GraphsTuple:
    """User-item graph; the weight is how often the user chose the item.

    Nodes `0..num_users-1` are the users, the items follow. To smooth a user and an item
    table with it, name them in this order: `sevo(graph, tables=("user", "item"))`.

    Args:
      users: user ids `[num_interactions]`.
      items: item ids `[num_interactions]`.
      num_users: rows of the user table.
      num_items: rows of the item table.

    Returns:
      A graph of `num_users + num_items` nodes.

    Examples:
      >>> graph = bipartite_graph([0, 0, 1], [0, 1, 1], num_users=2, num_items=2)
      >>> print(graph.receivers, graph.senders)
      [0 0 1 2 3 3] [2 3 3 0 0 1]
    """
    users, items = np.asarray(users), np.asarray(items)
    check_ids("bipartite_graph", "users", users, num_users, "num_users")
    check_ids("bipartite_graph", "items", items, num_items, "num_items")
    if users.shape != items.shape:
        raise ValueError(
            "`bipartite_graph` takes one user and one item per interaction, but `users` "
            f"has {len(users)} entries and `items` {len(items)}."
        )
    num_nodes = num_users + num_items
    items = items.astype(np.int64) + num_users
    return _graph(_count_pairs([(users, items, 1.0)], num_nodes), num_nodes)


def attribute_graph(attributes: Ragged, *, max_items: int | None = None) -> jraph.GraphsTuple:
    """Graph of items that share attributes (genre, category, brand).

    The weight is the number of attributes that two items share. An attribute of n items
    gives n (n - 1) edges, so one that nearly all items have makes the graph nearly complete.

    Args:
      attributes: for each item the ids of its attributes: a list of integer arrays or a
        tuple (values, row_splits), with one row per node.
      max_items: ignore attributes that more items than this have.

    Returns:
      A graph with one node per row of `attributes`.

    Examples:
      >>> graph = attribute_graph([[0, 1], [1], [0, 1]])
      >>> for edge in zip(graph.receivers, graph.senders, graph.edges):
      ...   print(*edge)
      0 1 1.0
      0 2 2.0
      1 0 1.0
      1 2 1.0
      2 0 2.0
      2 1 1.0
    """
    if max_items is not None:
        check_positive("attribute_graph", "max_items", max_items)
    values, splits = ragged("attribute_graph", "attributes", attributes, None)
    num_nodes = len(splits) - 1
    members = np.unique(  # a repeated attribute counts once
        np.stack([values, np.repeat(np.arange(num_nodes), np.diff(splits))]), axis=1
    )
    attribute, item = members
    _, group, size = np.unique(attribute, return_inverse=True, return_counts=True)
    if max_items is not None:
        common = (size > max_items)[group]
        attribute, item = attribute[~common], item[~common]
        _, group, size = np.unique(attribute, return_inverse=True, return_counts=True)
    # Members of a group stand together: pair each with all that come after it.
    after = np.cumsum(size)[group] - np.arange(len(item)) - 1
    left = np.repeat(np.arange(len(item)), after)
    offset = np.arange(len(left)) - np.repeat(np.cumsum(after) - after, after)
    pairs = [(item[left], item[left + 1 + offset], 1.0)]
    return _graph(_count_pairs(pairs, num_nodes), num_nodes)


def knn_graph(embeddings: ArrayLike, k: int = 10) -> jraph.GraphsTuple:
    """Graph of the k nearest neighbours by cosine similarity, which is the weight.

    Two items are joined if either is among the k nearest of the other. Similarities of zero
    or below make no edge. The paper distils a teacher's embeddings this way with k = 10.

    Args:
      embeddings: finite vectors `[num_nodes, d]`.
      k: neighbours per item, without itself.

    Returns:
      A graph with one node per row of `embeddings`.

    Examples:
      >>> graph = knn_graph([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]], k=1)
      >>> for i, j, weight in zip(graph.receivers, graph.senders, graph.edges):
      ...   print(i, j, f"{weight:.3f}")
      0 1 0.707
      1 0 0.707
    """
    check_positive("knn_graph", "k", k)
    table = np.asarray(embeddings, np.float32)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError(
            "`knn_graph` takes finite `embeddings` of shape [num_nodes, d], but got shape "
            f"{table.shape} with {np.size(table) - np.isfinite(table).sum()} non-finite values."
        )
    num_nodes = len(table)
    k = min(k, num_nodes - 1)
    norm = np.linalg.norm(table, axis=1, keepdims=True)
    table = np.divide(table, norm, out=np.zeros_like(table), where=norm > 0)
    keys, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for start in range(0, num_nodes if k > 0 else 0, 1024):
        similarity = table[start : start + 1024] @ table.T
        row = np.arange(start, start + len(similarity))[:, None]
        np.put_along_axis(similarity, row, -np.inf, axis=1)
        column = np.argpartition(similarity, -k, axis=1)[:, -k:]
        keys.append((np.minimum(row, column) * num_nodes + np.maximum(row, column)).ravel())
        weights.append(np.take_along_axis(similarity, column, axis=1).ravel())
    pair, first = np.unique(np.concatenate(keys), return_index=True)
    weight = np.concatenate(weights)[first]
    pair, weight = pair[weight > 0], weight[weight > 0]
    mirrored = pair % max(num_nodes, 1) * num_nodes + pair // max(num_nodes, 1)
    both = np.concatenate([pair, mirrored])
    order = np.argsort(both)
    return _graph((both[order], np.concatenate([weight, weight])[order]), num_nodes)


def _count_pairs(
    pairs: Iterable[tuple[np.ndarray, np.ndarray, float]], num_nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys `receiver * num_nodes + sender` of both directions, and their weights.

    A plain sort of keys and the lengths of runs: several times faster than sorting triples,
    and a pair (x, x) is counted twice, once for each direction, without a special case.
    """
    all_keys, all_weights = [np.zeros(0, np.int64)], [np.zeros(0)]
    for left, right, weight in pairs:
        left, right = left.astype(np.int64), right.astype(np.int64)
        keys = np.concatenate([left * num_nodes + right, right * num_nodes + left])
        keys.sort()
        start = np.flatnonzero(np.diff(keys, prepend=-1))
        all_keys.append(keys[start])
        all_weights.append(np.diff(start, append=len(keys)) * weight)
    if len(all_keys) == 2:
        return all_keys[1], all_weights[1]
    keys, weights = np.concatenate(all_keys), np.concatenate(all_weights)
    order = np.argsort(keys, kind="stable")  # merges runs that are sorted already
    keys = keys[order]
    start = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[start], np.add.reduceat(weights[order], start) if len(start) else weights


def _graph(weighted: tuple[np.ndarray, np.ndarray], num_nodes: int) -> jraph.GraphsTuple:
    keys, weights = weighted
    # NumPy arrays where jraph's types say JAX: graphs of any size are built on the host.
    receivers: Any = (keys // max(num_nodes, 1)).astype(np.int32)
    senders: Any = (keys % max(num_nodes, 1)).astype(np.int32)
    sizes: Any = np.array([[num_nodes], [len(keys)]], np.int32)
    return jraph.GraphsTuple(
        nodes=None,
        edges=weights.astype(np.float32),
        receivers=receivers,
        senders=senders,
        globals=None,
        n_node=sizes[0],
        n_edge=sizes[1],
    )


def _crop(
    values: np.ndarray, splits: np.ndarray, window: int | None, keep: str
) -> tuple[np.ndarray, np.ndarray]:
    """Keep the last or first `window` values of every row."""
    length = np.diff(splits)
    if window is None or not (length > window).any():
        return values, splits
    place = np.arange(len(values)) - np.repeat(splits[:-1], length)
    if keep == "last":
        place = np.repeat(length, length) - 1 - place
    return values[place < window], np.concatenate([[0], np.cumsum(np.minimum(length, window))])
