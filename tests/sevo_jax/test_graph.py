"""Graph builders against loops, the paper's example, and the figures of real data."""

# Optax and jraph type their trees as unions that nothing can be looked up in.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false

import csv
import gzip
import itertools
import time

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sevo_jax
import sevo_jax.graph as graph_module
from tests.data_path import data_folder
from tests.helpers import dense, reference_graph

SEQUENCES = st.lists(st.lists(st.integers(0, 6), max_size=9), max_size=8)


def test_worked_example_of_the_paper():
    # K = 3, H = 1: (v1) v2 v3 v2 and v2 v1 v3 give [[0, 1, 1], [1, 0, 2], [1, 2, 0]].
    graph = sevo_jax.item_graph([[0, 1, 2, 1], [1, 0, 2]], num_nodes=3, window=3)
    np.testing.assert_array_equal(dense(graph), [[0, 1, 1], [1, 0, 2], [1, 2, 0]])


def test_self_transition_adds_two_to_the_diagonal():
    graph = sevo_jax.item_graph([[0, 1, 1, 0]], num_nodes=2, max_distance=3)
    # 0-1, 1-1, 1-0 at distance 1; 0-1, 1-0 at distance 2; 0-0 at distance 3.
    np.testing.assert_allclose(dense(graph), [[2 / 3, 3], [3, 2]], rtol=1e-6)


@given(SEQUENCES, st.integers(1, 10), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_item_graph_equals_the_loop(sequences, window, max_distance):
    graph = sevo_jax.item_graph(sequences, 7, window=window, max_distance=max_distance)
    expected = reference_graph(sequences, 7, window, max_distance)
    np.testing.assert_allclose(dense(graph), expected, rtol=1e-6)
    assert len(graph.edges) == np.count_nonzero(expected)  # no duplicate, no zero edge


@given(SEQUENCES, st.integers(1, 10), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_options_of_item_graph(sequences, window, max_distance):
    def build(rows, **kwargs):
        return dense(sevo_jax.item_graph(rows, 7, max_distance=max_distance, **kwargs))

    first = build([row[:window] for row in sequences], window=None)
    np.testing.assert_array_equal(build(sequences, window=window, keep="first"), first)
    by_distance = [
        dense(sevo_jax.item_graph(sequences, 7, window=None, max_distance=h, weighting="count"))
        for h in range(1, max_distance + 1)
    ]
    steps = [by_distance[0], *np.diff(by_distance, axis=0)]
    weighted = sum(step / h for h, step in enumerate(steps, start=1))
    np.testing.assert_allclose(build(sequences, window=None), weighted, atol=1e-5)


@given(SEQUENCES)
@settings(deadline=None, max_examples=30)
def test_edges_are_sorted_and_symmetric(sequences):
    graph = sevo_jax.item_graph(sequences, 7, max_distance=3)
    keys = np.asarray(graph.receivers) * 7 + np.asarray(graph.senders)
    assert (np.diff(keys) > 0).all()
    np.testing.assert_array_equal(dense(graph), dense(graph).T)


def test_forms_of_sequences_agree():
    lists = [[3, 1, 2], [], [2, 2, 0, 1]]
    splits = np.array([0, 3, 3, 7])
    values = np.array([3, 1, 2, 2, 2, 0, 1])
    expected = dense(sevo_jax.item_graph(lists, 4, window=3))
    forms = [(values, splits), [np.array(row, np.int64) for row in lists]]
    forms.append((values.astype(np.uint16), splits.astype(np.int32)))
    for form in forms:
        np.testing.assert_array_equal(dense(sevo_jax.item_graph(form, 4, window=3)), expected)
    matrix = np.array([[0, 1, 2], [2, 1, 0]])
    np.testing.assert_array_equal(
        dense(sevo_jax.item_graph(matrix, 3)), dense(sevo_jax.item_graph(list(matrix), 3))
    )


@pytest.mark.parametrize("sequences", [[], [[]], [[1]], ([], [0])])
def test_graph_without_edges(sequences):
    graph = sevo_jax.item_graph(sequences, num_nodes=3)
    assert graph.edges.shape == graph.senders.shape == (0,)
    x = np.ones((3, 2), np.float32)
    np.testing.assert_allclose(sevo_jax.smooth(graph, x, beta=0.5, num_layers=1), x / 1.5)


def test_bipartite_graph():
    graph = sevo_jax.bipartite_graph(np.array([0, 1, 1]), np.array([2, 0, 0]), 2, 3)
    expected = np.zeros((5, 5))
    expected[0, 4] = expected[4, 0] = 1  # user 0 and item 2
    expected[1, 2] = expected[2, 1] = 2  # user 1 and item 0, twice
    np.testing.assert_array_equal(dense(graph), expected)


@given(st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_attribute_graph_equals_the_loop(attributes):
    expected = np.array(
        [[len(set(a) & set(b)) * (i != j) for i, a in enumerate(attributes)]
         for j, b in enumerate(attributes)]
    )  # fmt: skip
    np.testing.assert_array_equal(dense(sevo_jax.attribute_graph(attributes)), expected)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_large_ids_of_attributes_stay_apart(dtype):
    """Float64, in which NumPy joins the two types, does not tell 2^60 from its successor."""
    rows = [np.array([2**60 + n], dtype) for n in (0, 1, 0)] + [np.array([2**60 + 1])]
    expected = np.array([[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(dense(sevo_jax.attribute_graph(rows)), expected)


def test_attribute_graph_without_common_attributes():
    graph = sevo_jax.attribute_graph([[0, 1], [0, 2], [0, 2]], max_items=2)
    np.testing.assert_array_equal(dense(graph), [[0, 0, 0], [0, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize("num_nodes, k", [(40, 3), (5, 10), (1100, 2), (1, 1)])
def test_knn_graph_equals_the_loop(num_nodes, k, monkeypatch):
    monkeypatch.setattr(graph_module, "_BLOCK", 10_000)  # several blocks of rows, and a rest
    table = np.random.default_rng(0).normal(size=(num_nodes, 4)).astype(np.float32)
    table[0] = 0  # a vector without direction has no neighbours
    with np.errstate(invalid="ignore"):
        unit = np.nan_to_num(table / np.linalg.norm(table, axis=1, keepdims=True))
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -1)
    expected = np.zeros_like(similarity)
    for i in range(num_nodes):
        for j in np.argsort(-similarity[i])[:k]:
            if similarity[i, j] > 0:
                expected[i, j] = expected[j, i] = similarity[i, j]
    graph = sevo_jax.knn_graph(table, k)
    np.testing.assert_allclose(dense(graph), expected, atol=1e-6)
    np.testing.assert_array_equal(dense(graph), dense(graph).T)


def _training_part(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids shifted by one for a row of padding, without the last two items of each user."""
    with gzip.open(data_folder(name) / "interactions.csv.gz", "rt") as file:
        rows = csv.reader(file)
        next(rows)
        users, items = np.array([(int(row[0]), int(row[1])) for row in rows]).T
    ends = np.cumsum(np.bincount(users))
    training = np.ones(len(users), bool)
    training[ends - 1] = training[ends - 2] = False
    splits = np.concatenate([[0], np.cumsum(np.bincount(users[training]))])
    return items[training] + 1, splits


@pytest.mark.parametrize(
    "name, items, interactions, window, edges, isolated, weight, largest",
    [
        ("amazon_beauty", 12_101, 153_776, 50, 218_852, 35, 255_790, 453),
        ("amazon_beauty", 12_101, 153_776, 100, 222_468, 33, 261_612, 457),
        ("amazon_toys", 11_924, 128_773, 50, 196_100, 48, 212_968, 249),
        ("amazon_tools", 10_217, 101_200, 50, 160_170, 42, 167_488, 427),
        ("movielens_1m", 3_416, 987_531, 200, 634_692, 0, 1_291_738, 1192),
    ],
)
def test_figures_of_real_data(
    name, items, interactions, window, edges, isolated, weight, largest
):
    sequences = _training_part(name)
    assert len(sequences[0]) == interactions
    graph = sevo_jax.item_graph(sequences, items + 1, window=window)
    assert len(graph.edges) == edges
    assert graph.edges.sum() == weight
    assert np.bincount(graph.receivers).max() == largest
    adjacency = sevo_jax.normalized_adjacency(graph)
    assert adjacency.isolated.sum() == isolated + 1  # and the row of padding


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_edge_graph_equals_the_loop(seed):
    rng = np.random.default_rng(seed)
    senders, receivers = rng.integers(0, 7, (2, 30))
    weights = rng.integers(0, 4, 30) / 2
    expected = np.zeros((7, 7))
    for i, j, weight in zip(senders, receivers, weights, strict=True):
        expected[i, j] += weight
        expected[j, i] += weight
    graph = sevo_jax.edge_graph(senders, receivers, 7, weights)
    np.testing.assert_array_equal(dense(graph), expected)
    assert len(graph.edges) == np.count_nonzero(expected)
    counts = sevo_jax.edge_graph(senders, receivers, 7)
    assert counts.edges.sum() == 2 * 30
    # The builders' own graphs come back as twice themselves.
    again = sevo_jax.edge_graph(graph.senders, graph.receivers, 7, graph.edges)
    np.testing.assert_array_equal(dense(again), 2 * expected)


def test_edge_graph_without_edges():
    assert len(sevo_jax.edge_graph([], [], 3).edges) == 0
    assert len(sevo_jax.edge_graph([0], [1], 3, [1e-50]).edges) == 0  # 0 in float32


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1.0, 1e25, 1e37])
def test_neighbours_do_not_depend_on_scale(scale):
    table = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    expected = sevo_jax.knn_graph(table, 3)
    graph = sevo_jax.knn_graph(np.float32(scale) * table, 3)
    np.testing.assert_array_equal(graph.senders, expected.senders)
    np.testing.assert_allclose(graph.edges, expected.edges, rtol=1e-4)


def test_build_time():
    rng = np.random.default_rng(0)
    values, splits = rng.integers(0, 50_000, 1_000_000), np.arange(0, 1_000_001, 10)
    start = time.perf_counter()
    graph = sevo_jax.item_graph((values, splits), 50_000)
    assert time.perf_counter() - start < 10  # takes .4 s; a loop over the pairs takes minutes
    assert graph.edges.sum() == 2 * 900_000


@pytest.mark.parametrize("weighting", ["inverse_distance", "count"])
def test_blocks_give_the_same_graph_bit_for_bit(monkeypatch, tmp_path, weighting):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 30, 400)
    splits = np.concatenate([[0], np.cumsum(lengths)])
    values = rng.integers(0, 60, splits[-1]).astype(np.int32)

    def build(sequences):
        graph = sevo_jax.item_graph(
            sequences, 60, window=20, max_distance=7, weighting=weighting
        )
        return graph.receivers, graph.senders, graph.edges

    expected = build((values, splits))
    np.save(tmp_path / "values.npy", values)
    mapped = np.load(tmp_path / "values.npy", mmap_mode="r")
    monkeypatch.setattr(graph_module, "_BLOCK", 64)  # so that runs are cut and merged often
    cuts = [0, 1, 150, 150, 400]
    blocks = [
        (values[splits[a] : splits[b]], splits[a : b + 1] - splits[a])
        for a, b in itertools.pairwise(cuts)
    ]
    lists = ([values[a:b] for a, b in itertools.pairwise(splits)] for _ in range(1))
    for form in ((values, splits), (mapped, splits), iter(blocks), lists):
        for one, other in zip(build(form), expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def test_bad_block_and_no_block():
    assert len(sevo_jax.item_graph(iter([]), 3).edges) == 0
    with pytest.raises(ValueError, match="the largest is 3"):
        sevo_jax.item_graph(iter([[[0, 1]], [[1, 3]]]), 3)
    # Of sequences instead of blocks.
    with pytest.raises(ValueError, match="row 0 is int .* An iterator yields blocks of rows"):
        sevo_jax.item_graph(iter([[0, 1]]), 3)


@pytest.mark.slow
def test_ten_million_interactions():
    rng = np.random.default_rng(0)
    values, splits = rng.integers(0, 400_000, 10_000_000), np.arange(0, 10_000_001, 10)
    start = time.perf_counter()
    graph = sevo_jax.item_graph((values, splits), 400_000)
    sevo_jax.normalized_adjacency(graph)
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: sevo_jax.item_graph([[0, -1]], 3), ValueError, "ids from 0 .* smallest is -1"),
        (
            lambda: sevo_jax.item_graph([[0, 3]], 3),
            ValueError,
            "`num_nodes` = 3 .* largest is 3",
        ),
        (lambda: sevo_jax.item_graph([[0, 1.0]], 3), TypeError, "integer ids .* float64"),
        (lambda: sevo_jax.item_graph([["a"]], 3), TypeError, "integer ids"),
        (lambda: sevo_jax.item_graph([[True]], 3), TypeError, "integer ids .* bool"),
        (lambda: sevo_jax.item_graph([[0], [[1], [2, 0]]], 3), ValueError, "row 1 is list"),
        (lambda: sevo_jax.item_graph([0, 1], 3), ValueError, r"row 0 is int of shape \(\).$"),
        (
            lambda: sevo_jax.item_graph([(0, [1, 2])], 3),
            ValueError,
            "row 0 is tuple of rows of unequal lengths",
        ),
        (
            lambda: sevo_jax.item_graph(np.ma.masked_equal([[1, 2], [0, 1]], 0), 3),
            ValueError,
            r"`sequences\[1\]` has masked entries",
        ),
        (
            lambda: sevo_jax.item_graph((np.ma.masked_equal([1, 2, 0], 0), [0, 3]), 3),
            ValueError,
            "`sequences` has masked entries",
        ),
        (
            lambda: sevo_jax.bipartite_graph(np.ma.masked_equal([1, 0], 0), [0, 1], 3, 3),
            ValueError,
            "`users` has masked entries",
        ),
        *(
            (
                lambda rows=rows: sevo_jax.attribute_graph(rows),
                TypeError,
                "integers or strings in `attributes`, not both and no missing values, but row",
            )
            for rows in ([["Drama"], [np.nan]], [["a", None]], [["1"], [1]], [["a"], [True]])
        ),
        (
            lambda: sevo_jax.attribute_graph(np.eye(4, 3, dtype=int)),
            ValueError,
            "rows of ids in `attributes`, but got a matrix of zeros and ones",
        ),
        (
            lambda: sevo_jax.attribute_graph(np.eye(4, 3, dtype=bool)),
            ValueError,
            "rows of ids in `attributes`, but got a matrix of zeros and ones",
        ),
        (
            lambda: sevo_jax.bipartite_graph([[0], [1, 2]], [0], 3, 3),
            ValueError,
            "an array in `users`, but its rows differ in length",
        ),
        (lambda: sevo_jax.item_graph(([0, 1], [0, 1]), 3), ValueError, "row splits"),
        (lambda: sevo_jax.item_graph(([0, 1], [0, 2, 1, 2]), 3), ValueError, "row splits"),
        (lambda: sevo_jax.item_graph(([0, 1], [0.0, 2.0]), 3), ValueError, "row splits"),
        (lambda: sevo_jax.item_graph(([[0, 1]], [0, 1]), 3), ValueError, "must be flat"),
        (lambda: sevo_jax.item_graph((3, 4), 5), ValueError, "row splits"),  # pyright: ignore
        (lambda: sevo_jax.item_graph([[0]], 3.0), ValueError, "`num_nodes` must .* got 3.0"),
        (lambda: sevo_jax.item_graph([], -1), ValueError, "`num_nodes` must .* got -1"),
        (lambda: sevo_jax.item_graph([[0]], None), ValueError, "`num_nodes` must .* got None"),
        (lambda: sevo_jax.item_graph([[0]], 3, window=0), ValueError, "`window` must be"),
        (lambda: sevo_jax.item_graph([[0]], 3, window=True), ValueError, "`window` must be"),
        (lambda: sevo_jax.item_graph([[0]], 3, max_distance=0.5), ValueError, "`max_distance`"),
        (
            lambda: sevo_jax.item_graph([[0]], 3, weighting="cosine"),
            ValueError,
            "unknown `weighting` 'cosine', valid are .*'inverse_distance', 'count'",
        ),
        (lambda: sevo_jax.item_graph([[0]], 3, keep="all"), ValueError, "unknown `keep` 'all'"),
        (lambda: sevo_jax.item_graph(None, 3), TypeError, "integers in `sequences`, .* None"),
        (lambda: sevo_jax.attribute_graph(5), TypeError, "rows of integers in .*, but got 5"),
        (lambda: sevo_jax.item_graph({3: [0, 1]}, 3), TypeError, "got a dict, which hands out"),
        (
            lambda: sevo_jax.attribute_graph(pl.DataFrame({"user": [0], "item": [1]})),
            TypeError,
            "list of rows of integers in `attributes`, but got a DataFrame",
        ),
        (
            lambda: sevo_jax.item_graph([[0, 2**31]], 2**31 + 1),
            ValueError,
            r"`num_nodes` must .* below 2\*\*31, got 2147483649",
        ),
        (
            lambda: sevo_jax.edge_graph([[0], [1, 2]], [1], 4),
            ValueError,
            "an array in `senders`, but its rows differ in length",
        ),
        (
            lambda: sevo_jax.knn_graph([[1.0, 2.0], [3.0]]),
            ValueError,
            "an array in `embeddings`, but its rows differ in length",
        ),
        (lambda: sevo_jax.edge_graph([0], [2], 2), ValueError, "`receivers`, .* largest is 2"),
        (lambda: sevo_jax.edge_graph([0.5], [1], 2), TypeError, "integer ids in `senders`"),
        (lambda: sevo_jax.edge_graph([0], [1], "2"), ValueError, "`num_nodes` must .* got '2'"),
        (lambda: sevo_jax.edge_graph([0], [1, 0], 2), ValueError, r"\(1,\), \(2,\) and \(1,\)"),
        (lambda: sevo_jax.edge_graph([0], [1], 2, [1, 2]), ValueError, r"and \(2,\)"),
        (lambda: sevo_jax.edge_graph([0], [1], 2, [-1.0]), ValueError, "entry 0 is -1.0"),
        (lambda: sevo_jax.edge_graph([0], [1], 2, [np.nan]), ValueError, "entry 0 is nan"),
        (lambda: sevo_jax.edge_graph([0], [1], 2, [1e300]), ValueError, "large for float32"),
        (lambda: sevo_jax.bipartite_graph([2], [0], 2, 2), ValueError, "`num_users` = 2"),
        (lambda: sevo_jax.bipartite_graph([0], [0], 2.0, 2), ValueError, "`num_users` must"),
        (lambda: sevo_jax.bipartite_graph([0], [0], 2, True), ValueError, "`num_items` must"),
        (lambda: sevo_jax.bipartite_graph([0, 1], [0], 2, 2), ValueError, "has 2 .* `items` 1"),
        (
            lambda: sevo_jax.attribute_graph([[0.5]]),
            TypeError,
            "`attribute_graph` takes integer",
        ),
        (lambda: sevo_jax.attribute_graph([[0]], max_items=0), ValueError, "`max_items`"),
        (
            lambda: sevo_jax.edge_graph([0], [1], 2, ["a"]),
            TypeError,
            "in `weights`, but got <U1",
        ),
        (lambda: sevo_jax.knn_graph([[1j]]), TypeError, "in `embeddings`, but got complex128"),
        (lambda: sevo_jax.knn_graph([[np.nan]]), ValueError, "1 non-finite"),
        (lambda: sevo_jax.knn_graph([0.0]), ValueError, "shape \\[num_nodes, d\\]"),
        (lambda: sevo_jax.knn_graph([[0.0]], k=0), ValueError, "`k` must be a positive"),
    ],
)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_orthogonal_items_are_no_neighbours():
    assert len(sevo_jax.knn_graph(np.eye(3), k=2).edges) == 0


def test_a_pair_may_be_met_very_often():
    graph = sevo_jax.item_graph([[0, 1] * 40_000], 2, window=None)
    assert graph.edges.tolist() == [79_999, 79_999]
