"""Selecting tables by pattern, tuple, mask, function or shape."""

# Optax and jraph type their trees as unions that nothing can be looked up in.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sevo_jax
from sevo_jax.tables import table_groups, table_mask
from tests.helpers import random_graph

PARAMS = {
    "item_embedding": {"embedding": jnp.ones((20, 4))},
    "position": {"embedding": jnp.ones((10, 4))},
    "layers": [{"kernel": jnp.ones((4, 4))}, {"bias": jnp.ones(20)}],
}
MASK = {"item_embedding": True, "position": False, "layers": False}


@pytest.mark.parametrize(
    "tables",
    [
        None,
        "item_embedding",
        "^item.*/embedding$",
        ("item_embedding",),
        MASK,
        lambda params: jax.tree.map(lambda leaf: leaf.shape == (20, 4), params),
        lambda params: MASK,
    ],
)
def test_one_table(tables):
    mask = table_mask(PARAMS, tables, 20)
    assert mask == {
        "item_embedding": {"embedding": True},
        "position": {"embedding": False},
        "layers": [{"kernel": False}, {"bias": False}],
    }


def test_several_tables_share_the_graph():
    params = {"a": jnp.ones((20, 4)), "b": jnp.ones((20, 3)), "c": jnp.ones((4, 4))}
    assert table_groups(params, "^(a|b)$", 20) == [[0], [1]]
    assert table_groups(params, {"a": True, "b": True, "c": False}, 20) == [[0], [1]]


def test_a_tuple_stacks_tables_in_its_order():
    params = {"item": jnp.ones((15, 4)), "user": jnp.ones((5, 4)), "w": jnp.ones((4, 4))}
    assert table_groups(params, ("user", "item"), 20) == [[1, 0]]
    assert table_groups(params, ("item", "user"), 20) == [[0, 1]]


def test_a_bare_table_and_a_tuple_of_parameters():
    assert table_groups(jnp.ones((20, 4)), None, 20) == [[0]]
    assert table_groups((jnp.ones(3), jnp.ones((20, 4))), "^1$", 20) == [[1]]
    assert table_groups((jnp.ones(3), jnp.ones((20, 4))), (False, True), 20) == [[1]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Called:
    """A tree that can be called, as Equinox's modules can."""

    item: Any
    bias: Any

    def __call__(self):
        raise AssertionError


def test_a_mask_that_can_be_called_is_a_mask():
    params = Called(item=jnp.ones((20, 4)), bias=jnp.ones(4))
    assert table_groups(params, Called(item=True, bias=False), 20) == [[0]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Memory:
    key: jax.Array
    value: jax.Array


def test_a_key_called_value_is_part_of_the_path():
    params = {"item": {"key": jnp.ones((20, 4)), "value": jnp.ones((20, 4))}}
    assert table_groups(params, "item/value", 20) == [[1]]
    memory = {"memory": Memory(key=jnp.ones((20, 4)), value=jnp.ones((20, 4)))}
    assert table_groups(memory, "memory/value", 20) == [[1]]
    memory["memory"].key = jnp.ones(3)
    table = sevo_jax.sevo_adamw(0.1, random_graph(), tables="memory/value", residual_decay=0.5)
    _, state = table.update(memory, table.init(memory), memory)
    evaluated = sevo_jax.eval_params(state, memory)["memory"]  # with a placeholder for the key
    assert jnp.abs(evaluated.value - 1).max() > 1e-4 and (evaluated.key == 1).all()


def test_a_tree_without_leaves_passes():
    for empty in ({}, None, optax.MaskedNode(), {"a": optax.MaskedNode()}):
        assert table_groups(empty, None, 20) == []
        assert table_groups(empty, "missing", 20) == []


@pytest.mark.parametrize(
    "tables, error, message",
    [
        ("user", ValueError, r"'user' selects no parameter.*\n.*item_embedding/embedding"),
        ({"item_embedding": False, "position": False, "layers": False}, ValueError, "no param"),
        ("position", ValueError, r"20 nodes, but .* position/embedding \(10, 4\)"),
        ("embedding", ValueError, r"20 nodes, but .* position/embedding \(10, 4\)"),
        ("bias", ValueError, r"Tables have shape \[rows, d\] .* layers/1/bias \(20,\)"),
        (("item", "item"), ValueError, "names a parameter twice: item_.*, item_"),
        (("embedding",), ValueError, "Each of a tuple .* but 2 match 'embedding'"),
        (("item", "user"), ValueError, "Each of a tuple .* but 0 match 'user'"),
        (("item", "kernel"), ValueError, r"20 nodes, but .*\(20, 4\), .*kernel \(4, 4\)"),
        ("item[", ValueError, r"regular expressions, and .item\[. is none: unterminated"),
        (7, TypeError, "takes a path pattern, .* but got 7"),
        ((), TypeError, r"takes a path pattern, .* but got \(\)"),
        (lambda params: None, TypeError, "takes a path pattern, .* but got None"),
        ({"item_embedding": 1}, TypeError, "tree of bools"),
        ({"item": True}, ValueError, "no prefix of the parameter tree"),
    ],
)
@pytest.mark.parametrize("place", ["init", "update"])
def test_errors(tables, error, message, place):
    graph = random_graph()
    for make in (sevo_jax.sevo, functools.partial(sevo_jax.sevo_adamw, 1e-3)):
        solver = make(graph, tables=tables)
        state = make(graph, tables="item").init(PARAMS)
        with pytest.raises(error, match=message):
            if place == "init":
                solver.init(PARAMS)
            else:
                solver.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize(
    "params, found",
    [
        ({"w": jnp.ones((3, 3))}, 0),
        ({"w": jnp.ones((20, 3)), "v": jnp.ones((20, 2))}, 2),
        ({"b": jnp.ones(20), "c": jnp.ones((20, 2, 2))}, 0),
    ],
)
def test_none_wants_exactly_one(params, found):
    with pytest.raises(ValueError, match=rf"shape \[20, d\], but {found} match") as caught:
        sevo_jax.sevo_sgd(0.1, random_graph()).init(params)
    for path in params:
        assert f"  {path}: (" in str(caught.value)


def test_nodes_of_an_overriding_graph_are_checked():
    solver = sevo_jax.sevo(random_graph())
    table = jnp.ones((20, 2))
    with pytest.raises(ValueError, match=r"shape \[21, d\], but 0 match"):
        solver.update(table, solver.init(table), graph=random_graph(num_nodes=21))


def test_other_leaves_pass_through():
    graph = sevo_jax.normalized_adjacency(
        random_graph(), layout="padded"
    )  # equal bits anywhere
    solver = sevo_jax.sevo(graph, tables="item")
    updates, _ = solver.update(PARAMS, solver.init(PARAMS))
    assert isinstance(updates, dict)
    assert updates["layers"] == PARAMS["layers"]
    assert updates["position"] == PARAMS["position"]
    expected = sevo_jax.smooth(graph, jnp.ones((20, 4)))
    np.testing.assert_array_equal(updates["item_embedding"]["embedding"], expected)
