"""LightGCN against a slow propagation from neighbour to neighbour."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import LightGCN
from models.lightgcn import INIT_STD
from sevo_jax import bipartite_graph, normalized_adjacency
from tests.models.toys import (
    PRECISIONS,
    abstract,
    assert_normal,
    assert_same_tree,
    initial_params,
    paths,
    precision,
    random_params,
)

NUM_USERS, NUM_ITEMS, DIM = 4, 5, 3
# User 0 chose item 1 twice; user 3 and item 4 have no edge.
USERS, ITEMS = [0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 2, 3]
GRAPH: Any = bipartite_graph(USERS, ITEMS, NUM_USERS, NUM_ITEMS)
NEIGHBOURS = {0: [0, 1], 1: [1, 2], 2: [3], 3: []}


def build(dtype="float32", **options) -> LightGCN:
    module = abstract(
        lambda rngs: LightGCN(NUM_ITEMS, NUM_USERS, dim=DIM, **options, rngs=rngs)
    )
    module.user_embedding.dtype = module.item_embedding.dtype = jnp.dtype(dtype)
    return module


def propagation(module: LightGCN):
    graphdef = nnx.split(module)[0]
    return jax.jit(lambda params, graph: nnx.merge(graphdef, params).propagate(graph))


def slow_propagation(params, num_layers):
    """Equation 3 of the paper for one node at a time, then the mean of the layers."""
    users, items = (
        np.asarray(params[name]["embedding"], float)
        for name in ("user_embedding", "item_embedding")
    )
    chosen_by = {i: [u for u in NEIGHBOURS if i in NEIGHBOURS[u]] for i in range(NUM_ITEMS)}
    layers = [(users, items)]
    for _ in range(num_layers):
        users, items = layers[-1]
        new_users, new_items = np.zeros_like(users), np.zeros_like(items)
        for u, chosen in NEIGHBOURS.items():
            for i in chosen:
                norm = math.sqrt(len(chosen)) * math.sqrt(len(chosen_by[i]))
                new_users[u] += items[i] / norm
                new_items[i] += users[u] / norm
        layers.append((new_users, new_items))
    return [np.mean(layer, axis=0) for layer in zip(*layers, strict=True)]


@pytest.mark.parametrize(("dtype", "atol"), PRECISIONS)
@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_propagation(dtype, atol, num_layers):
    """A repeated choice counts once; nodes without an edge keep their own layer alone."""
    with precision(dtype):
        module = build(dtype, num_layers=num_layers)
        params = random_params(module, dtype)
        users, items = propagation(module)(params, GRAPH)
        assert users.dtype == items.dtype == dtype
        expected_users, expected_items = slow_propagation(params, num_layers)
        np.testing.assert_allclose(users, expected_users, rtol=0, atol=atol)
        np.testing.assert_allclose(items, expected_items, rtol=0, atol=atol)
        own = params["user_embedding"]["embedding"][3] / (num_layers + 1)
        np.testing.assert_allclose(users[3], own, rtol=1e-6)


@pytest.mark.parametrize("more_users, more_items", [(1, 0), (0, -1)])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_graph_of_another_size_is_refused(more_users, more_items, prepared):
    module = LightGCN(NUM_ITEMS, NUM_USERS, dim=DIM, rngs=nnx.Rngs(0))
    graph: Any = bipartite_graph([0], [0], NUM_USERS + more_users, NUM_ITEMS + more_items)
    graph = normalized_adjacency(graph) if prepared else graph
    with pytest.raises(ValueError, match="`graph` must have [0-9]+ nodes, the users and then"):
        module.propagate(graph)


@pytest.mark.parametrize("layout", ["edges", "rows", "dense"])
def test_a_prepared_adjacency_propagates_alike(layout):
    module = build(num_layers=3)
    params, run = random_params(module), propagation(module)
    users, items = np.array([(u, i) for u, chosen in NEIGHBOURS.items() for i in chosen]).T
    graph: Any = bipartite_graph(users, items, NUM_USERS, NUM_ITEMS)
    prepared = normalized_adjacency(graph, layout=layout)

    def loss(params, graph):
        users, items = run(params, graph)
        return jnp.sum(users**2) + jnp.sum(users[:2] @ items.T)

    assert_same_tree(run(params, prepared), run(params, GRAPH), 1e-6)
    actual, expected = (jax.jit(jax.grad(loss))(params, one) for one in (prepared, GRAPH))
    assert_same_tree(actual, expected, 1e-5)


def test_square_roots_of_the_degrees_stay():
    """They are the fixed point of the normalised adjacency, whatever the number of layers."""
    module = build(num_layers=2)
    degrees = np.bincount(np.asarray(GRAPH.receivers), minlength=NUM_USERS + NUM_ITEMS)
    table = np.repeat(np.sqrt(degrees)[:, None], DIM, axis=1).astype("float32")
    params = {
        "user_embedding": {"embedding": table[:NUM_USERS]},
        "item_embedding": {"embedding": table[NUM_USERS:]},
    }
    propagated = np.concatenate(propagation(module)(params, GRAPH))
    np.testing.assert_allclose(propagated, table, rtol=1e-6)


def test_padding_edges_and_order_of_edges():
    """A graph may be padded to a fixed number of edges, for graphs that grow."""
    module = build()
    params, run = random_params(build()), propagation(module)
    order = np.random.default_rng(0).permutation(len(GRAPH.edges))
    last = np.full(4, NUM_USERS + NUM_ITEMS - 1)
    padded = GRAPH._replace(
        edges=np.concatenate([GRAPH.edges[order], np.zeros(4, "float32")]),
        receivers=np.concatenate([GRAPH.receivers[order], last]),
        senders=np.concatenate([GRAPH.senders[order], last]),
        n_edge=GRAPH.n_edge + 4,
    )
    for actual, expected in zip(run(params, padded), run(params, GRAPH), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_gradients_reach_as_far_as_the_layers():
    """One choice by user 2, of item 3, is a graph of its own; the others hang together."""
    reach = {}
    for num_layers in (1, 3):
        module = build(num_layers=num_layers)
        run, params = propagation(module), random_params(module)

        @jax.jit
        @jax.grad
        def gradient(params, run=run):
            users, items = run(params, GRAPH)
            return users[0] @ items[0]

        gradients = gradient(params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        reach[num_layers] = [
            np.flatnonzero(np.any(gradients[name]["embedding"], axis=1)).tolist()
            for name in ("user_embedding", "item_embedding")
        ]
    assert reach == {1: [[0], [0, 1]], 3: [[0, 1], [0, 1, 2]]}


def test_scores_of_propagated_rows():
    module = build()
    users, items = propagation(module)(random_params(module), GRAPH)
    every = [[user @ item for item in np.asarray(items)] for user in np.asarray(users)]
    np.testing.assert_allclose(module.score_all(users, items), every, rtol=1e-5)
    np.testing.assert_allclose(module.score(users, items[:4]), np.diag(every), rtol=1e-5)
    assert module.num_special == 0


def test_initial_values():
    params = initial_params(lambda rngs: LightGCN(120, 80, dim=16, rngs=rngs))
    assert paths(params) == ["item_embedding/embedding", "user_embedding/embedding"]
    assert params["item_embedding"]["embedding"].shape == (120, 16)
    assert params["user_embedding"]["embedding"].shape == (80, 16)
    for leaf in jax.tree.leaves(params):
        assert_normal(leaf, INIT_STD)
