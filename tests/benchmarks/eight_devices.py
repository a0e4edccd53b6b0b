"""Tests that need eight devices; `test_aot.py` runs them in a process that has as many."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from benchmarks.aot import collectives
from benchmarks.mesh_epoch import Size, lower_epoch
from experiments.backbones import BACKBONES, make_graph
from experiments.config import Config
from experiments.dataset import leave_one_out
from experiments.mesh import make_mesh
from experiments.run import make_trainer
from experiments.synthetic import synthetic
from experiments.training import round_up

CONFIG = Config(batch_size=16, max_length=6, dim=8, num_blocks=1, num_negatives=2)
SLOTS = 128  # of a stream


def test_the_described_epoch_is_that_of_training():
    """What shapes alone describe has the arguments and the collectives of the real thing."""
    config = dataclasses.replace(CONFIG, streams=8)
    split = leave_one_out(synthetic(num_users=60, num_items=100, num_communities=2))
    trainer: Any = make_trainer(config, split, mesh=make_mesh(8))
    num_edges = len(make_graph(config, split).edges)
    size = Size(100, num_edges, 60, len(trainer.data.values))
    slots = round_up(trainer.windows_per_stream * config.max_length, 128)
    actual, expected = lower_epoch(size, make_mesh(8), CONFIG), trainer.lower_epoch(slots)
    # Not the graph, for which every backend has a layout of its own.
    arguments = [one.args_info[0][:3] for one in (actual, expected)]
    assert jax.tree.structure(arguments[0]) == jax.tree.structure(arguments[1])
    assert jax.tree.leaves(arguments[0]) == jax.tree.leaves(arguments[1])
    actual, expected = actual.compile(), expected.compile()
    places = [jax.tree.leaves(one.input_shardings[0][:3]) for one in (actual, expected)]
    assert places[0] == places[1]
    assert collectives(actual.as_text() or "") == collectives(expected.as_text() or "")


def test_no_collective_holds_more_than_the_batch():
    """Of a table larger than what a batch looks up; the partitioner copies a smaller one."""
    num_rows = 80_000
    lowered = lower_epoch(Size(num_rows - 1, 200, 50, 300), make_mesh(8), CONFIG)
    found = collectives(lowered.compile().as_text() or "")
    looked_up = 8 * 4 * SLOTS  # inputs, targets and two negatives
    table = num_rows * 8 * 4 // 8  # bytes of the rows of one device, or of its columns
    assert found["all-to-all"] == (2, 2 * table)
    # Of the ids; and, in the gradient, of the rows that were looked up.
    assert found["all-gather"] == (2, looked_up * 4 + looked_up * 8 * 4)
    # Of what every device found for the others, and the gradients of the other parameters.
    module = BACKBONES[CONFIG.model].build(0, 1, CONFIG, nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    others = sum(leaf.size for leaf in leaves) - 2 * CONFIG.dim  # without the table
    assert set(found) == {"all-to-all", "all-gather", "all-reduce"}
    number, moved = found["all-reduce"]
    assert number == 3 and 0 <= moved - 4 * (looked_up * 8 + others) < 128  # and the loss
