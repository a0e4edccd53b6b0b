"""Is one run better than another: tests over seeds and over users, and corrections.

Two kinds of chance are told apart. *Seeds* are few: the paired t-test asks whether another
training would again be better, and the exact sign-flip test asks the same without assuming a
normal distribution, but cannot give less than 2 / 2^n (.0625 for five seeds). *Users* are
many: the paired bootstrap asks whether other users of the same kind would see the gain, with
the trained models as they are. A claim should pass both.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

MOST_FLIPS = 24  # pairs of which `sign_flip` tries all signs


class SeedTest(NamedTuple):
    """First minus second, paired by seed."""

    difference: float  # mean
    low: float  # of Student's interval around it
    high: float
    p: float  # paired t-test, two-sided
    p_exact: float | None  # sign-flip test, two-sided; None of more seeds than it takes
    effect: float  # Cohen's d_z
    num_seeds: int


class UserTest(NamedTuple):
    """First minus second, paired by user, each user's values averaged over seeds."""

    difference: float
    low: float  # of the bootstrap's percentile interval
    high: float
    p: float  # two-sided
    num_users: int


class BySeed(NamedTuple):
    """Two runs over the seeds that both have, see `by_seed`."""

    seeds: list[int]
    means: tuple[float, float]  # NaN without a seed
    test: SeedTest | None  # of more than one seed


def by_seed(first: Mapping[int, float], second: Mapping[int, float]) -> BySeed:
    """Pairs a metric of two runs, given by seed, and tests the difference by `paired_t`.

    Raises:
      ValueError: of several pairs, a value is not finite.
    """
    seeds = sorted(first.keys() & second.keys())
    one, other = (np.array([run[seed] for seed in seeds]) for run in (first, second))
    if not seeds:
        return BySeed(seeds, (np.nan, np.nan), None)
    test = paired_t(one, other) if len(seeds) > 1 else None
    return BySeed(seeds, (float(one.mean()), float(other.mean())), test)


def paired_t(first: np.ndarray, second: np.ndarray, *, level: float = 0.95) -> SeedTest:
    """Compares two runs over the seeds that they share.

    Where all differences are equal and not zero the t statistic and the effect are infinite,
    which happens by chance where the metric takes few values: p is then that of the sign-flip
    test, as no correction for many comparisons could do anything about 0.

    Args:
      first, second: a metric `[num_seeds]`, the same seed at the same place.
      level: of the interval.

    Raises:
      ValueError: shapes differ, there are fewer than two pairs, or a value is not finite.

    References:
      Student, The probable error of a mean, 1908; d_z as in Lakens, Calculating and reporting
      effect sizes, 2013.
    """
    difference = _differences(first, second)
    num, mean, effect = len(difference), float(difference.mean()), cohen_dz(difference)
    p = 2 * float(stats.t.sf(abs(effect) * np.sqrt(num), num - 1))  # t is d_z sqrt(n)
    if np.isinf(effect):
        p = 2.0 ** (1 - num)
    width = stats.t.ppf((1 + _fraction("level", level)) / 2, num - 1)
    half = float(width * difference.std(ddof=1) / np.sqrt(num))
    exact = sign_flip(difference) if num <= MOST_FLIPS else None
    return SeedTest(mean, mean - half, mean + half, p, exact, effect, num)


def sign_flip(differences: np.ndarray) -> float:
    """Exact two-sided p value that paired differences are symmetric around zero.

    The share of the 2^n ways to choose the signs whose sum is at least as far from zero.

    Args:
      differences: `[n]`, at most `MOST_FLIPS` of them.

    References:
      Fisher, The Design of Experiments, 1935, section 21.
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or not 1 <= len(values) <= MOST_FLIPS:
        raise ValueError(
            f"`differences` must hold 1 to {MOST_FLIPS} numbers, got shape {values.shape}."
        )
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    # Sums that are equal but for rounding count as equal.
    return float(np.mean(np.abs(sums) >= abs(values.sum()) - 1e-12 * np.abs(values).sum()))


def cohen_dz(differences: np.ndarray) -> float:
    """Mean of paired differences `[n]` over their standard deviation (n - 1)."""
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"`differences` must hold at least two numbers, got shape {values.shape}."
        )
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    if spread <= 1e-12 * np.abs(values).max():
        return float(np.sign(mean) * np.inf) if mean else 0.0
    return mean / spread


def spread(values: Iterable[float]) -> str:
    """Mean and, of several values, sample standard deviation, as `0.0408 ± 0.0009`."""
    found = np.fromiter(values, np.float64)
    deviation = f" ± {found.std(ddof=1):.4f}" if len(found) > 1 else ""
    return f"{found.mean():.4f}{deviation}"


def paired_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    *,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    chunk_values: int = 2_000_000,
) -> UserTest:
    """Compares two runs over users, by drawing users with replacement.

    The interval is the percentile one. The p value is the share of draws whose difference is
    as far from the measured one as that is from zero, so never below 1 / (samples + 1).

    Args:
      first, second: a metric for each user `[..., num_users]`, the same user at the same
        place; leading axes (seeds) are averaged away first.
      samples: draws of as many users as there are.
      seed: of the draws; the same seed gives the same numbers.
      level: of the interval.
      chunk_values: draws are made about this many users at a time, which bounds the memory.

    Raises:
      ValueError: shapes differ, there are fewer than two users, or a value is not finite.

    References:
      Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 16; for
      rankings, Sakai, Evaluating evaluation metrics based on the bootstrap, SIGIR 2006.
    """
    difference = _differences(_over_seeds(first), _over_seeds(second))
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")
    num, mean, changed = len(difference), float(difference.mean()), difference[difference != 0]
    if not len(changed):
        return UserTest(0.0, 0.0, 0.0, 1.0, num)
    # Most users see no difference, so only how many of the others are drawn, and which.
    draw = np.random.default_rng(seed)
    counts = draw.binomial(num, len(changed) / num, size=samples)
    rows, means = max(1, chunk_values // len(changed)), []
    for start in range(0, samples, rows):
        ends = np.cumsum(counts[start : start + rows])
        drawn = changed[draw.integers(len(changed), size=ends[-1], dtype=np.int32)]
        sums = np.concatenate([[0.0], np.cumsum(drawn)])[ends]
        means.append(np.diff(sums, prepend=0.0) / num)
    means = np.concatenate(means)
    tail = (1 - _fraction("level", level)) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    # Means that are equal but for rounding count as equal.
    far = int(np.sum(np.abs(means - mean) >= abs(mean) * (1 - 1e-9)))
    return UserTest(mean, float(low), float(high), (far + 1) / (samples + 1), num)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """P values `[n]` adjusted by Holm's step-down rule, which bounds any false discovery.

    References:
      Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"`p_values` must be a list of numbers from 0 to 1, got {p_values}.")
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def _differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(
            "`first` and `second` must be pairs, at least two of them, got shapes "
            f"{first.shape} and {second.shape}."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("`first` and `second` must be finite.")
    return first - second


def _over_seeds(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return values.reshape(-1, values.shape[-1]).mean(axis=0) if values.ndim > 1 else values


def _fraction(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"`{name}` must be between 0 and 1, got {value}.")
    return value
