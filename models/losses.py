"""Losses over scored pairs of a positive and a negative item."""

import jax
import jax.numpy as jnp


def bce(positive: jax.Array, negative: jax.Array, weights: jax.Array) -> jax.Array:
    """Binary cross-entropy of the positive plus that of the negative, weighted mean.

    The two are added, not averaged, so that scores of 0 give 2 ln 2.

    Args:
      positive, negative: scores `[T]`.
      weights: `[T]`, 0 for slots that do not count.
    """
    losses = jax.nn.softplus(-positive) + jax.nn.softplus(negative)
    return weighted_mean(losses, weights)


def bpr(positive: jax.Array, negative: jax.Array, weights: jax.Array) -> jax.Array:
    """Bayesian personalised ranking, softplus(negative - positive), weighted mean.

    Arguments as for `bce`; scores of 0 give ln 2.
    """
    return weighted_mean(jax.nn.softplus(negative - positive), weights)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `values` `[T]` under `weights` `[T]`; 0 where no weight is positive."""
    total = weights.sum()
    values = jnp.where(weights > 0, values, 0)  # an unused slot never reaches the result
    return (values * weights).sum() / jnp.where(total > 0, total, 1)


LOSSES = {"bce": bce, "bpr": bpr}
