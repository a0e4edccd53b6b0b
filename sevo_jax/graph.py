"""Graphs of similar items, as `jraph.GraphsTuple`.

Every builder stores both directions of an edge, sorted by receiver and then sender, with
the raw weight in `edges`. Node ids are rows of the embedding table: whoever keeps a padding
row shifts the ids, and a row that never occurs becomes an isolated node.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import jax
import jraph
import numpy as np
from numpy.typing import ArrayLike

from sevo_jax.ids import (
    Ragged,
    as_array,
    bad_weight,
    check_choice,
    check_count,
    check_ids,
    check_positive,
    ragged,
    real_numbers,
)

_BLOCK = 1 << 22  # values, pairs or keys in flight at a time: bounds the working memory


def item_graph(
    sequences: Ragged | Iterator[Ragged],
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
        (values `[num_values]`, row_splits `[num_sequences + 1]`). Use training data only, and
        without padding, which would pass for an item that everything follows.
        Or an iterator over blocks of sequences, each a list or such a tuple: then no more than
        a block is held at a time, beside the distinct pairs found so far, and the graph is the
        same. Memory-mapped `values` are read a part at a time as well.
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
    check_count("item_graph", "num_nodes", num_nodes)
    check_positive("item_graph", "max_distance", max_distance)
    if window is not None:
        check_positive("item_graph", "window", window)
    blocks = sequences if isinstance(sequences, Iterator) else iter([sequences])
    hint = " An iterator yields blocks of rows, not rows." if blocks is sequences else ""
    pairs = [_Pairs(num_nodes) for _ in range(max_distance)]
    for block in blocks:
        values, splits = ragged("item_graph", "sequences", block, num_nodes, hint)
        for part, part_splits in _cut(values, splits):
            part, part_splits = _crop(part, part_splits, window, keep)
            length = np.diff(part_splits)
            remaining = np.repeat(part_splits[1:], length) - np.arange(len(part))
            for distance, found in enumerate(pairs, start=1):
                left = np.flatnonzero(remaining > distance)
                found.add(part[left], part[left + distance])
    # Counts are added up before they are weighted, so the blocks leave no trace in rounding.
    keys, weights = [], []
    for distance, found in enumerate(pairs, start=1):
        found_keys, counts = found.counted()
        keys.append(found_keys)
        by = distance if weighting == "inverse_distance" else 1
        weights.append(counts if by == 1 else counts / by)
    return _mirrored(*_added(keys, weights), num_nodes)


def edge_graph(
    senders: ArrayLike, receivers: ArrayLike, num_nodes: int, weights: ArrayLike | None = None
) -> jraph.GraphsTuple:
    """Graph of given edges, such as products that are bought together.

    Direction does not count: the weight of two nodes is the sum over all edges between them,
    in either direction. So a symmetric matrix with entries in both halves gives twice itself,
    of which the normalised adjacency is the same. An edge from a node to itself is one in
    either direction, so it counts twice, too.

    Args:
      senders: node ids `[num_edges]`.
      receivers: node ids `[num_edges]`.
      num_nodes: rows of the embedding table.
      weights: finite and non-negative `[num_edges]`, 1 each by default. Pairs whose weights
        add up to 0 make no edge.

    Returns:
      A graph with `edges` float32 `[num_edges]`, `senders` and `receivers` int32.

    Examples:
      A SciPy matrix has them as `matrix.tocoo()`'s `row`, `col` and `data`.

      >>> graph = edge_graph([0, 1, 1], [1, 0, 2], num_nodes=3, weights=[1.0, 2.0, 0.5])
      >>> for edge in zip(graph.receivers, graph.senders, graph.edges):
      ...   print(*edge)
      0 1 3.0
      1 0 3.0
      1 2 0.5
      2 1 0.5
    """
    check_count("edge_graph", "num_nodes", num_nodes)
    given = {"senders": senders, "receivers": receivers}
    ends = {name: as_array("edge_graph", name, ids) for name, ids in given.items()}
    for name, ids in ends.items():
        check_ids("edge_graph", name, ids, num_nodes, "num_nodes")
    left, right = ends.values()
    weight = np.ones(len(left))
    if weights is not None:
        weight = real_numbers("edge_graph", "weights", weights).astype(np.float64)
    if not left.shape == right.shape == weight.shape:
        raise ValueError(
            "`edge_graph` takes `senders`, `receivers` and `weights` of one shape [num_edges], "
            f"but got {left.shape}, {right.shape} and {weight.shape}."
        )
    if (bad := bad_weight(weight)) is not None:
        raise ValueError(
            "`edge_graph` takes finite, non-negative `weights`, but entry "
            f"{bad} is {weight[bad]}."
        )
    left, right = left.astype(np.int64), right.astype(np.int64)
    keys = np.minimum(left, right) * num_nodes + np.maximum(left, right)
    keys, pair = np.unique(keys, return_inverse=True)
    with np.errstate(over="ignore", under="ignore"):  # what graphs hold is float32
        weight = np.bincount(pair, weight, minlength=len(keys)).astype(np.float32)
    if not np.isfinite(weight).all():
        raise ValueError("`edge_graph`: `weights` are too large for float32.")
    return _mirrored(keys[weight > 0], weight[weight > 0], num_nodes)


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
    check_count("bipartite_graph", "num_users", num_users)
    check_count("bipartite_graph", "num_items", num_items)
    users = as_array("bipartite_graph", "users", users)
    items = as_array("bipartite_graph", "items", items)
    check_ids("bipartite_graph", "users", users, num_users, "num_users")
    check_ids("bipartite_graph", "items", items, num_items, "num_items")
    if users.shape != items.shape:
        raise ValueError(
            "`bipartite_graph` takes one user and one item per interaction, but `users` "
            f"has {len(users)} entries and `items` {len(items)}."
        )
    num_nodes = num_users + num_items
    pairs = _Pairs(num_nodes)
    pairs.add(users, items.astype(np.int64) + num_users)
    return _mirrored(*pairs.counted(), num_nodes)


def attribute_graph(attributes: Ragged, *, max_items: int | None = None) -> jraph.GraphsTuple:
    """Graph of items that share attributes (genre, category, brand).

    The weight is the number of attributes that two items share. An attribute of n items
    gives n (n - 1) edges, so one that nearly all items have makes the graph nearly complete.

    Args:
      attributes: for each item its attributes, integers or strings: a list of rows or a
        tuple (values, row_splits), with one row per node. Not a matrix of zeros and ones:
        `[np.flatnonzero(row) for row in matrix]` has the rows of one.
      max_items: ignore attributes that more items than this have.

    Returns:
      A graph with one node per row of `attributes`.

    Examples:
      >>> graph = attribute_graph([["Drama", "Comedy"], ["Comedy"], ["Drama", "Comedy"]])
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
    # As rows of ids, those of more than two columns would repeat themselves.
    shape = attributes.shape if isinstance(attributes, np.ndarray | jax.Array) else ()
    if len(shape) == 2 and shape[0] and shape[1] > 2 and np.isin(attributes, [0, 1]).all():
        raise ValueError(
            "`attribute_graph` takes rows of ids in `attributes`, but got a matrix of zeros "
            "and ones. `[np.flatnonzero(row) for row in matrix]` has the ids."
        )
    values, splits = ragged("attribute_graph", "attributes", attributes, None)
    num_nodes = len(splits) - 1
    numbers = np.unique(values, return_inverse=True)[1]  # ids may be of any size and type
    members = numbers * num_nodes + np.repeat(np.arange(num_nodes), np.diff(splits))
    # A repeated attribute counts once.
    attribute, item = np.divmod(np.unique(members), max(1, num_nodes))
    _, group, size = np.unique(attribute, return_inverse=True, return_counts=True)
    if max_items is not None:
        common = (size > max_items)[group]
        attribute, item = attribute[~common], item[~common]
        _, group, size = np.unique(attribute, return_inverse=True, return_counts=True)
    # Members of a group stand together: pair each with all that come after it.
    after = np.cumsum(size)[group] - np.arange(len(item)) - 1
    left = np.repeat(np.arange(len(item)), after)
    offset = np.arange(len(left)) - np.repeat(np.cumsum(after) - after, after)
    pairs = _Pairs(num_nodes)
    pairs.add(item[left], item[left + 1 + offset])
    return _mirrored(*pairs.counted(), num_nodes)


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
    table = real_numbers("knn_graph", "embeddings", embeddings).astype(np.float32)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError(
            "`knn_graph` takes finite `embeddings` of shape [num_nodes, d], but got shape "
            f"{table.shape} with {np.size(table) - np.isfinite(table).sum()} non-finite values."
        )
    num_nodes = len(table)
    k = min(k, num_nodes - 1)
    for order in (np.inf, 2):  # the largest first, so that no square is 0 or infinite
        norm = np.linalg.norm(table, order, axis=1, keepdims=True)
        table = np.divide(table, norm, out=np.zeros_like(table), where=norm > 0)
    keys, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    rows = max(1, _BLOCK // max(1, num_nodes))
    for start in range(0, num_nodes if k > 0 else 0, rows):
        similarity = table[start : start + rows] @ table.T
        row = np.arange(start, start + len(similarity))[:, None]
        np.put_along_axis(similarity, row, -np.inf, axis=1)
        column = np.argpartition(similarity, -k, axis=1)[:, -k:]
        keys.append((np.minimum(row, column) * num_nodes + np.maximum(row, column)).ravel())
        weights.append(np.take_along_axis(similarity, column, axis=1).ravel())
    pair, first = np.unique(np.concatenate(keys), return_index=True)
    weight = np.concatenate(weights)[first]
    pair, weight = pair[weight > 0], weight[weight > 0]
    return _mirrored(pair, weight, num_nodes)


class _Pairs:
    """Counts unordered pairs of nodes that come a part at a time.

    A pair i <= j has the key `i * num_nodes + j`. Every part becomes a sorted run of distinct
    keys. When the runs hold twice what they held after they were last merged, they are merged
    again: memory follows the number of distinct pairs, not that of all pairs.
    """

    def __init__(self, num_nodes: int):
        self.num_nodes = num_nodes
        self.keys = [np.zeros(0, np.int64)]
        self.counts = [np.zeros(0, np.int32)]
        self.merged = 0

    def add(self, left: np.ndarray, right: np.ndarray) -> None:
        """Counts the pairs (left, right), int `[n]` each."""
        for first in range(0, len(left), _BLOCK):
            part = slice(first, first + _BLOCK)
            one, other = left[part].astype(np.int64), right[part].astype(np.int64)
            keys = np.minimum(one, other) * self.num_nodes + np.maximum(one, other)
            keys.sort()
            start = np.flatnonzero(np.diff(keys, prepend=-1))
            self.keys.append(keys[start])
            self.counts.append(np.diff(start, append=len(keys)).astype(np.int32))
            if sum(map(len, self.keys)) > 2 * max(self.merged, _BLOCK):
                self._merge()

    def _merge(self) -> None:
        keys, counts = _added(self.keys, self.counts)
        self.keys, self.counts, self.merged = [keys], [counts], len(keys)

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted distinct keys `[n]`, and how often each was seen."""
        self._merge()
        return self.keys[0], self.counts[0]


def _added(keys: list[np.ndarray], weights: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The sorted distinct keys of runs that are sorted, and their weights added up.

    A range of keys at a time, so that the sort needs little memory of its own.
    """
    if len(keys) == 1:
        return keys[0], weights[0]
    longest = max(keys, key=len)
    borders = [0, *longest[_BLOCK::_BLOCK], np.iinfo(np.int64).max]
    places = [np.searchsorted(run, borders) for run in keys]
    parts = []
    for i in range(len(borders) - 1):
        cuts = [slice(place[i], place[i + 1]) for place in places]
        part = np.concatenate([run[cut] for run, cut in zip(keys, cuts, strict=True)])
        weight = np.concatenate([run[cut] for run, cut in zip(weights, cuts, strict=True)])
        order = np.argsort(part, kind="stable")  # merges runs that are sorted already
        part, weight = part[order], weight[order]
        start = np.flatnonzero(np.diff(part, prepend=-1))
        parts.append((part[start], np.add.reduceat(weight, start) if len(start) else weight))
    distinct, total = zip(*parts, strict=True)
    return np.concatenate(distinct), np.concatenate(total)


def _mirrored(keys: np.ndarray, weights: np.ndarray, num_nodes: int) -> jraph.GraphsTuple:
    """A graph of both directions, from sorted keys `i * num_nodes + j` with i <= j.

    Each row of the matrix holds first what stands below the diagonal and then the rest, so
    both halves are put in their places without being sorted together. A pair (i, i) has one
    place and counts twice, once for each direction.
    """
    size = max(num_nodes, 1)
    left, right = (keys // size).astype(np.int32), (keys % size).astype(np.int32)
    loop = left == right
    below = np.argsort(right, kind="stable")  # by row, then column
    below = below[~loop[below]]
    above = np.bincount(left, minlength=num_nodes)
    under = np.bincount(right[below], minlength=num_nodes)
    num_edges = len(keys) + len(below)
    halves = np.stack([under, above], axis=1).ravel()
    is_above = np.repeat(np.tile([False, True], num_nodes), halves)
    weights = weights.astype(np.float32)
    # NumPy arrays where jraph's types say JAX: graphs of any size are built on the host.
    receivers: Any = np.repeat(np.arange(num_nodes, dtype=np.int32), above + under)
    senders: Any = np.empty(num_edges, np.int32)
    edges: Any = np.empty(num_edges, np.float32)
    senders[~is_above], edges[~is_above] = left[below], weights[below]
    weights[loop] *= 2
    senders[is_above], edges[is_above] = right, weights
    sizes: Any = np.array([[num_nodes], [num_edges]], np.int32)
    return jraph.GraphsTuple(
        nodes=None,
        edges=edges,
        receivers=receivers,
        senders=senders,
        globals=None,
        n_node=sizes[0],
        n_edge=sizes[1],
    )


def _cut(values: np.ndarray, splits: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of whole sequences, of about `_BLOCK` values each."""
    starts = np.arange(0, len(values) or 1, _BLOCK)
    rows = np.unique([*np.searchsorted(splits, starts), len(splits) - 1])
    for first, last in pairwise(rows):
        yield values[splits[first] : splits[last]], splits[first : last + 1] - splits[first]


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
