"""The smoother and the corrected Adam as gradient transformations."""

# Optax and jraph type their trees as unions that nothing can be looked up in.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, traverse_util

import sevo_jax
from sevo_jax import transforms
from tests.helpers import (
    dense,
    of_tables,
    random_graph,
    reference_adamw,
    reference_normalized,
)

SETTINGS = dict(lr=0.01, beta=0.9, num_layers=3, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.1)


def _sparse_grads(steps: int, seed: int = 0) -> np.ndarray:
    """Gradients `[steps, 20, 3]` in which about half of the rows are zero."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(steps, 20, 3)) * (rng.random((steps, 20, 1)) < 0.5)


def _run(solver, grads, params, **extra):
    state = solver.init(params)
    update = jax.jit(solver.update)
    for grad in grads:
        updates, state = update(grad, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def _sevo_adamw(graph, **kwargs):
    settings = {k: v for k, v in SETTINGS.items() if k != "lr"} | kwargs
    return sevo_jax.sevo_adamw(SETTINGS["lr"], graph, **settings)


def test_adamw_equals_the_loops_of_the_official_code(x64):
    graph, grads = random_graph(), _sparse_grads(25)
    table = np.random.default_rng(1).normal(size=(20, 3))
    adjacency = reference_normalized(dense(graph))
    expected, m, v = reference_adamw(adjacency, table, grads, **SETTINGS)[-1]
    params, state = _run(_sevo_adamw(graph), jnp.asarray(grads), jnp.asarray(table))
    np.testing.assert_allclose(params, expected, atol=1e-7)  # float32 edge weights
    moments = of_tables(state, "mu_hat")
    np.testing.assert_allclose(moments * (1 - SETTINGS["b1"] ** 25), m, atol=1e-13)
    moments = of_tables(state, "nu_hat")
    np.testing.assert_allclose(moments * (1 - SETTINGS["b2"] ** 25), v, atol=1e-13)


@pytest.mark.parametrize("eps_root", [0.0, 0.1])
def test_dense_gradients_give_plain_adam(dtype, eps_root):
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(10, 6, 3)), dtype)
    params = jnp.zeros((6, 3), dtype)
    ours = sevo_jax.scale_by_corrected_adam(0.9, 0.99, 1e-6, eps_root)
    theirs = optax.scale_by_adam(0.9, 0.99, 1e-6, eps_root)
    state, other = ours.init(params), theirs.init(params)
    for grad in grads:
        updates, state = jax.jit(ours.update)(grad, state)
        expected, other = jax.jit(theirs.update)(grad, other)
        np.testing.assert_allclose(updates, expected, rtol=200 * jnp.finfo(dtype).eps)


def test_a_row_without_gradient_keeps_its_direction():
    solver = sevo_jax.scale_by_corrected_adam()
    grads = jnp.array([[1.0, -2.0], [3.0, 0.0]])
    state = solver.init(grads)
    first, state = solver.update(grads, state)
    mu, nu = state.mu_hat, state.nu_hat
    for _ in range(5):
        updates, state = solver.update(grads.at[0].set(-0.0), state)
    np.testing.assert_array_equal(updates[0], first[0])
    np.testing.assert_array_equal(state.mu_hat[0], mu[0])  # not even rounded
    np.testing.assert_array_equal(state.nu_hat[0], nu[0])
    assert state.count == 6
    never = solver.init(grads)
    updates, never = solver.update(jnp.zeros((2, 2)), never)
    np.testing.assert_array_equal(updates, 0)


@pytest.mark.parametrize("t", [1, 2, 10, 1000, 10**6])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("b", [0.0, 0.9, 0.98, 0.999, 0.999999])
def test_step_of_the_running_mean_in_float32(b, traced, t):
    decay = jnp.float32(b) if traced else b
    solver = sevo_jax.scale_by_corrected_adam(b1=decay, b2=decay)
    state = solver.init(jnp.zeros((1, 1)))._replace(count=jnp.int32(t - 1))
    _, state = solver.update(jnp.ones((1, 1)), state)
    exact = float(decay)
    expected = (1 - exact) / -np.expm1(t * np.log1p(exact - 1)) if exact else 1.0
    np.testing.assert_allclose(state.mu_hat, expected, rtol=3e-6)


def test_a_decay_for_each_column_in_numpy_and_in_jax():
    decays = np.array([0.0, 0.9, 0.999])
    g = jnp.arange(6.0).reshape(2, 3) + 1
    for kinds in (np.asarray, jnp.asarray):
        solver = sevo_jax.scale_by_corrected_adam(b1=kinds(decays), b2=kinds(decays))
        _, state = solver.update(g, solver.init(g))
        _, state = solver.update(2 * g, state)
        old = 1 - (1 - decays) / (1 - decays**2)
        np.testing.assert_allclose(state.mu_hat, old * g + (1 - old) * 2 * g, rtol=3e-6)


def test_count_saturates_instead_of_overflowing():
    solver = sevo_jax.scale_by_corrected_adam()
    state = solver.init(jnp.zeros((1, 1)))._replace(count=jnp.int32(2**31 - 1))
    updates, state = solver.update(jnp.ones((1, 1)), state)
    assert state.count == 2**31 - 1
    assert np.isfinite(updates).all()


def test_moments_of_half_precision_move():
    """A bfloat16 mean with a step of .001 would stop at once; ours is float32."""
    solver = sevo_jax.scale_by_corrected_adam(b2=0.999)
    params = jnp.zeros((2, 2), jnp.bfloat16)
    state = solver.init(params)._replace(count=jnp.int32(100_000))
    for _ in range(10):
        updates, state = solver.update(jnp.ones_like(params), state)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(state.nu_hat, 1 - 0.999**10, rtol=1e-4)


@pytest.mark.parametrize("as_tree", [False, True])
def test_touched_rows_can_be_given(as_tree):
    graph, grads = random_graph(), jnp.asarray(_sparse_grads(6), jnp.float32)
    params = {"item": jnp.ones((20, 3)), "w": jnp.ones(2)}
    solver = _sevo_adamw(graph, tables="item")
    by_zero, by_mask = solver.init(params), solver.init(params)
    for grad in grads:
        tree = {"item": grad, "w": jnp.ones(2)}
        rows = (grad != 0).any(axis=1)
        touched = {"item": rows, "w": True} if as_tree else rows
        expected, by_zero = jax.jit(solver.update)(tree, by_zero, params)
        updates, by_mask = jax.jit(solver.update)(tree, by_mask, params, touched=touched)
        np.testing.assert_allclose(updates["item"], expected["item"], rtol=1e-5, atol=1e-8)
    # The mask decides, not the zeros: a touched row with a zero gradient decays.
    mu = of_tables(by_mask, "mu_hat")["item"]
    everywhere = {"item": jnp.ones(20, bool), "w": True} if as_tree else jnp.ones(20, bool)
    tree = {"item": jnp.zeros((20, 3)), "w": jnp.ones(2)}
    _, state = solver.update(tree, by_mask, params, touched=everywhere)
    decayed = of_tables(state, "mu_hat")["item"]
    assert ((abs(decayed) < abs(mu)) | (mu == 0)).all() and (mu != 0).any()


def test_touched_rows_inside_of_a_partition_of_the_users():
    params = {"item": jnp.ones((20, 3)), "w": jnp.ones(2), "fixed": jnp.ones(2)}
    inner = {"train": _sevo_adamw(random_graph(), tables="item"), "not": optax.set_to_zero()}
    solver = optax.partition(inner, {"item": "train", "w": "train", "fixed": "not"})
    touched = {"item": jnp.arange(20) < 3, "w": True, "fixed": True}
    _, state = solver.update(params, solver.init(params), params, touched=touched)
    (mu,) = jax.tree.leaves(of_tables(optax.tree.get(state, "train"), "mu_hat"))
    np.testing.assert_array_equal((mu != 0).any(axis=1), touched["item"])


@pytest.mark.parametrize("touched", [{"item": np.ones(3, bool)}, [np.ones(3, bool)], "item"])
def test_touched_of_another_structure(touched):
    graph = sevo_jax.item_graph([[0, 1, 2]], num_nodes=3)
    params = {"item": jnp.ones((3, 2)), "w": jnp.ones(2)}
    solver = sevo_jax.sevo_adamw(0.1, graph)
    state = solver.init(params)
    with pytest.raises(ValueError, match="`touched` takes one array of bools, or a tree"):
        solver.update(params, state, params, touched=touched)
    whole = {"item": np.ones(3, bool), "w": 0}
    solver.update(params, state, params, touched=whole)


@pytest.mark.parametrize("touched", [np.ones(19, bool), np.ones(20), np.ones((20, 1), bool)])
def test_bad_touched(touched):
    solver = sevo_jax.scale_by_corrected_adam()
    table = jnp.ones((20, 3))
    with pytest.raises(ValueError, match=r"`touched` takes bools of shape \(20,\)"):
        solver.update(table, solver.init(table), touched=touched)


def test_weight_decay_reaches_rows_without_gradient_and_is_not_smoothed():
    graph = random_graph()
    params = jnp.ones((20, 3))
    params, _ = _run(_sevo_adamw(graph), jnp.zeros((1, 20, 3)), params)
    np.testing.assert_allclose(params, 1 - 0.01 * 0.1, rtol=1e-6)


def test_other_parameters_get_the_plain_optimizer():
    graph, rng = random_graph(), np.random.default_rng(0)
    params = {"item": jnp.ones((20, 3)), "w": jnp.asarray(rng.normal(size=(4, 4)))}
    grads = [{"item": jnp.ones((20, 3)), "w": jnp.asarray(rng.normal(size=(4, 4)))}] * 3
    kwargs = dict(b1=0.8, b2=0.95, eps=1e-5)
    l2 = optax.add_decayed_weights(0.1)
    for ours, theirs in (
        (
            sevo_jax.sevo_adamw(0.01, graph, tables="item", weight_decay=0.1, **kwargs),
            optax.adamw(0.01, weight_decay=0.1, **kwargs),
        ),
        (
            sevo_jax.sevo_adam(0.01, graph, tables="item", weight_decay=0.1, **kwargs),
            optax.chain(l2, optax.adam(0.01, **kwargs)),
        ),
        (
            sevo_jax.sevo_sgd(0.01, graph, tables="item", weight_decay=0.1, nesterov=True),
            optax.chain(l2, optax.sgd(0.01, momentum=0.9, nesterov=True)),
        ),
    ):
        actual, _ = _run(ours, grads, params)
        expected, _ = _run(theirs, grads, params)
        np.testing.assert_allclose(actual["w"], expected["w"], rtol=1e-6)


def test_functions_may_look_at_the_parameters():
    """As those of `optax.adamw` may: at shapes, and by paths as Flax has them."""
    params = {"item": jnp.ones((20, 3)), "w": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    by_path = traverse_util.path_aware_map
    solver = sevo_jax.sevo_adamw(
        0.1,
        random_graph(),
        tables=lambda p: {name: leaf.shape == (20, 3) for name, leaf in p.items()},
        mask=lambda p: by_path(lambda path, leaf: path != ("item",) and leaf.ndim > 1, p),
        weight_decay=0.5,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved, state = _run(solver, [zeros], params)
    for name, expected in {"item": 1.0, "w": 0.95, "bias": 1.0}.items():
        np.testing.assert_allclose(moved[name], expected, rtol=1e-6)
    (moments,) = jax.tree.leaves(of_tables(state, "mu_hat"))
    assert moments.shape == (20, 3)


@pytest.mark.parametrize("as_tree", [True, False])
def test_mask_of_the_weight_decay(as_tree):
    graph, mask = random_graph(), {"item": True, "w": True, "bias": False}
    params = {"item": jnp.ones((20, 3)), "w": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    solver = sevo_jax.sevo_adamw(
        optax.constant_schedule(0.1),
        graph,
        tables="item",
        weight_decay=0.5,
        mask=mask if as_tree else lambda params: {name: mask[name] for name in params},
    )
    grads = jax.tree.map(lambda p: jnp.zeros((1, *p.shape)), params)
    moved, _ = _run(solver, [jax.tree.map(lambda g: g[0], grads)], params)
    for name, decays in mask.items():
        np.testing.assert_allclose(moved[name], 0.95 if decays else 1.0, rtol=1e-6)
    solver = sevo_jax.sevo_adamw(0.1, graph, tables="item", mask=mask | {"item": False})
    moved, _ = _run(solver, [jax.tree.map(lambda g: g[0], grads)], params)
    np.testing.assert_array_equal(moved["item"], 1.0)


@pytest.mark.parametrize("alias", [sevo_jax.sevo_adam, sevo_jax.sevo_sgd])
def test_without_a_decay_update_needs_no_parameters(alias):
    graph = sevo_jax.normalized_adjacency(
        random_graph(), layout="padded"
    )  # equal bits anywhere
    table, solver = jnp.ones((20, 3)), alias(0.1, graph)
    updates, _ = solver.update(table, solver.init(table))
    expected, _ = solver.update(table, solver.init(table), table)
    np.testing.assert_array_equal(updates, expected)


def test_moments_of_python_numbers():
    solver = sevo_jax.scale_by_corrected_adam()
    grads = jax.grad(lambda params: 2 * params["a"])({"a": 1.0})
    updates, _ = solver.update(grads, solver.init({"a": 1.0}))
    np.testing.assert_allclose(updates["a"], 1.0, rtol=1e-6)
    updates, _ = solver.update(grads, solver.init({"a": 1.0}), {"a": 1.0})
    np.testing.assert_allclose(updates["a"], 1.0, rtol=1e-6)


@pytest.mark.parametrize("alias", [sevo_jax.sevo_adam, sevo_jax.sevo_sgd])
def test_parameters_and_gradients_may_be_python_numbers(alias):
    solver = alias(0.1, random_graph(), tables="item", weight_decay=0.5)
    params = {"item": jnp.ones((20, 2)), "scale": 2.0}
    numbers, arrays = (
        solver.update(params | {"scale": scale}, solver.init(params), params)[0]["scale"]
        for scale in (0.25, jnp.float32(0.25))
    )
    np.testing.assert_array_equal(numbers, arrays)


def test_placements_differ():
    """Smoothing Adam's proposal is not smoothing the gradient that Adam then rescales."""
    graph, grads = random_graph(), jnp.asarray(_sparse_grads(3), jnp.float32)
    table = jnp.zeros((20, 3))
    after = sevo_jax.sevo_adamw(0.01, graph, weight_decay=0.0)
    before = optax.chain(sevo_jax.sevo(graph), optax.adamw(0.01, weight_decay=0.0))
    assert np.abs(_run(after, grads, table)[0] - _run(before, grads, table)[0]).max() > 1e-3


def test_stacked_tables_are_smoothed_as_one():
    users, items = np.array([0, 0, 1, 2]), np.array([1, 2, 2, 0])
    graph = sevo_jax.bipartite_graph(users, items, 3, 4)
    rng = np.random.default_rng(0)
    updates = {k: jnp.asarray(rng.normal(size=(n, 2))) for k, n in (("item", 4), ("user", 3))}
    solver = sevo_jax.sevo(graph, tables=("user", "item"))
    smoothed, _ = solver.update(updates, solver.init(updates))
    expected = sevo_jax.smooth(graph, jnp.concatenate([updates["user"], updates["item"]]))
    np.testing.assert_array_equal(smoothed["user"], expected[:3])
    np.testing.assert_array_equal(smoothed["item"], expected[3:])


def test_stacked_tables_of_two_dtypes_keep_them():
    graph = random_graph()
    updates = {"item": jnp.ones((15, 2), jnp.bfloat16), "user": jnp.ones((5, 2))}
    solver = sevo_jax.sevo(graph, tables=("user", "item"))
    smoothed, _ = solver.update(updates, solver.init(updates))
    assert [smoothed[k].dtype for k in updates] == [jnp.bfloat16, jnp.float32]


def test_schedule_for_beta():
    graph, table = random_graph(), jnp.asarray(_sparse_grads(1)[0], jnp.float32)
    schedule = optax.linear_schedule(0.0, 0.9, transition_steps=3)
    solver = sevo_jax.sevo(graph, beta=schedule)
    state = solver.init(table)
    update = jax.jit(solver.update)
    for count in range(5):
        smoothed, state = update(table, state)
        expected = sevo_jax.smooth(graph, table, beta=0.3 * min(count, 3))
        np.testing.assert_allclose(smoothed, expected, atol=1e-6)
    assert state.count == 5


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("tables", ["item|user", ("user", "item")])
def test_every_third_step_smooths_the_sum_of_three(x64, tables, jit):
    """Then the table has moved by psi of all updates; between, by the updates as they are."""
    stacked = isinstance(tables, tuple)
    graph = random_graph(num_nodes=20 if stacked else 10)

    def schedule(count):
        return jnp.where(count < 4, 0.5, 0.9)

    solver = sevo_jax.sevo(graph, tables=tables, beta=schedule, every=3)
    rng = np.random.default_rng(0)
    shapes = {"bias": (3,), "item": (10, 2), "user": (10, 2)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    state, update = solver.init(params), jax.jit(solver.update) if jit else solver.update
    none = jax.tree.map(jnp.zeros_like, params)
    moved = since = none
    for count in range(7):
        new = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        out, state = update(new, state)
        moved = jax.tree.map(jnp.add, moved, out)
        since = jax.tree.map(jnp.add, since, new)
        if (count + 1) % 3:
            jax.tree.map(np.testing.assert_array_equal, out, new)
            continue
        np.testing.assert_array_equal(out["bias"], new["bias"])
        psi = functools.partial(sevo_jax.smooth, graph, beta=schedule(count))
        if stacked:
            both = psi(jnp.concatenate([since["user"], since["item"]]))
            expected = {"user": both[:10], "item": both[10:]}
        else:
            expected = {name: psi(since[name]) for name in ("user", "item")}
        for name, table in expected.items():
            np.testing.assert_allclose(moved[name], table, rtol=0, atol=1e-12)
        moved = since = none
    assert state.count == 7


@pytest.mark.parametrize("rate", [0.01, optax.linear_schedule(0.0, 0.01, 8)])
@pytest.mark.parametrize("alias", [sevo_jax.sevo_adamw, sevo_jax.sevo_adam, sevo_jax.sevo_sgd])
def test_rare_smoothing_holds_each_step_with_its_own_learning_rate(alias, rate, x64):
    """So after the eighth the table stands where psi of every step has brought it."""
    graph, table = random_graph(), jnp.ones((20, 3))
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(8, 20, 3)))
    often, rarely = (
        _run(alias(rate, graph, beta=0.9, weight_decay=0.0, every=every), grads, table)[0]
        for every in (None, 8)
    )
    np.testing.assert_allclose(rarely, often, rtol=0, atol=1e-10)
    assert np.abs(often - table).max() > 1e-3


def test_weight_decay_between_changes_little(x64):
    """By at most the share k eta lambda of the movement."""
    graph, table, every = random_graph(), jnp.ones((20, 3)), 20
    grads = jnp.ones((every, 20, 3))
    often, rarely = (
        _run(sevo_jax.sevo_adamw(0.01, graph, every=k, weight_decay=0.5), grads, table)[0]
        for k in (None, every)
    )
    still = table * (1 - 0.01 * 0.5) ** every  # what the decay alone leaves
    gap, movement = (np.linalg.norm(x) for x in (rarely - often, often - still))
    assert 0 < gap < every * 0.01 * 0.5 * movement


def test_gradients_of_half_precision_do_not_narrow_a_wider_table():
    """The step is float32, as Optax's; and what `every` takes back is what was there."""
    params = {"item": jnp.ones((20, 3)), "bias": jnp.ones(3)}
    grads = {"item": jnp.asarray(_sparse_grads(1)[0], jnp.bfloat16), "bias": jnp.ones(3)}
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    moments = sevo_jax.scale_by_corrected_adam()
    step, expected = (
        moments.update(g, moments.init(params), params)[0]["item"] for g in (grads, wide)
    )
    np.testing.assert_array_equal(step, expected)
    theirs = optax.scale_by_adam()
    theirs = theirs.update(grads, theirs.init(params), params)[0]["item"]
    assert step.dtype == theirs.dtype == jnp.float32

    graph = random_graph()
    solver = sevo_jax.sevo(graph, tables="item", beta=0.9, every=3)
    state, moved = solver.init(params), jnp.zeros((20, 3))
    for _ in range(3):
        updates, state = jax.jit(solver.update)(grads, state, params)
        moved += updates["item"]
    total = 3 * grads["item"].astype(jnp.float32)
    np.testing.assert_allclose(moved, sevo_jax.smooth(graph, total, beta=0.9), atol=1e-6)


def test_complex_parameters_get_the_direction_of_optax():
    grad = jnp.array([1 + 2j, 3 - 1j])
    ours, theirs = sevo_jax.scale_by_corrected_adam(), optax.scale_by_adam()
    step, expected = (s.update(grad, s.init(grad), grad)[0] for s in (ours, theirs))
    np.testing.assert_allclose(step, expected, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.9, jnp.array([0.9, 0.5])])
@pytest.mark.parametrize("tables", ["item|user", ("user", "item")])
def test_residuals_fade_and_are_left_out_of_what_is_evaluated(x64, tables, decay):
    """The evaluated table moves by psi of each update, the trained one is ahead of it by
    R_t, the sum of decay^(t - s) (u_s - psi(u_s))."""
    stacked = isinstance(tables, tuple)
    graph = random_graph(num_nodes=20 if stacked else 10)
    paper = sevo_jax.sevo(graph, tables=tables, beta=optax.linear_schedule(0.5, 0.9, 7))
    solver = sevo_jax.sevo(
        graph, tables=tables, beta=optax.linear_schedule(0.5, 0.9, 7), residual_decay=decay
    )
    rng = np.random.default_rng(0)
    shapes = {"bias": (2,), "item": (10, 2), "user": (10, 2)}
    params = smoothed = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    ahead = params
    states = solver.init(params), paper.init(params)
    for count in range(1, 8):
        new = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        out, state = jax.jit(solver.update)(new, states[0])
        expected, other = jax.jit(paper.update)(new, states[1])
        states = state, other
        params = optax.apply_updates(params, out)
        smoothed = optax.apply_updates(smoothed, expected)
        ahead = {name: decay * ahead[name] + (new[name] - expected[name]) for name in new}
        for name in shapes:
            evaluated = sevo_jax.eval_params(state, params)[name]
            np.testing.assert_allclose(evaluated, smoothed[name], rtol=0, atol=1e-12)
            difference = params[name] - smoothed[name]
            np.testing.assert_allclose(difference, ahead[name], rtol=0, atol=1e-12)
        assert state.count == count
    assert np.abs(ahead["item"]).max() > 0.1 and not ahead["bias"].any()


@pytest.mark.parametrize("alias", [sevo_jax.sevo_adamw, sevo_jax.sevo_adam, sevo_jax.sevo_sgd])
def test_optimizers_without_their_residuals_are_the_papers(alias, x64):
    """With the same gradients; of a parameter that is no table nothing changes at all."""
    graph, params = random_graph(), {"item": jnp.ones((20, 3)), "bias": jnp.ones(3)}
    grads = jnp.asarray(_sparse_grads(6))
    results = []
    for decay in (None, 0.9):
        solver = alias(0.1, graph, tables="item", residual_decay=decay, weight_decay=0.0)
        tree, state = params, solver.init(params)
        for grad in grads:
            updates = {"item": grad, "bias": grad[0]}
            updates, state = jax.jit(solver.update)(updates, state, tree)
            tree = optax.apply_updates(tree, updates)
        results.append((tree, state))
    (expected, plain), (trained, state) = results
    untouched = sevo_jax.eval_params(plain, expected)  # there is nothing to leave out
    jax.tree.map(np.testing.assert_array_equal, untouched, expected)
    for held in (state, serialization.to_state_dict(state)):
        evaluated = sevo_jax.eval_params(held, trained)
        np.testing.assert_allclose(evaluated["item"], expected["item"], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(evaluated["bias"], trained["bias"])
    with pytest.raises(ValueError, match=r"has item of shape \(20, 3\), but it is not there"):
        sevo_jax.eval_params(state, {"bias": jnp.ones(3)})
    with pytest.raises(TypeError, match="`opt_state`, then `params`, but `params` is a state"):
        sevo_jax.eval_params(trained, state)
    np.testing.assert_allclose(trained["bias"], expected["bias"], rtol=1e-12)
    assert np.abs(trained["item"] - expected["item"]).max() > 0.01


def test_evaluated_parameters_of_every_smoothing_in_a_chain(x64):
    """Two graphs, each with a table: each keeps the residuals of its own."""
    graphs, params = (random_graph(0), random_graph(1)), {"a": jnp.ones((20, 3)), "b": None}
    params["b"] = 2 * params["a"]

    def solver(decay):
        return optax.chain(
            optax.sgd(0.1),
            sevo_jax.sevo(graphs[0], tables="a", residual_decay=decay),
            sevo_jax.sevo(graphs[1], tables="b", residual_decay=decay),
        )

    trained = []
    for decay in (None, 0.9):
        tree, state = params, solver(decay).init(params)
        for grad in jnp.asarray(_sparse_grads(5)):
            updates, state = solver(decay).update({"a": grad, "b": -grad}, state)
            tree = optax.apply_updates(tree, updates)
        trained.append(sevo_jax.eval_params(state, tree))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), *trained)


def test_residuals_under_vmap_and_inject_hyperparams():
    """A sweep over the decay is one program."""
    decays, table = jnp.array([0.0, 0.5, 0.99]), jnp.ones((20, 3))
    graph = sevo_jax.normalized_adjacency(random_graph())
    grads = jnp.asarray(_sparse_grads(4), jnp.float32)

    @jax.jit
    @jax.vmap
    def sweep(decay):
        inject = optax.inject_hyperparams(sevo_jax.sevo_adamw, static_args=("num_layers",))
        solver = inject(0.1, graph, residual_decay=decay)
        return _run(solver, grads, table)[0]

    for decay, actual in zip(decays, sweep(decays), strict=True):
        expected, _ = _run(_sevo_adamw_at(graph, float(decay)), grads, table)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def _sevo_adamw_at(graph, decay):
    return sevo_jax.sevo_adamw(0.1, graph, residual_decay=decay)


def test_moments_of_parameters_called_as_a_state_are_no_residual():
    params = {"item": jnp.ones((20, 3)), "block": {"residual": {"item": jnp.ones((20, 3))}}}
    params["block"]["count"] = jnp.ones(3)
    solver = sevo_jax.sevo_adamw(0.1, random_graph(), tables="^item", residual_decay=0.5)
    _, state = solver.update(params, solver.init(params), params)
    evaluated = sevo_jax.eval_params(serialization.to_state_dict(state), params)
    np.testing.assert_array_equal(evaluated["block"]["residual"]["item"], 1)
    once = sevo_jax.eval_params(state, params)["item"]
    np.testing.assert_array_equal(evaluated["item"], once)
    assert abs(once - 1).max() > 1e-4


@pytest.mark.parametrize("shape", [(4,), (5, 1, 1), (1,)])
def test_residual_decay_is_a_number_or_has_one_for_each_column(shape):
    solver = sevo_jax.sevo(random_graph(), residual_decay=jnp.full(shape, 0.5))
    with pytest.raises(ValueError, match=r"entry for each of the 3 columns, got shape"):
        solver.update(jnp.ones((20, 3)), solver.init(jnp.ones((20, 3))))


@pytest.mark.parametrize("kwargs", [{}, {"every": 2}, {"residual_decay": 0.5}])
def test_gradients_may_be_none(kwargs):
    """Of parameters that the loss does not see."""
    params = {"bias": jnp.ones(3), "item": jnp.ones((20, 3)), "w": jnp.ones(2)}
    solver = sevo_jax.sevo(random_graph(), tables="item", **kwargs)
    state, seen = solver.init(params), params | {"bias": None}
    updates, _ = solver.update(seen, state, params)
    expected, _ = solver.update(params, state, params)
    # Not to the bit: a GPU adds the messages of two calls in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, updates, expected | {"bias": None})
    if kwargs:
        solver = sevo_jax.sevo(random_graph(), tables="item|other", **kwargs)
        params["other"] = params["item"]
        with pytest.raises(ValueError, match="sums of 2 tables, but found updates of 1"):
            solver.update(params | {"other": None}, solver.init(params), params)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"beta": 0.5},
        {"num_layers": 1},
        {"method": "iterative"},
        {"rescale": False},
        {"coefficients": np.array([0.5, 0.25])},
        {"isolated": "identity"},
    ],
)
def test_settings_reach_the_smoothing(kwargs, x64):
    """Of the transformation itself and in each optimizer."""
    graph = sevo_jax.edge_graph([0, 1], [1, 2], num_nodes=20)  # most rows are isolated
    params = {"item": jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)))}
    settings = {"num_layers": 2} | kwargs
    updates, _ = sevo_jax.sevo(graph, **settings).update(params, optax.EmptyState())
    expected = sevo_jax.smooth(graph, params["item"], **settings)
    np.testing.assert_allclose(updates["item"], expected, rtol=1e-12)
    assert abs(expected - sevo_jax.smooth(graph, params["item"], num_layers=2)).max() > 1e-3
    steps = {
        "sevo_adamw": optax.scale_by_adam(),
        "sevo_adam": optax.scale_by_adam(),
        "sevo_sgd": optax.trace(0.9),
    }
    for name, plain in steps.items():
        solver = getattr(sevo_jax, name)(0.1, graph, weight_decay=0.0, **settings)
        updates, _ = solver.update(params, solver.init(params), params)
        step, _ = plain.update(params, plain.init(params), params)
        smoothed = sevo_jax.smooth(graph, -0.1 * step["item"], **settings)
        np.testing.assert_allclose(updates["item"], smoothed, rtol=1e-5)


@pytest.mark.parametrize("kwargs", [{"every": 2}, {"residual_decay": 0.9}])
def test_what_is_taken_back_is_refused_in_half_precision(kwargs):
    """Sums of what a bfloat16 table has rounded away would be taken back from it."""
    solver = sevo_jax.sevo(random_graph(), tables="item", **kwargs)
    params = {"item": jnp.ones((20, 2), jnp.bfloat16), "bias": jnp.ones(2, jnp.bfloat16)}
    (name,) = kwargs
    with pytest.raises(TypeError, match=f"`{name}` needs tables of float32 .* got bfloat16"):
        solver.init(params)
    solver.init(params | {"item": jnp.ones((20, 2))})  # others may be


def test_a_state_that_other_settings_made_is_refused():
    """What `every` and `residual_decay` have in theirs would be lost, or never leave it."""
    settings: list[dict] = [
        {},
        {"every": 4},
        {"residual_decay": 0.9},
        {"beta": optax.constant_schedule(0.5)},
    ]
    table, solvers = jnp.ones((20, 3)), [sevo_jax.sevo(random_graph(), **s) for s in settings]
    for maker, user in itertools.permutations(solvers, 2):
        with pytest.raises(ValueError, match="`sevo`: `state` must be .* other settings made"):
            user.update(table, maker.init(table))


@pytest.mark.parametrize("num_seeds", [0, 3])
def test_steps_between_do_not_compute_psi(monkeypatch, num_seeds):
    """Nor do they under `vmap`, as all seeds are in the same step."""
    calls = []

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: calls.append(1))
        return sevo_jax.smooth(*args, **kwargs)

    monkeypatch.setattr(transforms, "smooth", counted)
    solver, table = _sevo_adamw(random_graph(), every=4), jnp.zeros((20, 3))
    init, update = solver.init, solver.update
    if num_seeds:
        table = jnp.zeros((num_seeds, 20, 3))
        init, update = jax.vmap(init), jax.vmap(update, (None, 0, 0))
    state, update = init(table), jax.jit(update)
    for grad in jnp.asarray(_sparse_grads(9)):
        _, state = update(grad, state, table)
    jax.effects_barrier()
    assert len(calls) == 2, calls


def test_overriding_graph_is_no_constant_of_the_program():
    first, second = (random_graph(seed) for seed in (0, 1))
    prepared = [sevo_jax.normalized_adjacency(g, capacity=400) for g in (first, second)]
    solver = sevo_jax.sevo_adamw(0.01, first)
    table = jnp.asarray(_sparse_grads(1)[0], jnp.float32)
    state = solver.init(table)
    update = jax.jit(lambda g, s, p, graph: solver.update(g, s, p, graph=graph))
    for graph, raw in zip(prepared, (first, second), strict=True):
        updates, _ = update(table, state, table, graph)
        expected, _ = sevo_jax.sevo_adamw(0.01, raw).update(table, state, table)
        np.testing.assert_allclose(updates, expected, atol=1e-7)
    assert update._cache_size() == 1
    text = update.lower(table, state, table, prepared[0]).as_text()
    assert f"tensor<{len(first.edges)}x" not in text
    # A raw graph will do as well; it is then prepared while tracing.
    updates, _ = solver.update(table, state, table, graph=second)
    np.testing.assert_allclose(updates, expected, atol=1e-7)


class TestNaN:
    """One row of NaN, in the gradient of row 5, with a chain as graph and L = 3."""

    graph = sevo_jax.item_graph([np.arange(20)], num_nodes=20)
    near = np.abs(np.arange(20) - 5) <= 3
    good, bad = jnp.ones((20, 2)), jnp.ones((20, 2)).at[5].set(jnp.nan)

    def test_it_spreads_to_rows_within_reach_and_stays_in_its_own_moments(self):
        solver = sevo_jax.sevo_adamw(0.01, self.graph)
        params = jnp.ones((20, 2))
        updates, state = solver.update(self.bad, solver.init(params), params)
        np.testing.assert_array_equal(np.isnan(updates).all(axis=1), self.near)
        np.testing.assert_array_equal(np.isnan(updates).any(axis=1), self.near)
        mu = of_tables(state, "mu_hat")
        np.testing.assert_array_equal(np.isnan(mu).any(axis=1), np.arange(20) == 5)
        updates, _ = solver.update(self.good, state, params)  # it does not wear off
        np.testing.assert_array_equal(np.isnan(updates).any(axis=1), self.near)

    def test_apply_if_finite_stops_it_before_parameters_and_state(self):
        solver = sevo_jax.sevo_adamw(0.01, self.graph)
        guarded = optax.apply_if_finite(solver, max_consecutive_errors=3)
        params = jnp.ones((20, 2))
        state = guarded.init(params)
        update = jax.jit(guarded.update)
        _, state = update(self.good, state, params)
        before = state.inner_state
        updates, state = update(self.bad, state, params)
        np.testing.assert_array_equal(updates, 0)
        assert state.total_notfinite == 1
        for old, new in zip(
            jax.tree.leaves(before), jax.tree.leaves(state.inner_state), strict=True
        ):
            np.testing.assert_array_equal(old, new)
        updates, state = update(self.good, state, params)
        assert np.isfinite(updates).all() and state.last_finite


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"beta": 1.0}, r"`sevo`: `beta` must lie in \[0, 1\), got 1.0"),
        ({"num_layers": -2}, "`sevo`: `num_layers` .* got -2"),
        ({"method": "mean"}, "`sevo`: unknown `method` 'mean', valid are"),
        ({"coefficients": np.array([np.inf])}, "`sevo`: `coefficients` must be finite"),
        (
            {"coefficients": np.ones(2), "beta": lambda count: 0.5},
            "`sevo` .* neither a schedule",
        ),
        ({"isolated": "drop"}, "`sevo`: unknown `isolated` 'drop'"),
        ({"every": 0}, "`sevo`: `every` must be a positive Python integer .* got 0"),
        ({"every": 2.0}, "`sevo`: `every` must be a positive .* got 2.0"),
        ({"every": True}, "`sevo`: `every` must be a positive .* got True"),
        ({"every": 2**31}, "`sevo`: `every` must be a .* below .* got 2147483648"),
        ({"num_layers": True}, "`sevo`: `num_layers` .* got True"),
        ({"residual_decay": 1.0}, r"`sevo`: `residual_decay` must lie in \[0, 1\), got 1.0"),
        ({"residual_decay": 0.9, "every": 2}, "`sevo` takes `every` or `residual_decay`"),
    ],
)
@pytest.mark.parametrize(
    "factory",
    [
        sevo_jax.sevo,
        lambda graph, **kwargs: sevo_jax.sevo_adamw(0.1, graph, **kwargs),
        lambda graph, **kwargs: sevo_jax.sevo_adam(0.1, graph, **kwargs),
        lambda graph, **kwargs: sevo_jax.sevo_sgd(0.1, graph, **kwargs),
    ],
)
def test_bad_settings(factory, kwargs, message):
    with pytest.raises(ValueError, match=message):
        factory(random_graph(), **kwargs)


def test_bad_arguments_of_the_optimizers():
    with pytest.raises(ValueError, match=r"`b1` must lie in \[0, 1\), got 1.0"):
        sevo_jax.sevo_adamw(0.1, random_graph(), b1=1.0)
    with pytest.raises(ValueError, match=r"`b2` must lie in \[0, 1\), got -0.1"):
        sevo_jax.scale_by_corrected_adam(b2=-0.1)
    with pytest.raises(ValueError, match=r"`sevo_adamw`: `b2` must lie in \[0, 1\), got 1.0"):
        sevo_jax.sevo_adamw(0.1, random_graph(), b2=1.0, correct_moments=False)
    with pytest.raises(ValueError, match=r"`sevo_adam`: `b1` must lie in \[0, 1\), got 1.5"):
        sevo_jax.sevo_adam(0.1, random_graph(), b1=1.5)
    with pytest.raises(ValueError, match=r"`sevo_sgd`: `momentum` must lie in \[0, 1\)"):
        sevo_jax.sevo_sgd(0.1, random_graph(), momentum=1.5)
    for factory in (sevo_jax.sevo_adamw, sevo_jax.sevo_adam, sevo_jax.sevo_sgd):
        with pytest.raises(TypeError, match="is a `jraph.GraphsTuple`.* but got float"):
            factory(random_graph(), 0.1)
        prepared = sevo_jax.normalized_adjacency(random_graph())
        with pytest.raises(TypeError, match="is a `jraph.GraphsTuple`.* but got float"):
            factory(prepared, 0.1)
        with pytest.raises(TypeError, match="takes `learning_rate` as a .* but got '0.1'"):
            factory("0.1", prepared)
        with pytest.raises(TypeError, match="takes `weight_decay` as a .* but got None"):
            factory(0.1, prepared, weight_decay=None)
    for factory in (sevo_jax.sevo_adamw, sevo_jax.sevo_adam):
        with pytest.raises(TypeError, match="takes `eps` as a number .* but got None"):
            factory(0.1, random_graph(), eps=None)
    with pytest.raises(TypeError, match="takes `eps_root` as a number .* but got None"):
        sevo_jax.scale_by_corrected_adam(eps_root=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="takes `mask` as a tree of bools .* but got 'bias'"):
        sevo_jax.sevo_adamw(0.1, random_graph(), mask="bias")


def test_states_of_plain_and_corrected_moments_do_not_mix():
    """The same arrays mean other moments."""
    params = jnp.ones((20, 2))
    corrected = sevo_jax.sevo_adamw(0.1, random_graph())
    plain = sevo_jax.sevo_adamw(0.1, random_graph(), correct_moments=False)
    for one, other in ((corrected, plain), (plain, corrected)):
        saved = serialization.to_bytes(one.init(params))
        serialization.from_bytes(one.init(params), saved)
        with pytest.raises(ValueError, match="do not match"):
            serialization.from_bytes(other.init(params), saved)
    with pytest.raises(ValueError, match="a ScaleByCorrectedAdamState, but is ScaleByAd"):
        corrected.update(params, plain.init(params), params)


@pytest.mark.parametrize("factory", [sevo_jax.sevo_adamw, sevo_jax.sevo_adam])
def test_derivatives_through_the_optimizers(factory, x64):
    """By the learning rate; a column without a gradient has a second moment of 0."""
    params = {"item": jnp.ones((20, 2)), "w": jnp.array([[1.0, -1.0], [1.0, -1.0]])}

    def loss(params):
        return jnp.sum(jax.nn.relu(params["item"] @ params["w"]) ** 2)

    def trained(rate, eps_root=1e-16):
        solver = factory(rate, random_graph(), tables="item", eps_root=eps_root)
        tree, state = params, solver.init(params)
        for _ in range(2):
            updates, state = solver.update(jax.grad(loss)(tree), state, tree)
            tree = optax.apply_updates(tree, updates)
        return loss(tree)

    h = 1e-6
    expected = (trained(0.1 + h) - trained(0.1 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(trained)(0.1), expected, rtol=1e-6)
    assert np.isnan(jax.grad(functools.partial(trained, eps_root=0.0))(0.1))


def test_weights_decay_as_in_the_paper_unless_told():
    table = jnp.ones((20, 3))
    solver = sevo_jax.sevo_adamw(0.01, random_graph())
    updates, _ = solver.update(jnp.zeros((20, 3)), solver.init(table), table)
    np.testing.assert_allclose(updates, -0.01 * 0.1, rtol=1e-6)
