"""Every layout against the dense matrix; preparation and its errors."""

import dataclasses
import itertools
import platform
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest

import sevo_jax
from sevo_jax import layouts, native, padded
from sevo_jax.adjacency import LAYOUTS
from sevo_jax.compile import compile_library, find_compiler
from sevo_jax.smoothing import coefficients_of
from tests.helpers import dense, random_graph, reference_normalized
from tests.processes import output, start

HAS_COMPILER = find_compiler() is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
EVERY_LAYOUT = [
    *sorted(LAYOUTS.keys() - {"compiled"}),
    pytest.param("compiled", marks=needs_compiler),
]


@pytest.fixture(autouse=True, scope="module")
def library(tmp_path_factory):
    """The compiled product in a cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield compile_library() if HAS_COMPILER else None


@pytest.fixture(autouse=True)
def quick_compilation(request, monkeypatch):
    """The padded layout is long to compile; in narrower rows it is less so."""
    monkeypatch.setattr(padded, "_WIDTHS", (4, 4))
    jax.config.update("jax_disable_most_optimizations", "padded" in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


BETAS = {"scalar": 0.7, "per column": np.array([0.0, 0.5, 0.99])}


def _expected(graph: Any, x: Any, beta: Any, num_layers: int = 3) -> np.ndarray:
    """psi from powers of the dense matrix."""
    total = _polynomial(graph, x, [beta**l for l in range(num_layers + 1)])
    return total * (1 - beta) / (1 - beta ** (num_layers + 1))


def _polynomial(graph: Any, x: Any, coefficients: Any) -> Any:
    matrix = reference_normalized(dense(graph))
    powers = (np.linalg.matrix_power(matrix, l) for l in range(len(coefficients)))
    return sum(power @ x * c for power, c in zip(powers, coefficients, strict=True))


def _table(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


@pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS.keys())
@pytest.mark.parametrize("table_dtype", TOLERANCE)
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_layout_equals_the_matrix(layout, table_dtype, beta):
    graph, x = random_graph(), _table(20, 3)
    with jax.enable_x64(table_dtype == "float64"):
        adjacency = sevo_jax.normalized_adjacency(graph, layout=layout)
        y = jax.jit(sevo_jax.smooth)(adjacency, jnp.asarray(x, table_dtype), beta=beta)
        assert y.dtype == table_dtype
        np.testing.assert_allclose(
            np.asarray(y, np.float64), _expected(graph, x, beta), atol=TOLERANCE[table_dtype]
        )


def _batched(*widths):
    """Every layout with all widths, but one for those that JAX batches by its own rules."""
    return [
        pytest.param(name, d, marks=needs_compiler if name == "compiled" else ())
        for name, d in itertools.product(sorted(LAYOUTS), widths)
        if d == widths[0] or name not in ("dense", "padded")
    ]


# Tables of 3 columns stand side by side, those of 60 take turns, those of 20 do both; as edges
# only those of 100 do both.
@pytest.mark.parametrize(("layout", "d"), _batched(20, 3, 60, 100))
def test_vmapped_tables(layout, d):
    graph, xs = random_graph(), _table(7, 20, d)
    adjacency = sevo_jax.normalized_adjacency(graph, layout=layout)
    betas = np.linspace(0, 0.99, 7).astype(np.float32)

    def smooth(x, beta):
        return sevo_jax.smooth(adjacency, x, beta=beta)

    tables = jax.jit(jax.vmap(smooth, (0, None)))(jnp.asarray(xs, jnp.float32), 0.9)
    ablation = jax.jit(jax.vmap(smooth, (None, 0)))(jnp.asarray(xs[0], jnp.float32), betas)
    both = jax.jit(jax.vmap(smooth))(jnp.asarray(xs, jnp.float32), betas)
    by_column = np.linspace(0, betas, d, axis=1)  # [7, d]
    columns = jax.jit(jax.vmap(smooth))(jnp.asarray(xs, jnp.float32), by_column)
    for s in range(7):
        for column in (1, d - 1):
            expected = _expected(graph, xs[s, :, [column]].T, by_column[s, column])
            np.testing.assert_allclose(columns[s, :, [column]].T, expected, atol=3e-6)
        np.testing.assert_allclose(tables[s], _expected(graph, xs[s], 0.9), atol=3e-6)
        np.testing.assert_allclose(ablation[s], _expected(graph, xs[0], betas[s]), atol=3e-6)
        np.testing.assert_allclose(both[s], _expected(graph, xs[s], betas[s]), atol=3e-6)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_coefficients_in_place_of_settings(layout):
    """Of any number, for all columns or each, and traced: several L are one program."""
    graph, x = random_graph(), jnp.asarray(_table(20, 3), jnp.float32)
    adjacency = sevo_jax.normalized_adjacency(graph, layout=layout)

    @jax.jit
    def smooth(coefficients, x=x):
        return sevo_jax.smooth(adjacency, x, coefficients=coefficients)

    own = _table(4, 3, seed=1).astype(np.float32)
    for some in (own, own[:, 0], own[:1], own[:2, 1]):
        np.testing.assert_allclose(smooth(some), _polynomial(graph, x, some), atol=5e-6)

    @jax.jit
    @jax.vmap
    def sweep(num_layers, beta):
        return smooth(jnp.stack(coefficients_of(beta, num_layers, "neumann", True, 3)))

    betas = np.array([0.5, 0.99, 0.9, 0.9], np.float32)
    for num_layers, table in enumerate(sweep(jnp.arange(4), betas)):
        expected = _expected(graph, x, betas[num_layers], num_layers)
        np.testing.assert_allclose(table, expected, atol=3e-6)
    slope = jax.grad(lambda x: jnp.vdot(smooth(own[:, 0], x), x))(x)
    np.testing.assert_allclose(slope, 2 * _polynomial(graph, x, own[:, 0]), atol=1e-5)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_second_derivatives(layout):
    """In reverse mode, of the table, of beta, and of both."""
    graph, x = random_graph(), jnp.asarray(_table(20, 3), jnp.float32)

    def derivatives(layout):
        adjacency = sevo_jax.normalized_adjacency(graph, layout=layout)

        def loss(x, beta):
            return (sevo_jax.smooth(adjacency, x, beta=beta) ** 3).sum()

        def along(x, beta):
            return jnp.vdot(jax.grad(loss)(x, beta), x)

        return *jax.grad(along, (0, 1))(x, 0.5), jax.grad(jax.grad(loss, 1), 1)(x, 0.5)

    for found, expected in zip(derivatives(layout), derivatives("dense"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["edges", "padded"])
def test_forward_mode(layout):
    """Of the table and of beta, batched, and mixed with reverse mode."""
    xs, tangents = (jnp.asarray(_table(3, 20, 2, seed=i), jnp.float32) for i in range(2))

    def derivatives(layout):
        adjacency = sevo_jax.normalized_adjacency(random_graph(), layout=layout)

        def loss(x, beta):
            return (sevo_jax.smooth(adjacency, x, beta=beta) ** 3).sum()

        def along(x, tangent, beta):
            return jax.jvp(loss, (x, beta), (tangent, 0.7))[1]

        reverse = jax.grad(along, (0, 2))
        return (
            jax.vmap(along, (0, 0, None))(xs, tangents, 0.5),
            jax.vmap(reverse, (0, 0, None))(xs, tangents, 0.5),
            jax.hessian(loss, (0, 1))(xs[0], 0.5),
        )

    found, expected = map(jax.tree.leaves, (derivatives(layout), derivatives("dense")))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_no_tables_at_all(layout):
    adjacency = sevo_jax.normalized_adjacency(random_graph(), layout=layout)
    for shape in ((0, 20, 60), (0, 20, 3)):
        y = jax.vmap(sevo_jax.smooth, (None, 0))(adjacency, jnp.zeros(shape))
        assert y.shape == shape


@pytest.mark.parametrize("layout", ["rows", pytest.param("compiled", marks=needs_compiler)])
def test_a_shared_table_is_not_copied(layout, library):
    """A sweep over beta of one table needs none of its size for each beta but the results."""
    adjacency = sevo_jax.normalized_adjacency(random_graph(), layout=layout)
    x, betas = jnp.zeros((20, 64)), jnp.linspace(0, 0.9, 16)
    psi = jax.vmap(lambda x, beta: sevo_jax.smooth(adjacency, x, beta=beta), (None, 0))
    compiled: Any = jax.jit(psi).lower(x, betas).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * x.nbytes


@pytest.mark.parametrize(("layout", "d"), _batched(4, 60))
def test_vmap_of_vmap_and_of_scan(layout, d):
    graph, xs = random_graph(), _table(2, 3, 20, d)
    adjacency = sevo_jax.normalized_adjacency(graph, layout=layout)

    def twice(x, beta):
        def body(carry, _):
            return sevo_jax.smooth(adjacency, carry, beta=beta), None

        return jax.lax.scan(body, x, length=2)[0]

    nested = jax.jit(jax.vmap(jax.vmap(twice, (0, None))))
    betas = np.array([0.3, 0.9], np.float32)
    y = nested(jnp.asarray(xs, jnp.float32), betas)
    for i in range(2):
        for j in range(3):
            once = _expected(graph, xs[i, j], betas[i])
            np.testing.assert_allclose(y[i, j], _expected(graph, once, betas[i]), atol=3e-6)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_vmapped_graphs(layout, number):
    graphs = [random_graph(seed) for seed in range(number)]
    capacity = max(len(graph.edges) for graph in graphs)
    prepared = [
        sevo_jax.normalized_adjacency(graph, layout=layout, capacity=capacity)
        for graph in graphs
    ]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *prepared)
    x = _table(2, 20, 60)
    each = jax.vmap(sevo_jax.smooth, (None, 0))
    y = jax.jit(jax.vmap(each, (0, None)))(batch, jnp.asarray(x, jnp.float32))
    one = jax.jit(jax.vmap(sevo_jax.smooth, (0, None)))(batch, jnp.asarray(x[0], jnp.float32))
    for i, graph in enumerate(graphs):
        np.testing.assert_allclose(one[i], _expected(graph, x[0], 0.99), atol=3e-6)
        for j in range(2):
            np.testing.assert_allclose(y[i, j], _expected(graph, x[j], 0.99), atol=3e-6)


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_reverse_mode(layout, x64):
    graph, x, weight = random_graph(), _table(20, 3), _table(20, 3, seed=1)
    adjacency = sevo_jax.normalized_adjacency(graph, layout=layout)

    @jax.jit
    def slopes(x, beta):
        return jax.grad(loss, (0, 1))(x, beta)

    def loss(x, beta):
        return jnp.sum(weight * sevo_jax.smooth(adjacency, x, beta=beta))

    for beta in BETAS.values():
        to_x, to_beta = slopes(jnp.asarray(x), jnp.asarray(beta))
        np.testing.assert_allclose(to_x, _expected(graph, weight, beta), atol=1e-12)
        step = 1e-6
        up, down = (_expected(graph, x, beta + s) * weight for s in (step, -step))
        slope = (up - down).sum(axis=0 if np.ndim(beta) else None) / (2 * step)
        np.testing.assert_allclose(to_beta, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_chunked_fallback(dtype_name, monkeypatch):
    graph, x = random_graph(), _table(20, 3)
    monkeypatch.setattr(layouts, "BCSR", None)
    adjacency = sevo_jax.normalized_adjacency(graph, layout="rows")
    expected = reference_normalized(dense(graph)) @ x
    for chunk in (7, 1 << 16):
        monkeypatch.setattr(layouts, "_CHUNK", chunk)
        jax.clear_caches()
        y = adjacency.matmul(jnp.asarray(x, dtype_name))
        assert y.dtype == dtype_name
        tolerance = 1e-6 if dtype_name == "float32" else 3e-2
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=tolerance)


@pytest.mark.cpu
def test_rows_use_the_native_product():
    """On CPU and within `vmap`; a silent gather and scatter would be ten times slower."""
    adjacency = sevo_jax.normalized_adjacency(random_graph(), layout="rows")
    for d in (3, 60):
        xs = jnp.zeros((4, 20, d))
        compiled = jax.jit(jax.vmap(sevo_jax.smooth, (None, 0))).lower(adjacency, xs).compile()
        text = compiled.as_text() or ""
        assert "scatter" not in text and "gather(" not in text


@pytest.mark.cpu
@pytest.mark.parametrize(
    "layout, messages",
    [
        ("rows", None),
        pytest.param("compiled", None, marks=needs_compiler),
        pytest.param("compiled", "bfloat16", marks=needs_compiler),
    ],
)
def test_what_auto_takes_on_cpu_needs_one_more_table(layout, messages, library):
    """Temporary memory is 1.1 tables at most: no edges x d array, which here has 40 of them."""
    num_nodes, d = 1000, 64
    rng = np.random.default_rng(0)
    graph: Any = sevo_jax.item_graph(
        rng.integers(0, num_nodes, (400, 60)), num_nodes=num_nodes, window=60
    )
    assert len(graph.edges) > 40 * num_nodes
    adjacency = sevo_jax.normalized_adjacency(graph, layout=layout, messages=messages)
    x = jax.ShapeDtypeStruct((num_nodes, d), jnp.float32)
    compiled: Any = jax.jit(sevo_jax.smooth).lower(adjacency, x).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 1.1 * num_nodes * d * 4


NEW_WIDTHS = itertools.count(201)


@pytest.mark.parametrize("how", [{"num_layers": 0}, {"num_layers": 3}, {"method": "exact"}])
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_second_call_outside_of_jit_compiles_nothing(layout, how, caplog):
    adjacency = sevo_jax.normalized_adjacency(random_graph(), layout=layout)
    x = jnp.ones((20, next(NEW_WIDTHS)))  # nothing is compiled for it yet
    with jax.log_compiles():
        sevo_jax.smooth(adjacency, adjacency.matmul(x), **how)
        assert "Compiling" in caplog.text
        caplog.clear()
        sevo_jax.smooth(adjacency, adjacency.matmul(x), **how)
        assert "Compiling" not in caplog.text


def test_rare_smoothing_outside_of_jit_compiles_nothing_in_later_steps(caplog):
    solver, table = sevo_jax.sevo(random_graph(), every=2), jnp.ones((20, 11))
    state = solver.init(table)
    with jax.log_compiles():
        for _ in range(2):
            _, state = solver.update(table, state)
        assert "Compiling" in caplog.text
        caplog.clear()
        for _ in range(2):
            _, state = solver.update(table, state)
        assert "Compiling" not in caplog.text


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_one_program_for_graphs_of_equal_capacity(layout):
    smooth: Any = jax.jit(lambda adjacency, x: sevo_jax.smooth(adjacency, x))
    for seed in range(3):
        graph = random_graph(seed)
        assert len(graph.edges) < 300
        adjacency = sevo_jax.normalized_adjacency(graph, layout=layout, capacity=300)
        x = _table(20, 3, seed=seed)
        y = smooth(adjacency, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(y, _expected(graph, x, 0.99), atol=3e-6)
    assert smooth._cache_size() == 1


# The dense layout multiplies every entry.
@pytest.mark.parametrize("layout", [one for one in EVERY_LAYOUT if one != "dense"])
def test_padding_edges_spread_no_nan(layout):
    graph = sevo_jax.item_graph([[0, 1]], num_nodes=4)
    adjacency = sevo_jax.normalized_adjacency(graph, layout=layout, capacity=10)
    x = jnp.ones((4, 1)).at[0].set(jnp.nan)
    y = np.asarray(sevo_jax.smooth(adjacency, x))
    np.testing.assert_array_equal(np.isnan(y[:, 0]), [True, True, False, False])
    # Nor do they count as the neighbours of the last row, where they lie.
    kept = sevo_jax.smooth(adjacency, jnp.full((4, 1), 3.0), isolated="identity")
    assert kept[3, 0] == 3.0


@pytest.mark.parametrize("layout", [one for one in EVERY_LAYOUT if one != "dense"])
def test_places_left_free_spread_no_nan(layout, monkeypatch):
    """Those in the last chunk of edges, and in further rows of a node of many neighbours."""
    monkeypatch.setattr(layouts, "BCSR", None)
    monkeypatch.setattr(layouts, "_CHUNK", 7)
    monkeypatch.setattr(padded, "_WIDTHS", (4, 3))
    stars = np.repeat([1, 31], 29), np.delete(np.arange(2, 61), 29)
    stars = sevo_jax.edge_graph(*stars, num_nodes=62)
    adjacency = sevo_jax.normalized_adjacency(stars, layout=layout)
    x = jnp.ones((62, 1)).at[jnp.array([0, 7])].set(jnp.nan)  # without and with a neighbour
    found = np.flatnonzero(np.isnan(adjacency.matmul(x)[:, 0]))
    assert 1 in found and set(found) <= {0, 1, 7}


@pytest.mark.parametrize("num_leaves", [0, 16, 33, 600])
def test_padded_rows_of_many_neighbours(num_leaves, monkeypatch):
    """A hub's neighbours fill many rows, whose sums fill several in turn."""
    monkeypatch.setattr(padded, "_WIDTHS", (32, 4))  # as users have it
    star = sevo_jax.bipartite_graph(
        np.zeros(num_leaves, int), np.arange(num_leaves), 1, num_leaves + 1
    )
    x = _table(num_leaves + 2, 3)
    adjacency: Any = sevo_jax.normalized_adjacency(star, layout="padded")
    assert len(adjacency.groups) == {0: 1, 16: 2, 33: 2, 600: 4}[num_leaves]
    y = sevo_jax.smooth(adjacency, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, _expected(star, x, 0.99), atol=3e-6)


@pytest.mark.cpu
def test_auto_takes_rows_on_cpu(monkeypatch, tmp_path):
    assert jax.default_backend() == "cpu"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert type(sevo_jax.normalized_adjacency(random_graph())) is layouts.Rows


@pytest.mark.cpu
def test_a_graph_is_prepared_without_a_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")  # which has to be absolute
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # the user is in no list
    monkeypatch.chdir(tmp_path)
    native.library().parent.mkdir(parents=True)
    native.library().touch()  # a file of that name in this folder is not the library
    assert type(sevo_jax.normalized_adjacency(random_graph())) is layouts.Rows
    with pytest.raises(RuntimeError, match="no folder for the library: ~.* Set XDG_CACHE_HOME"):
        compile_library()


@pytest.mark.cpu
@needs_compiler
def test_auto_takes_compiled_rows_on_cpu_if_built(library, monkeypatch, tmp_path):
    assert isinstance(sevo_jax.normalized_adjacency(random_graph()), native.Compiled)
    assert compile_library() == library  # not again
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    adjacency = sevo_jax.normalized_adjacency(random_graph(), layout="compiled")
    with pytest.raises(RuntimeError, match="Run `python -m sevo_jax.compile`"):
        sevo_jax.smooth(adjacency, jnp.ones((20, 2)))


@pytest.mark.cpu
@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are those of x86-64")
@pytest.mark.parametrize("registers", ["avx512f", "avx"])
def test_the_compiled_layout_with_shorter_registers(registers):
    """As on processors that have no longer ones; in a process, which takes one library."""
    cpu = Path("/proc/cpuinfo")
    if cpu.exists() and registers not in cpu.read_text():
        pytest.skip(f"this processor has no {registers}: the other tests have what is left")
    tests = ("-m", "pytest", __file__, "-q", "-k", "compiled_rows or half_precision")
    process = start(*tests, devices=1, CXX=f"{find_compiler()} -mno-{registers}")
    assert " passed" in output(process, timeout=120)


@needs_compiler
def test_the_library_may_also_lie_in_another_cache(library, monkeypatch, tmp_path):
    """XLA refuses the functions of a second library, and calls those of the first."""
    graph = random_graph()
    adjacency = sevo_jax.normalized_adjacency(graph, layout="compiled")
    expected = sevo_jax.smooth(adjacency, jnp.ones((20, 2)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "sevo_jax").mkdir()
    shutil.copy(library, native.library())
    actual = jax.jit(lambda x: sevo_jax.smooth(adjacency, x))(jnp.ones((20, 2)))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@needs_compiler
def test_a_library_of_another_source_is_not_taken(library, monkeypatch, tmp_path):
    other = tmp_path / "native.cc"
    other.write_text(native.SOURCE.read_text() + "// changed")
    monkeypatch.setattr(native, "SOURCE", other)
    assert native.library() != library and not native.is_built()


@needs_compiler
def test_a_library_that_does_not_load_is_named(library, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_registered", set())
    broken = native.library()
    broken.parent.mkdir()
    broken.write_text("broken")
    x = jnp.ones((20, next(NEW_WIDTHS)))  # nothing is traced for it yet
    with pytest.raises(RuntimeError, match=f"does not load .* Delete {broken}"):
        sevo_jax.smooth(random_graph(), x)


def test_what_the_compiler_says_is_passed_on(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/does/not/exist")
    with pytest.raises(RuntimeError, match="'/does/not/exist' does not start"):
        compile_library()
    monkeypatch.setenv("CXX", "false --with 'an option'")
    with pytest.raises(RuntimeError, match="^false --with an option -O3 .* failed"):
        compile_library()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        compile_library()
    assert not native.is_built() and not list(tmp_path.rglob("*.so"))


@needs_compiler
@pytest.mark.parametrize(
    "d, num_layers", [(1, 1), (16, 0), (20, 1), (64, 2), (83, 3), (100, 5), (128, 5)]
)
def test_compiled_rows_of_any_width(num_layers, d, library):
    """All paths of the columns, and several pieces of work: 900 nodes, 40,000 edges."""
    rng = np.random.default_rng(0)
    graph: Any = sevo_jax.item_graph(
        rng.zipf(1.3, (200, 120)) % 900, num_nodes=900, window=120, max_distance=2
    )
    assert len(graph.edges) > 2 * 8192
    x = _table(900, d)
    beta = np.linspace(0, 0.99, d) if d > 1 else 0.9
    adjacency = sevo_jax.normalized_adjacency(graph, layout="compiled")
    y = jax.jit(sevo_jax.smooth, static_argnames="num_layers")(
        adjacency, jnp.asarray(x, jnp.float32), beta=jnp.asarray(beta), num_layers=num_layers
    )
    np.testing.assert_allclose(y, _expected(graph, x, beta, num_layers), atol=3e-6)


def _drawn_graph(num_nodes: int, rng: np.random.Generator) -> Any:
    """Four edges for each node, drawn in no time."""
    senders, receivers = rng.integers(num_nodes, size=(2, 4 * num_nodes))
    return sevo_jax.edge_graph(senders, receivers, num_nodes)


@needs_compiler
@pytest.mark.parametrize(
    "dtype, num_nodes, d",
    [("float32", 45_000, 50), ("float32", 25_000, 100), ("float64", 13_000, 100)],
)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_compiled_rows_of_a_large_table(num_layers, dtype, num_nodes, d, library):
    """From `kLarge` on a copy is read, on AMD in slices and with rows asked for earlier."""
    rng = np.random.default_rng(0)
    graph = _drawn_graph(num_nodes, rng)
    psi = jax.jit(sevo_jax.smooth, static_argnames="num_layers")
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(_table(num_nodes, d), dtype)
        assert x.nbytes >= 8 << 20
        compiled = sevo_jax.normalized_adjacency(graph, layout="compiled")
        rows = sevo_jax.normalized_adjacency(graph, layout="rows")
        for beta in 0.9, jnp.asarray(rng.random(d), dtype):
            y = psi(compiled, x, beta=beta, num_layers=num_layers)
            expected = psi(rows, x, beta=beta, num_layers=num_layers)
            np.testing.assert_allclose(y, expected, atol=1e-12 if dtype == "float64" else 3e-6)


@needs_compiler
def test_large_tables_under_vmap_and_in_half_precision(library):
    """As above, of two tables, and of one whose messages are large in half precision, too."""
    num_nodes, d = 25_000, 170
    rng = np.random.default_rng(0)
    graph = _drawn_graph(num_nodes, rng)
    compiled = sevo_jax.normalized_adjacency(graph, layout="compiled")
    half = sevo_jax.normalized_adjacency(graph, layout="compiled", messages="bfloat16")
    rows = sevo_jax.normalized_adjacency(graph, layout="rows")
    x = jnp.asarray(_table(num_nodes, d), jnp.float32)
    betas = jnp.asarray(rng.random((2, d)), jnp.float32)

    def psi(adjacency, beta):
        return sevo_jax.smooth(adjacency, x, beta=beta)

    each = jax.jit(jax.vmap(psi, (None, 0)))
    expected = each(rows, betas)
    np.testing.assert_allclose(each(compiled, betas), expected, atol=3e-6)
    np.testing.assert_allclose(each(half, betas), expected, atol=2e-2)


@pytest.mark.parametrize(
    "layout", ["edges", pytest.param("compiled", marks=[needs_compiler, pytest.mark.cpu])]
)
def test_messages_in_half_precision(layout, library):
    graph, x = random_graph(), _table(20, 67)
    exact, half = (
        sevo_jax.normalized_adjacency(graph, layout=layout, messages=messages)
        for messages in (None, "bfloat16")
    )
    table = jnp.asarray(x, jnp.float32)
    expected: Any = _expected(graph, x, 0.99)
    errors = [
        np.linalg.norm(sevo_jax.smooth(adjacency, table) - expected) / np.linalg.norm(expected)
        for adjacency in (exact, half)
    ]
    assert errors[0] < 1e-6 and 1e-5 < errors[1] < 2e-3
    several = jnp.stack([table, 2 * table])  # rounding knows no powers of two
    y = jax.jit(jax.vmap(sevo_jax.smooth, (None, 0)))(half, several)
    one = sevo_jax.smooth(half, table)
    np.testing.assert_allclose(y, np.stack([one, 2 * one]), rtol=1e-6, atol=1e-7)
    with jax.enable_x64(True):  # no other table is rounded
        wide = sevo_jax.normalized_adjacency(graph, layout=layout, messages="bfloat16")
        np.testing.assert_allclose(sevo_jax.smooth(wide, jnp.asarray(x)), expected, atol=1e-12)


@needs_compiler
def test_messages_in_half_precision_keep_every_nan(library):
    """Also those whose bits rounding would carry over into a number."""
    graph = sevo_jax.item_graph([[0, 1]], num_nodes=2)
    adjacency = sevo_jax.normalized_adjacency(graph, layout="compiled", messages="bfloat16")
    bits = [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001]
    nans = np.array(bits, np.uint32).view(np.float32)
    x = jnp.stack([jnp.asarray(nans), jnp.ones(len(bits))])
    assert np.isnan(sevo_jax.smooth(adjacency, x)).all()


def test_a_prepared_adjacency_is_returned():
    adjacency = sevo_jax.normalized_adjacency(random_graph())
    assert sevo_jax.normalized_adjacency(adjacency) is adjacency
    wrong: Any = ({"layout": "dense"}, {"capacity": 1000}, {"messages": "bfloat16"})
    for options in wrong:
        with pytest.raises(ValueError, match="cannot change a prepared adjacency"):
            sevo_jax.normalized_adjacency(adjacency, **options)


def test_edges_in_any_order_repeated_or_on_the_device():
    graph = random_graph()
    order = np.random.default_rng(0).permutation(len(graph.edges))
    halved = [np.concatenate([a, a]) for a in (graph.receivers[order], graph.senders[order])]
    other = graph._replace(
        receivers=jnp.asarray(halved[0]),
        senders=jnp.asarray(halved[1]),
        edges=jnp.asarray(np.tile(graph.edges[order] / 2, 2)),
    )
    x = jnp.asarray(_table(20, 3), jnp.float32)
    np.testing.assert_allclose(sevo_jax.smooth(other, x), sevo_jax.smooth(graph, x), atol=1e-6)


def test_leaves_are_arrays_that_a_jitted_function_takes():
    for layout in LAYOUTS:  # `messages` is no leaf
        adjacency: Any = sevo_jax.normalized_adjacency(random_graph(), layout=layout)
        leaves = jax.tree.leaves(adjacency)
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
        fields = [f for f in dataclasses.fields(adjacency) if not f.metadata.get("static")]
        held = [jax.tree.leaves(getattr(adjacency, field.name)) for field in fields]
        assert len(leaves) == sum(map(len, held))
        assert layout == "padded" or len(leaves) == len(fields)  # it has several to a field


def test_isolated_rows():
    adjacency = sevo_jax.normalized_adjacency(random_graph())
    assert adjacency.isolated[0] and adjacency.isolated[-1]  # random_sequences leaves them out
    np.testing.assert_array_equal(adjacency.isolated, dense(random_graph()).sum(axis=1) == 0)


def _graph(receivers: Any, senders: Any, edges: Any, num_nodes: int = 3) -> jraph.GraphsTuple:
    arrays: list[Any] = [np.asarray(a) for a in (edges, receivers, senders)]
    edges, receivers, senders = arrays
    sizes: list[Any] = [np.array([n]) for n in (num_nodes, len(edges))]
    return jraph.GraphsTuple(None, edges, receivers, senders, None, *sizes)


def test_no_edges_have_no_type():
    adjacency = sevo_jax.normalized_adjacency(_graph([], [], []))  # floats, as NumPy has it
    assert np.asarray(adjacency.isolated).all() and len(adjacency.isolated) == 3


@pytest.mark.parametrize(
    "graph, error, message",
    [
        (_graph([0, 1], [1, 0], [1.0, 2.0]), ValueError, "symmetric .* node 0 differ"),
        (_graph([0, 1], [1, 0], [1.0, 1.0001]), ValueError, "symmetric .* node 0 differ"),
        (_graph([1], [2], [1.0]), ValueError, "symmetric .* node 1 differ"),
        # Equal degrees in both directions, yet a directed circle.
        (_graph([0, 1, 2], [1, 2, 0], [1.0, 1.0, 1.0]), ValueError, "symmetric"),
        (_graph([0, 1], [1, 0], [-1.0, -1.0]), ValueError, "edge 1 -> 0 weighs -1.0"),
        (_graph([0, 1], [1, 0], [1.0, np.nan]), ValueError, "edge 0 -> 1 weighs nan"),
        (_graph([0, 1], [1, 0], [np.inf, np.inf]), ValueError, "weighs inf"),
        (
            _graph([0, 0, 1, 2], [1, 2, 0, 0], [1e308] * 4),
            ValueError,
            "of node 0 add up to inf",
        ),
        (
            _graph([0, 1], [1, 0], [1.0, 1.0])._replace(edges=None),
            ValueError,
            "`edges` is None",
        ),
        (_graph([0, 3], [3, 0], [1.0, 1.0]), ValueError, "from 0 to 3, but .* 3 nodes"),
        (_graph([0, -1], [-1, 0], [1.0, 1.0]), ValueError, "from -1 to 0"),
        (_graph([0.0, 1.0], [1.0, 0.0], [1.0, 1.0]), TypeError, "float64, not integers"),
        (_graph([0, 1], [1, 0], [[1.0], [1.0]]), ValueError, r"got \(2, 1\), \(2,\)"),
        (_graph([0, 1], [1], [1.0, 1.0]), ValueError, "one shape"),
        (_graph([0, 1], [1, 0], [1j, 1j]), TypeError, "weights, `edges`, are complex128"),
        (_graph([], [], [], 0), ValueError, "with nodes, but `n_node` is .0."),
        (_graph([], [], [])._replace(n_node=None), ValueError, "`n_node` is None"),
        ([[0, 1], [1, 0]], TypeError, "`jraph.GraphsTuple`, .* got list"),
    ],
)
def test_bad_graph(graph, error, message):
    with pytest.raises(error, match=message):
        sevo_jax.normalized_adjacency(graph)


def test_bad_options():
    graph = random_graph()
    with pytest.raises(ValueError, match="unknown `layout` 'csr', valid are .*edges.*rows"):
        sevo_jax.normalized_adjacency(graph, layout="csr")  # pyright: ignore
    with pytest.raises(ValueError, match="`capacity` is 5, but the graph has"):
        sevo_jax.normalized_adjacency(graph, capacity=5)
    with pytest.raises(ValueError, match="`capacity` must be an integer .* got 100.0"):
        sevo_jax.normalized_adjacency(graph, capacity=100.0)  # pyright: ignore
    with pytest.raises(ValueError, match="`messages` is None or 'bfloat16', got 'float16'"):
        sevo_jax.normalized_adjacency(graph, messages="float16")  # pyright: ignore
    with pytest.raises(ValueError, match="need the layout 'edges' or 'compiled', but .*Rows"):
        sevo_jax.normalized_adjacency(graph, layout="rows", messages="bfloat16")


def test_traced_graph():
    with pytest.raises(TypeError, match="got a traced one. Call it outside of `jit`"):
        jax.jit(sevo_jax.smooth)(random_graph(), jnp.ones((20, 2)))
