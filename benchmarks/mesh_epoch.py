"""The epoch that `experiments train --mesh` runs, for devices that need not be there."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from experiments.backbones import BACKBONES, make_optimizer
from experiments.batching import TrainData
from experiments.config import Config
from experiments.mesh import AXIS, SPLIT, WHOLE, MeshTrainer, Streams, check_mesh, placed
from experiments.training import round_up
from sevo_jax.layouts import Edges
from sevo_jax.sharding import Sharded


class Size(NamedTuple):
    """Of a catalogue, its graph, and what its users did."""

    num_items: int
    num_edges: int  # directed
    num_users: int
    num_interactions: int  # of training


def lower_epoch(size: Size, mesh: Mesh, config: Config) -> jax.stages.Lowered:
    """An epoch of training on all devices of a mesh, from shapes alone.

    Every device packs its share of a batch into a stream of its own (`models.packing`), with
    room for windows of full length. The table gets as many rows as the devices divide.

    Args:
      size: what to train on, a window for each user.
      mesh: of devices on one axis, `experiments.mesh.AXIS`.
      config: of a model that learns the next item, without a recurrence: that of GRU4Rec is
        written for the backend at hand.
    """
    config = dataclasses.replace(config, streams=mesh.size)
    check_mesh(config, mesh)
    backbone = BACKBONES[config.model]
    num_rows = size.num_items + backbone.module.num_special
    graph = _graph(round_up(num_rows, mesh.size), size.num_edges, mesh)
    trainer = MeshTrainer(
        mesh,
        num_rows,
        lambda rngs: backbone.build(size.num_users, size.num_items, config, rngs),
        make_optimizer(config, graph),
        Streams(backbone.objective(size.num_items, config), config.streams, mesh),
        graph,
        _data(size, mesh),
        config.batch_size,
    )
    return trainer.lower_epoch(round_up(trainer.windows_per_stream * config.max_length, 128))


def _data(size: Size, mesh: Mesh) -> TrainData:
    """What `training_data` makes of `windows="last"`, as shapes."""
    of_users = _everywhere(size.num_users, np.int32, mesh)
    of_interactions = _everywhere(size.num_interactions, np.int32, mesh)
    return TrainData(
        values=of_interactions,
        starts=of_users,
        lengths=of_users,
        warm_up=of_users,
        users=of_users,
        seen_gaps=of_interactions,
        seen_splits=_everywhere(size.num_users + 1, np.int32, mesh),
        num_items=_everywhere((), np.int32, mesh),
    )


def _graph(num_nodes: int, num_edges: int, mesh: Mesh) -> Sharded:
    """What `shard_adjacency` returns for such a graph, as shapes."""
    ids = _everywhere(num_edges, np.int32, mesh)
    isolated = _everywhere(num_nodes, np.bool_, mesh)
    local = Edges(ids, ids, _everywhere(num_edges, np.float32, mesh), isolated)
    rows = NamedSharding(mesh, SPLIT)
    return Sharded(local, placed(isolated, rows), mesh, (AXIS,))


def _everywhere(shape: Any, dtype: Any, mesh: Mesh) -> Any:
    whole = NamedSharding(mesh, WHOLE)
    shape = shape if isinstance(shape, tuple) else (shape,)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
