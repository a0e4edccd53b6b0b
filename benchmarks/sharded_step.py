"""A training step on a mesh: the table split by rows, the batch by users, shapes alone."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.backbones import BACKBONES, TABLE, make_optimizer
from experiments.batching import Batch
from experiments.config import Config
from experiments.training import round_up
from models.packing import Packed
from sevo_jax.layouts import Edges
from sevo_jax.sharding import Sharded, row_shardings


class Size(NamedTuple):
    """Of a catalogue and its graph."""

    num_items: int
    num_edges: int  # directed


def abstract_graph(num_nodes: int, num_edges: int, mesh: Mesh) -> Sharded:
    """What `shard_adjacency` returns for such a graph, as shapes; `num_edges` is a capacity."""

    def leaf(length: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((length,), dtype, sharding=everywhere)

    everywhere = NamedSharding(mesh, PartitionSpec())
    ids, isolated = leaf(num_edges, np.int32), leaf(num_nodes, bool)
    local = Edges(ids, ids, leaf(num_edges, np.float32), isolated)
    graph = Sharded(local, isolated, mesh, mesh.axis_names)
    return dataclasses.replace(
        graph, isolated=_placed(isolated, row_shardings(isolated, graph))
    )


def training_step(size: Size, mesh: Mesh, config: Config) -> tuple[Any, tuple]:
    """One step of training on all devices of a mesh, and the shapes of its arguments.

    Every device packs its share of the batch into a stream of its own (`models.packing`), with
    room for windows of full length. The table gets as many rows as the devices divide.

    Args:
      size: of the catalogue and its graph.
      mesh: of P devices on one axis.
      config: of a model that learns the next item.

    Returns:
      `step(params, opt_state, batch, key, graph)` under `jit`, which returns parameters, the
      state and the loss `[]`; and its five arguments as trees of `jax.ShapeDtypeStruct`. The
      leaves of `batch`, an `experiments.batching.Batch`, have a leading axis of P streams.
    """
    if config.batch_size % mesh.size:
        raise ValueError(
            f"`training_step`: `batch_size` must be a multiple of the {mesh.size} devices, got "
            f"{config.batch_size}."
        )
    rows = round_up(size.num_items + 1, mesh.size)  # row 0 is padding
    graph = abstract_graph(rows, size.num_edges, mesh)
    backbone = BACKBONES[config.model]
    objective: Any = backbone.objective(rows - 1, config)
    module = nnx.eval_shape(lambda: backbone.build(0, rows - 1, config, nnx.Rngs(0)))
    graphdef, variables = nnx.split(module)
    optimizer = optax.with_extra_args_support(make_optimizer(config, graph))

    def loss(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        ids = jnp.stack([batch.inputs, batch.targets, *jnp.moveaxis(batch.negatives, 2, 0)], 1)
        table = params[TABLE]["embedding"]
        rows = table[ids].reshape(mesh.size, -1, table.shape[1])

        def of_stream(rows: jax.Array, batch: Batch, key: jax.Array) -> jax.Array:
            # To the model the rows that its stream names, in their order, are the whole table.
            module = nnx.merge(graphdef, params | {TABLE: {"embedding": rows}})
            inputs, targets, *negatives = jnp.arange(len(rows)).reshape(ids.shape[1:])
            batch = batch._replace(
                inputs=inputs, targets=targets, negatives=jnp.stack(negatives, axis=1)
            )
            return objective.loss(module, batch, key, None)

        keys = jax.random.split(key, mesh.size)
        means = jax.vmap(of_stream)(rows, batch, keys)
        counts = batch.weights.sum(axis=1)
        return (means * counts).sum() / counts.sum()

    def step(params: Any, opt_state: Any, batch: Batch, key: jax.Array, graph: Sharded):
        value, grads = jax.value_and_grad(loss)(params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params, graph=graph)
        return optax.apply_updates(params, updates), opt_state, value

    params = nnx.to_pure_dict(variables)
    state = params, jax.eval_shape(optimizer.init, params)
    state = _placed(state, row_shardings(state, graph))
    windows = config.batch_size // mesh.size
    slots = round_up(windows * config.max_length, 128)

    def leaf(*shape: int, dtype: Any = np.int32) -> Any:
        place = NamedSharding(mesh, PartitionSpec("rows"))
        return jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=place)

    ids = leaf(slots)
    drawn = leaf(slots, config.num_negatives)
    stream = Packed(ids, ids, ids, leaf(windows))
    batch = Batch(stream, ids, ids, drawn, leaf(slots, dtype=np.float32))
    everywhere = NamedSharding(mesh, PartitionSpec())
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, everywhere))
    return compiled, (*state, batch, key, graph)


def _placed(shapes: Any, places: Any) -> Any:
    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, places)
