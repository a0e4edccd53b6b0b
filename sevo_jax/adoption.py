"""Going on with SEvo where Optax's Adam or AdamW has been trained."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sevo_jax.corrected_adam import ScaleByCorrectedAdamState
from sevo_jax.smoothing import check_decays

_MOMENTS = (optax.ScaleByAdamState, ScaleByCorrectedAdamState)


def adopt_adam_state(
    state: Any,
    adam_state: Any,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
) -> Any:
    """The state of an optimizer with SEvo that goes on from Adam's moments.

    Adam's count of steps goes to all moments and schedules. Of the tables' moments the bias is
    corrected, as SEvo's Adam keeps them: with beta 0 and a gradient in every row the next step
    is then Adam's own.

    Args:
      state: what `init` of :func:`sevo_adamw`, of :func:`sevo_adam`, or of a chain of
        :func:`sevo` and an Adam returns for the parameters.
      adam_state: of `optax.adam`, `optax.adamw`, or a chain with one of them, for the same
        parameters.
      b1: decay of Adam's first moment.
      b2: decay of its second moment.

    Returns:
      A state in the structure of `state`.

    Raises:
      ValueError: `adam_state` does not hold the moments of one Adam, or they are of other
        parameters; `state` has no place for them; `b1` or `b2` lies outside of [0, 1).

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import sevo_jax
      >>> params = {"table": jnp.ones((3, 2)), "bias": jnp.ones(2)}
      >>> adam = optax.adamw(1e-2)
      >>> _, trained = adam.update(params, adam.init(params), params)
      >>> optimizer = sevo_jax.sevo_adamw(1e-2, sevo_jax.item_graph([[0, 1, 2]], 3))
      >>> state = sevo_jax.adopt_adam_state(optimizer.init(params), trained)
      >>> updates, state = optimizer.update(params, state, params)
    """
    check_decays("adopt_adam_state", b1=b1, b2=b2)
    found = [part for part in _parts(adam_state) if isinstance(part, optax.ScaleByAdamState)]
    if len(found) != 1:
        raise ValueError(
            f"`adopt_adam_state`: `adam_state` must hold one optax.ScaleByAdamState, got "
            f"{len(found)} of them in a {type(adam_state).__name__}."
        )
    adam, count = found[0], jnp.asarray(found[0].count)
    if not any(isinstance(part, _MOMENTS) for part in _parts(state)):
        raise ValueError(
            f"`adopt_adam_state`: `state` must hold Adam's moments, got a "
            f"{type(state).__name__} without any."
        )

    def correct(moment: Any, decay: jax.typing.ArrayLike) -> Any:
        # Before the first step there is nothing to correct, and 1 - b^0 to divide by.
        return optax.tree.bias_correction(moment, decay, jnp.maximum(count, 1))

    def adopt(part: Any) -> Any:
        if isinstance(part, ScaleByCorrectedAdamState):
            return ScaleByCorrectedAdamState(
                count=count,
                mu_hat=_filled(part.mu_hat, correct(adam.mu, b1)),
                nu_hat=_filled(part.nu_hat, correct(adam.nu, b2)),
            )
        if isinstance(part, optax.ScaleByAdamState):
            mu, nu = _filled(part.mu, adam.mu), _filled(part.nu, adam.nu)
            return optax.ScaleByAdamState(count, mu, nu)
        return part._replace(count=count) if _is_schedule(part) else part

    return jax.tree.map(adopt, state, is_leaf=_counts)


def _counts(part: Any) -> bool:
    return isinstance(part, _MOMENTS) or _is_schedule(part)


def _is_schedule(part: Any) -> bool:
    """Of a learning rate or a weight decay: Optax has a type for each."""
    return getattr(part, "_fields", None) == ("count",)


def _parts(state: Any) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=_counts)


def _filled(like: Any, moment: Any) -> Any:
    """`moment` where `like` has one, in its type: a partition leaves the other places empty."""

    def fill(old: Any, new: Any) -> Any:
        if _is_empty(old):
            return old
        if jnp.shape(old) != jnp.shape(new):
            raise ValueError(
                f"`adopt_adam_state`: a moment of `state` has the shape {jnp.shape(old)}, that "
                f"of `adam_state` {jnp.shape(new)}."
            )
        return jnp.asarray(new, old.dtype)

    if jax.tree.structure(like, is_leaf=_is_empty) != jax.tree.structure(moment):
        raise ValueError(
            "`adopt_adam_state`: `state` and `adam_state` must be of the same parameters, got "
            f"{jax.tree.structure(like)} and {jax.tree.structure(moment)}."
        )
    return jax.tree.map(fill, like, moment, is_leaf=_is_empty)


def _is_empty(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
