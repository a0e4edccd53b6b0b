"""How a normalised adjacency is stored and multiplied: one class per layout.

A layout is a registered pytree of arrays. All that is static follows from their shapes, but for
the precision of messages, so a program compiled for one graph serves every graph of the same
capacity.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

try:
    from jax.experimental.sparse import BCSR
except ImportError:  # JAX no longer develops this module; `_scan_chunks` stands in for it
    BCSR = None

_CHUNK = 1 << 16  # edges in flight in `_scan_chunks`: bounds its memory at _CHUNK * d
_TPU_CHUNK = 1 << 20  # the same for `Edges` on TPU
_WIDTH = 64  # columns of vmapped tables to multiply at once in `Rows`
_SUM_WIDTH = 512  # the same in `Edges`


class Adjacency(abc.ABC):
    """A symmetric matrix A~ `[num_nodes, num_nodes]` that can be applied to a table."""

    isolated: jax.Array  # [num_nodes] bool: rows of A~ that are zero
    splits_rows = False  # whether it takes tables whose rows are split over devices

    @classmethod
    @abc.abstractmethod
    def from_edges(
        cls, receivers: np.ndarray, senders: np.ndarray, weights: np.ndarray, num_nodes: int
    ) -> Self:
        """Store edges `[num_edges]` that are sorted by receiver."""

    @property
    def num_nodes(self) -> int:
        return self.isolated.shape[0]

    @abc.abstractmethod
    def matmul(self, x: jax.Array) -> jax.Array:
        """A~ x for x `[num_nodes, d]`, in the dtype of x; take no derivatives by A~."""

    def polynomial(self, coefficients: jax.Array, x: jax.Array) -> jax.Array:
        """sum_l c_l A~^l x, with coefficients `[L + 1, 1, 1]` or `[L + 1, 1, d]`."""
        y = coefficients[-1] * x  # by Horner's rule: L products, with two tables in flight
        for c in coefficients[-2::-1]:
            y = self.matmul(y) + c * x
        return y

    def columnwise(
        self, function: "ColumnFunction", parameters: jax.Array, x: jax.Array
    ) -> jax.Array:
        """`function(self, parameters, x)`, each column of whose result follows from that of x
        and, if there are as many, of the parameters `[..., 1 or d]`."""
        return function(self, parameters, x)


ColumnFunction: TypeAlias = Callable[[Adjacency, jax.Array, jax.Array], jax.Array]


def isolated_rows(receivers: np.ndarray, weights: np.ndarray, num_nodes: int) -> np.ndarray:
    """Which nodes have no edge of a weight, bool `[num_nodes]`."""
    return np.bincount(receivers, weights != 0, minlength=num_nodes) == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Edges(Adjacency):
    """Segment sums over a list of edges; the plain form, good on every backend.

    On GPU the sum fuses with the gather. On CPU it holds an edges x d array. On TPU it fuses or
    not, by the size of the table; messages then take 128 columns each, however few they have.
    So there the sum runs over a million edges at a time, in half a gigabyte.
    """

    receivers: jax.Array  # [num_edges] int32, ascending
    senders: jax.Array  # [num_edges] int32
    weights: jax.Array  # [num_edges]
    isolated: jax.Array  # [num_nodes] bool
    # "bfloat16" lets rows of a float32 table travel along edges in half precision.
    messages: str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def from_edges(
        cls, receivers: np.ndarray, senders: np.ndarray, weights: np.ndarray, num_nodes: int
    ) -> Self:
        isolated = isolated_rows(receivers, weights, num_nodes)
        r, s, w, i = map(jnp.asarray, (receivers, senders, weights, isolated))
        return cls(r, s, w, i)

    def matmul(self, x: jax.Array) -> jax.Array:
        if len(self.receivers) <= _TPU_CHUNK:
            return _segment_sum(self, x)
        return jax.lax.platform_dependent(self, x, tpu=_segments_in_turn, default=_segment_sum)

    def sent(self, x: jax.Array) -> jax.Array:
        """x in the precision of the messages."""
        return x.astype(self.messages) if self.messages and x.dtype == jnp.float32 else x


@jax.jit  # or each call outside of `jit` would trace what follows anew
def _segment_sum(adjacency: Edges, x: jax.Array) -> jax.Array:
    # `custom_vmap` alone has no reverse mode. A solver may hold one, and JAX knows of its
    # solution that it is linear in x; the equation, of which it is a symmetric solution, need
    # not be written down, as A~ is a constant.
    constant = jax.lax.stop_gradient(adjacency)
    return jax.lax.custom_linear_solve(
        lambda y: y, x, lambda _, x: _sum_messages_jit(constant, x), symmetric=True
    )


def _sum(adjacency: Edges, x: jax.Array) -> jax.Array:
    sent = adjacency.sent(x)[adjacency.senders].astype(x.dtype)
    messages = adjacency.weights.astype(x.dtype)[:, None] * sent
    return jax.ops.segment_sum(
        messages, adjacency.receivers, adjacency.num_nodes, indices_are_sorted=True
    )


_sum_messages = custom_vmap(_sum)
# Traced where it is called: in a `shard_map`, what the solver traced would not fit.
_sum_messages_jit = jax.jit(_sum_messages)


@_sum_messages.def_vmap
def _sum_messages_of_tables(
    axis_size: int, in_batched: tuple[Edges, bool], adjacency: Edges, x: jax.Array
) -> tuple[jax.Array, bool]:
    """Tables stand side by side, so that an edge moves one long row.

    As JAX batches it, the sum has the tables apart, and takes several times as long on a GPU.
    It is left to JAX where the tables are split over an explicit mesh, or their number is a
    symbol.
    """
    num_nodes, d = x.shape[-2:]
    if not isinstance(axis_size, int) or any(jax.typeof(x).sharding.spec):
        in_axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
        return jax.vmap(_sum, in_axes)(adjacency, x), True
    several_graphs = any(jax.tree.leaves(in_batched[0]))
    at_once = 1 if several_graphs else max(1, _SUM_WIDTH // max(1, d))
    if several_graphs or at_once < axis_size:
        return in_turn(_sum_messages, in_batched, (adjacency, x), at_once), True
    wide = jnp.moveaxis(x, 0, 1).reshape(num_nodes, axis_size * d)
    y = _sum_messages(adjacency, wide).reshape(num_nodes, axis_size, d)
    return jnp.moveaxis(y, 1, 0), True


def _segments_in_turn(adjacency: Edges, x: jax.Array) -> jax.Array:
    weights = adjacency.weights.astype(x.dtype)
    sent = adjacency.sent(x)
    return _add_chunks(adjacency.receivers, adjacency.senders, weights, sent, _TPU_CHUNK)


@functools.partial(jax.jit, static_argnums=4)  # or each call outside of `jit` would compile
def _add_chunks(
    rows: jax.Array, columns: jax.Array, weights: jax.Array, x: jax.Array, size: int
) -> jax.Array:
    """A~ x from entries `[num_edges]` that are sorted by row, `size` of them at a time.

    The type of the weights is that of the sum; x may be of a narrower one.
    """
    num_edges, num_nodes = len(rows), len(x)
    size = max(1, min(size, num_edges))

    def chunks(leaf: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(leaf, (0, -num_edges % size), constant_values=fill).reshape(-1, size)

    def add(y: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        row, column, weight = chunk
        message = weight[:, None] * x[column].astype(weight.dtype)
        return y.at[row].add(message, indices_are_sorted=True), None

    entries = (
        chunks(rows, num_nodes - 1),
        chunks(columns, num_nodes - 1),
        chunks(weights, 0),
    )
    return jax.lax.scan(add, jnp.zeros_like(x, dtype=weights.dtype), entries)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Adjacency):
    """The matrix itself, for graphs of a few thousand nodes on an accelerator."""

    matrix: jax.Array  # [num_nodes, num_nodes]
    isolated: jax.Array  # [num_nodes] bool

    @classmethod
    def from_edges(
        cls, receivers: np.ndarray, senders: np.ndarray, weights: np.ndarray, num_nodes: int
    ) -> Self:
        matrix = np.zeros((num_nodes, num_nodes), weights.dtype)
        np.add.at(matrix, (receivers, senders), weights)
        return cls(
            jnp.asarray(matrix), jnp.asarray(isolated_rows(receivers, weights, num_nodes))
        )

    def matmul(self, x: jax.Array) -> jax.Array:
        return jnp.matmul(self.matrix.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Adjacency):
    """Compressed rows; on CPU a native multithreaded product without an edges x d array."""

    row_splits: jax.Array  # [num_nodes + 1] int32
    columns: jax.Array  # [num_edges] int32, of the type of row_splits or BCSR is slow
    weights: jax.Array  # [num_edges]
    isolated: jax.Array  # [num_nodes] bool

    @classmethod
    def from_edges(
        cls, receivers: np.ndarray, senders: np.ndarray, weights: np.ndarray, num_nodes: int
    ) -> Self:
        isolated = isolated_rows(receivers, weights, num_nodes)
        row_splits = np.searchsorted(receivers, np.arange(num_nodes + 1))
        row_splits, columns = row_splits.astype(np.int32), senders.astype(np.int32)
        r, c, w, i = map(jnp.asarray, (row_splits, columns, weights, isolated))
        return cls(r, c, w, i)

    def matmul(self, x: jax.Array) -> jax.Array:
        if BCSR is None or x.dtype not in (jnp.float32, jnp.float64):
            return _scan_chunks(self, x)
        return jax.lax.platform_dependent(self, x, cpu=_native, default=_scan_chunks)

    def polynomial(self, coefficients: jax.Array, x: jax.Array) -> jax.Array:
        return _rows_polynomial(self, coefficients, x)

    def one_table(self, coefficients: jax.Array, x: jax.Array) -> jax.Array:
        """The polynomial of a table that is no batch; what `vmap` and `grad` build on."""
        return super().polynomial(coefficients, x)

    def tables(self, coefficients: jax.Array, x: jax.Array) -> jax.Array:
        """Those of tables `[S or 1, num_nodes, d]`; coefficients `[S, L + 1, 1, 1 or d]`."""
        shared = len(x) == 1
        in_batched = jax.tree.map(lambda _: False, self), True, not shared
        x = x[0] if shared else x
        return in_turn(_tables_polynomial, in_batched, (self, coefficients, x))


def _native(adjacency: Rows, x: jax.Array) -> jax.Array:
    assert BCSR is not None
    weights = adjacency.weights.astype(x.dtype)
    shape = (adjacency.num_nodes, adjacency.num_nodes)
    return BCSR((weights, adjacency.columns, adjacency.row_splits), shape=shape) @ x


def _scan_chunks(adjacency: Rows, x: jax.Array) -> jax.Array:
    """The same product for every backend and dtype, by a bounded number of edges at a time."""
    num_nodes, num_edges = adjacency.num_nodes, adjacency.columns.shape[0]
    rows = jnp.repeat(
        jnp.arange(num_nodes, dtype=jnp.int32),
        jnp.diff(adjacency.row_splits),
        total_repeat_length=num_edges,
    )
    weights = adjacency.weights.astype(x.dtype)
    return _add_chunks(rows, adjacency.columns, weights, x, _CHUNK)


@custom_vmap
def _tables_polynomial(adjacency: Rows, coefficients: jax.Array, x: jax.Array) -> jax.Array:
    return adjacency.one_table(coefficients, x)


@_tables_polynomial.def_vmap
def _tables_in_turn(
    axis_size: int,
    in_batched: tuple[Rows, bool, bool],
    adjacency: Rows,
    coefficients: jax.Array,
    x: jax.Array,
) -> tuple[jax.Array, bool]:
    """The native product has no batch form. Narrow tables stand side by side as one wide
    table; wide ones take turns, because two of them would not fit into the cache together.
    """
    several_graphs = any(jax.tree.leaves(in_batched[0]))
    at_once = 1 if several_graphs else max(1, _WIDTH // max(1, x.shape[-1]))
    if several_graphs or 1 < at_once < axis_size:
        args = adjacency, coefficients, x
        return in_turn(_tables_polynomial, in_batched, args, at_once), True
    if not in_batched[1]:
        coefficients = jnp.broadcast_to(coefficients, (axis_size, *coefficients.shape))
    x = x if in_batched[2] else x[None]
    form = _side_by_side if at_once > 1 else type(adjacency).tables
    return form(adjacency, coefficients, x), True


def in_turn(
    function: Callable[..., jax.Array], in_batched: Any, args: Any, at_once: int = 1
) -> jax.Array:
    """`function(*args)` for slices of those leaves of `args` that `in_batched` marks."""
    leaves, treedef = jax.tree.flatten(args)
    batched = [i for i, is_batched in enumerate(jax.tree.leaves(in_batched)) if is_batched]

    def one(slices: list[jax.Array]) -> jax.Array:
        parts = leaves.copy()
        for i, part in zip(batched, slices, strict=True):
            parts[i] = part
        return function(*treedef.unflatten(parts))

    slices = [leaves[i] for i in batched]
    return jax.lax.map(one, slices, batch_size=at_once if at_once > 1 else None)


def _side_by_side(adjacency: Rows, coefficients: jax.Array, x: jax.Array) -> jax.Array:
    """psi of tables `[S or 1, num_nodes, d]` as of one of S d columns."""
    num_tables, (num_nodes, d) = len(coefficients), x.shape[1:]
    x = jnp.broadcast_to(x, (num_tables, num_nodes, d))
    coefficients = jnp.broadcast_to(coefficients, (*coefficients.shape[:-1], d))

    def wide(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf, 0, -2).reshape(*leaf.shape[1:-1], num_tables * d)

    y = _tables_polynomial(adjacency, wide(coefficients), wide(x))
    return jnp.moveaxis(y.reshape(num_nodes, num_tables, d), 1, 0)


def _forward(*args: Any) -> tuple[jax.Array, Any]:
    return _rows_polynomial(*args), args  # which has a second derivative, in reverse mode


def _backward(args: Any, cotangent: jax.Array) -> tuple[None, jax.Array, jax.Array]:
    adjacency, coefficients, x = args
    powers, product = [x], jnp.array([0, 1], x.dtype).reshape(2, 1, 1)
    for _ in coefficients[1:]:
        powers.append(_rows_polynomial(adjacency, product, powers[-1]))
    axes = (0, 1) if coefficients.shape[-1] == 1 else 0
    inner = [jnp.sum(power * cotangent, axes, keepdims=True) for power in powers]
    return None, jnp.stack(inner), _rows_polynomial(adjacency, coefficients, cotangent)


# `custom_vmap` has no reverse mode of its own. psi is symmetric, and the edges are data.
_differentiable = jax.custom_vjp(_tables_polynomial)
_differentiable.defvjp(_forward, _backward)
# Under `vmap` in `jit`, JAX's custom derivatives do not take NumPy's arrays for constants.
_rows_polynomial = jax.jit(_differentiable)
