"""Smoothing on several devices: the rows of a table split over a mesh, two collectives."""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sevo_jax.adjacency import Graph, normalized_adjacency
from sevo_jax.ids import check_count
from sevo_jax.layouts import Adjacency, ColumnFunction


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sharded(Adjacency):
    """An adjacency that every device holds, for tables whose rows are split over devices.

    The columns of a table smooth independently of one another. An all-to-all hands every
    device all rows of its share of the columns, the layers run without communication, and a
    second all-to-all returns the rows. A number of columns that the devices do not divide is
    filled up with zeros. Rows that they do not divide cannot be split: such a table lies whole
    on every device, which takes its columns from it, and one all-gather joins the results.

    It cannot be pickled, as a mesh names devices of this process; what it was made from can.
    """

    splits_rows = True

    local: Adjacency  # on every device
    isolated: jax.Array  # [num_nodes] bool, split as the rows
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})  # () for none

    @classmethod
    def from_edges(
        cls, receivers: np.ndarray, senders: np.ndarray, weights: np.ndarray, num_nodes: int
    ) -> Self:
        raise NotImplementedError(
            "`Sharded` takes a prepared adjacency and a mesh: call `shard_adjacency`."
        )

    @property
    def rows(self) -> PartitionSpec:
        """How the rows of a table lie on the mesh."""
        return _rows(self.num_nodes, self.mesh, self.axes)

    def matmul(self, x: jax.Array) -> jax.Array:
        return self.polynomial(jnp.array([0, 1], x.dtype).reshape(2, 1, 1), x)

    def polynomial(self, coefficients: jax.Array, x: jax.Array) -> jax.Array:
        return self.columnwise(_polynomial, coefficients, x)

    def columnwise(
        self, function: ColumnFunction, parameters: jax.Array, x: jax.Array
    ) -> jax.Array:
        if AxisType.Explicit not in self.mesh.axis_types:
            return _on_all_devices(self, function, parameters, x)
        # There the place is a part of the type, and JAX brings nothing to where it is needed:
        # a table that lies elsewhere, as stacked ones do, is brought there and back. One that
        # has no place yet comes back whole on every device, so that it can be cut anywhere.
        before = jax.typeof(x).sharding
        x = jax.sharding.reshard(x, self._place(self.rows))
        y = _on_all_devices(self, function, parameters, x)
        spec = PartitionSpec() if before.mesh.empty else before.spec
        return jax.sharding.reshard(y, self._place(spec))

    def _place(self, spec: PartitionSpec) -> NamedSharding:
        """Of a mesh that mixes kinds of axes, only explicit ones are a part of types."""
        kinds = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        explicit = {name for name, kind in kinds if kind == AxisType.Explicit}

        def kept(names: Any) -> tuple[str, ...] | None:
            names = (names,) if isinstance(names, str) else names or ()
            return tuple(name for name in names if name in explicit) or None

        return NamedSharding(self.mesh, PartitionSpec(*map(kept, spec)))

    def _own_share(
        self, function: ColumnFunction, local: Adjacency, parameters: jax.Array, x: jax.Array
    ) -> jax.Array:
        """What one device does, with its rows `[num_nodes / devices, d]` of x or with all."""
        axes, d = self.axes, x.shape[1]
        if not axes:
            return function(local, parameters, x)
        width = -(-d // _size(self.mesh, axes))

        def fill(columns: jax.Array) -> jax.Array:
            missing = width * _size(self.mesh, axes) - d
            return jnp.pad(columns, [(0, 0)] * (columns.ndim - 1) + [(0, missing)])

        def own(columns: jax.Array) -> jax.Array:
            start = lax.axis_index(axes) * width
            return lax.dynamic_slice_in_dim(fill(columns), start, width, axis=-1)

        if parameters.shape[-1] > 1:
            parameters = own(parameters)
        if self.rows == PartitionSpec():
            y = function(local, parameters, own(x))
            return lax.all_gather(y, axes, axis=1, tiled=True)[:, :d]
        columns = lax.all_to_all(fill(x), axes, split_axis=1, concat_axis=0, tiled=True)
        y = function(local, parameters, columns)
        return lax.all_to_all(y, axes, split_axis=0, concat_axis=1, tiled=True)[:, :d]


def _polynomial(adjacency: Adjacency, coefficients: jax.Array, x: jax.Array) -> jax.Array:
    return adjacency.polynomial(coefficients, x)


# Without `jit` each call outside of one would compile anew.
@functools.partial(jax.jit, static_argnames="function")
def _on_all_devices(
    adjacency: Sharded, function: ColumnFunction, parameters: jax.Array, x: jax.Array
) -> jax.Array:
    whole = PartitionSpec()
    # Products inside start sums from constants, which the check of varying axes refuses.
    apply = jax.shard_map(
        functools.partial(adjacency._own_share, function),
        mesh=adjacency.mesh,
        in_specs=(whole, whole, adjacency.rows),
        out_specs=adjacency.rows,
        check_vma=False,
    )
    return apply(adjacency.local, parameters, x)


def shard_adjacency(
    graph: Graph,
    mesh: Mesh,
    *,
    axes: str | tuple[str, ...] | None = None,
    min_rows: int = 0,
) -> Sharded:
    r"""Prepare a graph for tables whose rows are split over the devices of a mesh.

    :func:`smooth`, :func:`sevo`, :func:`sevo_adamw` and the others take the result in place
    of a graph. Smoothing costs two collectives of :math:`N d / P^2` numbers to and from each
    other device, for a table `[N, d]` on P devices and whatever the number of layers. Every
    device holds the whole graph.

    The table must be split as :func:`row_shardings` says. P has to divide N for that: build
    the graph with `num_nodes` rounded up. Otherwise the table stays whole on every device,
    and only the work is shared, with one collective of :math:`N d / P` numbers.

    Args:
      graph: a graph or a prepared adjacency. Its layout serves on each device.
      mesh: the devices, of this process or of several.
      axes: the axis or axes of `mesh` that split the rows; all by default.
      min_rows: smaller tables stay whole on every device, which then smooths all of it without
        communication. That is faster up to about 100,000 rows.

    Returns:
      The adjacency, on all devices of the mesh. Where its axes are of the type `Explicit`,
      derivatives taken outside of `jax.jit` need `jax.set_mesh(mesh)`.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> import sevo_jax
      >>> from sevo_jax.sharding import row_shardings, shard_adjacency
      >>> graph = sevo_jax.item_graph([[0, 1, 2]], num_nodes=8)
      >>> mesh = jax.sharding.Mesh(jax.devices(), ("rows",))
      >>> sharded = shard_adjacency(graph, mesh)
      >>> x = jnp.eye(8, 2)
      >>> x = jax.device_put(x, row_shardings(x, sharded))
      >>> y = jax.jit(sevo_jax.smooth)(sharded, x, beta=0.5)
      >>> print(np.asarray(y)[:3].round(3))
      [[0.6   0.236]
       [0.236 0.667]
       [0.067 0.236]]
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"`shard_adjacency` takes a `jax.sharding.Mesh`, but `mesh` is "
            f"{type(mesh).__name__}. `jax.sharding.Mesh(jax.devices(), ('rows',))` makes one "
            "of all devices."
        )
    check_count("shard_adjacency", "min_rows", min_rows)
    names = mesh.axis_names if axes is None else (axes,) if isinstance(axes, str) else axes
    if (
        not isinstance(names, tuple | list)
        or not names
        or not set(names) <= set(mesh.axis_names)
        or len(set(names)) < len(names)
    ):
        raise ValueError(
            "`shard_adjacency` takes as `axes` one or more different axes of the mesh, "
            f"{mesh.axis_names}, but got {axes!r}."
        )
    adjacency = normalized_adjacency(graph)
    if isinstance(adjacency, Sharded):
        adjacency = adjacency.local
    names = tuple(names) if adjacency.num_nodes >= min_rows else ()
    rows = _rows(adjacency.num_nodes, mesh, names)
    return Sharded(
        local=jax.device_put(adjacency, NamedSharding(mesh, PartitionSpec())),
        isolated=jax.device_put(adjacency.isolated, NamedSharding(mesh, rows)),
        mesh=mesh,
        axes=names,
    )


def row_shardings(tree: Any, graph: Sharded) -> Any:
    """Where the leaves of parameters, gradients or an optimizer's state belong on the mesh.

    Tables and their moments are split by rows: every leaf with a dimension of `num_nodes` is,
    along the first such. All others are whole on every device. Both is a matter of place, not
    of values. Tables that are stacked to make `num_nodes` rows together stay whole.

    Args:
      tree: of arrays, or of shapes as `jax.eval_shape` returns them.
      graph: the result of :func:`shard_adjacency`.

    Returns:
      A tree of `jax.sharding.NamedSharding` for `jax.device_put` or `out_shardings`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import sevo_jax
      >>> from sevo_jax.sharding import row_shardings, shard_adjacency
      >>> graph = sevo_jax.item_graph([[0, 1, 2]], num_nodes=8)
      >>> graph = shard_adjacency(graph, jax.sharding.Mesh(jax.devices(), ("rows",)))
      >>> params = {"item_embedding": jnp.zeros((8, 2)), "bias": jnp.zeros(2)}
      >>> shardings = row_shardings(params, graph)
      >>> tuple(shardings["item_embedding"].spec), tuple(shardings["bias"].spec)
      (('rows',), ())
    """
    if not isinstance(graph, Sharded):
        raise TypeError(
            "`row_shardings` takes the result of `shard_adjacency`, but `graph` is "
            f"{type(graph).__name__}."
        )

    def sharding(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        entries: list[Any] = []
        if graph.num_nodes in shape:
            entries = [None] * shape.index(graph.num_nodes) + [*graph.rows]
        # As compiled functions return them, or the second step would compile anew: with an
        # entry for every dimension where axes are explicit, else without any at the end.
        if AxisType.Explicit in graph.mesh.axis_types:
            entries += [None] * (len(shape) - len(entries))
        return NamedSharding(graph.mesh, PartitionSpec(*entries))

    return jax.tree.map(sharding, tree)


def _rows(num_nodes: int, mesh: Mesh, axes: tuple[str, ...]) -> PartitionSpec:
    if not axes or num_nodes % _size(mesh, axes):
        return PartitionSpec()
    return PartitionSpec(axes[0] if len(axes) == 1 else axes)


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
