"""The same optimizers on Flax NNX, Flax Linen and plain dictionaries."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import sevo_jax
from sevo_jax.tables import table_mask
from tests.helpers import random_graph

GRAPH = random_graph()
ITEMS = jnp.array([[1, 2, 3], [4, 2, 7]])
PATTERNS = [None, "item_embedding", "^item_embedding/embedding$"]
SOLVERS = {
    "sevo_adamw": sevo_jax.sevo_adamw(0.02, GRAPH),
    "sevo_sgd": sevo_jax.sevo_sgd(0.05, GRAPH, tables=PATTERNS[1]),
    "gradient": optax.chain(sevo_jax.sevo(GRAPH, tables=PATTERNS[2]), optax.adamw(0.02)),
}

each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.item_embedding = nnx.Embed(20, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs)])

    def __call__(self, items: jax.Array) -> jax.Array:
        return self.layers[0](self.item_embedding(items))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, items: jax.Array) -> jax.Array:
        return nn.Dense(4, name="layer")(nn.Embed(20, 4, name="item_embedding")(items))


def _dict_params(model: NnxModel) -> dict:
    linear = model.layers[0]
    return {
        "item_embedding": {"embedding": model.item_embedding.embedding[...]},
        "layer": {"kernel": linear.kernel[...], "bias": linear.bias[...]},  # pyright: ignore
    }


def _dict_loss(params: dict) -> jax.Array:
    x = params["item_embedding"]["embedding"][ITEMS]
    y = x @ params["layer"]["kernel"] + params["layer"]["bias"]
    return jnp.mean((y - 1) ** 2)


def _train_dict(solver: optax.GradientTransformation, params: dict) -> dict:
    @jax.jit
    def step(params, state):
        updates, state = solver.update(jax.grad(_dict_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = solver.init(params)
    for _ in range(3):
        params, state = step(params, state)
    return params


@each_solver
def test_nnx_optimizer(solver):
    model = NnxModel(nnx.Rngs(0))
    initial = _dict_params(model)
    optimizer = nnx.Optimizer(model, solver, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(ITEMS) - 1) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
    expected = _train_dict(solver, initial)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), _dict_params(model), expected
    )


def test_nnx_parameters_without_residuals():
    """As the state of the module and of the optimizer have them, and the parts of both."""
    model = NnxModel(nnx.Rngs(0))
    solver = sevo_jax.sevo_adamw(0.02, GRAPH, residual_decay=0.9)
    optimizer = nnx.Optimizer(model, solver, wrt=nnx.Param)
    for _ in range(3):
        grads = nnx.grad(lambda model: jnp.mean((model(ITEMS) - 1) ** 2))(model)
        optimizer.update(model, grads)
    evaluated = sevo_jax.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    for held in (nnx.state(optimizer)["opt_state"], nnx.split(optimizer)[1]):
        again = sevo_jax.eval_params(held, nnx.state(model, nnx.Param))
        jax.tree.map(np.testing.assert_array_equal, again, evaluated)
    (residual,) = [r for _, r in optax.tree.get_all_with_path(optimizer.opt_state, "residual")]
    rows = residual["item_embedding"]["embedding"][...]
    trained = _dict_params(model)
    nnx.update(model, evaluated)
    served = _dict_params(model)
    assert np.abs(rows).max() > 1e-4
    np.testing.assert_array_equal(
        served["item_embedding"]["embedding"], trained["item_embedding"]["embedding"] - rows
    )
    np.testing.assert_array_equal(served["layer"]["kernel"], trained["layer"]["kernel"])


@each_solver
def test_nnx_as_pure_functions(solver):
    model = NnxModel(nnx.Rngs(0))
    graphdef, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)

    @jax.jit
    def step(params, opt_state):
        loss = lambda params: jnp.mean((nnx.merge(graphdef, params)(ITEMS) - 1) ** 2)  # noqa: E731
        updates, opt_state = solver.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = solver.init(params)
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    expected = _train_dict(solver, _dict_params(model))
    np.testing.assert_allclose(
        params["item_embedding"]["embedding"],
        expected["item_embedding"]["embedding"],
        atol=1e-6,
    )


@each_solver
def test_linen_train_state(solver):
    model, initial = LinenModel(), _dict_params(NnxModel(nnx.Rngs(0)))
    assert jax.tree.structure(model.init(jax.random.key(0), ITEMS)["params"]) == (
        jax.tree.structure(initial)
    )
    state = TrainState.create(apply_fn=model.apply, params=initial, tx=solver)

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, ITEMS) - 1) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(3):
        state = step(state)
    expected = _train_dict(solver, initial)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, expected
    )


def test_paths_of_nnx_states_are_those_of_dictionaries():
    state = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    for pattern in PATTERNS:
        mask = table_mask(state, pattern, 20)
        assert jax.tree.leaves(mask) == jax.tree.leaves(
            jax.tree.map(lambda leaf: leaf.shape == (20, 4), state)
        )
    with pytest.raises(ValueError, match=r"layers/0/kernel: \(4, 4\)"):
        table_mask(state, "missing", 20)
