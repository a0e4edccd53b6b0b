"""Windows, batches and negatives against slow Python, and no leak of held-out items."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from scipy import stats

from experiments import batching
from experiments.batching import (
    TrainData,
    check_negatives,
    draw_negatives,
    epoch_order,
    most_slots,
    sample_batch,
    training_data,
)
from experiments.config import Config
from experiments.dataset import Dataset, leave_one_out
from experiments.run import make_trainer

KEY = jax.random.key(0)
# Users with none, one, two and more training items than a window takes; items 0 to 11.
SEQUENCES = [[], [3], [1, 2], [5, 4, 5], [0, 1, 2, 3, 4, 5, 6], [7], [8, 9], list(range(10))]
NUM_ITEMS, MAX_LENGTH = 12, 4


def ragged(sequences) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([item for sequence in sequences for item in sequence], np.int32)
    return values, np.cumsum([0, *map(len, sequences)])


def windows_of(data: TrainData, sequences) -> list[tuple[int, list[int], int]]:
    """(user, places of the inputs in the user's sequence, warm-up) of every window."""
    first = np.cumsum([0, *map(len, sequences)])
    rows = zip(*(np.asarray(a).tolist() for a in data[1:5]), strict=True)
    return [
        (user, list(range(start - first[user], start - first[user] + length)), warm_up)
        for start, length, warm_up, user in rows
    ]


sequences_of = st.lists(
    st.integers(0, 12).map(lambda n: list(range(n))), min_size=1, max_size=5
)


@settings(deadline=None)
@given(sequences_of, st.integers(1, 6))
def test_windows_last(sequences, max_length):
    """One window for each user with a target: the last inputs, of which each has one."""
    if not any(len(sequence) > 1 for sequence in sequences):
        sequences = [*sequences, [0, 1]]
    data = training_data(ragged(sequences), 13, max_length=max_length, windows="last")
    expected = [
        (user, list(range(len(sequence)))[:-1][-max_length:], 0)
        for user, sequence in enumerate(sequences)
        if len(sequence) > 1
    ]
    assert windows_of(data, sequences) == expected


@settings(deadline=None)
@given(sequences_of, st.integers(1, 6))
def test_windows_prefixes(sequences, max_length):
    """A window for every target, with the newest of its history, and it alone counts."""
    if not any(len(sequence) > 1 for sequence in sequences):
        sequences = [*sequences, [0, 1]]
    data = training_data(ragged(sequences), 13, max_length=max_length, windows="prefixes")
    expected = []
    for user, sequence in enumerate(sequences):
        for target in range(1, len(sequence)):
            inputs = list(range(target))[-max_length:]
            expected.append((user, inputs, len(inputs) - 1))
    assert windows_of(data, sequences) == expected


@settings(deadline=None)
@given(sequences_of, st.integers(1, 6))
@example([list(range(12))], 1)
@example([list(range(9)), [], list(range(6))], 4)  # a window ends exactly with the sequence
def test_windows_whole(sequences, max_length):
    """Every target counts once, with all its history, or half to a whole length of it."""
    if not any(len(sequence) > 1 for sequence in sequences):
        sequences = [*sequences, [0, 1]]
    data = training_data(ragged(sequences), 13, max_length=max_length, windows="whole")
    history = {}
    for user, inputs, warm_up in windows_of(data, sequences):
        assert 0 <= inputs[0] and warm_up < len(inputs) <= max_length
        assert inputs[-1] + 1 < len(sequences[user])  # the last target is the user's own
        for place in inputs[warm_up:]:
            target = (user, place + 1)
            assert target not in history
            history[target] = place + 1 - inputs[0]
    targets = {(u, t) for u, sequence in enumerate(sequences) for t in range(1, len(sequence))}
    assert set(history) == targets
    for (_, place), length in history.items():
        assert length == place or max_length / 2 < length <= max_length


def test_bad_input():
    with pytest.raises(ValueError, match=r"`windows` must be one of \('last', .* got 'all'"):
        training_data(ragged(SEQUENCES), NUM_ITEMS, max_length=4, windows="all")  # type: ignore
    with pytest.raises(ValueError, match="no user has the two .* `split_times`"):
        training_data(ragged([[1], [], [2]]), NUM_ITEMS, max_length=4)
    data = training_data(ragged([[0, 1], [2, 1, 0, 2]]), 3, max_length=4)
    with pytest.raises(ValueError, match=r"user 1 \(.*\) has trained on all 3 items"):
        check_negatives(data)
    check_negatives(data_for("last"))


@functools.cache
def data_for(windows) -> TrainData:
    return training_data(ragged(SEQUENCES), NUM_ITEMS, max_length=MAX_LENGTH, windows=windows)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 20])
def test_an_epoch_is_an_exact_partition(batch_size):
    """Free places of the last batch hold the number of windows, once each window is drawn."""
    data = data_for("prefixes")
    orders = [np.asarray(epoch_order(jax.random.key(s), data, batch_size)) for s in (0, 0, 1)]
    for order in orders:
        assert order.shape == (-(-data.num_windows // batch_size), batch_size)
        flat = order.ravel()
        np.testing.assert_array_equal(
            np.sort(flat[: data.num_windows]), range(data.num_windows)
        )
        assert np.all(flat[data.num_windows :] == data.num_windows)
        sizes = np.append(data.lengths, 0)[order].sum(axis=1)
        assert most_slots(jnp.asarray(order), data) == sizes.max()
    np.testing.assert_array_equal(orders[0], orders[1])
    assert np.any(orders[0] != orders[2])


def test_an_epoch_of_several_workers():
    """Of 22 windows and 4 workers two have six windows and two five; batches of 4 take turns.

    How often a window comes is binomial: each worker takes it or not, a quarter of the times.
    """
    data, counts = data_for("prefixes")._replace(starts=jnp.zeros(22, jnp.int32)), []
    assert data.num_windows == 22
    for seed in range(400):
        order = np.asarray(epoch_order(jax.random.key(seed), data, 4, workers=4))
        assert (order < 22).sum(axis=1).tolist() == [4, 4, 4, 4, 2, 2, 1, 1]
        for worker in range(4):  # which has no window twice
            own = order[worker::4].ravel()
            assert len(set(own[own < 22])) == (own < 22).sum()
        counts.append(np.bincount(order[order < 22], minlength=22))
    found = np.bincount(np.ravel(counts), minlength=5) / np.size(counts)
    np.testing.assert_allclose(found, stats.binom.pmf(range(5), 4, 1 / 4), atol=0.02)


@pytest.mark.parametrize("windows", ["last", "prefixes", "whole"])
def test_batches_hold_consecutive_items_of_the_right_user(windows):
    """Slot for slot, for all windows of an epoch; users next to each other never mix."""
    data = data_for(windows)
    order = np.asarray(epoch_order(KEY, data, 4))
    num_slots = int(most_slots(jnp.asarray(order), data)) + 3
    assert (order == data.num_windows).any()  # the last batch is partial
    sample = jax.jit(sample_batch, static_argnums=3)
    places = windows_of(data, SEQUENCES)
    num_targets = 0
    for batch_windows in order:
        batch = jax.tree.map(
            np.asarray, sample(KEY, data, jnp.asarray(batch_windows), num_slots)
        )
        slots = []  # (user, input row, target row, weight)
        for window in batch_windows[batch_windows < data.num_windows]:
            user, inputs, warm_up = places[window]
            items = SEQUENCES[user]
            for number, t in enumerate(inputs):
                slots.append((user, items[t] + 1, items[t + 1] + 1, number >= warm_up))
        num_used = len(slots)
        num_targets += batch.weights.sum()
        users, inputs, targets, weights = zip(*slots, strict=True)
        np.testing.assert_array_equal(batch.inputs[:num_used], inputs)
        np.testing.assert_array_equal(batch.targets[:num_used], targets)
        np.testing.assert_array_equal(batch.weights[:num_used], weights)
        for user, negative in zip(users, batch.negatives, strict=False):
            assert negative - 1 not in SEQUENCES[user] and 1 <= negative <= NUM_ITEMS
        for field in (batch.inputs, batch.targets, batch.negatives, batch.weights):
            assert len(field) == num_slots and not field[num_used:].any()
    assert data.num_targets == num_targets


# Items seen, in the catalogue of 12: none below, none above, scattered, twice, all but one.
SEEN = [[0, 1], [11, 10, 9], [2, 7, 3, 8], [5, 5, 6, 5], [*range(4), *range(5, 12)]]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_negatives_are_uniform_over_the_unseen(backend, monkeypatch):
    """Chi-square for users whose seen items lie in every way that the search can meet."""
    data = training_data(ragged(SEEN), NUM_ITEMS, max_length=4)
    if backend == "gpu":  # its search runs here as well
        monkeypatch.setattr(
            batching.jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args)
        )
    num = 6000
    users = jnp.repeat(jnp.arange(len(SEEN)), num)
    draw = jax.jit(lambda *args: draw_negatives(*args))  # a trace of its own for each backend
    draws = np.asarray(draw(KEY, data, users)).reshape(len(SEEN), num)
    for seen, drawn in zip(SEEN, draws, strict=True):
        counts = np.bincount(drawn, minlength=NUM_ITEMS)
        assert len(counts) == NUM_ITEMS and not counts[seen].any()
        unseen = counts[np.setdiff1d(np.arange(NUM_ITEMS), seen)]
        assert len(unseen) == 1 or stats.chisquare(unseen).pvalue > 1e-3


def test_negatives_are_independent():
    """Of the slot, and of the user beside it: pairs of neighbours fill the square evenly."""
    data = training_data(ragged([[0, 1], [2, 3]]), 6, max_length=4)
    pairs = np.asarray(draw_negatives(KEY, data, jnp.tile(jnp.arange(2), 8000))).reshape(-1, 2)
    counts = np.bincount(pairs[:, 0] * 6 + pairs[:, 1], minlength=36).reshape(6, 6)
    assert stats.chisquare(counts[2:, [0, 1, 4, 5]].ravel()).pvalue > 1e-3


def test_held_out_items_reach_neither_batches_nor_graph():
    """Two datasets that differ in what is held out, and only there, train alike to the bit.

    Held-out items stay in the catalogue, so they may be drawn as negatives, as in the
    official code: to leave them out would tell the model which they are.
    """
    rng = np.random.default_rng(0)
    train_values, _ = ragged([list(rng.permutation(9)[:6]) for _ in range(8)])
    trained = []
    for held_out in ([0, 1], [10, 11]):
        sequences = [[*items, *held_out] for items in train_values.reshape(8, 6).tolist()]
        values, splits = ragged(sequences)
        split = leave_one_out(Dataset("toy", values, splits, num_items=12))
        assert split.dataset.values[split.test].tolist() == [held_out[1]] * 8
        trainer = make_trainer(Config(batch_size=8, max_length=8, dim=4), split)
        windows = epoch_order(KEY, trainer.data, 8)[0]
        batch = jax.jit(sample_batch, static_argnums=3)(KEY, trainer.data, windows, 64)
        trained.append((trainer.data, trainer.graph, batch))
        assert {11, 12} <= set(np.asarray(batch.negatives).ravel())  # rows of items 10 and 11
    jax.tree.map(np.testing.assert_array_equal, *trained)
