"""What the generated data promises: its shape, its communities, the same bytes twice."""

import numpy as np
import pytest

from experiments.dataset import leave_one_out
from experiments.synthetic import synthetic


@pytest.fixture(scope="module")
def dataset():
    return synthetic()


def communities(dataset):
    """The planted community of each interaction, read off the external item ids."""
    return np.array([int(name[1:4]) for name in dataset.item_ids])[dataset.values]


def test_shape_is_that_of_beauty(dataset):
    lengths = np.diff(dataset.row_splits)
    assert (dataset.num_users, dataset.num_items) == (4000, 3000)
    assert lengths.min() == 5 and np.median(lengths) == 6 and 8 < lengths.mean() < 9
    np.testing.assert_allclose(np.quantile(lengths, [0.75, 0.9]), [9, 14], atol=1)
    per_item = np.bincount(dataset.values, minlength=dataset.num_items)
    assert 8 < leave_one_out(dataset).num_train / dataset.num_items < 13  # Beauty: 12.7
    # A long tail: the most popular tenth of the items takes far more than a tenth.
    top = np.sort(per_item)[-dataset.num_items // 10 :].sum() / per_item.sum()
    assert 0.25 < top < 0.5, top


def test_the_community_is_the_attribute(dataset):
    attributes = dataset.known_attributes()
    assert len(attributes.names) == 150
    found = np.array(attributes.names)[attributes.values]  # one for each item
    np.testing.assert_array_equal(found, [name[:4] for name in dataset.item_ids])


def test_no_user_has_an_item_twice(dataset):
    pairs = dataset.users * dataset.num_items + dataset.values
    assert len(np.unique(pairs)) == dataset.num_interactions


def test_users_prefer_two_communities(dataset):
    table = np.zeros((dataset.num_users, 150), int)
    np.add.at(table, (dataset.users, communities(dataset)), 1)
    most = np.sort(table, axis=1)[:, ::-1] / dataset.num_interactions
    assert most[:, 0].sum() > 0.33 and most[:, :2].sum() > 0.55  # by chance: 0.14, 0.26


def test_order_matters(dataset):
    """Neighbours in a sequence are alike, and more so than any two items of the user."""
    users, community = dataset.users, communities(dataset)
    followed = users[1:] == users[:-1]

    def alike(order):
        return (community[order][1:] == community[order][:-1])[followed].mean()

    shuffled = np.lexsort((np.random.default_rng(0).random(len(users)), users))
    in_order = alike(np.arange(len(users)))
    assert in_order > 0.33 and in_order > 1.3 * alike(shuffled)
    # Walks repeat: among items of one community, few pairs make up many of the steps.
    step = np.stack([dataset.values[:-1], dataset.values[1:]])[
        :, followed & (community[1:] == community[:-1])
    ]
    _, counts = np.unique(np.sort(step, axis=0), axis=1, return_counts=True)
    assert len(counts) < 0.3 * 150 * (20 * 19 / 2)  # of all pairs inside communities
    assert np.mean(counts > 1) > 0.25


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
