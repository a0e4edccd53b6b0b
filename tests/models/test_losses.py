"""The losses on numbers worked out by hand, against slow references, and at their limits."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.losses import (
    LOSSES,
    bce,
    bpr,
    cross_entropy,
    gbce,
    mean_in_chunks,
    sampled_softmax,
    weighted_mean,
)
from tests.models.toys import assert_same_tree, precision

LN2, LN3 = math.log(2), math.log(3)
NUM_ITEMS = 11
SAMPLED = LOSSES | {
    "gbce": functools.partial(gbce, num_items=NUM_ITEMS, t=0.75),
    "sampled_softmax": functools.partial(sampled_softmax, num_items=NUM_ITEMS),
}
RUN = jax.jit(
    jax.value_and_grad(lambda loss, *args: SAMPLED[loss](*args), (1, 2)), static_argnums=0
)

# loss, positive, negative, weights, expected
BY_HAND = [
    ("bce", [0, 0], [[0], [0]], [1, 1], 2 * LN2),
    ("bpr", [0, 0], [[0], [0]], [1, 1], LN2),
    # sigmoid(ln 3) = 3/4: -ln(3/4) for the positive and -ln(1/4) for the negative
    ("bce", [LN3], [[LN3]], [1], math.log(16 / 3)),
    ("bce", [LN3], [[-LN3]], [1], 2 * math.log(4 / 3)),
    ("bpr", [LN3], [[0]], [1], math.log(4 / 3)),
    ("bpr", [1 + LN3], [[1 + 2 * LN3]], [1], math.log(4)),
    # two negatives: binary terms add up, pairs are averaged
    ("bce", [LN3], [[LN3, -LN3]], [1], math.log(16 / 3) + math.log(4 / 3)),
    ("bpr", [LN3], [[0, 2 * LN3]], [1], (math.log(4 / 3) + math.log(4)) / 2),
    # alpha = 2/10, so beta = 1 - 0.75 * 0.8 = 0.4
    ("gbce", [LN3], [[LN3, -LN3]], [1], 1.4 * math.log(4 / 3) + math.log(4)),
    # each negative stands for five of the ten others: 3 / (3 + 5 * 1 + 5 * 2)
    ("sampled_softmax", [LN3], [[0, LN2]], [1], math.log(18 / 3)),
    # weights 1 and 3
    ("bce", [0, LN3], [[0], [LN3]], [1, 3], (2 * LN2 + 3 * math.log(16 / 3)) / 4),
    ("bpr", [0, LN3], [[0], [0]], [1, 3], (LN2 + 3 * math.log(4 / 3)) / 4),
    (
        "sampled_softmax",
        [0, LN3],
        [[0], [0]],
        [1, 3],
        (math.log(11) + 3 * math.log(13 / 3)) / 4,
    ),
    # scores so large that exp overflows
    ("bce", [-1000], [[1000]], [1], 2000),
    ("bpr", [-1000], [[1000]], [1], 2000),
    ("gbce", [-1000], [[1000, 1000]], [1], 2400),
    ("sampled_softmax", [-1000], [[1000]], [1], 2000 + math.log(10)),
    ("gbce", [1000], [[-1000, -1000]], [1], 0),
    ("sampled_softmax", [1000], [[-1000]], [1], 0),
]


@pytest.mark.parametrize(("loss", "positive", "negative", "weights", "expected"), BY_HAND)
def test_by_hand(loss, positive, negative, weights, expected):
    args = (jnp.array(a, float) for a in (positive, negative, weights))
    value, gradients = RUN(loss, *args)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("loss", SAMPLED)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_weight_of_0_excludes_anything(loss, bad):
    """An unused slot of a packed stream holds whatever came out of it."""
    value, (positive, negative) = RUN(
        loss,
        jnp.array([1.0, bad]),
        jnp.array([[2.0, 0.5], [bad, bad]]),
        jnp.array([1.0, 0.0]),
    )
    expected, gradients = RUN(loss, jnp.array([1.0]), jnp.array([[2.0, 0.5]]), jnp.array([1.0]))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(positive[:1], gradients[0])
    np.testing.assert_allclose(negative[:1], gradients[1])
    assert not positive[1:].any() and not negative[1:].any()


@pytest.mark.parametrize("loss", SAMPLED)
def test_no_valid_slot(loss):
    """0 with zero gradients, not 0/0: a batch of empty windows must not ruin a run."""
    value, gradients = RUN(loss, jnp.ones(2), jnp.ones((2, 3)), jnp.zeros(2))
    assert value == 0 and not any(np.any(g) for g in gradients)


@pytest.mark.parametrize("loss", SAMPLED)
def test_one_negative_needs_no_axis(loss):
    positive, negative, weights = np.random.default_rng(0).uniform(size=(3, 4))
    with_axis, without = (
        RUN(loss, positive, n, weights) for n in (negative[:, None], negative)
    )
    assert_same_tree(without[0], with_axis[0], 0)
    assert_same_tree(without[1], (with_axis[1][0], with_axis[1][1][:, 0]), 0)


@pytest.mark.parametrize("loss", SAMPLED)
def test_order_of_negatives(loss):
    """The value does not depend on it, and no negative is left out of the gradient."""
    rng = np.random.default_rng(0)
    positive, negative, weights = rng.normal(size=4), rng.normal(size=(4, 5)), np.ones(4)
    value, (_, gradient) = RUN(loss, positive, negative, weights)
    other, (_, reversed_gradient) = RUN(loss, positive, negative[:, ::-1], weights)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    np.testing.assert_allclose(reversed_gradient[:, ::-1], gradient, rtol=1e-5)
    assert np.all(gradient > 0)


def test_gradients():
    """Of the sum over pairs: sigmoid(p) - 1 and sigmoid(n); for a margin, sigmoid(n - p)."""
    score, one = jnp.array([LN3]), jnp.ones(1)
    _, (positive, negative) = RUN("bce", score, score[:, None], one)
    np.testing.assert_allclose([positive, negative[:, 0]], [[-1 / 4], [3 / 4]], rtol=1e-6)
    _, (positive, negative) = RUN("bpr", score, 0 * one[:, None], one)
    np.testing.assert_allclose([positive, negative[:, 0]], [[-1 / 4], [1 / 4]], rtol=1e-6)


def test_weighted_mean_of_none():
    assert weighted_mean(jnp.array([jnp.nan]), jnp.zeros(1)) == 0


@pytest.mark.parametrize("t", [0, 0.5, 1])
def test_gbce_against_the_paper(t):
    """Its formulas one by one, where powers of a probability do not yet underflow."""
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(size=3), rng.normal(size=(3, 4))
    alpha = 4 / (NUM_ITEMS - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    expected = []
    for p, negatives in zip(positive, negative, strict=True):
        terms = [math.log((1 / (1 + math.exp(-p))) ** beta)]
        terms += [math.log(1 - 1 / (1 + math.exp(-n))) for n in negatives]
        expected.append(-sum(terms))
    loss = jax.jit(functools.partial(gbce, num_items=NUM_ITEMS, t=t))
    actual = loss(positive, negative, np.ones(3))
    np.testing.assert_allclose(actual, np.mean(expected), rtol=1e-5)
    if t == 0:
        same, _ = RUN("bce", positive, negative, np.ones(3))
        np.testing.assert_allclose(actual, same, rtol=1e-6)


def test_calibrated_gbce_has_its_minimum_at_the_true_probabilities():
    """With t = 1, over all pairs of a target and another item: what the loss is for."""
    probabilities = np.random.default_rng(0).dirichlet(np.ones(NUM_ITEMS))
    target, other = np.nonzero(~np.eye(NUM_ITEMS, dtype=bool))

    def loss(scores):
        weights = jnp.asarray(probabilities[target])
        return gbce(scores[target], scores[other, None], weights, num_items=NUM_ITEMS, t=1)

    scores = np.log(probabilities / (1 - probabilities))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(scores), 0, atol=1e-7)


@pytest.mark.parametrize("t", [-0.1, 1.1])
def test_gbce_refuses_a_calibration_outside_of_0_and_1(t):
    with pytest.raises(ValueError, match=r"`t` must lie in \[0, 1\], got"):
        gbce(jnp.ones(1), jnp.ones((1, 1)), jnp.ones(1), num_items=NUM_ITEMS, t=t)


def test_gbce_refuses_a_calibration_that_is_no_number():
    with pytest.raises(TypeError, match="`t` must be a number, got None"):
        gbce(jnp.ones(1), jnp.ones((1, 1)), jnp.ones(1), num_items=NUM_ITEMS, t=None)  # type: ignore


def others(scores: np.ndarray) -> np.ndarray:
    """All scores but that of the first item, which is the positive."""
    return scores[None, 1:]


def log_sum_exp(scores: Iterable[float]) -> float:
    return math.log(sum(math.exp(s) for s in scores))


@jax.jit
def sampled_losses(positive: jax.Array, negative: jax.Array) -> jax.Array:
    """`[draws]` for one positive and `[draws, n]`."""
    loss = functools.partial(sampled_softmax, num_items=NUM_ITEMS)
    return jax.vmap(lambda n: loss(positive, n[None], jnp.ones(1)))(negative)


def test_sampled_softmax_with_all_others_is_the_full_one():
    scores = np.random.default_rng(0).normal(size=NUM_ITEMS)
    loss = sampled_losses(scores[:1], others(scores))
    np.testing.assert_allclose(loss, log_sum_exp(scores) - scores[0], rtol=1e-6)


def test_sampled_softmax_is_unbiased_inside_the_logarithm():
    """Over all draws of one negative, exp(loss) has exactly the full loss's as its mean."""
    scores = np.random.default_rng(0).normal(size=NUM_ITEMS)
    losses = sampled_losses(scores[:1], others(scores).T)
    full = log_sum_exp(scores) - scores[0]
    np.testing.assert_allclose(np.exp(losses).mean(), math.exp(full), rtol=1e-6)


def test_sampled_softmax_approaches_the_full_one():
    """From below, the bias falling with 1 / n."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=NUM_ITEMS)
    full = log_sum_exp(scores) - scores[0]
    biases = []
    for num_negatives in (1, 8, 64):
        drawn = scores[rng.integers(1, NUM_ITEMS, (4000, num_negatives))]
        biases.append(full - sampled_losses(scores[:1], drawn).mean())
    assert biases[0] > 5 * biases[1] > 0 and biases[1] > 5 * abs(biases[2])
    assert abs(biases[2]) < 0.01 * full


def test_accidental_hits_do_not_count():
    """As if they had not been drawn; where all are hits, nothing is left to lose against."""
    positive, weights = jnp.array([1.0, 1.0]), jnp.ones(2)
    loss = functools.partial(sampled_softmax, num_items=NUM_ITEMS)
    run = jax.jit(jax.value_and_grad(lambda n, hits: loss(positive, n, weights, hits=hits)))
    negative = jnp.array([[0.3, 1.0, -0.2], [1.0, 1.0, 1.0]])
    value, gradient = run(negative, jnp.array([[False, True, False], [True] * 3]))
    expected, _ = RUN("sampled_softmax", positive[:1], negative[:1, ::2], weights[:1])
    np.testing.assert_allclose(value, expected / 2, rtol=1e-6)
    np.testing.assert_array_equal(gradient != 0, [[True, False, True], [False] * 3])


# Soft-max over the catalogue: dot products, with a bias as in BERT4Rec, and distances between
# pairs of vectors as in STOSA.
def with_bias(states, items):
    weights, bias = items
    return states @ weights.T + bias


def distance(states, items):
    return sum(
        2 * s @ i.T - (s**2).sum(axis=1)[:, None] - (i**2).sum(axis=1)
        for s, i in zip(states, items, strict=True)
    )


def dot(states, items):
    return states @ items.T


NUM_SLOTS, DIM = 7, 3
SCORERS = {dot: (1, "table"), with_bias: (1, "bias"), distance: (2, "tables")}


def softmax_problem(score_all, dtype) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """States, items, targets `[T]` and weights `[T]`, of which one is 0."""
    rng = np.random.default_rng(0)
    num_states, kind = SCORERS[score_all]
    states = tuple(rng.normal(size=(NUM_SLOTS, DIM)).astype(dtype) for _ in range(num_states))
    tables = tuple(rng.normal(size=(NUM_ITEMS, DIM)).astype(dtype) for _ in range(2))
    items = {"table": tables[0], "bias": (tables[0], tables[1][:, 0]), "tables": tables}[kind]
    weights = rng.uniform(1, 2, NUM_SLOTS).astype(dtype)
    weights[2] = 0
    targets = rng.integers(0, NUM_ITEMS, NUM_SLOTS)
    return states if num_states > 1 else states[0], items, targets, weights


def softmax_loss(form, score_all, targets, weights):
    """A function of states and items; the positive's score depends on both too."""

    def loss(states, items):
        positive = score_all(states, items)[jnp.arange(len(targets)), targets]
        return form(score_all, states, items, positive, weights)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def dense(score_all, states, items, positive, weights, label_smoothing=0.0):
    scores = score_all(states, items)
    log_probabilities = scores - jnp.log(jnp.exp(scores).sum(axis=1, keepdims=True))
    of_target = positive - jnp.log(jnp.exp(scores).sum(axis=1))
    losses = (1 - label_smoothing) * of_target
    losses += label_smoothing * log_probabilities.mean(axis=1)
    return -(losses * weights).sum() / weights.sum()


@pytest.mark.parametrize(
    ("score_all", "label_smoothing", "chunk_size"),
    # Chunks of one slot, with a rest, without, and larger than all slots.
    [(dot, 0.0, 3), (dot, 0.2, 100), (with_bias, 0.0, 7), (distance, 0.2, 1)],
)
def test_cross_entropy_in_chunks(score_all, label_smoothing, chunk_size):
    """Value and gradients in double precision equal those of the dense form."""
    with precision("float64"):
        states, items, targets, weights = softmax_problem(score_all, "float64")
        plain = functools.partial(dense, label_smoothing=label_smoothing)
        chunked = functools.partial(
            cross_entropy, label_smoothing=label_smoothing, chunk_size=chunk_size
        )
        actual, expected = (
            softmax_loss(form, score_all, targets, weights)(states, items)
            for form in (chunked, plain)
        )
        assert_same_tree(actual, expected, 1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cross_entropy_by_definition(label_smoothing):
    """The smoothed target's distribution against the soft-max, one item at a time."""
    states, items, targets, weights = softmax_problem(dot, "float32")
    expected = 0.0
    for state, target, weight in zip(states, targets, weights, strict=True):
        scores = [float(state @ item) for item in items]
        for i, score in enumerate(scores):
            share = label_smoothing / NUM_ITEMS + (1 - label_smoothing) * (i == target)
            expected -= weight * share * (score - log_sum_exp(scores)) / weights.sum()
    form = functools.partial(cross_entropy, label_smoothing=label_smoothing)
    value, _ = softmax_loss(form, dot, targets, weights)(states, items)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_cross_entropy_does_not_see_a_shift():
    """A constant added to all scores of a slot changes nothing."""
    with precision("float64"):
        states, (items, bias), targets, weights = softmax_problem(with_bias, "float64")
        loss = softmax_loss(cross_entropy, with_bias, targets, weights)
        expected = loss(states, (items, bias))
        assert_same_tree(loss(states, (items, bias + 3)), expected, 1e-12)
        np.testing.assert_allclose(expected[1][1][1].sum(), 0, atol=1e-12)


def test_cross_entropy_of_large_scores():
    states, items, targets, weights = softmax_problem(dot, "float32")
    result = softmax_loss(cross_entropy, dot, targets, weights)(1e4 * states, items)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    assert result[0] > 1000


def test_cross_entropy_of_unused_slots():
    """They change neither the value nor any gradient, and get none; nor if all are unused."""
    states, items, targets, weights = softmax_problem(dot, "float32")
    positive = (states * items[targets]).sum(axis=1)
    run = jax.jit(jax.value_and_grad(functools.partial(cross_entropy, dot), (0, 1, 2)))
    expected = run(states, items, positive, weights)
    assert not np.any(expected[1][0][weights == 0])
    for bad in (1e38, math.inf, math.nan):
        bad_states, bad_positive = states.copy(), positive.copy()
        bad_states[weights == 0] = bad_positive[weights == 0] = bad
        assert_same_tree(run(bad_states, items, bad_positive, weights), expected, 0)
        nothing = run(bad_states, items, bad_positive, 0 * weights)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["value", "gradient"])
def test_cross_entropy_computes_no_chunk_of_unused_slots(transform):
    calls = []

    def counted(states, items):
        jax.debug.callback(lambda: calls.append(1))
        return dot(states, items)

    states, items, _, _ = softmax_problem(dot, "float32")
    weights = jnp.array([1.0, 0, 0, 1, 0, 0, 1])  # in three chunks, but for the order
    run = jax.jit(
        transform(lambda s: cross_entropy(counted, s, items, s[:, 0], weights, chunk_size=2))
    )
    jax.block_until_ready(run(states))
    jax.effects_barrier()
    assert len(calls) == 2


def test_cross_entropy_maps_over_seeds():
    """Several runs train in one program."""
    states, items, targets, weights = softmax_problem(dot, "float32")
    loss = softmax_loss(cross_entropy, dot, targets, weights)
    stacked = np.stack([states, states[::-1]])
    both = jax.vmap(loss, (0, None))(stacked, items)
    for i, one in enumerate(stacked):
        assert_same_tree(jax.tree.map(lambda x, i=i: x[i], both), loss(one, items), 1e-6)


def test_cross_entropy_never_holds_all_scores():
    """Neither forward nor backward: by the program's shapes, and on a CPU by its memory."""
    num_slots, num_items, chunk_size = 640, 1000, 32
    form = functools.partial(cross_entropy, chunk_size=chunk_size)

    def loss(form, states, items):
        return form(dot, states, items, states.sum(axis=1), jnp.ones(num_slots))

    shapes = [jax.ShapeDtypeStruct((n, 4), "float32") for n in (num_slots, num_items)]

    def temporary(form):
        gradient = jax.jit(jax.value_and_grad(functools.partial(loss, form), (0, 1)))
        lowered = gradient.lower(*shapes)
        memory: Any = lowered.compile().memory_analysis()
        return lowered.as_text(), memory.temp_size_in_bytes

    jax.config.update("jax_disable_most_optimizations", False)  # memory as users have it
    text, memory = temporary(form)
    plain_text, plain_memory = temporary(dense)
    every = f"{num_slots}x{num_items}x"
    assert every in plain_text and every not in text
    assert f"{chunk_size}x{num_items}x" in text
    if jax.default_backend() == "cpu":  # elsewhere the products take room of their own
        assert plain_memory > 4 * num_slots * num_items > 5 * memory


@pytest.mark.parametrize("loss", [bce, bpr])
def test_scores_and_weights_of_other_slots_are_refused(loss):
    positive, negative, weights = jnp.arange(4.0), jnp.ones((4, 2)), jnp.ones(4)
    with pytest.raises(ValueError, match=r"`negative` must have the shape \(4, 4\) of the"):
        loss(positive, negative.T, weights)
    with pytest.raises(ValueError, match=r"`weights` must have the shape \(4,\) of the slots"):
        loss(positive, negative, weights[:, None])
    with pytest.raises(ValueError, match=r"`weights` must have the shape \(4,\) of the slots"):
        cross_entropy(dot, positive[:, None], jnp.ones((3, 1)), positive, weights[:, None])
    with pytest.raises(ValueError, match=r"`positive` must have the shape \(4,\) of the slots"):
        cross_entropy(dot, positive[:, None], jnp.ones((3, 1)), positive[:, None], weights)
    with pytest.raises(ValueError, match=r"`hits` must have the shape \(4, 2\) of the slots"):
        hits = jnp.zeros((4, 1), bool)
        sampled_softmax(positive, negative, weights, num_items=9, hits=hits)
    with pytest.raises(ValueError, match="`chunk_size` must be a positive integer, got 0"):
        form = functools.partial(cross_entropy, chunk_size=0)
        form(dot, positive[:, None], jnp.ones((3, 1)), positive, weights)
    with pytest.raises(ValueError, match="`num_items` must be at least 2, got 1"):
        gbce(positive, negative, weights, num_items=1, t=0.5)
    with pytest.raises(ValueError, match="`num_items` must be at least 2, got 0"):
        sampled_softmax(positive, negative, weights, num_items=0)
    with pytest.raises(ValueError, match="`negative` must hold at least one score"):
        loss(positive, negative[:, :0], weights)


@pytest.mark.parametrize("loss", SAMPLED)
def test_no_slots(loss):
    value, _ = RUN(loss, jnp.ones(0), jnp.ones((0, 3)), jnp.ones(0))
    assert value == 0
    assert cross_entropy(dot, jnp.ones((0, 1)), jnp.ones((3, 1)), jnp.ones(0), jnp.ones(0)) == 0


def test_weights_may_be_bools():
    def loss(states, weights):
        return cross_entropy(dot, states, jnp.eye(3), states[:, 0], weights, chunk_size=2)

    states = jnp.arange(12.0).reshape(4, 3)
    used = jnp.array([True, False, True, True])
    expected = jax.value_and_grad(loss)(states, used.astype(jnp.float32))
    for found, one in zip(jax.value_and_grad(loss)(states, used), expected, strict=True):
        np.testing.assert_array_equal(found, one)


def test_cross_entropy_sums_the_gradient_of_a_narrow_table_in_float32():
    """In bfloat16 the sum over the chunks would lose more than the table's own rounding."""
    rng = np.random.default_rng(0)
    states, items = (jnp.asarray(rng.normal(size=(n, 8)), jnp.bfloat16) for n in (4000, 20))

    def slope(dtype, chunk_size):
        wide = states.astype(dtype), items.astype(dtype)

        def loss(items):
            positive = (wide[0] * items[0]).sum(axis=1)
            form = functools.partial(cross_entropy, chunk_size=chunk_size)
            return form(dot, wide[0], items, positive, jnp.ones(4000, dtype))

        return np.asarray(jax.grad(loss)(wide[1]), np.float32)

    expected = slope(jnp.float32, 4000)
    many, one = (np.linalg.norm(slope(jnp.bfloat16, n) - expected) for n in (32, 4000))
    assert many < 2 * one


def test_gradients_of_a_narrow_table_under_wide_weights_keep_its_type():
    """A table that is used twice, as the docstring asks for, sums its two gradients."""

    def loss(states, items):
        positive = (states * items[:4]).sum(axis=1)
        return cross_entropy(dot, states, items, positive, jnp.ones(4), chunk_size=3)

    wide = [jnp.asarray(np.random.default_rng(0).normal(size=(n, 8))) for n in (4, 6)]
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = [x.astype(dtype) for x in wide]
        for found, exact in zip(
            jax.grad(loss, (0, 1))(*narrow), jax.grad(loss, (0, 1))(*wide), strict=True
        ):
            assert found.dtype == dtype
            np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.02)


def test_sampled_softmax_in_float16_of_a_large_catalogue():
    scores = jnp.zeros((2, 3), jnp.float16), jnp.ones(2, jnp.float16)
    value = sampled_softmax(scores[0][:, 0], scores[0], scores[1], num_items=100_000)
    np.testing.assert_allclose(value, np.log(100_000), rtol=2e-3)


def test_cross_entropy_refuses_what_belongs_to_other_slots():
    one = jnp.ones((3, 1))
    with pytest.raises(ValueError, match=r"must have 3 of them, as `weights`, .* \(1, 1\)"):
        mean_in_chunks(lambda *_: jnp.ones(3), one, one, one[:1], jnp.ones(3), chunk_size=3)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0])
def test_cross_entropy_refuses_a_smoothing_outside_of_0_and_1(label_smoothing):
    one = jnp.ones((1, 1))
    with pytest.raises(ValueError, match=r"`label_smoothing` must lie in \[0, 1\), got"):
        cross_entropy(dot, one, one, one[0], one[0], label_smoothing=label_smoothing)
