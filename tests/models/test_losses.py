"""The losses on numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.losses import LOSSES, bce, bpr, weighted_mean

LN2, LN3 = math.log(2), math.log(3)
RUN = jax.jit(
    jax.value_and_grad(lambda loss, *args: LOSSES[loss](*args), (1, 2)), static_argnums=0
)

# loss, positive, negative, weights, expected
BY_HAND = [
    ("bce", [0, 0], [0, 0], [1, 1], 2 * LN2),
    ("bpr", [0, 0], [0, 0], [1, 1], LN2),
    # sigmoid(ln 3) = 3/4: -ln(3/4) for the positive and -ln(1/4) for the negative
    ("bce", [LN3], [LN3], [1], math.log(16 / 3)),
    ("bce", [LN3], [-LN3], [1], 2 * math.log(4 / 3)),
    ("bpr", [LN3], [0], [1], math.log(4 / 3)),
    ("bpr", [1 + LN3], [1 + 2 * LN3], [1], math.log(4)),
    # weights 1 and 3
    ("bce", [0, LN3], [0, LN3], [1, 3], (2 * LN2 + 3 * math.log(16 / 3)) / 4),
    ("bpr", [0, LN3], [0, 0], [1, 3], (LN2 + 3 * math.log(4 / 3)) / 4),
    # scores so large that exp overflows
    ("bce", [-1000], [1000], [1], 2000),
    ("bpr", [-1000], [1000], [1], 2000),
]


@pytest.mark.parametrize(("loss", "positive", "negative", "weights", "expected"), BY_HAND)
def test_by_hand(loss, positive, negative, weights, expected):
    args = (jnp.array(a, float) for a in (positive, negative, weights))
    np.testing.assert_allclose(LOSSES[loss](*args), expected, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_weight_of_0_excludes_anything(loss, bad):
    """An unused slot of a packed stream holds whatever came out of it."""
    value, (positive, negative) = RUN(
        loss, jnp.array([1.0, bad]), jnp.array([2.0, bad]), jnp.array([1.0, 0.0])
    )
    expected, gradients = RUN(loss, jnp.array([1.0]), jnp.array([2.0]), jnp.array([1.0]))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(jnp.array([positive[0], negative[0]]), jnp.concat(gradients))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_valid_slot(loss):
    """0 with zero gradients, not 0/0: a batch of empty windows must not ruin a run."""
    value, gradients = RUN(loss, jnp.ones(2), jnp.ones(2), jnp.zeros(2))
    assert value == 0 and not np.any(gradients)


def test_gradients():
    """Of the sum over pairs: sigmoid(p) - 1 and sigmoid(n); for a margin, sigmoid(n - p)."""
    score, one = jnp.array([LN3]), jnp.ones(1)
    np.testing.assert_allclose(
        jax.grad(bce, (0, 1))(score, score, one), [[-1 / 4], [3 / 4]], rtol=1e-6
    )
    np.testing.assert_allclose(
        jax.grad(bpr, (0, 1))(score, 0 * one, one), [[-1 / 4], [1 / 4]], rtol=1e-6
    )


def test_weighted_mean_of_none():
    assert weighted_mean(jnp.array([jnp.nan]), jnp.zeros(1)) == 0
