"""Tests that need eight devices; `test_sharding.py` runs them in a process that has as many."""

# Optax and jraph type their trees as unions that nothing can be looked up in.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sevo_jax
from sevo_jax.sharding import row_shardings, shard_adjacency
from tests.helpers import random_graph

SOLVER_KWARGS: dict[str, Any] = {"tables": "item", "beta": 0.9, "weight_decay": 0.01}
NUM_NODES, DIM, STEPS = 40, 16, 4


def mesh(*shape: int, types: Any = AxisType.Auto) -> jax.sharding.Mesh:
    names = ("rows", "more")[: len(shape)]
    devices = jax.devices()[: math.prod(shape)]
    kinds = types if isinstance(types, tuple) else (types,) * len(shape)
    return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)


def problem() -> tuple[Any, dict[str, jax.Array], jax.Array]:
    """A graph, parameters in float64, and the ids `[STEPS, 16, 3]` of a few batches."""
    rng = np.random.default_rng(0)
    params = {
        "item": jnp.asarray(rng.normal(size=(NUM_NODES, DIM))),
        "bias": jnp.asarray(rng.normal(size=DIM)),
    }
    ids = jnp.asarray(rng.integers(0, NUM_NODES // 2, (STEPS, 16, 3)))
    return sevo_jax.normalized_adjacency(random_graph(0, NUM_NODES)), params, ids


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_the_second_step_compiles_nothing(types):
    graph, params, _ = problem()
    graph = shard_adjacency(graph, mesh(8, types=types))
    solver = sevo_jax.sevo_adamw(0.03, graph)
    state = solver.init(params)
    params, state = jax.device_put((params, state), row_shardings((params, state), graph))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = solver.update(params, state, params)
        return optax.apply_updates(params, updates), state

    step(*step(params, state))
    assert step._cache_size() == 1


def train(graph: Any, params: Any, batches: Any, shardings: Any = None) -> tuple[Any, Any]:
    """Parameters and optimizer state after the steps of `batches`."""
    solver = sevo_jax.sevo_adamw(0.03, graph, **SOLVER_KWARGS)
    state = solver.init(params)
    if shardings is not None:
        shardings = shardings((params, state))
        params, state = jax.device_put((params, state), shardings)

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        state, positive, negative = jnp.moveaxis(params["item"][ids] + params["bias"], 1, 0)
        return jax.nn.softplus((state * (negative - positive)).sum(-1)).mean()

    def step(params: Any, state: Any, ids: jax.Array, graph: Any) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, ids)
        updates, state = solver.update(grads, state, params, graph=graph)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, out_shardings=shardings)
    for ids in batches:
        params, state = jitted(params, state, ids, graph)
    assert jitted._cache_size() == 1
    return params, state


def assert_trees_close(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-12)


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """Kind and size in bytes of the result, on each device, of every collective."""
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text())
    sizes = {"f32": 4, "f64": 8}
    return [
        (kind, sum(sizes[t] * eval(dims.replace(",", "*")) for t, dims in _shapes(shapes)))
        for shapes, kind in found
    ]


def _shapes(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(\w+)\[([\d,]+)\]", text)


@jax.jit
def every_psi(graph: Any, x: jax.Array, beta: jax.Array, betas: jax.Array) -> dict[str, Any]:
    def smooth(x: jax.Array, **kwargs: Any) -> jax.Array:
        return sevo_jax.smooth(graph, x, **kwargs)

    def energy(x: jax.Array) -> jax.Array:
        return (smooth(x, beta=betas) ** 2).sum()

    return {
        "traced beta": smooth(x, beta=beta),
        "iterative, by column": smooth(x, beta=betas, method="iterative", num_layers=2),
        "identity": smooth(x, beta=0.5, isolated="identity", rescale=False),
        "no layer": smooth(x, beta=0.5, num_layers=0),
        "exact": smooth(x, beta=0.5, method="exact"),
        "bfloat16": smooth(x.astype(jnp.bfloat16), beta=betas),
        "gradient": jax.grad(energy)(x),
        "vmap": jax.vmap(lambda beta: smooth(x, beta=beta))(jnp.stack([beta, beta / 2])),
        "one product": graph.matmul(x),
        "smoothness": sevo_jax.smoothness(graph, x)[None],
    }


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
    "layout, shape, types, num_nodes, d",
    [
        ("rows", (8,), AUTO, 40, 16),
        ("edges", (2, 4), EXPLICIT, 40, 5),  # columns are filled up
        ("rows", (8,), AUTO, 41, 3),  # rows cannot be split
        ("dense", (8,), AUTO, 41, 16),
        ("rows", (2, 4), (AUTO, EXPLICIT), 40, 16),
        ("edges", (2, 4), (EXPLICIT, AUTO), 40, 16),
    ],
)
def test_psi_equals_one_device(layout, shape, types, num_nodes, d, x64):
    adjacency = sevo_jax.normalized_adjacency(random_graph(0, num_nodes), layout=layout)
    graph = shard_adjacency(adjacency, mesh(*shape, types=types))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(num_nodes, d)))
    split = jax.device_put(x, row_shardings(x, graph))
    assert split.is_fully_replicated == (num_nodes == 41)
    betas = (jnp.float64(0.9), jnp.linspace(0, 0.99, d))
    expected, actual = every_psi(adjacency, x, *betas), every_psi(graph, split, *betas)
    assert actual["bfloat16"].dtype == jnp.bfloat16
    assert_trees_close(actual, expected)
    if not isinstance(types, tuple):  # along axes of both kinds the compiler decides
        assert actual["traced beta"].sharding.is_equivalent_to(split.sharding, 2)


@pytest.mark.parametrize("shape, axes", [((8,), None), ((2, 4), "more")])
def test_training_equals_one_device(shape, axes, x64):
    """Moments included; and everything stays where `row_shardings` has put it."""
    adjacency, params, batches = problem()
    graph = shard_adjacency(adjacency, mesh(*shape), axes=axes)
    by_batch = NamedSharding(graph.mesh, PartitionSpec("rows"))
    split = [jax.device_put(ids, by_batch) for ids in batches]
    actual = train(graph, params, split, lambda tree: row_shardings(tree, graph))
    expected = train(adjacency, params, batches)
    assert_trees_close(actual, expected)
    for leaf in jax.tree.leaves(actual):
        assert leaf.is_fully_replicated == (leaf.shape != (NUM_NODES, DIM))
        rows = NUM_NODES // (8 if axes is None else 4)
        if leaf.shape == (NUM_NODES, DIM):
            assert leaf.addressable_shards[0].data.shape == (rows, DIM)


def test_moments_and_sums_begin_where_the_table_lies():
    graph = shard_adjacency(random_graph(0, NUM_NODES), mesh(8))
    table = jnp.ones((NUM_NODES, DIM))
    table = jax.device_put(table, row_shardings(table, graph))
    state = sevo_jax.sevo_adamw(0.1, graph, every=2).init(table)
    tables = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == table.shape]
    assert len(tables) == 3
    assert all(leaf.sharding.is_equivalent_to(table.sharding, 2) for leaf in tables)


@pytest.mark.parametrize("types", [AUTO, EXPLICIT])
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("placed", [True, False])
def test_stacked_tables_stay_whole(types, jit, placed, x64):
    graph = sevo_jax.bipartite_graph(np.arange(15), np.arange(15), 15, 25)
    params = {"user": jnp.ones((15, 8)), "item": jnp.ones((25, 8))}
    sharded = shard_adjacency(graph, mesh(8, types=types))
    places = row_shardings(params, sharded)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(places))

    def trained(graph: Any, params: Any) -> Any:
        solver = sevo_jax.sevo_adamw(0.1, graph, tables=("user", "item"))
        update = jax.jit(solver.update) if jit else solver.update
        return update(params, solver.init(params), params)[0]

    given = jax.device_put(params, places) if placed else params
    assert_trees_close(trained(sharded, given), trained(graph, params))


@pytest.mark.parametrize("how", [{}, {"method": "exact"}])
@pytest.mark.parametrize("types", [AUTO, EXPLICIT])
def test_second_call_outside_of_jit_compiles_nothing(types, how, caplog):
    graph = shard_adjacency(random_graph(0, NUM_NODES), mesh(8, types=types))
    table = jnp.ones((NUM_NODES, 19))
    table = jax.device_put(table, row_shardings(table, graph))
    with jax.log_compiles():
        sevo_jax.smooth(graph, table, **how)
        assert "Compiling" in caplog.text
        caplog.clear()
        sevo_jax.smooth(graph, table, **how)
        assert "Compiling" not in caplog.text


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec(None, "rows"), None])
def test_a_table_that_lies_elsewhere_on_an_explicit_mesh_is_brought(spec, x64):
    graph, devices = random_graph(0, NUM_NODES), mesh(8, types=EXPLICIT)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(NUM_NODES, DIM)))
    placed = x if spec is None else jax.device_put(x, NamedSharding(devices, spec))
    y = jax.jit(sevo_jax.smooth)(shard_adjacency(graph, devices), placed)
    np.testing.assert_allclose(np.asarray(y), sevo_jax.smooth(graph, x), atol=1e-12)
    if spec is not None:
        assert y.sharding.is_equivalent_to(placed.sharding, 2)


def test_split_rows_and_a_graph_that_is_not_split_are_refused():
    graph, devices = random_graph(0, NUM_NODES), mesh(8, types=EXPLICIT)
    x = jax.device_put(jnp.ones((NUM_NODES, 2)), NamedSharding(devices, PartitionSpec("rows")))
    with pytest.raises(ValueError, match="`smooth` got `x` with rows .* `sevo_jax.sharding.sh"):
        jax.jit(sevo_jax.smooth)(sevo_jax.normalized_adjacency(graph), x)


@pytest.mark.parametrize("split", [PartitionSpec(None, None, "rows"), PartitionSpec("rows")])
def test_edges_in_a_shard_map_of_ones_own(split, x64):
    """Columns or tables split, with and without `vmap` and derivatives."""
    adjacency = sevo_jax.normalized_adjacency(random_graph(0, NUM_NODES), layout="edges")
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(8, NUM_NODES, DIM)))

    def slopes(adjacency: Any, xs: jax.Array) -> jax.Array:
        return jax.grad(
            lambda x: (jax.vmap(sevo_jax.smooth, (None, 0))(adjacency, x) ** 3).sum()
        )(xs)

    ours = jax.shard_map(
        slopes, mesh=mesh(8), in_specs=(PartitionSpec(), split), out_specs=split
    )
    np.testing.assert_allclose(jax.jit(ours)(adjacency, xs), slopes(adjacency, xs), atol=1e-12)


def test_edges_under_vmap_of_tables_on_an_explicit_mesh(x64):
    adjacency = sevo_jax.normalized_adjacency(random_graph(0, NUM_NODES), layout="edges")
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(8, NUM_NODES, DIM)))
    each = jax.jit(jax.vmap(sevo_jax.smooth, (None, 0)))
    expected = each(adjacency, xs)
    devices = mesh(8, types=AxisType.Explicit)
    with jax.set_mesh(devices):
        whole, by_table = (
            NamedSharding(devices, spec) for spec in (PartitionSpec(), PartitionSpec("rows"))
        )
        y = each(jax.device_put(adjacency, whole), jax.device_put(xs, by_table))
        assert y.sharding.spec == PartitionSpec("rows", None, None)
    np.testing.assert_allclose(y, expected, atol=1e-12)


def _collectives_of_psi(
    num_nodes: int, d: int, num_layers: int, method: str = "neumann", **kwargs: Any
):
    graph = shard_adjacency(random_graph(0, num_nodes), mesh(8), **kwargs)
    x = jnp.zeros((num_nodes, d))
    x = jax.device_put(x, row_shardings(x, graph))
    smooth = jax.jit(sevo_jax.smooth, static_argnames=("num_layers", "method"))
    beta = jnp.linspace(0, 0.9, d)
    lowered = smooth.lower(graph, x, beta=beta, num_layers=num_layers, method=method)
    return collectives(lowered.compile())


@pytest.mark.parametrize("num_layers, method", [(1, "neumann"), (5, "neumann"), (0, "exact")])
def test_two_collectives_whatever_the_number_of_layers(num_layers, method):
    size = 40 * 16 * 4 // 8  # a share of rows, or a share of columns, in float32
    assert _collectives_of_psi(40, 16, num_layers, method) == [("all-to-all", size)] * 2


def test_collectives_where_the_sizes_do_not_divide():
    filled = 40 * 8 * 4 // 8  # 5 columns are filled up to 8
    assert _collectives_of_psi(40, 5, 3) == [("all-to-all", filled)] * 2
    assert _collectives_of_psi(41, 16, 3) == [("all-gather", 41 * 16 * 4)]


def test_small_tables_need_none():
    assert _collectives_of_psi(40, 16, 3, min_rows=41) == []
    assert len(_collectives_of_psi(40, 16, 3, min_rows=40)) == 2


@pytest.mark.skipif("CHECKPOINT" not in os.environ, reason="run by test_sharding.py")
def test_checkpoint_of_eight_devices_restores_on_four(x64):
    """`test_sharding.py` then restores it on one."""
    adjacency, params, batches = problem()
    on = {n: shard_adjacency(adjacency, mesh(n)) for n in (8, 4)}
    trained = train(on[8], params, batches, lambda tree: row_shardings(tree, on[8]))
    path = Path(os.environ["CHECKPOINT"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, trained)
    restored = restore(path, lambda tree: row_shardings(tree, on[4]))
    assert_trees_close(restored, trained)
    assert restored[0]["item"].addressable_shards[0].data.shape == (NUM_NODES // 4, DIM)


def restore(path: Path, shardings: Any) -> Any:
    """The checkpoint of what `train` returns, placed by `shardings`."""
    adjacency, params, _ = problem()
    solver = sevo_jax.sevo_adamw(0.03, adjacency, **SOLVER_KWARGS)
    shapes = jax.eval_shape(lambda: (params, solver.init(params)))
    target = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings(shapes),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)
