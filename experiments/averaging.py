"""A running mean of the parameters, for validation and test."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AveragedState(NamedTuple):
    count: jax.Array  # int32 [], steps so far
    average: Any  # like the parameters, float32 or wider


def averaged(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential mean of the parameters in its state; updates pass unchanged.

    To stand last in a chain, where the updates are what is added to the parameters. Early in
    training the mean forgets faster, min(`decay`, (1 + t) / (10 + t)) in step t, so that the
    initial values do not linger.

    Args:
      decay: the share of itself that the mean keeps in a step, in (0, 1).
    """
    if not 0 < decay < 1:
        raise ValueError(f"`averaged`: `decay` must lie in (0, 1), got {decay}.")

    def init_fn(params: Any) -> AveragedState:
        # In half precision a mean with a small step would stand still.
        wide = lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32))  # noqa: E731
        return AveragedState(jnp.zeros([], jnp.int32), jax.tree.map(wide, params))

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, AveragedState]:
        if params is None:
            raise ValueError("`averaged`: `update` needs `params`, got None.")
        new = optax.apply_updates(params, updates)
        rate = 1 - jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        average = optax.incremental_update(new, state.average, rate)
        return updates, AveragedState(state.count + 1, average)

    return optax.GradientTransformation(init_fn, update_fn)


def averages(opt_state: Any, params: Any) -> Any:
    """The mean that an optimizer's state holds; `params` where it holds none."""
    found = optax.tree.get(opt_state, "average")
    if found is None:
        return params
    return jax.tree.map(lambda mean, p: mean.astype(p.dtype), found, params)
