"""Training that goes on with SEvo where Adam has been."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sevo_jax
from sevo_jax import adopt_adam_state

GRAPH = sevo_jax.item_graph([[0, 1, 2], [2, 3]], num_nodes=5)
PARAMS = {"table": jnp.ones((5, 3)), "bias": jnp.ones(3)}
RATE = optax.cosine_decay_schedule(0.1, 20)


def gradient(key: int):
    keys = jax.random.split(jax.random.key(key))
    return {
        name: jax.random.normal(k, p.shape)
        for (name, p), k in zip(PARAMS.items(), keys, strict=True)
    }


def run(optimizer, state: Any, params: Any, keys) -> Any:
    for key in keys:
        updates, state = optimizer.update(gradient(key), state, params)
        params = optax.apply_updates(params, updates)
    return state, params


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_without_smoothing_it_is_the_same_training(steps):
    """With a schedule, whose count goes on, and in a chain with clipping on both sides."""

    def clipped(optimizer):
        return optax.chain(optax.clip_by_global_norm(1.5), optimizer)

    adamw = clipped(optax.adamw(RATE, b1=0.8, weight_decay=0.1))
    ours = clipped(sevo_jax.sevo_adamw(RATE, GRAPH, beta=0.0, b1=0.8, weight_decay=0.1))
    state, params = run(adamw, adamw.init(PARAMS), PARAMS, range(steps))
    adopted = adopt_adam_state(ours.init(PARAMS), state, b1=0.8)
    assert jax.tree.structure(adopted) == jax.tree.structure(ours.init(PARAMS))
    _, expected = run(adamw, state, params, range(steps, steps + 4))
    _, found = run(ours, adopted, params, range(steps, steps + 4))
    for name in PARAMS:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5)


def test_other_states_are_refused():
    adam, ours = optax.adam(0.1), sevo_jax.sevo_adam(0.1, GRAPH)
    state, trained = ours.init(PARAMS), adam.init(PARAMS)
    with pytest.raises(ValueError, match="`adam_state` must hold one .* got 0 of them"):
        adopt_adam_state(state, optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="got 2 of them"):
        adopt_adam_state(state, (trained, trained))
    with pytest.raises(ValueError, match="must hold Adam's moments"):
        adopt_adam_state(sevo_jax.sevo_sgd(0.1, GRAPH).init(PARAMS), trained)
    with pytest.raises(ValueError, match=r"shape \(5, 3\), that of `adam_state` \(6, 3\)"):
        adopt_adam_state(state, adam.init(PARAMS | {"table": jnp.ones((6, 3))}))
    with pytest.raises(ValueError, match="of the same parameters"):
        adopt_adam_state(state, adam.init({"table": jnp.ones((5, 3))}))
    with pytest.raises(ValueError, match="`b1`"):
        adopt_adam_state(state, trained, b1=1.0)


def test_a_table_grows_by_padding():
    """As the guide has it."""
    optimizer = sevo_jax.sevo_adamw(0.1, GRAPH)
    state, params = run(optimizer, optimizer.init(PARAMS), PARAMS, range(3))

    def grow(x):
        return jnp.pad(x, [(0, 2), (0, 0)]) if jnp.shape(x)[:1] == (5,) else x

    larger = sevo_jax.sevo_adamw(0.1, sevo_jax.item_graph([[0, 1, 2], [2, 3], [5, 6]], 7))
    params, state = jax.tree.map(grow, (params, state))
    gradients = {"table": jnp.zeros((7, 3)).at[6].set(1.0), "bias": jnp.ones(3)}
    updates, state = jax.jit(larger.update)(gradients, state, params)
    assert updates["table"].shape == (7, 3) and bool((updates["table"][5:] != 0).all())
