"""Losses of a positive item against drawn negatives, or against the whole catalogue.

All take scores of T slots and `weights` `[T]`, which are 0 for slots that do not count: what
these hold has no influence. All return a weighted mean `[]`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.layers import check_number, check_sizes
from models.scoring import Items, States


def bce(positive: jax.Array, negative: jax.Array, weights: jax.Array) -> jax.Array:
    """Binary cross-entropy of the positive plus that of each negative.

    They are added, not averaged, so that scores of 0 give (1 + n) ln 2.

    Args:
      positive: scores `[T]`.
      negative: scores `[T, n]`, or `[T]` where n is 1.
      weights: `[T]`.
    """
    return _binary(positive, negative, weights, 1.0)


def gbce(
    positive: jax.Array, negative: jax.Array, weights: jax.Array, *, num_items: int, t: float
) -> jax.Array:
    r"""Generalised binary cross-entropy, which undoes the bias of drawing few negatives.

    The positive's probability is raised to a power,

    .. math::

      -\log \sigma(s^+)^\beta - \sum_j \log(1 - \sigma(s^-_j)), \qquad
      \beta = \alpha \left( t (1 - 1/\alpha) + 1/\alpha \right), \quad
      \alpha = \frac{n}{N - 1}

    so that :math:`t = 0` is `bce`, and with :math:`t = 1` the sigmoid of a score estimates the
    probability of the item. The paper's value is this one divided by n + 1.

    Args:
      positive: scores `[T]`.
      negative: scores `[T, n]`, or `[T]` where n is 1.
      weights: `[T]`.
      num_items: N, of the catalogue.
      t: calibration, from 0 to 1.

    References:
      Petrov and Macdonald, `gSASRec <https://arxiv.org/abs/2308.07192>`_, RecSys 2023
    """
    if num_items < 2:
        raise ValueError(f"`gbce`: `num_items` must be at least 2, got {num_items}.")
    check_number("t", t)
    if not 0 <= t <= 1:
        raise ValueError(f"`gbce`: `t` must lie in [0, 1], got {t}.")
    rate = _per_negative(positive, negative).shape[1] / (num_items - 1)
    return _binary(positive, negative, weights, 1 - t * (1 - rate))


def bpr(positive: jax.Array, negative: jax.Array, weights: jax.Array) -> jax.Array:
    """Bayesian personalised ranking, the mean of softplus(negative - positive) over negatives.

    Each pair is one draw of the same objective, so more negatives change the variance alone.
    Arguments as for `bce`; scores of 0 give ln 2.
    """
    positive, negative = _used(positive, negative, weights)
    margin = negative - positive[:, None]
    return weighted_mean(jax.nn.softplus(margin).mean(axis=1), weights)


def sampled_softmax(
    positive: jax.Array,
    negative: jax.Array,
    weights: jax.Array,
    *,
    num_items: int,
    hits: jax.Array | None = None,
) -> jax.Array:
    r"""Soft-max cross-entropy over the positive and uniform negatives, corrected for drawing.

    The n negatives stand for all N - 1 other items, so each counts (N - 1) / n times,

    .. math::

      -s^+ + \log \left( e^{s^+} + \frac{N - 1}{n} \sum_j e^{s^-_j} \right)

    which is the correction by the logarithm of the proposal's probabilities. The argument of
    the logarithm has the expectation of the full sum; the loss is on average
    below the full one by O(1 / n), and equal to it where the negatives are all others.

    Args:
      positive: scores `[T]`.
      negative: scores `[T, n]`, or `[T]` where n is 1.
      weights: `[T]`.
      num_items: N, of the catalogue.
      hits: bool like `negative`, where it is the positive item itself. These do not count, so
        negatives may be drawn from all items or be shared by slots.

    References:
      Bengio and Senécal, `Adaptive importance sampling
      <https://doi.org/10.1109/TNN.2007.912312>`_, IEEE TNN 2008
    """
    if num_items < 2:
        raise ValueError(f"`sampled_softmax`: `num_items` must be at least 2, got {num_items}.")
    _check_shape("weights", weights, positive.shape)
    if hits is not None:
        _check_shape("hits", hits, negative.shape)
    negative = _per_negative(positive, negative)
    count = jnp.full(positive.shape, negative.shape[1])
    if hits is not None:
        hits = _per_negative(positive, hits)
        negative = jnp.where(hits, -jnp.inf, negative)
        count = jnp.maximum(count - hits.sum(axis=1), 1)
    wide = jnp.promote_types(positive.dtype, jnp.float32)  # the ratio may be past float16
    correction = jnp.log((num_items - 1) / count.astype(wide)).astype(positive.dtype)
    scores = jnp.concatenate([positive[:, None], negative + correction[:, None]], axis=1)
    scores = jnp.where(weights[:, None] > 0, scores, 0)
    return weighted_mean(jax.nn.logsumexp(scores, axis=1) - positive, weights)


def cross_entropy(
    score_all: Callable[[States, Items], jax.Array],
    states: States,
    items: Items,
    positive: jax.Array,
    weights: jax.Array,
    *,
    label_smoothing: float = 0.0,
    chunk_size: int = 256,
) -> jax.Array:
    """Soft-max cross-entropy of the positive over the whole catalogue.

    Computed for a few slots at a time, value and gradient together: scores `[T, N]` never
    exist. That needs one pass over the catalogue where an online soft-max over chunks of items
    needs two, and takes less time than the plain form.

    Args:
      score_all: scores of slots' states with all items, `[chunk_size, N]`, from its arguments
        alone.
      states: leaves `[T, ...]`.
      items: leaves `[N, ...]`, the positive items among them.
      positive: scores `[T]`.
      weights: `[T]`.
      label_smoothing: the share of the target's probability that all N items divide equally.
      chunk_size: slots at a time. Memory grows with `chunk_size` times N.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"`cross_entropy`: `label_smoothing` must lie in [0, 1), got {label_smoothing}."
        )
    _check_shape("positive", positive, (len(jax.tree.leaves(states)[0]),))

    def chunk_loss(items: Items, slots: tuple[States, jax.Array], _: None) -> jax.Array:
        states, positive = slots
        scores = score_all(states, items)
        losses = jax.nn.logsumexp(scores, axis=1) - (1 - label_smoothing) * positive
        if label_smoothing:
            losses -= label_smoothing * scores.mean(axis=1)
        return losses

    return mean_in_chunks(
        chunk_loss, items, (states, positive), None, weights, chunk_size=chunk_size
    )


def mean_in_chunks(
    loss: Callable[[Any, Any, Any], jax.Array],
    shared: Any,
    slots: Any,
    fixed: Any,
    weights: jax.Array,
    *,
    chunk_size: int,
) -> jax.Array:
    """Weighted mean of losses over slots, a few at a time, value and gradient together.

    Args:
      loss: of C slots, `[C]`, from `shared` and C slots of `slots` and of `fixed`; from its
        arguments alone.
      shared: arrays of any shape.
      slots: leaves `[T, ...]`.
      fixed: leaves `[T, ...]` that get no gradient.
      weights: `[T]`.
      chunk_size: C, slots at a time.
    """
    check_sizes(chunk_size=chunk_size)
    _check_shape("weights", weights, (len(jax.tree.leaves(slots)[0]),))
    for leaf in jax.tree.leaves((slots, fixed)):
        if leaf.shape[:1] != weights.shape:
            raise ValueError(
                f"What belongs to slots must have {len(weights)} of them, as `weights`, but an "
                f"array of shape {leaf.shape} has not."
            )
    weights = weights.astype(jnp.result_type(weights, float))  # bools have no derivative
    used = weights > 0
    pieces = ((slots, jnp.where(used, weights, 0)), fixed)
    # Those that count come first: where they are few among many, as the last slots of prefixes
    # are, most chunks then have none and are left out.
    order = jnp.argsort(~used, stable=True)
    used, pieces = jax.tree.map(lambda x: jnp.asarray(x)[order], (used, pieces))
    # No infinite score, which times a weight of 0 would be NaN.
    pieces = jax.tree.map(lambda x: jnp.where(_like(used, x), x, 0), pieces)
    size = max(1, min(chunk_size, len(weights)))  # no slots are one empty chunk
    (chunks, fixed), used = jax.tree.map(lambda x: _chunks(x, size), (pieces, used))

    def weighted(shared: Any, chunk: Any, fixed: Any) -> jax.Array:
        slots, weights = chunk
        return (loss(shared, slots, fixed) * weights).sum()

    summed: Any = _sum_over_chunks(weighted, shared, chunks, (fixed, used.any(axis=1)))
    total = weights.sum()
    return summed / jnp.where(total > 0, total, 1)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of `values` `[T]` under `weights` `[T]`; 0 where no weight is positive."""
    _check_shape("weights", weights, values.shape)
    total = weights.sum()
    values = jnp.where(weights > 0, values, 0)  # an unused slot never reaches the result
    return (values * weights).sum() / jnp.where(total > 0, total, 1)


def _binary(
    positive: jax.Array, negative: jax.Array, weights: jax.Array, power: float
) -> jax.Array:
    positive, negative = _used(positive, negative, weights)
    of_negatives = jax.nn.softplus(negative).sum(axis=1)
    return weighted_mean(power * jax.nn.softplus(-positive) + of_negatives, weights)


def _per_negative(positive: jax.Array, negative: jax.Array) -> jax.Array:
    """`[T, n]` of what may be `[T]`."""
    if negative.shape == positive.shape:
        negative = negative[:, None]
    _check_shape("negative", negative, (*positive.shape, *negative.shape[1:2]))
    if not negative.shape[1]:
        raise ValueError("`negative` must hold at least one score for each slot, got none.")
    return negative


def _used(
    positive: jax.Array, negative: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores `[T]` and `[T, n]`, 0 where the weight is: else a gradient may be NaN there."""
    _check_shape("weights", weights, positive.shape)
    used = weights > 0
    negative = jnp.where(used[:, None], _per_negative(positive, negative), 0)
    return jnp.where(used, positive, 0), negative


def _check_shape(name: str, x: jax.Array, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"`{name}` must have the shape {shape} of the slots, got {x.shape}.")


def _like(used: jax.Array, x: jax.Array) -> jax.Array:
    """`[T]` as `[T, 1, ...]`, to broadcast with `x`."""
    return used.reshape(-1, *[1] * (x.ndim - 1))


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """`[T, ...]` -> `[ceil(T / size), size, ...]`, filled with zeros."""
    padding = [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, size, *x.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_chunks(loss: Callable[..., jax.Array], shared: Any, chunks: Any, rest: Any):
    """Sum of `loss(shared, chunk, fixed)` over the leading axis of `chunks` and `rest`.

    `rest` is `fixed` and whether a chunk is used; the loss of others is 0 and takes no time.

    When differentiated, the gradient of a chunk is taken together with its value: nothing of
    its size outlives it, and nothing is computed again. `rest` has none.
    """

    def value(pieces: Any) -> jax.Array:
        chunk, (fixed, used) = pieces
        # The last ones have no slot that counts.
        of_chunk = functools.partial(loss, shared, chunk, fixed)
        return jax.lax.cond(used, of_chunk, lambda: jnp.zeros_like(jax.eval_shape(of_chunk)))

    return jax.lax.map(value, (chunks, rest)).sum()


def _sum_and_gradients(loss: Callable[..., jax.Array], shared: Any, chunks: Any, rest: Any):
    def step(total: Any, pieces: Any):
        chunk, (fixed, used) = pieces

        def add(total: Any):
            value, (of_shared, of_chunk) = jax.value_and_grad(loss, (0, 1))(
                shared, chunk, fixed
            )
            return jax.tree.map(jnp.add, total, of_shared), (value, of_chunk)

        def skip(total: Any):
            return total, jax.tree.map(jnp.zeros_like, jax.eval_shape(add, total)[1])

        # Differentiating a `cond` inside `loss` instead was measured to be slower than none.
        return jax.lax.cond(used, add, skip, total)

    def zeros(x: jax.Array) -> jax.Array:  # sums of many chunks, too long for half precision
        return jnp.zeros_like(x, dtype=jnp.promote_types(x.dtype, jnp.float32))

    start = jax.tree.map(zeros, shared)
    of_shared, (values, of_chunks) = jax.lax.scan(step, start, (chunks, rest))
    of_shared = jax.tree.map(lambda total, x: total.astype(x.dtype), of_shared, shared)
    return values.sum(), (of_shared, of_chunks)


def _scale_gradients(loss: Callable[..., jax.Array], gradients: Any, cotangent: Any):
    # Each in the type of what it belongs to: weights, and so losses, may be wider.
    scale = lambda gradient: (gradient * cotangent).astype(gradient.dtype)  # noqa: E731
    return *jax.tree.map(scale, gradients), None


_sum_over_chunks.defvjp(_sum_and_gradients, _scale_gradients)


LOSSES = {"bce": bce, "bpr": bpr}
