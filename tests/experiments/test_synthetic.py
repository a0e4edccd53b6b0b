"""What the generated data promises: its shape, its communities, the same bytes twice."""

import numpy as np
import pytest

from experiments.dataset import leave_one_out
from experiments.synthetic import RING_REACH, synthetic


@pytest.fixture(scope="module")
def dataset():
    return synthetic()


def communities(dataset):
    """The planted community of each interaction, read off the external item ids."""
    return np.array([int(name[1:3]) for name in dataset.item_ids])[dataset.values]


def test_shape_is_that_of_beauty(dataset):
    lengths = np.diff(dataset.row_splits)
    assert (dataset.num_users, dataset.num_items) == (4000, 2000)
    assert lengths.min() == 5 and np.median(lengths) == 6 and 8 < lengths.mean() < 9
    np.testing.assert_allclose(np.quantile(lengths, [0.75, 0.9]), [9, 14], atol=1)
    per_item = np.bincount(dataset.values, minlength=dataset.num_items)
    assert 10 < leave_one_out(dataset).num_train / dataset.num_items < 14  # Beauty: 12.7
    # A long tail: the most popular tenth of the items takes far more than a tenth.
    top = np.sort(per_item)[-dataset.num_items // 10 :].sum() / per_item.sum()
    assert 0.25 < top < 0.5


def test_no_user_has_an_item_twice(dataset):
    pairs = dataset.users * dataset.num_items + dataset.values
    assert len(np.unique(pairs)) == dataset.num_interactions


def test_users_stay_in_one_or_two_communities(dataset):
    community, users = communities(dataset), dataset.users
    table = np.zeros((dataset.num_users, community.max() + 1), int)
    np.add.at(table, (users, community), 1)
    most = np.sort(table, axis=1)[:, ::-1]
    purity = most[:, :2].sum() / dataset.num_interactions
    assert purity > 0.9
    assert most[:, 0].sum() / dataset.num_interactions > 0.65
    followed = users[1:] == users[:-1]
    same = (community[1:] == community[:-1])[followed].mean()
    assert same > 0.75  # by chance: 1 in 25


def test_next_items_are_few(dataset):
    """Sequences have an order: an item's commonest successors follow far above chance."""
    followed = dataset.users[1:] == dataset.users[:-1]
    item, after = dataset.values[:-1][followed], dataset.values[1:][followed]
    pairs, counts = np.unique(item * dataset.num_items + after, return_counts=True)
    owner = pairs // dataset.num_items
    best = [np.sort(counts[owner == i])[-RING_REACH:].sum() for i in range(200)]
    seen = [counts[owner == i].sum() for i in range(200)]
    # Within a community of 80, four popular items alone would take under a half.
    assert np.sum(best) / np.sum(seen) > 0.55
    # Order has a direction: the reverse pair is rare.
    reverse = np.isin(after * dataset.num_items + item, pairs[counts > 2])
    forward = np.isin(item * dataset.num_items + after, pairs[counts > 2])
    assert reverse.sum() < 0.2 * forward.sum()


def test_same_bytes_twice():
    first, again, other = (synthetic(300, 200, 5, seed=seed) for seed in (3, 3, 4))
    for name in ("values", "row_splits", "user_ids", "item_ids"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    assert first.values.tobytes() != other.values.tobytes()


@pytest.mark.parametrize("sizes", [(1, 10, 1), (7, 123, 10), (50, 40, 4)])
def test_small_and_uneven_sizes(sizes):
    dataset = synthetic(*sizes)
    assert (dataset.num_users, dataset.num_items) == sizes[:2]
    assert len(set(communities(dataset))) <= sizes[2]
    assert np.diff(dataset.row_splits).min() == 5


@pytest.mark.parametrize("sizes", [(0, 100, 1), (10, 9, 1), (10, 100, 0), (10, 100, 11)])
def test_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="ten items for each community, got num_users="):
        synthetic(*sizes)
