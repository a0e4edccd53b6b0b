"""Properties of psi that the paper states or that follow from its closed form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sevo_jax
from sevo_jax.smoothing import coefficients_of
from tests.helpers import dense, random_graph, reference_normalized, reference_smooth

BETA = st.floats(0, 0.99)
LAYERS = st.integers(0, 6)
SEED = st.integers(0, 50)


def _matrix(graph, beta, num_layers=3, **kwargs):
    """psi as a matrix: its effect on the identity."""
    with jax.enable_x64(True):
        graph = sevo_jax.normalized_adjacency(graph, capacity=500)  # one program for all
        eye = jnp.eye(graph.num_nodes, dtype=jnp.float64)
        return np.asarray(
            sevo_jax.smooth(graph, eye, beta=beta, num_layers=num_layers, **kwargs)
        )


@given(SEED, BETA, LAYERS, st.sampled_from(["neumann", "iterative"]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_equals_the_loops_of_the_official_code(seed, beta, num_layers, method, rescale):
    graph = random_graph(seed, max_distance=1 + seed % 3)
    expected = reference_smooth(
        reference_normalized(dense(graph)), np.eye(20), beta, num_layers, method, rescale
    )
    psi = _matrix(graph, beta, num_layers, method=method, rescale=rescale)
    np.testing.assert_allclose(psi, expected, atol=1e-12)
    with jax.enable_x64(True):
        rows = coefficients_of(beta, jnp.array(num_layers), method, jnp.array(rescale), 6)
        assert not any(rows[num_layers + 1 :])
        psi = _matrix(graph, 0.5, coefficients=jnp.stack(rows))  # and not that of beta 0.5
    np.testing.assert_allclose(psi, expected, atol=1e-12)


@given(SEED, BETA, LAYERS)
@settings(deadline=None, max_examples=25)
def test_operator_properties(seed, beta, num_layers):
    graph = random_graph(seed)
    psi = _matrix(graph, beta, num_layers)
    np.testing.assert_allclose(psi, psi.T, atol=1e-13)  # symmetric
    eigenvalues = np.linalg.eigvalsh(psi)
    assert eigenvalues.min() > 0  # direction-aware: <psi(x), x> > 0
    assert eigenvalues.max() <= 1 + 1e-12
    fixed = np.sqrt(dense(graph).sum(axis=1))  # D^1/2 1, an eigenvector to the eigenvalue 1
    np.testing.assert_allclose(psi @ fixed, fixed, atol=1e-11)
    isolated = fixed == 0
    first = 1 / sum(beta**l for l in range(num_layers + 1))
    np.testing.assert_allclose(psi[isolated][:, isolated], first * np.eye(isolated.sum()))


@given(SEED, BETA)
@settings(deadline=None, max_examples=20)
def test_structure_aware(seed, beta):
    graph = random_graph(seed)
    with jax.enable_x64(True):
        graph = sevo_jax.normalized_adjacency(graph, capacity=500)
        x = jnp.asarray(np.random.default_rng(seed).normal(size=(20, 3)))
        before = float(sevo_jax.smoothness(graph, x))
        after = float(sevo_jax.smoothness(graph, sevo_jax.smooth(graph, x, beta=beta)))
    assert after <= before * (1 + 1e-12)


def test_linear(dtype):
    graph, rng = random_graph(), np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(20, 3)), dtype) for _ in range(2))
    left = sevo_jax.smooth(graph, 2 * x - 3 * y)
    right = 2 * sevo_jax.smooth(graph, x) - 3 * sevo_jax.smooth(graph, y)
    assert left.dtype == dtype
    np.testing.assert_allclose(left, right, atol=100 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("method", ["neumann", "iterative"])
@pytest.mark.parametrize("beta, num_layers", [(0.0, 3), (0.99, 0), (0.0, 0)])
def test_identity(beta, num_layers, method):
    psi = _matrix(random_graph(), beta, num_layers, method=method)
    np.testing.assert_array_equal(psi, np.eye(20))


def test_commutes_with_relabelling():
    graph, rng = random_graph(), np.random.default_rng(0)
    label = rng.permutation(20)
    relabelled = graph._replace(receivers=label[graph.receivers], senders=label[graph.senders])
    psi, other = _matrix(graph, 0.9), _matrix(relabelled, 0.9)
    np.testing.assert_allclose(other[np.ix_(label, label)], psi, atol=1e-14)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_tends_to_the_closed_form(beta):
    graph = random_graph()
    exact = (1 - beta) * np.linalg.inv(np.eye(20) - beta * reference_normalized(dense(graph)))
    distances = [
        np.abs(_matrix(graph, beta, num_layers) - exact).max() for num_layers in (5, 10, 20)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 2 * beta**21


@pytest.mark.parametrize(
    "beta, scale",
    [(0.99, 0.25378), (0.5, 0.5333), (0.7, 0.3948), (0.9, 0.2908), (0.999, 0.2504)],
)
def test_isolated_rows(beta, scale):
    graph = sevo_jax.item_graph([[0, 1]], num_nodes=3)
    x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, -6.0]])
    scaled = sevo_jax.smooth(graph, x, beta=beta)
    np.testing.assert_allclose(scaled[2] / x[2], scale, atol=5e-5)
    kept = sevo_jax.smooth(graph, x, beta=beta, isolated="identity")
    np.testing.assert_array_equal(kept[2], x[2])
    np.testing.assert_array_equal(kept[:2], scaled[:2])


def test_eigenvalue_of_minus_one():
    # Two items joined by one edge: A~ has eigenvalues 1 and -1.
    graph = sevo_jax.item_graph([[0, 1]], num_nodes=2)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(_matrix(graph, 0.99)), [0.005025, 1], atol=5e-7
    )


def test_iterative_is_no_descent_direction():
    # Theorem 1: only for beta below 1/2 does the iterative form keep the direction.
    graph = sevo_jax.item_graph([[0, 1]], num_nodes=2)
    assert np.linalg.eigvalsh(_matrix(graph, 0.99, method="iterative")).min() < 0
    assert np.linalg.eigvalsh(_matrix(graph, 0.49, method="iterative")).min() > 0


@given(SEED)
@settings(deadline=None, max_examples=15)
def test_smoothness_equals_the_sum_over_edges(seed):
    graph = random_graph(seed)
    weights, x = dense(graph), np.random.default_rng(seed).normal(size=(20, 3))
    degree, total = weights.sum(axis=1), 0.0
    for i in range(20):
        total += (degree[i] == 0) * np.sum(x[i] ** 2)
        for j in np.flatnonzero(weights[i]):
            gap = x[i] / np.sqrt(degree[i]) - x[j] / np.sqrt(degree[j])
            total += 0.5 * weights[i, j] * np.sum(gap**2)
    with jax.enable_x64(True):
        adjacency = sevo_jax.normalized_adjacency(graph, capacity=500)
        np.testing.assert_allclose(sevo_jax.smoothness(adjacency, jnp.asarray(x)), total)


@pytest.mark.parametrize(
    "kwargs", [{}, {"layout": "edges"}, {"layout": "edges", "messages": "bfloat16"}]
)
def test_strict_promotion_and_no_nan(dtype, kwargs):
    adjacency = sevo_jax.normalized_adjacency(random_graph(), **kwargs)
    x = jnp.ones((20, 3), dtype)
    strict = (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
    )
    with strict[0], strict[1], strict[2]:
        for beta in (0.9, jnp.full(3, 0.9, dtype)):
            y = jax.jit(sevo_jax.smooth)(adjacency, x, beta=beta)
            assert y.dtype == dtype
        assert sevo_jax.smoothness(adjacency, x).dtype == dtype


def test_a_traced_beta_takes_the_dtype_of_the_table():
    with jax.enable_x64(True):
        smooth = jax.jit(sevo_jax.smooth)
        for name in ("bfloat16", "float32", "float64"):
            y = smooth(random_graph_adjacency(), jnp.ones((20, 2), name), beta=jnp.float64(0.9))
            assert y.dtype == name


def random_graph_adjacency():
    return sevo_jax.normalized_adjacency(random_graph())


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"beta": 1.0}, ValueError, r"`beta` must lie in \[0, 1\), got 1.0"),
        ({"beta": -0.1}, ValueError, r"`beta` must lie in"),
        ({"beta": np.nan}, ValueError, r"`beta` must lie in"),
        ({"beta": np.array([0.5, 1.5])}, ValueError, r"`beta` must lie in"),
        ({"beta": 1 - 1e-9, "method": "exact"}, ValueError, r"`beta` must .* got 1.0"),
        ({"beta": np.complex64(0.5)}, TypeError, "`beta` as a number, an array"),
        ({"beta": lambda count: 0.5}, TypeError, "`beta` as a number or an array, but got <f"),
        ({"beta": [0.5, 0.5]}, TypeError, r"a number, an array or a schedule, .* \[0.5, 0.5\]"),
        ({"beta": np.array([0.5, 0.5, 0.5])}, ValueError, r"shape \[d=2\], but got \(3,\)"),
        ({"num_layers": -1}, ValueError, "`num_layers` .* at least 0, got -1"),
        ({"num_layers": 1.5}, ValueError, "`num_layers` .* got 1.5"),
        (
            {"method": "average"},
            ValueError,
            "unknown `method` 'average', valid are .*'neumann', 'iterative'",
        ),
        ({"rescale": "no"}, TypeError, "`rescale` as a bool or a scalar array, but got 'no'"),
        ({"rescale": jnp.array([True, False])}, TypeError, "`rescale` as a bool or a scalar"),
        (
            {"coefficients": [0.5, 0.5]},
            TypeError,
            r"`coefficients` as an array, .* \[0.5, 0.5\]",
        ),
        ({"coefficients": np.array([True])}, TypeError, "`coefficients` as an array"),
        (
            {"coefficients": 0.5},
            ValueError,
            r"`coefficients` of shape \[L \+ 1\] or .* got \(\)",
        ),
        ({"coefficients": np.ones(0)}, ValueError, r"`coefficients` of shape .* got \(0,\)"),
        (
            {"coefficients": np.ones((4, 1, 2))},
            ValueError,
            r"`coefficients` .* got \(4, 1, 2\)",
        ),
        ({"coefficients": np.ones((4, 3))}, ValueError, r"1, d=2\], but got \(4, 3\)"),
        ({"coefficients": np.array([1, np.nan])}, ValueError, "`coefficients` must be finite"),
        (
            {"coefficients": np.ones(2), "method": "exact"},
            ValueError,
            "`coefficients` in place of .* nor the method 'exact'",
        ),
        ({"isolated": "drop"}, ValueError, "unknown `isolated` 'drop', valid are"),
        ({"x": jnp.ones((19, 2))}, ValueError, r"\[num_nodes=20, d\], but got \(19, 2\)"),
        ({"x": jnp.ones(20)}, ValueError, r"but got \(20,\)"),
        ({"x": jnp.ones((20, 2), int)}, TypeError, "table of floats, but `x` is int32"),
        ({"x": None}, TypeError, "`smooth` takes a table of floats in `x`, but got None"),
        ({"x": "a table"}, TypeError, "a table of floats in `x`, but got 'a table'"),
    ],
)
def test_bad_input(kwargs, error, message):
    with pytest.raises(error, match=message):
        sevo_jax.smooth(random_graph(), kwargs.pop("x", jnp.ones((20, 2))), **kwargs)


@pytest.mark.parametrize("layout", ["edges", "rows", "dense"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_exact_inverse(layout, beta):
    graph = random_graph(3)
    adjacency = sevo_jax.normalized_adjacency(graph, layout=layout)
    x = np.random.default_rng(0).normal(size=(20, 4))
    matrix = np.eye(20) - beta * reference_normalized(dense(graph))
    expected = (1 - beta) * np.linalg.solve(matrix, x)
    smooth = jax.jit(lambda x, beta: sevo_jax.smooth(adjacency, x, beta=beta, method="exact"))
    found = smooth(jnp.asarray(x, jnp.float32), beta)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    columns = jnp.array([0.3, beta, 0.7, beta])
    np.testing.assert_allclose(smooth(x, columns)[:, 1::2], expected[:, 1::2], atol=2e-5)
    tables = jnp.stack([x, 2 * x]).astype(jnp.float32)
    both = jax.vmap(smooth, (0, None))(tables, beta)
    np.testing.assert_allclose(both[1], 2 * expected, atol=5e-5)


@pytest.mark.parametrize("layout", ["edges", "rows", "dense", "padded"])
def test_reverse_mode_of_the_exact_inverse(layout, x64):
    graph, rng = random_graph(3), np.random.default_rng(0)
    adjacency = sevo_jax.normalized_adjacency(graph, layout=layout)
    x, weight = jnp.asarray(rng.normal(size=(2, 20, 4)))

    @jax.jit
    def loss(x, beta):
        return jnp.sum(weight * sevo_jax.smooth(adjacency, x, beta=beta, method="exact"))

    to_x, to_beta = jax.jit(jax.grad(loss, (0, 1)))(x, 0.9)
    expected = sevo_jax.smooth(adjacency, weight, beta=0.9, method="exact")  # it is symmetric
    np.testing.assert_allclose(to_x, expected, atol=1e-5)
    matrix = reference_normalized(dense(graph))

    def exact(beta):
        return np.sum(weight * ((1 - beta) * np.linalg.solve(np.eye(20) - beta * matrix, x)))

    slope = (exact(0.9 + 1e-5) - exact(0.9 - 1e-5)) / 2e-5
    np.testing.assert_allclose(to_beta, slope, rtol=1e-4)


@pytest.mark.parametrize("function", [sevo_jax.smooth, sevo_jax.smoothness])
@pytest.mark.parametrize("layout", ["edges", "rows", "dense", "padded"])
def test_derivatives_take_the_adjacency_for_a_constant(layout, function):
    adjacency = sevo_jax.normalized_adjacency(random_graph(), layout=layout)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)))
    slopes = jax.grad(lambda a: jnp.sum(function(a, x) ** 2), allow_int=True)(adjacency)
    slopes = [s for s in jax.tree.leaves(slopes) if jnp.issubdtype(s.dtype, jnp.floating)]
    assert slopes and not any(s.any() for s in slopes)


def test_tables_of_numpy_and_lists(recwarn):
    graph = sevo_jax.item_graph([[0, 1]], num_nodes=2)
    rows = [[1.0, 2.0], [3.0, 5.0]]
    expected = sevo_jax.smooth(graph, jnp.array(rows))
    tables: list[Any] = [rows, np.array(rows)]  # float64, which JAX holds in float32
    for x in tables:
        np.testing.assert_array_equal(sevo_jax.smooth(graph, x), expected)
        assert sevo_jax.smoothness(graph, x) == sevo_jax.smoothness(graph, jnp.array(rows))
    assert not recwarn


@pytest.mark.parametrize("layout", ["edges", "rows", "dense", "padded"])
def test_numpy_tables_may_be_constants_of_a_mapped_program(layout):
    adjacency = sevo_jax.normalized_adjacency(random_graph(), layout=layout)
    tables = np.random.default_rng(0).normal(size=(3, 20, 4)).astype(np.float32)
    mapped = jax.jit(lambda: jax.vmap(lambda x: sevo_jax.smooth(adjacency, x))(tables))()
    expected = [sevo_jax.smooth(adjacency, x) for x in tables]
    np.testing.assert_allclose(mapped, expected, rtol=1e-6, atol=1e-6)


def test_where_there_is_no_inverse_the_exact_method_gives_no_number():
    beta = jnp.array([0.5, 1.0])

    @jax.jit
    def smooth(beta):
        return sevo_jax.smooth(random_graph(), jnp.ones((20, 2)), beta=beta, method="exact")

    np.testing.assert_array_equal(np.isnan(smooth(beta)), np.tile([False, True], (20, 1)))


@pytest.mark.parametrize("method", ["neumann", "iterative", "exact"])
def test_beta_of_half_precision_means_its_number(method):
    """Its powers are not rounded. `inject_hyperparams` casts it to the parameters' type."""
    graph, x = random_graph(3), jnp.asarray(np.random.default_rng(0).normal(size=(20, 4)))
    for beta in (jnp.bfloat16(0.9), np.float16(0.9), jnp.full(4, 0.9, jnp.bfloat16)):
        half = sevo_jax.smooth(graph, x, beta=beta, method=method)
        full = sevo_jax.smooth(graph, x, beta=beta.astype(jnp.float32), method=method)
        np.testing.assert_array_equal(half, full)


def test_neumann_tends_to_the_exact_inverse():
    graph, x = random_graph(3), jnp.asarray(np.random.default_rng(0).normal(size=(20, 4)))
    exact = sevo_jax.smooth(graph, x, beta=0.8, method="exact")
    errors = [
        float(jnp.abs(sevo_jax.smooth(graph, x, beta=0.8, num_layers=num) - exact).max())
        for num in (1, 3, 10, 60)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < errors[0]
