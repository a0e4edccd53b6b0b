"""Tests and corrections against SciPy, by hand, and by what they promise."""

import numpy as np
import pytest
from scipy import stats

from experiments import per_user as pu
from experiments import statistics as st
from experiments.dataset import Dataset, leave_one_out
from experiments.ranking import Ranks, metrics


def test_paired_t_is_scipys():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.04, 0.001, (2, 5))
    found, known = st.paired_t(first, second), stats.ttest_rel(first, second)
    low, high = known.confidence_interval(0.95)
    np.testing.assert_allclose([found.p, found.low, found.high], [known.pvalue, low, high])
    difference = first - second
    assert found.num_seeds == 5
    np.testing.assert_allclose(found.effect, difference.mean() / difference.std(ddof=1))


@pytest.mark.parametrize(("gain", "p", "effect"), [(0.0, 1.0, 0.0), (-0.25, 0.25, -np.inf)])
def test_equal_differences(gain, p, effect):
    """Not 0, which a correction for many comparisons would leave at 0."""
    first = np.array([0.5, 0.75, 1.0])
    found = st.paired_t(first + gain, first)
    assert (found.difference, found.low, found.high) == (gain, gain, gain)
    assert (found.p, found.effect) == (p, effect)


def test_sign_flip_by_hand():
    assert st.sign_flip(np.arange(1.0, 6.0)) == 2 / 32  # the least that five seeds allow
    assert st.sign_flip(np.array([1.0, 1.0, -1.0])) == 1.0
    assert st.sign_flip(np.array([3.0, -1.0])) == 1.0  # |2| against 4, 2, 2, 4
    assert st.sign_flip(np.array([0.1, 0.2, -0.3])) == 1.0  # a sum of zero but for rounding


def test_more_seeds_than_sign_flip_takes():
    first = np.random.default_rng(0).normal(size=25)
    test = st.paired_t(first, first / 2)
    assert test.num_seeds == 25 and test.p_exact is None and 0 < test.p < 1
    assert st.paired_t(first[:24], first[:24] / 2).p_exact is not None


def test_sign_flip_is_scipys_permutation():
    values = np.random.default_rng(1).normal(0.5, 1, 9)
    # SciPy enumerates when asked for at least 2^9 draws.
    known = stats.permutation_test(
        (values,), np.sum, permutation_type="samples", n_resamples=1000
    )
    np.testing.assert_allclose(st.sign_flip(values), known.pvalue)


# The second list is out of order.
@pytest.mark.parametrize(
    ("p", "holm"),
    [
        ([0.01, 0.02, 0.03, 0.04], [0.04, 0.06, 0.06, 0.06]),
        ([0.04, 0.01, 0.5], [0.08, 0.03, 0.5]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holms_rule_by_hand(p, holm):
    np.testing.assert_allclose(st.holm(p), holm)


def test_bootstrap_interval_covers_the_truth():
    rng, covered, rejected = np.random.default_rng(3), 0, 0
    for seed in range(300):  # most users see no difference, as in ranking
        difference = rng.normal(0.3, 1, 200) * (rng.uniform(size=200) < 0.3)
        found = st.paired_bootstrap(difference, np.zeros(200), samples=500, seed=seed)
        covered += found.low <= 0.09 <= found.high
        null = difference - 0.09
        rejected += st.paired_bootstrap(null, np.zeros(200), samples=500, seed=seed).p < 0.05
    assert 0.91 <= covered / 300 <= 0.98
    assert 0.02 <= rejected / 300 <= 0.09


def test_bootstrap_is_scipys_and_repeats():
    rng = np.random.default_rng(4)
    first, second = rng.exponential(1.0, (2, 3, 400))
    found = st.paired_bootstrap(first, second, samples=4000)
    difference = (first - second).mean(axis=0)
    known = stats.bootstrap(
        (difference,), np.mean, method="percentile", n_resamples=4000, rng=rng
    )
    interval = known.confidence_interval
    np.testing.assert_allclose([found.low, found.high], [*interval], atol=0.01)
    np.testing.assert_allclose(found.difference, difference.mean())
    chunked = st.paired_bootstrap(first, second, samples=4000, chunk_values=999)
    np.testing.assert_allclose(chunked, found, atol=1e-12)
    assert found == st.paired_bootstrap(first, second, samples=4000)
    assert found != st.paired_bootstrap(first, second, samples=4000, seed=1)


@pytest.mark.parametrize("changed", [1, 3, 20])
def test_bootstrap_counts_ties_whatever_the_scale(changed):
    """Of few users who differ equally, sums are often just as far as the measured one."""
    one = np.zeros(500)
    one[:changed] = 1
    zero = np.zeros(500)
    found = {st.paired_bootstrap(scale * one, zero).p for scale in (1, 0.63, 1 / 3)}
    assert len(found) == 1


def test_bootstrap_without_any_difference():
    same = np.ones(10)
    assert st.paired_bootstrap(same, same) == (0, 0, 0, 1, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: st.paired_t(np.ones(3), np.ones(2)), "must be pairs"),
        (lambda: st.paired_t(np.ones(1), np.ones(1)), "at least two"),
        (lambda: st.paired_t(np.array([1, np.nan]), np.ones(2)), "must be finite"),
        (lambda: st.paired_t(np.arange(2), np.ones(2), level=95), "`level` must be between"),
        (lambda: st.sign_flip(np.ones(25)), "1 to 24 numbers"),
        (lambda: st.cohen_dz(np.ones(1)), "at least two numbers"),
        (lambda: st.paired_bootstrap(np.ones((2, 3)), np.ones((2, 4))), "must be pairs"),
        (lambda: st.paired_bootstrap(np.ones(3), np.ones(3), samples=0), "`samples`"),
        (lambda: st.holm([0.1, 1.1]), "numbers from 0 to 1"),
        (lambda: st.holm([np.nan]), "numbers from 0 to 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def user_ranks(seeds, users, above):
    above = np.asarray(above, np.int32)
    ranks = Ranks(above, np.zeros_like(above))
    return pu.UserRanks(np.array(seeds), np.array(users), ranks)


FIRST = user_ranks([0, 1], [5, 3], [[0, 1], [2, 3]])


def test_ranks_are_read_and_measured(tmp_path):
    path = tmp_path / "ranks.npz"
    np.savez(path, seeds=FIRST.seeds, users=FIRST.users, **FIRST.ranks._asdict())
    held = pu.read_ranks(path)
    np.testing.assert_equal(held, FIRST)
    values = pu.per_user(held, "NDCG@3")
    np.testing.assert_allclose(values, [[1, 1 / np.log2(3)], [0.5, 0]])
    np.testing.assert_allclose(values.mean(axis=1), metrics(held.ranks, ["NDCG@3"])["NDCG@3"])
    np.savez(path, seeds=FIRST.seeds)
    with pytest.raises(ValueError, match=r"lacks \['above', 'ties', 'users'\]"):
        pu.read_ranks(path)
    np.savez(path, seeds=np.arange(3), users=FIRST.users, **FIRST.ranks._asdict())
    with pytest.raises(ValueError, match=r"ranks must be \(3, 2\)"):
        pu.read_ranks(path)


def test_ranks_that_are_none_or_cut_short_are_named(tmp_path):
    path = tmp_path / "ranks.npz"
    np.savez(path, seeds=[0], users=[1, 2], above=[[0, 1]], ties=[[0, 0]])
    whole = path.read_bytes()
    for content in (b"", whole[:10], whole[: len(whole) // 2], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"ranks\.npz holds no ranks, or not all"):
            pu.read_ranks(path)


def test_align_by_user_and_seed():
    second = user_ranks([1, 0], [3, 5], [[30, 20], [10, 0]])
    one, other = pu.align(FIRST, second)
    assert one.users.tolist() == other.users.tolist() == [3, 5]
    assert one.ranks.above.tolist() == [[1, 0], [3, 2]]
    assert other.ranks.above.tolist() == [[10, 0], [30, 20]]
    one, other = pu.align(FIRST, second, seeds=[1])
    assert (one.ranks.above.tolist(), other.ranks.above.tolist()) == ([[3, 2]], [[30, 20]])
    with pytest.raises(ValueError, match="the runs have other seeds"):
        pu.align(FIRST, user_ranks([0], [3, 5], [[1, 2]]))
    with pytest.raises(ValueError, match="1 are in the first alone, 2 in the second alone"):
        pu.align(FIRST, user_ranks([0, 1], [3, 4, 6], np.zeros((2, 3))))
    with pytest.raises(ValueError, match=r"has the seeds \[0, 1\], not \[2\]"):
        pu.align(FIRST, second, seeds=[2])


def test_combine_joins_seeds():
    whole = pu.combine([FIRST, user_ranks([1, 2], [3, 5], [[9, 9], [6, 7]])])
    assert whole.seeds.tolist() == [0, 1, 2]
    assert whole.ranks.above.tolist() == [[1, 0], [3, 2], [6, 7]]
    with pytest.raises(ValueError, match="rank other users"):
        pu.combine([FIRST, user_ranks([2], [3, 4], [[6, 7]])])


def test_popularity_and_length_of_targets():
    # Three users; the last item tests, the one before validates.
    values = np.array([0, 1, 0, 2, 1, 0, 2, 3, 0, 1, 2, 3, 1])
    split = leave_one_out(Dataset("hand", values, np.array([0, 4, 8, 13]), 4))
    assert split.train[0].tolist() == [0, 1, 1, 0, 0, 1, 2]
    assert pu.target_popularity(split).tolist() == [1, 0, 3]  # items 2, 3 and 1
    assert pu.history_lengths(split).tolist() == [3, 3, 4]


def test_buckets():
    values = np.array([0, 7, 1, 1, 0, 3])
    ranks = Ranks(np.array([[0, 0, 9, 9, 9, 0]] * 2), np.zeros((2, 6), int))
    found = pu.bucket_metrics(ranks, values, starts=[0, 1, 3, 5], names=["HR@1"])
    assert [(b.low, b.high, b.num_targets) for b in found] == [
        (0, 0, 2), (1, 1, 2), (3, 3, 1), (7, 7, 1)
    ]  # fmt: skip
    assert [b.metrics["HR@1"].tolist() for b in found] == [[0.5] * 2, [0] * 2, [1] * 2, [1] * 2]
    whole = pu.bucket_metrics(ranks, values, names=["HR@1"])
    mean = sum(b.num_targets * b.metrics["HR@1"] for b in whole) / 6
    np.testing.assert_allclose(mean, metrics(ranks, ["HR@1"])["HR@1"])


def test_bucket_starts():
    assert pu.bucket_starts(np.arange(1, 11), 5).tolist() == [1, 3, 5, 7, 9]
    assert pu.bucket_starts(np.array([0, 0, 4, 4, 4, 9]), 2).tolist() == [0, 4]
    assert pu.bucket_starts(np.zeros(3, int)).tolist() == [0]
    with pytest.raises(ValueError, match="must hold counts"):
        pu.bucket_starts(np.array([-1]))
    ranks = Ranks(np.zeros(2, int), np.zeros(2, int))
    with pytest.raises(ValueError, match=r"`values` must be \(2,\)"):
        pu.bucket_metrics(ranks, np.ones(3, int))
    with pytest.raises(ValueError, match="must ascend from at most the smallest value 1"):
        pu.bucket_metrics(ranks, np.array([1, 2]), starts=[2, 3])


def test_bootstrap_p_is_never_zero():
    assert st.paired_bootstrap(np.arange(1.0, 51), np.zeros(50), samples=99).p == 1 / 100


def test_bootstrap_draws_how_many_users_differ():
    one = np.repeat([1.0, 0.0], [40, 360])
    found = st.paired_bootstrap(one, np.zeros(400))
    known = stats.binom.ppf([0.025, 0.975], 400, 0.1) / 400
    np.testing.assert_allclose([found.low, found.high], known, atol=0.003)


def test_a_bucket_begins_with_its_start():
    values, ranks = np.arange(4), Ranks(np.zeros(4, int), np.zeros(4, int))
    found = pu.bucket_metrics(ranks, values, starts=[0, 2], names=["HR@1"])
    assert [(b.low, b.high) for b in found] == [(0, 1), (2, 3)]
