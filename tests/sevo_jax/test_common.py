"""One suite for every optimizer and placement: adding one is adding a row in helpers.py."""

# Optax and jraph type their trees as unions that nothing can be looked up in.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sevo_jax
from sevo_jax.smoothing import coefficients_of
from tests.helpers import PLACEMENTS, random_graph

GRAPH = random_graph()
ADJACENCY = sevo_jax.normalized_adjacency(GRAPH)
ALIASES = {
    "sevo_adamw": functools.partial(sevo_jax.sevo_adamw, weight_decay=0.01),
    "sevo_adam": functools.partial(sevo_jax.sevo_adam, weight_decay=0.01),
    "sevo_sgd": functools.partial(sevo_jax.sevo_sgd, weight_decay=0.01),
}

each_placement = pytest.mark.parametrize("name", PLACEMENTS)
each_alias = pytest.mark.parametrize("name", ALIASES)


def _make(name, **kwargs):
    return PLACEMENTS[name](ADJACENCY, tables="item", **kwargs)


def _params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "item": jnp.asarray(rng.normal(size=(20, 3)), dtype),
        "bias": jnp.asarray(rng.normal(size=3), dtype),
    }


def _grads(steps, dtype=jnp.float32, seed=1):
    rng = np.random.default_rng(seed)
    rows = rng.random((steps, 20, 1)) < 0.5
    return {
        "item": jnp.asarray(rng.normal(size=(steps, 20, 3)) * rows, dtype),
        "bias": jnp.asarray(rng.normal(size=(steps, 3)), dtype),
    }


def _train(solver, params, grads, **extra):
    """A scan over the steps of `grads`."""

    def step(carry, grad):
        params, state = carry
        updates, state = solver.update(grad, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, solver.init(params)), grads)[0]


def _types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def _pick(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@each_placement
def test_converges(name):
    solver, target = _make(name, beta=0.5), _params(seed=2)

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = solver.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, solver.init(params)), length=1500)[0][0]

    assert loss(_params()) > 50
    _assert_close(train(_params()), target, rtol=0.03, atol=0.03)


@each_placement
def test_second_step_and_second_graph_compile_nothing(name):
    solver, params, grads = _make(name), _params(), _pick(_grads(1), 0)
    graphs = [
        sevo_jax.normalized_adjacency(random_graph(seed), capacity=400) for seed in (0, 1)
    ]

    @jax.jit
    def step(params, state, graph):
        updates, state = solver.update(grads, state, params, graph=graph, unknown=1)
        return optax.apply_updates(params, updates), state

    results = []
    for graph in graphs:
        result, state = step(params, jax.jit(solver.init)(params), graph)
        result, state = step(result, state, graph)
        results.append(result)
    assert step._cache_size() == 1
    assert np.abs(results[0]["item"] - results[1]["item"]).max() > 1e-4
    np.testing.assert_array_equal(results[0]["bias"], results[1]["bias"])


@pytest.mark.parametrize("dtype_name", ["bfloat16", "float32", "float64"])
@each_placement
def test_keeps_types_and_shapes(name, dtype_name):
    with jax.enable_x64(dtype_name == "float64"):
        solver, params = _make(name), _params(dtype_name)
        grads = _pick(_grads(1, dtype_name), 0)
        if ("every" in name or "residual" in name) and dtype_name == "bfloat16":
            pytest.skip("refused: test_what_is_taken_back_is_refused_in_half_precision")
        state = solver.init(params)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        updates, new_state = jax.eval_shape(solver.update, grads, state, params)
        assert _types(updates) == _types(params)
        assert _types(new_state) == _types(state)

        def maybe(flag):
            update = lambda state: solver.update(grads, state, params)[1]  # noqa: E731
            return jax.lax.cond(flag, update, lambda state: state, state)

        assert _types(jax.eval_shape(maybe, True)) == _types(state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@each_alias
def test_schedules_keep_half_precision(name, dtype):
    """Most schedules return float32 arrays; `apply_if_finite` wants the types of gradients."""
    rate = optax.linear_schedule(1e-2, 1e-3, 10)
    decay = optax.exponential_decay(0.1, 5, 0.5)
    solver = ALIASES[name](rate, ADJACENCY, tables="item", weight_decay=decay)
    solver = optax.apply_if_finite(solver, 3)
    params, grads = _params(dtype), _grads(3, dtype)
    trained, state = _train(solver, params, grads)
    assert _types(trained) == _types(params)
    assert _types(state) == _types(solver.init(params))


@each_placement
def test_tree_map_params(name):
    solver = _make(name)
    state = solver.init(_params())
    mapped = optax.tree.map_params(solver, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(mapped), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new, old + (old.ndim > 0))  # moments but not counts


@each_placement
def test_scan_equals_steps_and_vmap_equals_a_loop(name):
    """Seeds as a `vmap` axis around a scan, with the graph shared and traced."""
    solver = _make(name)
    seeds = [_params(seed=seed) for seed in range(3)]
    batches = [_grads(4, seed=seed) for seed in range(3)]

    @jax.jit
    def train(params, grads, graph):
        return jax.vmap(lambda p, g: _train(solver, p, g, graph=graph))(params, grads)

    trained, states = train(_stack(seeds), _stack(batches), ADJACENCY)
    update = jax.jit(solver.update)
    for s, (params, grads) in enumerate(zip(seeds, batches, strict=True)):
        state = solver.init(params)
        for t in range(4):
            updates, state = update(_pick(grads, t), state, params)
            params = optax.apply_updates(params, updates)
        _assert_close(_pick(trained, s), params)
        _assert_close(_pick(states, s), state)


@each_placement
def test_multi_steps(name):
    """Two halves of a batch, accumulated, are the step on their mean."""
    solver, grads = _make(name), _grads(2)
    halves, _ = _train(optax.MultiSteps(solver, every_k_schedule=2), _params(), grads)
    mean = jax.tree.map(lambda g: g.mean(axis=0, keepdims=True), grads)
    whole, _ = _train(solver, _params(), mean)
    _assert_close(halves, whole)


@each_placement
def test_apply_if_finite_and_partition(name):
    solver, grads = _make(name), _grads(3)
    expected, _ = _train(solver, _params(), grads)
    guarded, _ = _train(optax.apply_if_finite(solver, 5), _params(), grads)
    _assert_close(guarded, expected)
    labels = {"item": "ours", "bias": "frozen"}
    split = optax.partition({"ours": solver, "frozen": optax.set_to_zero()}, labels)
    frozen, _ = _train(split, _params(), grads)
    np.testing.assert_allclose(frozen["item"], expected["item"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(frozen["bias"], _params()["bias"])


@each_alias
def test_inject_hyperparams(name):
    """Also beta, weight decay and schedules; only the number of layers must be static."""
    factory, grads = ALIASES[name], _grads(3)
    rate = optax.linear_schedule(0.1, 0.01, 3)
    kwargs = dict(graph=ADJACENCY, tables="item", beta=0.9)
    inject = optax.inject_hyperparams(factory, static_args=("num_layers",))
    injected, state = _train(inject(learning_rate=rate, **kwargs), _params(), grads)
    expected, inner = _train(factory(learning_rate=rate, **kwargs), _params(), grads)
    _assert_close(injected, expected)
    rows = jnp.stack(coefficients_of(0.9, 3, "neumann", True))
    own = inject(rate, ADJACENCY, tables="item", coefficients=rows)
    _assert_close(_train(own, _params(), grads)[0], expected)
    assert {"learning_rate", "beta", "weight_decay"} <= set(state.hyperparams)
    raw = inject(learning_rate=0.1, graph=GRAPH)  # prepared under the trace
    jax.jit(raw.update)(_params(), jax.jit(raw.init)(_params()), _params())
    with pytest.raises(ValueError, match="static_args=\\('num_layers',\\)"):
        optax.inject_hyperparams(factory)(0.1, GRAPH).init(_params())
    with pytest.raises(ValueError, match="static_args=\\('num_layers', 'every'\\)"):
        inject(0.1, GRAPH, every=2).init(_params())


@each_alias
def test_a_constant_schedule_equals_the_constant(name):
    constant = ALIASES[name](0.1, GRAPH, tables="item", beta=0.7)
    scheduled = ALIASES[name](
        optax.constant_schedule(0.1), GRAPH, tables="item", beta=optax.constant_schedule(0.7)
    )
    expected, _ = _train(constant, _params(), _grads(3))
    actual, _ = _train(scheduled, _params(), _grads(3))
    _assert_close(actual, expected)


@each_alias
def test_an_ablation_is_a_vmap(name):
    """beta, L and the learning rate as traced values: one program for all."""
    grads = _grads(3)

    def train(rate, **kwargs):
        solver = ALIASES[name](rate, ADJACENCY, tables="item", **kwargs)
        return _train(solver, _params(), grads)[0]["item"]

    @jax.jit
    @jax.vmap
    def sweep(rate, beta, num_layers):
        rows = coefficients_of(beta, num_layers, "neumann", True, most_layers=4)
        return train(rate, coefficients=jnp.stack(rows))

    rates, betas = np.float32([0.1, 0.02, 0.03]), np.float32([0, 0.5, 0.99])
    layers = 3, 1, 4
    together = sweep(rates, betas, jnp.array(layers))
    for rate, beta, num_layers, table in zip(rates, betas, layers, together, strict=True):
        alone = train(rate, beta=beta, num_layers=num_layers)
        np.testing.assert_allclose(table, alone, atol=2e-5)


@each_alias
def test_without_smoothing_it_is_the_plain_optimizer(name):
    plain = {
        "sevo_adamw": optax.adamw(0.1, weight_decay=0.01),
        "sevo_adam": optax.chain(optax.add_decayed_weights(0.01), optax.adam(0.1)),
        "sevo_sgd": optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, 0.9)),
    }[name]
    kwargs = {"correct_moments": False} if name == "sevo_adamw" else {}
    for off in ({"beta": 0.0}, {"num_layers": 0}):
        ours = ALIASES[name](0.1, GRAPH, tables="item", **off, **kwargs)
        actual, _ = _train(ours, _params(), _grads(3))
        _assert_close(actual, _train(plain, _params(), _grads(3))[0])
