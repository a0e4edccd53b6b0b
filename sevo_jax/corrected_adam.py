"""Adam's direction with the paper's correction of its moments."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sevo_jax.smoothing import check_decays, check_numbers


class ScaleByCorrectedAdamState(NamedTuple):
    """State of :func:`scale_by_corrected_adam`."""

    # Names of their own: in a checkpoint they are not to pass for `optax.scale_by_adam`'s.
    count: jax.typing.ArrayLike  # shape=(), dtype=int32
    mu_hat: optax.Updates  # bias-corrected, as params, at least float32
    nu_hat: optax.Updates  # bias-corrected, as params, at least float32


def scale_by_corrected_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction, in which rows without a gradient keep their last estimate.

    The state holds the bias-corrected moments. In them Adam is a running mean whose step
    shrinks from 1 to :math:`1-b_1`, and the paper's correction for a row with an all-zero
    gradient is to leave the row alone:

    .. math::

      \hat m_t = \hat m_{t-1} + \frac{1-b_1}{1-b_1^t} (g_t - \hat m_{t-1}), \qquad
      \hat v_t = \hat v_{t-1} + \frac{1-b_2}{1-b_2^t} (g_t^2 - \hat v_{t-1})

    Here t counts all steps, not those of the row. Multiply by :math:`1-b^t` to get the
    moments of `optax.scale_by_adam` or PyTorch. The direction is
    :math:`\hat m_t / (\sqrt{\hat v_t} + \epsilon)`.

    `update(..., touched=mask)` says which rows had a gradient, in place of the test for
    zeros: a bool array with an entry for each row of the table, which then holds for every
    table, or a tree of them in the structure of the parameters (with Flax NNX that of
    `nnx.state(model, nnx.Param)`, made by `jax.tree.map`).
    Where gradients of several batches are added up, as by `optax.MultiSteps`, it has to be the
    union of theirs.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator, outside of the root.
      eps_root: added to the second moment, inside of the root. A small one keeps derivatives
        through the optimizer finite where a moment is 0, as in `optax.scale_by_adam`.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: `b1` or `b2` lies outside of [0, 1).
      TypeError: one of the numbers is none.

    Examples:
      The second row has a gradient in the first step alone, and goes on with its estimate:

      >>> import jax.numpy as jnp, numpy as np
      >>> import sevo_jax
      >>> adam = sevo_jax.scale_by_corrected_adam()
      >>> state = adam.init(jnp.zeros((2, 1)))
      >>> for gradient in ([[1.0], [1.0]], [[1.0], [0.0]], [[-1.0], [0.0]]):
      ...   direction, state = adam.update(jnp.array(gradient), state)
      ...   print(np.asarray(direction).ravel().round(3))
      [1. 1.]
      [1. 1.]
      [0.262 1.   ]

    .. seealso:: :func:`sevo_adamw`
    """

    check_decays("scale_by_corrected_adam", b1=b1, b2=b2)
    check_numbers("scale_by_corrected_adam", eps=eps, eps_root=eps_root)

    def init_fn(params: optax.Params) -> ScaleByCorrectedAdamState:
        return ScaleByCorrectedAdamState(
            count=jnp.zeros([], jnp.int32),
            mu_hat=jax.tree.map(_zeros, params),
            nu_hat=jax.tree.map(_zeros, params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        touched: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByCorrectedAdamState]:
        del extra_args
        if not isinstance(state, ScaleByCorrectedAdamState):  # plain moments would pass
            raise ValueError(
                "`scale_by_corrected_adam`: `state` must be a ScaleByCorrectedAdamState, but "
                f"is {type(state).__name__}. Restore a checkpoint into what `init` returns."
            )
        count = optax.safe_increment(state.count)
        step1, step2 = _mean_step(b1, count), _mean_step(b2, count)
        rows = _touched_rows(updates, touched)

        def mean(old: jax.Array, new: jax.Array, row: jax.Array, step: jax.Array) -> jax.Array:
            return jnp.where(row, old + step.astype(old.dtype) * (new - old), old)

        def first(g: jax.Array, m: jax.Array, row: jax.Array) -> jax.Array:
            return mean(m, g.astype(m.dtype), row, step1)

        def second(g: jax.Array, v: jax.Array, row: jax.Array) -> jax.Array:
            return mean(v, (jnp.abs(g.astype(v.dtype)) ** 2).astype(v.dtype), row, step2)

        def direction(g: jax.Array, m: jax.Array, v: jax.Array, p: jax.Array) -> jax.Array:
            # As in Optax, a gradient in half precision does not narrow the step of its table.
            dtype = jnp.promote_types(g.dtype, jnp.result_type(p))
            return (m / (jnp.sqrt(v + eps_root) + eps)).astype(dtype)

        # Gathering and scattering the batch's rows alone, instead of these passes over all, was
        # tried: with 6,056 of 376,378 rows on two cores (AMD EPYC, Zen 4) an update without psi
        # takes .7 of the time, but a step with psi .97 to 1 (no record). Whoever left out a row
        # that has a gradient would lose it in silence.
        mu = jax.tree.map(first, updates, state.mu_hat, rows)
        nu = jax.tree.map(second, updates, state.nu_hat, rows)
        types = updates if params is None else params
        updates = jax.tree.map(direction, updates, mu, nu, types)
        return updates, ScaleByCorrectedAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zeros(p: jax.typing.ArrayLike) -> jax.Array:
    # In bfloat16 a mean with a step of 1 - 0.999 would stand still: its rounding is wider.
    dtype = jnp.result_type(p)
    return jnp.zeros_like(p, dtype=jnp.float32 if dtype.itemsize < 4 else dtype)


def _mean_step(decay: Any, count: jax.typing.ArrayLike) -> jax.Array:
    """(1 - b) / (1 - b^t), to float32 accuracy for b near one and any t.

    The logarithm of a Python float is taken in float64: in float32, 0.999 is off by 3e-8,
    which is 3e-5 of its logarithm.
    """
    if isinstance(decay, jax.Array):
        log_decay = jnp.log1p(decay - 1)
    elif np.ndim(decay):
        with np.errstate(divide="ignore"):
            log_decay = np.log(decay)
    else:
        log_decay = math.log(decay) if decay > 0 else -math.inf
    time = jnp.asarray(count, jnp.result_type(float))
    return (1 - decay) / -jnp.expm1(time * log_decay)


def _touched_rows(updates: optax.Updates, touched: Any) -> Any:
    """Masks that broadcast against the leaves of `updates`, true where a row has a gradient."""

    def nonzero(g: jax.Array) -> jax.Array:
        return jnp.any(g != 0, axis=tuple(range(1, g.ndim)), keepdims=True)

    def given(g: jax.Array, mask: jax.typing.ArrayLike) -> jax.Array:
        mask = jnp.asarray(mask)
        if mask.dtype != bool or mask.shape != g.shape[:1]:
            raise ValueError(
                f"`touched` takes bools of shape {g.shape[:1]}, one per row of the table, but "
                f"got {mask.dtype} of shape {mask.shape}. Tables that differ in their lengths "
                "take a tree of such masks in the structure of the parameters."
            )
        return mask.reshape(mask.shape + (1,) * (g.ndim - 1))

    if touched is None:
        return jax.tree.map(nonzero, updates)
    if isinstance(touched, jax.Array | np.ndarray):
        return jax.tree.map(lambda g: given(g, touched), updates)
    # Whom `optax.partition` and `optax.masked` leave out have placeholders.
    left_out = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    leaves, treedef = jax.tree.flatten(updates, is_leaf=left_out)
    try:
        masks = treedef.flatten_up_to(touched)
    except ValueError as error:
        raise ValueError(
            "`touched` takes one array of bools, or a tree of them in the structure of the "
            f"parameters, with any number in place of those without corrected moments. {error}"
        ) from None
    pairs = zip(leaves, masks, strict=True)
    return treedef.unflatten(g if left_out(g) else given(g, mask) for g, mask in pairs)
