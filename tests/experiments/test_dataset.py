"""The dataset object, its filters, and the two splits."""

import dataclasses
from typing import Any, Literal

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from experiments.dataset import (
    Attributes,
    Dataset,
    Split,
    distinct_pairs,
    drop_repeats,
    global_time_split,
    k_core,
    leave_one_out,
)
from experiments.loaders import load
from experiments.synthetic import synthetic
from tests.data_path import data_folder

PARTS: tuple[Literal["valid"], Literal["test"]] = ("valid", "test")


def ragged(*sequences: list[int], num_items: int = 10, **fields) -> Dataset:
    """A dataset from one list of items for each user."""
    return Dataset(
        name="toy",
        values=np.concatenate(sequences),
        row_splits=np.cumsum([0, *map(len, sequences)]),
        num_items=num_items,
        **fields,
    )


def sequences(dataset: Dataset) -> list[list[int]]:
    return [dataset.sequence(user).tolist() for user in range(dataset.num_users)]


@st.composite
def datasets(draw, timestamps: bool = False) -> Dataset:
    rows = draw(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=60))
    users, items, times = np.array(rows).T
    return Dataset.from_interactions(users, items, timestamps=times if timestamps else None)


# name: users, items, interactions, trained on under leave-one-out
COUNTS = {
    "amazon_beauty": (22_363, 12_101, 198_502, 153_776),
    "amazon_toys": (19_412, 11_924, 167_597, 128_773),
    "amazon_tools": (16_638, 10_217, 134_476, 101_200),
    "amazon_home": (66_519, 28_237, 551_682, 418_644),
    "movielens_1m": (6_040, 3_416, 999_611, 987_531),
    "movielens_100k": (943, 1_682, 100_000, 98_114),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_real_datasets(name):
    dataset = load(data_folder(name))
    split = leave_one_out(dataset)
    counts = (dataset.num_users, dataset.num_items, dataset.num_interactions, split.num_train)
    assert counts == COUNTS[name]
    assert dataset.name == name and not dataset.drops
    assert len(split.valid) == len(split.test) == dataset.num_users
    # The ids in the files are contiguous, and loading keeps them.
    np.testing.assert_array_equal(dataset.item_ids, np.arange(dataset.num_items))
    if name != "movielens_100k":  # the others are 5-core already
        assert k_core(dataset, 5).num_interactions == dataset.num_interactions


def test_ids_ascend_and_ties_keep_the_order_of_rows():
    dataset = Dataset.from_interactions(
        ["b", "a", "b", "b", "a"], [30, 7, 7, 200, 30], timestamps=[2, 5, 1, 1, 5]
    )
    assert dataset.user_ids.tolist() == ["a", "b"]
    assert dataset.item_ids.tolist() == [7, 30, 200]
    assert sequences(dataset) == [[0, 1], [0, 2, 1]]
    assert dataset.timestamps is not None
    assert dataset.timestamps.tolist() == [5, 5, 1, 1, 2]


def test_positions_rank_before_timestamps():
    dataset = Dataset.from_interactions(
        [0, 0, 0], [1, 2, 3], positions=[2, 1, 0], timestamps=[4, 4, 4]
    )
    assert sequences(dataset) == [[2, 1, 0]]


@given(datasets(timestamps=True), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_rows_matters_only_for_ties(dataset, random):
    order = list(range(dataset.num_interactions))
    random.shuffle(order)
    # Distinct times: the place of each interaction.
    args = dataset.users, dataset.values
    direct = Dataset.from_interactions(*args, timestamps=np.arange(len(order)))
    shuffled = Dataset.from_interactions(*(a[order] for a in args), timestamps=order)
    np.testing.assert_array_equal(direct.values, shuffled.values)
    np.testing.assert_array_equal(direct.row_splits, shuffled.row_splits)


def test_arrays_are_read_only_copies():
    values = np.array([0, 1, 2])
    dataset = Dataset("toy", values, np.array([0, 3]), 3)
    values[0] = 2
    assert dataset.sequence(0).tolist() == [0, 1, 2]
    for array in (dataset.values, dataset.row_splits, dataset.item_ids, dataset.sequence(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.num_items = 4  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        dataset.drops["k_core"] = 1  # pyright: ignore[reportIndexIssue]
    values, splits = leave_one_out(ragged([1, 2, 3, 4])).train
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(values=[0.0, 1.0, 2.0]), TypeError, "`values` must be integers"),
        (dict(values=[[0, 1, 2]]), ValueError, "`values` must have one dimension"),
        (dict(values=[0, 1, 5]), ValueError, "item ids from 0 to num_items - 1 = 2"),
        (dict(values=[0, -1, 2]), ValueError, "got -1 to 2"),
        (dict(values=[0, 1, 2**40]), ValueError, "must fit int32"),
        (dict(row_splits=[0, 2]), ValueError, "from 0 to the 3 values"),
        (dict(row_splits=[0]), ValueError, "at least one user"),
        (dict(row_splits=[0, 2, 1, 3]), ValueError, "user 1 has no interaction"),
        (dict(user_ids=["a", "b"]), ValueError, "`user_ids` must be 1 distinct ids"),
        (dict(item_ids=[4, 4, 5]), ValueError, "`item_ids` must be 3 distinct ids"),
        (dict(timestamps=[1, 3, 2]), ValueError, "user 0 .* decrease"),
        (dict(timestamps=[1, 2]), ValueError, "3 finite numbers"),
        (dict(timestamps=[1, 2, np.nan]), ValueError, "3 finite numbers"),
        (dict(timestamps=["a", "b", "c"]), TypeError, "`timestamps` must be numbers"),
        (dict(timestamps=np.array([3, 2, 1], np.uint32)), ValueError, "user 0 .* decrease"),
        (dict(timestamps=np.array([0, 1, 2**63], np.uint64)), ValueError, "must fit int64"),
        (dict(order="time"), ValueError, "`order` must be one of timestamp, .* got 'time'"),
    ],
)
def test_bad_datasets_say_what_is_wrong(change, error, message):
    good = dict(name="toy", values=[0, 1, 2], row_splits=[0, 3], num_items=3)
    Dataset(**good)  # pyright: ignore[reportArgumentType]
    with pytest.raises(error, match=message):
        Dataset(**(good | change))


@pytest.mark.parametrize(
    ("users", "items", "options", "error", "message"),
    [
        ([], [], {}, ValueError, "at least one row"),
        ([0, None], [0, 1], {}, ValueError, "no missing id"),
        ([0.5, 1.0], [0, 1], {}, TypeError, "integers or strings"),
        ([0, 1], [0, 1, 2], {}, ValueError, "`items` must have the 2 rows"),
        ([0, 1], [0, 1], {"timestamps": [1]}, ValueError, "`timestamps` must have the 2 rows"),
    ],
)
def test_bad_interactions_say_what_is_wrong(users, items, options, error, message):
    with pytest.raises(error, match=message):
        Dataset.from_interactions(users, items, **options)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint32, np.int64])
def test_timestamps_far_apart(dtype):
    """Their differences do not fit the type."""
    times = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max, np.iinfo(dtype).min], dtype)
    kept = ragged([1, 2], [3], timestamps=times).timestamps
    assert kept is not None and kept.dtype == np.int64 and kept.tolist() == times.tolist()


def test_the_order_is_no_part_of_the_fingerprint():
    rows: Any = ([0, 0, 0, 0], [3, 2, 1, 0])
    places = [1, 2, 3, 4]
    datasets = [
        Dataset.from_interactions(*rows),
        Dataset.from_interactions(*rows, timestamps=places),
        Dataset.from_interactions(*rows, timestamps=places, positions=places),
    ]
    assert [dataset.order for dataset in datasets] == ["file", "timestamp", "position"]
    assert len({leave_one_out(dataset).fingerprint() for dataset in datasets}) == 1


@given(datasets())
@settings(max_examples=50, deadline=None)
def test_distinct_pairs_and_popularity_are_those_of_python(dataset):
    rows, items = distinct_pairs(dataset.values, dataset.row_splits)
    found = list(zip(rows.tolist(), items.tolist(), strict=True))
    assert found == [
        (user, item)
        for user, sequence in enumerate(sequences(dataset))
        for item in sorted(set(sequence))
    ]
    split = leave_one_out(dataset)
    trained = split.train[0].tolist()
    assert split.popularity.tolist() == [trained.count(i) for i in range(dataset.num_items)]
    tested = [one for one in sequences(dataset) if len(one) > 3]
    repeated = sum(one[-1] in one[:-1] for one in tested)
    assert split.evaluation("test").num_repeated == repeated


def test_distinct_pairs_of_empty_rows():
    rows, items = distinct_pairs(np.array([4, 4], np.int32), np.array([0, 0, 2, 2]))
    assert rows.tolist() == [1] and items.tolist() == [4]
    rows, items = distinct_pairs(np.zeros(0, np.int32), np.zeros(3, int))
    assert rows.size == 0 and items.size == 0


def test_sequence_of_an_unknown_user():
    with pytest.raises(IndexError, match="from 0 to 0, got -1"):
        ragged([1, 2]).sequence(-1)


def test_k_core_repeats_until_nothing_is_rare():
    # Item 3 is rare; without it user 2 is, and without that user item 2 is.
    dataset = ragged([0, 1], [0, 1, 2], [2, 3], user_ids=np.array([5, 6, 9]))
    core = k_core(dataset, 2)
    assert sequences(core) == [[0, 1], [0, 1]]
    assert core.user_ids.tolist() == [5, 6] and core.item_ids.tolist() == [0, 1]
    assert core.drops == {"k_core": 3}
    with pytest.raises(ValueError, match="leaves no interaction"):
        k_core(dataset, 4)
    for k in (0, 2.5, None, True):
        with pytest.raises(ValueError, match="`k` of `k_core` must be an integer of at least"):
            k_core(dataset, k)  # type: ignore


@given(datasets(timestamps=True), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_k_core_keeps_what_a_loop_keeps(dataset, k):
    pairs = list(zip(dataset.users.tolist(), dataset.values.tolist(), strict=True))
    kept = None
    while kept != pairs:
        kept = pairs
        users, items = [u for u, _ in kept], [i for _, i in kept]
        pairs = [(u, i) for u, i in kept if users.count(u) >= k and items.count(i) >= k]
    if not kept:
        with pytest.raises(ValueError, match="leaves no interaction"):
            k_core(dataset, k)
        return
    core = k_core(dataset, k)
    external = [
        (dataset.user_ids.tolist().index(core.user_ids[u]), int(core.item_ids[i]))
        for u, i in zip(core.users, core.values, strict=True)
    ]
    assert external == [(u, int(dataset.item_ids[i])) for u, i in kept]
    assert core.drops["k_core"] == dataset.num_interactions - len(kept)


@pytest.mark.parametrize(
    ("keep", "expected", "drops"),
    [
        ("keep", [[1, 2, 1], [1, 1]], {}),
        ("first", [[0, 1], [0]], {"repeats": 2}),
        ("last", [[1, 0], [0]], {"repeats": 2}),
    ],
)
def test_repeats(keep, expected, drops):
    times = np.array([1, 2, 3, 1, 2])
    dataset = drop_repeats(ragged([1, 2, 1], [1, 1], timestamps=times), keep)
    assert sequences(dataset) == expected and dataset.drops == drops
    assert dataset.timestamps is not None and len(dataset.timestamps) == len(dataset.values)


def test_leave_one_out_by_hand():
    split = leave_one_out(ragged([1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 2, 1, 0]))
    values, splits = split.train
    assert values.tolist() == [1, 2, 3, 4, 5, 6, 9, 3, 2]
    assert splits.tolist() == [0, 3, 6, 7, 9]
    valid, test = split.evaluation("valid"), split.evaluation("test")
    assert valid.users.tolist() == test.users.tolist() == [1, 3]
    assert valid.targets.tolist() == [7, 1] and test.targets.tolist() == [8, 0]
    assert valid.history_values.tolist() == [4, 5, 6, 3, 2]
    assert test.history_values.tolist() == [4, 5, 6, 7, 3, 2, 1]
    assert test.history_splits.tolist() == [0, 4, 7]


def test_train_users_are_a_share_and_nested():
    split = leave_one_out(synthetic(num_users=200, num_items=100, num_communities=5))
    lengths, before = np.diff(split.train[1]), None
    for fraction in (1.0, 0.5, 0.1, 1e-9):
        some = split.with_train_users(fraction)
        kept = np.diff(some.train[1]) > 0
        assert kept.sum() == max(1, round(fraction * (lengths > 0).sum()))
        np.testing.assert_array_equal(np.diff(some.train[1]), np.where(kept, lengths, 0))
        assert before is None or not np.any(kept & ~before)
        before = kept
        np.testing.assert_array_equal(some.with_train_users(fraction).train[1], some.train[1])
        for part in ("valid", "test"):  # all users are still ranked for
            jax.tree.map(
                np.testing.assert_array_equal, some.evaluation(part), split.evaluation(part)
            )
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="`fraction` must be in"):
            split.with_train_users(fraction)


def test_global_time_split_by_hand():
    dataset = ragged(
        [1, 2, 3, 4, 5],  # trains on 2, validates once, tests once
        [6, 7],  # a test target without anything in validation
        [8],  # no history yet in the validation period: not ranked
        [9, 0],  # wholly trained on
        timestamps=np.array([1, 2, 10, 11, 20, 9, 25, 12, 3, 4]),
    )
    split = global_time_split(dataset, 10, 20)
    assert split.train[0].tolist() == [1, 2, 6, 9, 0]
    assert split.train[1].tolist() == [0, 2, 3, 3, 5]
    valid, test = split.evaluation("valid"), split.evaluation("test")
    assert (valid.users.tolist(), valid.targets.tolist()) == ([0], [3])
    assert (test.users.tolist(), test.targets.tolist()) == ([0, 1], [5, 7])
    assert test.history_values.tolist() == [1, 2, 3, 4, 6]
    with pytest.raises(ValueError, match="has no timestamps; use `leave_one_out`"):
        global_time_split(ragged([1]), 1, 2)
    with pytest.raises(ValueError, match="`valid_from` must be before `test_from`"):
        global_time_split(dataset, 20, 10)


def test_no_held_out_parts():
    evaluation = leave_one_out(ragged([1, 2, 3])).evaluation("test")
    assert evaluation.targets.shape == (0,) and evaluation.history_splits.tolist() == [0]


def split_of(dataset: Dataset, times: tuple[int, int] | None) -> Split:
    return leave_one_out(dataset) if times is None else global_time_split(dataset, *times)


@pytest.mark.parametrize("times", [None, (4, 7)])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_nothing_held_out_leaks_into_training(data, times):
    dataset = data.draw(datasets(timestamps=True))
    split = split_of(dataset, times)
    starts = dataset.row_splits[:-1]
    held_out = {"valid": split.valid, "test": split.test}
    first_free = split.train_end.copy()
    for part, evaluation in ((p, split.evaluation(p)) for p in PARTS):
        users, positions = evaluation.users, held_out[part]
        assert np.all(positions >= first_free[users])  # after all that is trained on
        first_free[users] = positions + 1  # and test targets after validation targets
        for row, (user, position) in enumerate(zip(users, positions, strict=True)):
            assert starts[user] <= position < dataset.row_splits[user + 1]
            history = slice(*evaluation.history_splits[row : row + 2])
            np.testing.assert_array_equal(
                evaluation.history_values[history], dataset.values[starts[user] : position]
            )
            assert evaluation.targets[row] == dataset.values[position]

    # Other held-out items, same training arrays.
    trained = np.zeros(dataset.num_interactions, bool)
    for user, end in enumerate(split.train_end):
        trained[starts[user] : end] = True
    assert split.num_train == trained.sum()
    others = np.where(trained, dataset.values, dataset.num_items - 1 - dataset.values)
    changed = split_of(dataclasses.replace(dataset, values=others), times)
    for array, same in zip(split.train, changed.train, strict=True):
        np.testing.assert_array_equal(array, same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(train_end=[2]), "one position inside each user's sequence"),
        (dict(train_end=[2, 3]), "one position inside each user's sequence"),
        (dict(valid=[9]), "`valid` must hold positions"),
        (dict(valid=[1]), "is trained on"),
        (dict(test=[2]), "not after the user's validation target"),
        (dict(test=[3, 3]), "at most one for each user"),
        (dict(test=[7, 3]), "must be ascending"),
    ],
)
def test_bad_splits_say_what_is_wrong(change, message):
    dataset = ragged([1, 2, 3, 4], [1, 2, 3, 4])
    good = dict(train_end=[2, 6], valid=[2, 6], test=[3, 7])
    Split(dataset, **good)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=message):
        Split(dataset, **(good | change))


def test_unknown_part():
    part: Any = "train"
    with pytest.raises(ValueError, match='"valid" or "test", got \'train\''):
        leave_one_out(ragged([1])).evaluation(part)


def test_filters_keep_the_attributes_of_each_item():
    attributes = Attributes(("a", "b", "c"), np.arange(3), np.arange(4))
    core = k_core(ragged([1, 2], [0, 1, 2], num_items=3, attributes=attributes), 2)
    assert core.item_ids.tolist() == [1, 2]
    assert core.known_attributes().values.tolist() == [1, 2]
