"""Training on a mesh of devices: the batch is split by streams, the tables by rows.

Every device packs its share of a batch into streams of its own and holds its share of the rows
of all tables of items, with their moments; everything else lies whole on every device. What is
said where is left to JAX: `shard_map` draws the batch and smooths, the compiler's partitioner
does the rest. Of T slots of all streams and a table `[N, d]` on P devices, a step communicates

- for psi, two all-to-alls of N d / P numbers, see `sevo_jax.sharding`; over users and items
  together, whose stacked table is not split as the items' is, it is brought there and back;
- for the look-up, an all-gather of the T ids and an all-reduce of the rows that they name,
  which is `[T, d]` for each use of the table (an input, a target, a negative);
- for their gradient, an all-gather of as much;
- an all-reduce of the gradients of everything else.

The partitioner may prefer to gather a table that is smaller than what a batch looks up. A loss
over the whole catalogue gathers the table, and sums its gradient, `[N, d]`, over the devices.
Ranking encodes histories on every device, and each scores the items whose rows it holds: what
it communicates is a few numbers for each user, whatever N.

Numbers do not depend on the devices, but for the order of sums: `Config.streams` says what is
drawn, the mesh only says where.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.batching import TrainData
from experiments.config import Config
from experiments.objectives import Objective
from experiments.ranking import Histories, RankingData
from experiments.training import Params, Trainer, round_up
from models.losses import weighted_mean
from sevo_jax.sharding import Sharded, row_shardings, shard_adjacency

AXIS = "devices"
WHOLE, SPLIT = PartitionSpec(), PartitionSpec(AXIS)


def make_mesh(size: int) -> Mesh:
    """A mesh of the first `size` devices, on one axis.

    Several processes share a mesh if each called `jax.distributed.initialize` before; then it
    must have all devices.

    Raises:
      ValueError: there are not so many devices, or one would belong to no mesh.
    """
    devices, processes = jax.devices(), jax.process_count()
    if not 1 <= size <= len(devices):
        raise ValueError(
            f"`mesh` must be from 1 to the {len(devices)} devices, got {size}. For trying it, "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N makes N of a CPU."
        )
    if processes > 1 and size < len(devices):
        raise ValueError(
            f"`mesh` of {processes} processes must be all their {len(devices)} devices, got "
            f"{size}."
        )
    return Mesh(np.array(devices[:size]), (AXIS,))


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Refuses settings that cannot train on a mesh."""
    if config.streams % mesh.size:
        raise ValueError(
            f"`streams` must be a multiple of the {mesh.size} devices of the mesh, got "
            f"{config.streams}."
        )
    if config.distil != "none":
        raise ValueError(f"`distil` does not run on a mesh yet, got {config.distil!r}.")


class Streams:
    """An objective whose batches are packed into several streams, each drawn on its own.

    Args:
      objective: draws one stream, and gives its loss as a mean weighted by `batch.weights`.
      number: S, of streams.
      mesh: of devices that draw S / P streams each, without communication.
    """

    def __init__(self, objective: Objective, number: int, mesh: Mesh | None = None):
        self.objective, self.number, self.mesh = objective, number, mesh
        self.num_queries = objective.num_queries

    def check(self, data: TrainData) -> None:
        self.objective.check(data)

    def order(self, key: jax.Array, data: TrainData, batch_size: int) -> jax.Array:
        """Windows `[steps, S, ceil(batch_size / S)]`, dealt out to the streams in turn."""
        order = self.objective.order(key, data, batch_size)
        missing = -batch_size % self.number
        order = jnp.pad(order, ((0, 0), (0, missing)), constant_values=data.num_windows)
        return order.reshape(len(order), -1, self.number).swapaxes(1, 2)

    def sample(
        self, key: jax.Array, data: TrainData, windows: jax.Array, num_slots: int
    ) -> Any:
        """Batches of at most `num_slots` slots, stacked along an axis of S."""

        def draw(keys: jax.Array, windows: jax.Array, data: TrainData) -> Any:
            def stream(key: jax.Array, windows: jax.Array) -> Any:
                return self.objective.sample(key, data, windows, num_slots)

            return jax.vmap(stream)(keys, windows)

        if self.mesh is not None:
            # Left to the partitioner, the devices would agree on each round of the search for
            # negatives. The check of varying axes refuses constants that a loop starts from.
            draw = jax.shard_map(
                draw,
                mesh=self.mesh,
                in_specs=(SPLIT, SPLIT, WHOLE),
                out_specs=SPLIT,
                check_vma=False,
            )
        return draw(jax.random.split(key, self.number), windows, data)

    def loss(self, module: Any, batch: Any, dropout_key: jax.Array, context: Any) -> jax.Array:
        def mean(batch: Any, key: jax.Array) -> jax.Array:
            return self.objective.loss(module, batch, key, context)

        means = jax.vmap(mean)(batch, jax.random.split(dropout_key, self.number))
        return weighted_mean(means, batch.weights.sum(axis=1))

    def rows(self, batch: Any) -> jax.Array:
        return jax.vmap(self.objective.rows)(batch).reshape(-1)

    def scorer(
        self, module: Any, num_slots: int, context: Any
    ) -> Callable[[Histories], jax.Array]:
        return self.objective.scorer(module, num_slots, context)


def split_graph(graph: Any, num_rows: int, mesh: Mesh) -> Sharded:
    """Shards a `GraphsTuple` whose last nodes are the `num_rows` rows of the tables of items.

    Isolated nodes follow until the devices divide these; users before them stay as they are.
    """
    num_free = -num_rows % mesh.size
    num_nodes = int(np.sum(graph.n_node)) + num_free
    return shard_adjacency(graph._replace(n_node=np.array([num_nodes])), mesh)


def trim(params: Params, shapes: Params) -> Params:
    """Parameters without free rows, as `shapes` of a module has them."""

    def name(path: Any) -> str:
        # In a restored checkpoint the places of a list are strings.
        return jax.tree_util.keystr(path, simple=True, separator="/")

    known = {name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes)}
    return jax.tree.map_with_path(
        lambda path, leaf: leaf[: known[name(path)][0]] if leaf.ndim else leaf, params
    )


def placed(leaf: Any, sharding: NamedSharding) -> Any:
    """The shape of an array, with its place on a mesh."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class MeshTrainer(Trainer):
    """A `Trainer` whose state is split over a mesh.

    Parameters with a row for each item end in free rows of zeros, so that the devices divide
    them; the model never sees these, and no gradient reaches them.

    Args:
      mesh: the devices.
      num_rows: of the tables of items.
      build: see `Trainer`.
      optimizer, objective, graph, data, batch_size, context, touched: see `Trainer`; the
        objective is one of `Streams` on that mesh, the graph from `split_graph`, and data lie
        on all devices. For `lower_epoch` alone, shapes may stand for graph, data and context.
    """

    def __init__(
        self,
        mesh: Mesh,
        num_rows: int,
        build: Callable[[nnx.Rngs], Any],
        optimizer: optax.GradientTransformation,
        objective: Streams,
        graph: Sharded | None,
        data: TrainData,
        batch_size: int,
        context: Any = None,
        touched: bool = False,
    ):
        def fill(path: Any, leaf: jax.Array) -> jax.Array:
            # There may be as many users as items.
            of_users = "user" in jax.tree_util.keystr(path)
            if of_users or leaf.shape[:1] != (num_rows,):
                return leaf
            return jnp.pad(leaf, [(0, -num_rows % mesh.size)] + [(0, 0)] * (leaf.ndim - 1))

        def build_filled(rngs: nnx.Rngs) -> Any:
            module = build(rngs)
            params = nnx.state(module, nnx.Param)
            nnx.update(module, jax.tree.map_with_path(fill, params))
            return module

        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self.shapes = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        self.everywhere = everywhere = NamedSharding(mesh, WHOLE)
        super().__init__(
            build_filled, optimizer, objective, graph, data, batch_size, context, touched
        )
        # Whatever the optimizer has for a graph, this one tells where rows belong.
        nodes = jax.ShapeDtypeStruct((round_up(num_rows, mesh.size),), bool)
        rows = Sharded(local=None, isolated=nodes, mesh=mesh, axes=(AXIS,))  # type: ignore
        keys = jax.ShapeDtypeStruct((1,), jax.random.key(0).dtype)
        state = jax.eval_shape(self.init, keys)
        places = row_shardings(state, rows)
        self.state_shapes = jax.tree.map(placed, state, places)  # of one seed
        init = self.init
        from_words = jax.jit(
            lambda words: init(jax.random.wrap_key_data(words)), out_shardings=places
        )
        # Between processes pass arrays of the host, and keys are none.
        self.init = lambda keys: from_words(np.asarray(jax.random.key_data(keys)))
        self._most_slots = jax.jit(self._most_slots, out_shardings=everywhere)
        self._epoch_jit = jax.jit(
            self._epoch_jit,
            static_argnums=5,
            donate_argnums=0,
            out_shardings=(places.params, places.opt_state, everywhere),
        )
        self._rank_jit = jax.jit(self._rank_jit, static_argnums=3, out_shardings=everywhere)

    def module(self, params: Params) -> Any:
        return super().module(trim(params, self.shapes))

    def lower_epoch(self, num_slots: int) -> jax.stages.Lowered:
        """The epoch of one seed, for a compiler; its devices need not be there."""
        params, opt_state, key, _ = self.state_shapes
        return self._epoch_jit.lower(
            (params, opt_state), (key, key), self.data, self.graph, self.context, num_slots
        )

    def rank(self, params: Params, data: RankingData, num_slots: int):
        return super().rank(params, jax.device_put(data, self.everywhere), num_slots)
