"""From a graph of raw weights to a prepared, normalised adjacency."""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax.core import Tracer

from sevo_jax import native
from sevo_jax.ids import bad_weight, check_choice, check_count
from sevo_jax.layouts import Adjacency, Dense, Edges, Rows
from sevo_jax.padded import Padded

Graph: TypeAlias = jraph.GraphsTuple | Adjacency
Layout: TypeAlias = Literal["auto", "edges", "rows", "dense", "padded", "compiled"]

LAYOUTS: dict[Layout, type[Adjacency]] = {
    "edges": Edges,
    "rows": Rows,
    "dense": Dense,
    "padded": Padded,
    "compiled": native.Compiled,
}


def normalized_adjacency(
    graph: Graph,
    *,
    layout: Layout = "auto",
    capacity: int | None = None,
    messages: Literal["bfloat16"] | None = None,
) -> Adjacency:
    r"""Prepare :math:`\tilde A = D^{-1/2} A D^{-1/2}` for smoothing.

    Here :math:`D = \mathrm{diag}(d_i)` with :math:`d_i = \sum_j w_{ij}`; rows of degree zero
    stay zero. No self-loops are added. The result is a pytree of arrays: pass it to jitted
    functions as an argument and they serve every graph of equal capacity without compiling
    again.

    Args:
      graph: a graph of non-negative symmetric weights, both directions stored, with
        concrete arrays. A prepared adjacency is returned as it is, and takes no options.
      layout: `"edges"` (segment sums), `"rows"` (compressed rows), `"dense"`, `"padded"`
        (gathers and sums in a fixed order, without atomics on a GPU), `"compiled"` (rows
        with a product in C++, for CPUs, once `python -m sevo_jax.compile` has built it), or
        `"auto"`, which takes `"compiled"` on a CPU if it is built and `"rows"` if not, and
        `"edges"` elsewhere. On a GPU the sums of `"edges"` are atomic, so their last bits
        differ from run to run; those of `"padded"` do not. Programs with the two CPU layouts
        cannot be exported by `jax.export`, need `check_vma=False` in a `shard_map` of your own
        that splits columns or tables, and refuse a `vmap` of tables that an explicit mesh
        splits, which the other layouts take.
      capacity: pad to this number of edges, which then cost time but change nothing.
      messages: `"bfloat16"` lets the rows of a float32 table travel along edges in half
        precision, which halves the memory traffic. Sums stay in float32; psi is then off by
        2 to 5e-4 of its norm for tables of random signs, and by up to 1e-3 where all rows are
        rounded alike. For the layouts `"edges"` and `"compiled"`.

    Returns:
      The adjacency, in the default float dtype. Products take the dtype of the table.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> import sevo_jax
      >>> graph = sevo_jax.item_graph([[0, 1, 2, 1], [1, 0, 2]], num_nodes=3, window=3)
      >>> adjacency = sevo_jax.normalized_adjacency(graph)
      >>> print(np.asarray(adjacency.matmul(jnp.eye(3))).round(3))
      [[0.    0.408 0.408]
       [0.408 0.    0.667]
       [0.408 0.667 0.   ]]
    """
    if isinstance(graph, Adjacency):
        if (layout, capacity, messages) != ("auto", None, None):
            raise ValueError(
                "`normalized_adjacency` cannot change a prepared adjacency, but got `layout` "
                f"{layout!r}, `capacity` {capacity} and `messages` {messages!r} with one. "
                "Prepare the graph itself with them."
            )
        return graph
    if not isinstance(graph, jraph.GraphsTuple):
        raise TypeError(
            "A graph is a `jraph.GraphsTuple`, or an adjacency that `normalized_adjacency` has "
            f"prepared, but got {type(graph).__name__}. `item_graph` makes one from sequences, "
            "`edge_graph` from the entries of a matrix."
        )
    check_choice("normalized_adjacency", "layout", layout, ("auto", *LAYOUTS))
    form = LAYOUTS[_fastest() if layout == "auto" else layout]
    if messages not in (None, "bfloat16"):
        raise ValueError(
            f"`normalized_adjacency`: `messages` is None or 'bfloat16', got {messages!r}."
        )
    if messages and form not in (Edges, native.Compiled):
        raise ValueError(
            "`normalized_adjacency`: `messages` in bfloat16 need the layout 'edges' or "
            f"'compiled', but `layout` {layout!r} takes {form.__name__}."
        )
    receivers, senders, weights, num_nodes = _edges(graph)
    degree = np.bincount(receivers, weights, minlength=num_nodes)
    if not np.isfinite(degree).all():
        raise ValueError(
            "`normalized_adjacency`: the weights of node "
            f"{np.argmin(np.isfinite(degree))} add up to infinity; scale all weights down."
        )
    scale = np.divide(1, np.sqrt(degree), out=np.zeros(num_nodes), where=degree > 0)
    weights = weights * scale[receivers] * scale[senders]
    if (np.diff(receivers) < 0).any():
        order = np.argsort(receivers, kind="stable")
        receivers, senders, weights = receivers[order], senders[order], weights[order]
    weights = weights.astype(jnp.result_type(float))
    edges = _pad(receivers, senders, weights, num_nodes, capacity)
    adjacency = form.from_edges(*edges, num_nodes)
    if isinstance(adjacency, Edges | native.Compiled):
        return dataclasses.replace(adjacency, messages=messages)
    return adjacency


# The layouts of "auto" by backend: the first that is there. Milliseconds of psi (L = 3, 64
# columns, float32; two cores of an Intel Xeon; benchmarks/RESULTS.md):
#
#   nodes, edges     compiled    rows   edges   padded   torch CSR
#   12k,  0.2M              2       6      22       80           4
#   160k,  10M      160 - 230     270   3,900                  250
#   376k,  16M            302     751                          474
#   1M,    41M          1,270   3,310                        2,070
#
# and of an AMD EPYC (Zen 4):
#
#   12k,  0.2M              2       6      16       60           5
#   160k,  10M            140     494   1,250                  775
#   376k,  16M            357   1,190                        1,540
#   1M,    41M          1,240   3,660                        4,710
#
# There is no size at which the order turns. On a GPU (NVIDIA H200):
#
#   nodes, edges       edges  padded   dense   torch CSR
#   12k,  0.2M          .056     .15     1.8         .24
#   160k,  10M           1.9     2.0                 2.1
#   376k,  16M           3.1     4.4                 4.3
#   1M,    41M          10.4    12.0                12.3
#
# and of another (NVIDIA H100):
#
#   3.4k, 0.3M          .098     .15     .18         .17
#   12k,  0.2M          .056     .14     1.8         .20
#
# At 10 and 16 million edges `edges` moves as many bytes a second as a copy of memory. No TPU
# has been timed: for a v5e, by the compiler's account, `edges` moves 73 MB with 3,400 nodes and
# 0.7M edges and 187 MB with 20,000 and 0.36M, where `dense` moves 341 MB and 4.9 GB.
_FASTEST: dict[str, tuple[Layout, ...]] = {"cpu": ("compiled", "rows"), "other": ("edges",)}
# Rows stay in the order of the table. Ordered by degree, psi takes 87 % of the time with
# `compiled` at 10 and at 16 million edges, and 88 and 95 % with `rows` (Zen 4, idle, medians of
# seven turns, no record). But the table has to be brought into that order and back: with that
# it is 89 and 96 %, and 89 and 98 %, and two tables more; in a trial where the compiled product
# did so on its way, without them, 99 and 99 %. Smaller graphs gained nothing, and as little by
# Cuthill and McKee's order.


def _fastest() -> Layout:
    layouts = _FASTEST.get(jax.default_backend(), _FASTEST["other"])
    return next(name for name in layouts if name != "compiled" or native.is_built())


def _edges(graph: jraph.GraphsTuple) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Validated receivers, senders, float64 weights `[num_edges]` and the number of nodes."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(graph)):
        raise TypeError(
            "`normalized_adjacency` prepares a graph of concrete arrays, but got a traced one. "
            "Call it outside of `jit` and pass the adjacency that it returns."
        )
    num_nodes = 0 if graph.n_node is None else int(np.sum(graph.n_node))
    if num_nodes < 1:
        raise ValueError(
            f"`normalized_adjacency` takes a graph with nodes, but `n_node` is {graph.n_node}."
        )
    if graph.edges is None:
        raise ValueError(
            "`normalized_adjacency` takes a graph with weights, but `edges` is None. "
            "`edge_graph` gives edges the weight 1."
        )
    receivers, senders = np.asarray(graph.receivers), np.asarray(graph.senders)
    weights = np.asarray(graph.edges)
    if not receivers.shape == senders.shape == weights.shape == (weights.size,):
        raise ValueError(
            "`normalized_adjacency` takes `edges`, `senders` and `receivers` of one shape "
            f"[num_edges], but got {weights.shape}, {senders.shape} and {receivers.shape}."
        )
    for name, ids in (("receivers", receivers), ("senders", senders)):
        if len(ids) and ids.dtype.kind not in "iu":  # of none, NumPy makes floats
            raise TypeError(f"`normalized_adjacency`: `{name}` are {ids.dtype}, not integers.")
        if len(ids) and not 0 <= ids.min() <= ids.max() < num_nodes:
            raise ValueError(
                f"`normalized_adjacency`: `{name}` reach from {ids.min()} to {ids.max()}, but "
                f"the graph has {num_nodes} nodes."
            )
    if weights.dtype.kind not in "biuf" and weights.dtype != jnp.bfloat16:
        raise TypeError(f"`normalized_adjacency`: the weights, `edges`, are {weights.dtype}.")
    receivers, senders = receivers.astype(np.int32), senders.astype(np.int32)
    weights = weights.astype(np.float64)
    _check_weights(receivers, senders, weights, num_nodes)
    return receivers, senders, weights, num_nodes


def _check_weights(
    receivers: np.ndarray, senders: np.ndarray, weights: np.ndarray, num_nodes: int
) -> None:
    if (bad := bad_weight(weights)) is not None:
        raise ValueError(
            "`normalized_adjacency` takes finite, non-negative weights, but edge "
            f"{senders[bad]} -> {receivers[bad]} weighs {weights[bad]}."
        )
    # A is symmetric if and only if A r = A^T r for a random r, almost surely: two passes over
    # the edges in place of a sort, and repeated edges need no merging.
    r = np.random.default_rng(0).uniform(1, 2, num_nodes)
    forward = np.bincount(receivers, weights * r[senders], minlength=num_nodes)
    backward = np.bincount(senders, weights * r[receivers], minlength=num_nodes)
    unequal = ~np.isclose(forward, backward, rtol=1e-6, atol=0)
    if unequal.any():
        raise ValueError(
            "`normalized_adjacency` takes symmetric weights with both directions stored, but "
            f"the edges to and from node {np.flatnonzero(unequal)[0]} differ. Add the "
            "reversed edges, or use `item_graph` and its kin."
        )


def _pad(
    receivers: np.ndarray,
    senders: np.ndarray,
    weights: np.ndarray,
    num_nodes: int,
    capacity: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Zero-weight loops on the last node, where a NaN of another row cannot get in."""
    if capacity is None:
        return receivers, senders, weights
    check_count("normalized_adjacency", "capacity", capacity)
    padding = capacity - len(weights)
    if padding < 0:
        raise ValueError(
            f"`normalized_adjacency`: `capacity` is {capacity}, but the graph has "
            f"{len(weights)} edges."
        )
    loops = np.full(padding, num_nodes - 1, np.int32)
    return (
        np.concatenate([receivers, loops]),
        np.concatenate([senders, loops]),
        np.concatenate([weights, np.zeros(padding, weights.dtype)]),
    )
