"""Tests that need eight devices; `test_aot.py` runs them in a process that has as many."""

# The step's shapes and what stands for them here are trees of no type.
# pyright: reportArgumentType=false

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import sevo_jax
from benchmarks.aot import collectives
from benchmarks.sharded_step import Size, training_step
from experiments.backbones import BACKBONES, make_optimizer
from experiments.batching import Batch
from experiments.config import Config
from models.packing import pack
from sevo_jax.layouts import Edges
from sevo_jax.sharding import shard_adjacency
from tests.helpers import random_graph

SIZE = Size(num_items=38, num_edges=200)  # 39 rows with the padding: filled up to 40
CONFIG = Config(batch_size=16, max_length=6, dim=8, num_blocks=1, num_negatives=2)
SLOTS = 128


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("rows",))


def batch_of(rng: np.random.Generator) -> Batch:
    """Eight streams of two sequences each, and a stream of different weight for every one."""
    lengths = rng.integers(0, 7, (8, 2))
    stream = jax.vmap(lambda n: pack(jnp.zeros(2, int), n, SLOTS))(jnp.asarray(lengths))
    used = np.asarray(jax.vmap(lambda s: s.used)(stream))
    rows = rng.integers(1, 39, (8, SLOTS, 4)) * used[..., None]
    inputs, targets = jnp.asarray(rows[..., 0]), jnp.asarray(rows[..., 1])
    return Batch(stream, inputs, targets, jnp.asarray(rows[..., 2:]), jnp.asarray(used * 1.0))


def plain_step(config: Config, adjacency: Any, params: Any, state: Any, batch: Any, key: Any):
    """The same step on one device, one stream after the other, with plain indexing."""
    backbone = BACKBONES["sasrec"]
    objective: Any = backbone.objective(39, config)
    graphdef = nnx.split(backbone.build(0, 39, config, nnx.Rngs(0)))[0]
    optimizer = optax.with_extra_args_support(make_optimizer(config, adjacency))

    def loss(params: Any) -> jax.Array:
        def weighted(stream: tuple[Batch, jax.Array]) -> jax.Array:
            one, key = stream
            mean = objective.loss(nnx.merge(graphdef, params), one, key, None)
            return mean * one.weights.sum()

        each = jax.lax.map(weighted, (batch, jax.random.split(key, 8)))
        return each.sum() / batch.weights.sum()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params, graph=adjacency)
    return optax.apply_updates(params, updates), state, value


def test_the_step_equals_one_on_one_device():
    with jax.enable_x64(True):
        adjacency = sevo_jax.normalized_adjacency(random_graph(0, 40), layout="edges")
        module = BACKBONES["sasrec"].build(0, 39, CONFIG, nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        state = make_optimizer(CONFIG, adjacency).init(params)
        step, (*places, _, _, _) = training_step(SIZE, mesh(), CONFIG)
        places = jax.tree.map(lambda leaf: leaf.sharding, places)
        actual: tuple[Any, ...] = jax.device_put((params, state), tuple(places))
        expected: tuple[Any, ...] = (params, state)
        plain = jax.jit(functools.partial(plain_step, CONFIG, adjacency))
        graph, rng = shard_adjacency(adjacency, mesh()), np.random.default_rng(0)
        for number in range(2):
            batch, key = batch_of(rng), jax.random.key(number)
            expected = plain(*expected[:2], batch, key)
            actual = step(*actual[:2], batch, key, graph)
        assert actual[2] > 0.1
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        # The steps are 1e-3 long. Adam divides by the gradient, and so raises rounding.
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-8)
        table = actual[0]["item_embedding"]["embedding"]
        assert table.addressable_shards[0].data.shape == (5, 8)


def test_no_collective_holds_more_than_the_batch():
    """Of a table larger than what a batch looks up; the partitioner copies a smaller one."""
    num_rows = 80_000
    step, arguments = training_step(Size(num_rows - 1, 200), mesh(), CONFIG)
    assert isinstance(arguments[-1].local, Edges)
    found = collectives(step.lower(*arguments).compile().as_text())
    looked_up = 8 * 4 * SLOTS  # inputs, targets and two negatives
    table = num_rows * 8 * 4 // 8  # bytes of the rows of one device, or of its columns
    assert found["all-to-all"] == (2, 2 * table)
    # Of the ids; and, in the gradient, of the rows that were looked up.
    assert found["all-gather"] == (2, looked_up * 4 + looked_up * 8 * 4)
    # Of what every device found for the others, and the gradients of the other parameters.
    others = sum(leaf.size for leaf in jax.tree.leaves(arguments[0])) - num_rows * 8
    assert set(found) == {"all-to-all", "all-gather", "all-reduce"}
    number, moved = found["all-reduce"]
    assert number == 2 and 0 <= moved - 4 * (looked_up * 8 + others) < 128  # and the loss


def test_a_batch_that_the_devices_do_not_divide():
    with pytest.raises(ValueError, match="a multiple of the 8 devices, got 12"):
        training_step(SIZE, mesh(), Config(batch_size=12))
