"""Ranks by counting against sorting, metrics worked out by hand, and ranx as an oracle."""

import functools
import itertools
import warnings
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.dataset import Evaluation
from experiments.ranking import (
    Ranks,
    collect,
    hit_rate,
    metrics,
    mrr,
    ndcg,
    rank_by_popularity,
    rank_targets,
    ranking_data,
)

NUM_ITEMS, MAX_LENGTH = 9, 3
# (history, target): longer than the model's input, an item twice, the target in it, one item.
USERS = [
    ([4, 2, 7, 0, 5], 1),
    ([3, 3, 8], 0),
    ([6, 1, 2], 6),
    ([8], 5),
    ([0, 4], 3),
    ([1, 1, 1, 1], 2),
    ([5, 6, 7, 8], 4),
]


def evaluation(users) -> Evaluation:
    histories = [history for history, _ in users]
    return Evaluation(
        np.arange(len(users), dtype=np.int32),
        np.array([target for _, target in users], np.int32),
        np.concatenate(histories).astype(np.int32),
        np.cumsum([0, *map(len, histories)]),
    )


def score_table(seed: int, high: int) -> np.ndarray:
    """Integers below `high`, so that sums are exact, and ties as many as `high` leaves."""
    return np.random.default_rng(seed).integers(0, high, (NUM_ITEMS + 1, NUM_ITEMS))


def slow_scores(table, history) -> np.ndarray:
    """Of a toy model that sees the newest items: the newest counts once, the one before it
    twice, and so on."""
    inputs = history[-MAX_LENGTH:]
    return (np.arange(len(inputs), 0, -1)[:, None] * table[np.add(inputs, 1)]).sum(axis=0)


@functools.partial(jax.jit, static_argnums=(2, 3))
def count(table, data, num_slots, mask_history=True):
    def scores_of(histories):
        stream, inputs = histories.pack(num_slots)
        place = stream.num_padding(MAX_LENGTH) + stream.offset
        terms = (MAX_LENGTH - place)[:, None] * table[inputs]
        return jax.ops.segment_sum(terms, stream.segment, data.targets.shape[1])

    return rank_targets(scores_of, data, mask_history=mask_history)


def ranks_of(table, users=USERS, *, chunk_size=4, mask_history=True) -> Ranks:
    """`Ranks` through the whole path: layout, packing, counting, collecting."""
    (data,), num_slots = ranking_data(
        [evaluation(users)], max_length=MAX_LENGTH, chunk_size=chunk_size
    )
    counts = count(jnp.asarray(table, float), data, num_slots, mask_history)
    return collect(counts, len(users))


def slow_ranks(table, users=USERS, mask_history=True) -> list[list[int]]:
    """For each target, the ranks that ties leave open, found by sorting."""
    ranks = []
    for history, target in users:
        scores = slow_scores(table, history)
        if mask_history and target in history:
            ranks.append([NUM_ITEMS])
            continue
        left_out = set(history) - {target} if mask_history else set()
        order = sorted(set(range(NUM_ITEMS)) - left_out, key=lambda item: -scores[item])
        ranks.append([r for r, i in enumerate(order, 1) if scores[i] == scores[target]])
    return ranks


def open_ranks(ranks: Ranks) -> list[list[int]]:
    pairs = zip(ranks.above.tolist(), ranks.ties.tolist(), strict=True)
    return [list(range(above + 1, above + ties + 2)) for above, ties in pairs]


@pytest.mark.parametrize("mask_history", [True, False])
@pytest.mark.parametrize("high", [10**5, 3, 1])  # no ties, many, nothing else
def test_ranks_equal_sorting(high, mask_history):
    """Items of the history never count above, once or twice in it; a target in its own
    history ranks last when masked. Histories longer than the input count as a whole."""
    table = score_table(0, high)
    ranks = ranks_of(table, mask_history=mask_history)
    assert open_ranks(ranks) == slow_ranks(table, mask_history=mask_history)
    if high == 10**5:
        assert not ranks.ties.any() and ranks.above.any()


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 10])
def test_chunks_do_not_matter(chunk_size):
    table = score_table(1, 4)
    assert open_ranks(ranks_of(table, chunk_size=chunk_size)) == slow_ranks(table)


@pytest.mark.parametrize("high", [10**5, 3, 1])
def test_ranks_by_popularity_equal_those_of_a_model_that_knows_nothing_else(high):
    popularity = np.random.default_rng(high).integers(0, high, NUM_ITEMS)
    (data,), _ = ranking_data([evaluation(USERS)], max_length=MAX_LENGTH, chunk_size=4)
    scores = jnp.broadcast_to(jnp.asarray(popularity, jnp.float32), (4, NUM_ITEMS))
    expected = collect(rank_targets(lambda _: scores, data), len(USERS))
    ranks = rank_by_popularity(evaluation(USERS), popularity)
    np.testing.assert_array_equal(ranks, expected)


def test_history_is_masked_whatever_it_scores():
    """A thousand more for what a user has had must not move its ranks; for others it does."""
    table = score_table(2, 100)
    raised = table + 1000 * (np.arange(NUM_ITEMS) >= 5)
    has_had_all, has_not = ([5, 6, 7, 8], 4), ([5, 7], 4)
    before, after = (open_ranks(ranks_of(t, [has_had_all, has_not])) for t in (table, raised))
    assert before[0] == after[0]
    assert after[1] > before[1]


@pytest.mark.parametrize("mask_history", [True, False])
def test_scores_that_are_not_numbers(mask_history):
    """A broken model never looks good: its NaN items rank above, a NaN target last."""
    users = [([8], 0), ([8, 1], 2), ([7], 3)]
    table = np.tile(np.arange(NUM_ITEMS, 0, -1.0), (NUM_ITEMS + 1, 1))
    table[:, [1, 3]] = np.nan  # item 1 is in the second history, item 3 is a target
    ranks = ranks_of(table, users, mask_history=mask_history)
    assert ranks.above.tolist() == [2, 2 if mask_history else 3, NUM_ITEMS - 1]
    assert ranks.ties.tolist() == [0, 0, 0]


def test_infinite_scores_rank_as_numbers_do():
    users = [([8], 0), ([8], 1), ([8], 2)]
    table = np.tile(np.arange(NUM_ITEMS, 0, -1.0), (NUM_ITEMS + 1, 1))
    table[:, [1, 2]] = np.inf, -np.inf
    ranks = ranks_of(table, users)
    assert ranks.above.tolist() == [1, 0, NUM_ITEMS - 2]


def test_parts_share_shapes():
    """So that validation and test share one program; what fills up the shorter is dropped."""
    parts = [evaluation(USERS), evaluation(USERS[:2])]
    data, num_slots = ranking_data(parts, max_length=MAX_LENGTH, chunk_size=2)
    assert jax.tree.map(jnp.shape, data[0]) == jax.tree.map(jnp.shape, data[1])
    assert num_slots == 6  # the first chunk: two inputs of three items
    table = score_table(3, 5)
    for users, laid_out in zip((USERS, USERS[:2]), data, strict=True):
        ranks = collect(count(jnp.asarray(table, float), laid_out, num_slots), len(users))
        assert open_ranks(ranks) == slow_ranks(table, users)


def test_nothing_to_rank():
    nobody = Evaluation(*(np.zeros(n, np.int32) for n in (0, 0, 0, 1)))
    with pytest.raises(ValueError, match="there is no held-out target to rank"):
        ranking_data([evaluation(USERS), nobody], max_length=MAX_LENGTH)


def ranks(*pairs: tuple[int, int]) -> Ranks:
    """From (rank, ties) of each target."""
    above, ties = np.array(pairs).T
    return Ranks(above - 1, ties)


F = Fraction
# Ranks 1, 3, 7, 15 have 1 / log2(rank + 1) = 1, 1/2, 1/3, 1/4.
BY_HAND = [
    (ranks((1, 0), (3, 0), (7, 0), (15, 0)), "HR@1", F(1, 4)),
    (ranks((1, 0), (3, 0), (7, 0), (15, 0)), "HR@3", F(2, 4)),
    (ranks((1, 0), (3, 0), (7, 0), (15, 0)), "HR@10", F(3, 4)),
    (ranks((1, 0), (3, 0), (7, 0), (15, 0)), "NDCG@2", F(1, 4)),
    (ranks((1, 0), (3, 0), (7, 0), (15, 0)), "NDCG@10", (1 + F(1, 2) + F(1, 3)) / 4),
    (ranks((1, 0), (3, 0), (7, 0), (15, 0)), "NDCG@20", (1 + F(1, 2) + F(1, 3) + F(1, 4)) / 4),
    (ranks((1, 0), (3, 0), (7, 0), (15, 0)), "MRR@10", (1 + F(1, 3) + F(1, 7)) / 4),
    # Two others at the score of the target, which may come first, second or third.
    (ranks((1, 2)), "HR@1", F(1, 3)),
    (ranks((1, 2)), "HR@2", F(2, 3)),
    (ranks((1, 2)), "MRR@10", (1 + F(1, 2) + F(1, 3)) / 3),
    # Places 3 to 6, of which two count.
    (ranks((3, 3)), "HR@4", F(2, 4)),
    (ranks((3, 3)), "MRR@4", (F(1, 3) + F(1, 4)) / 4),
    (ranks((3, 3)), "NDCG@3", F(1, 2) / 4),
    # More places asked for than there are items.
    (ranks((1, 0), (9, 0)), "HR@1000", F(1)),
    (ranks((1, 0), (9, 0)), "MRR@1000", (1 + F(1, 9)) / 2),
]


@pytest.mark.parametrize(("given", "name", "expected"), BY_HAND)
def test_metrics_by_hand(given, name, expected):
    np.testing.assert_allclose(metrics(given, [name])[name], float(expected), rtol=1e-12)


def test_metrics_keep_leading_axes():
    """One mean for each seed."""
    both = Ranks(np.array([[0, 2], [0, 9]]), np.zeros((2, 2), int))
    np.testing.assert_allclose(metrics(both, ["NDCG@5"])["NDCG@5"], [3 / 4, 1 / 2])


@pytest.mark.parametrize("name", ["HR", "HR@", "HR@-1", "HR@x", "hr@10", "MAP@10", "10"])
def test_bad_names(name):
    with pytest.raises(
        ValueError, match=f"must be like HR@10, NDCG@10 or MRR@10, got '{name}'"
    ):
        metrics(ranks((1, 0)), [name])


def test_bad_k():
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        metrics(ranks((1, 0)), ["HR@0"])


@pytest.mark.parametrize("function", [hit_rate, ndcg, mrr])
def test_ties_are_the_mean_over_all_orders(function):
    """Each order in which a sort could leave five equal items, two above and one below."""
    items, target = ["t", "a", "b", "c", "d"], "t"
    for k in (1, 3, 5, 8, 20):
        gains = []
        for order in itertools.permutations(items):
            rank = 2 + 1 + order.index(target)
            gains.append(function(Ranks(np.array([rank - 1]), np.array([0])), k)[0])
        tied = function(Ranks(np.array([2]), np.array([4])), k)[0]
        np.testing.assert_allclose(tied, np.mean(gains), rtol=1e-12)


def test_constant_scores_measure_as_random_ones():
    """A model that knows nothing must not gain by the order of ids."""
    users = [([8, 7], 0), ([0, 1, 2], 6)]  # 7 and 6 candidates
    found = metrics(ranks_of(np.ones((NUM_ITEMS + 1, NUM_ITEMS)), users), ["HR@3", "MRR@2"])
    np.testing.assert_allclose(found["HR@3"], float((F(3, 7) + F(3, 6)) / 2))
    np.testing.assert_allclose(found["MRR@2"], float((F(3, 2) / 7 + F(3, 2) / 6) / 2))


def test_against_ranx(monkeypatch):
    """An independent implementation, on scores without ties, which it breaks by order."""
    numba = pytest.importorskip("numba")
    # Compiling its metrics takes a minute; as plain Python they take no time.
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, while it is imported and at work
        ranx = pytest.importorskip("ranx")
        rng = np.random.default_rng(0)
        orders = [rng.permutation(NUM_ITEMS).tolist() for _ in range(20)]
        users = [(order[: 1 + n % 5], order[-1]) for n, order in enumerate(orders)]
        table = score_table(4, 10**5)
        qrels, run = {}, {}
        for number, (history, target) in enumerate(users):
            scores = slow_scores(table, history)
            unseen = sorted(set(range(NUM_ITEMS)) - set(history))
            qrels[str(number)] = {str(target): 1}
            run[str(number)] = {str(item): float(scores[item]) for item in unseen}
        names = {"HR": "hit_rate", "NDCG": "ndcg", "MRR": "mrr"}
        ours = metrics(
            ranks_of(table, users), [f"{name}@{k}" for name in names for k in (1, 2, 5, 20)]
        )
        theirs = ranx.evaluate(
            ranx.Qrels(qrels),
            ranx.Run(run),
            [f"{names[name]}@{k}" for name, k in (key.split("@") for key in ours)],
        )
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-12)
    assert 0 < ours["HR@1"] < ours["HR@5"] < ours["HR@20"] == 1
