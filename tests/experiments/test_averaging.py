"""The running mean of the parameters, and the schedule of the learning rate."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.averaging import averaged, averages
from experiments.backbones import make_optimizer
from experiments.config import Config
from experiments.dataset import leave_one_out
from experiments.run import make_trainer, start
from experiments.synthetic import synthetic
from sevo_jax import item_graph


def test_the_mean_follows_its_definition():
    optimizer = optax.chain(optax.sgd(0.5), averaged(0.5))
    params: Any = {"w": jnp.array([2.0, 0.0])}
    gradient = {"w": jnp.array([1.0, -1.0])}
    state = optimizer.init(params)
    expected, position = np.array([2.0, 0.0]), np.array([2.0, 0.0])
    for step in range(12):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        position = position - 0.5 * np.array([1.0, -1.0])
        rate = min(0.5, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * position
        np.testing.assert_allclose(params["w"], position)
        np.testing.assert_allclose(averages(state, params)["w"], expected, rtol=1e-6)
    assert not np.allclose(expected, position)


def test_without_a_mean_the_parameters_are_evaluated():
    params = {"w": jnp.ones(2)}
    assert averages(optax.adam(1e-3).init(params), params) is params
    with pytest.raises(ValueError, match="needs `params`"):
        averaged(0.9).update(params, averaged(0.9).init(params))
    for wrong in (-1.0, 0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match=r"`decay` must lie in \(0, 1\)"):
            averaged(wrong)


def test_a_mean_of_half_precision_is_wide_inside_and_scans():
    optimizer = averaged(0.99)
    params = jnp.ones(2, jnp.bfloat16)
    state: Any = optimizer.init(params)
    state = state._replace(count=jnp.int32(10_000))

    def step(state, _):
        updates, state = optimizer.update(jnp.ones(2, jnp.bfloat16), state, params)
        return state, updates

    state, _ = jax.lax.scan(step, state, length=50)
    found = averages(state, params)
    assert found.dtype == jnp.bfloat16
    # From 1 towards 2, by 1 % of the rest in each step; in bfloat16 it would never move.
    np.testing.assert_allclose(found.astype(jnp.float32), 2 - 0.99**50, rtol=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "sevo_adamw"])
def test_the_cosine_ends_at_zero(optimizer):
    """An optimizer on a schedule makes the same directions, times half a cosine."""
    graph = item_graph([[0, 1, 2, 3]], 4)
    config = Config(optimizer=optimizer, epochs=3, weight_decay=0.0)
    constant, cosine = (
        make_optimizer(replace(config, schedule=name), graph, steps_per_epoch=2)
        for name in ("constant", "cosine")
    )
    swept = make_optimizer(
        replace(config, schedule="cosine"), graph, {"learning_rate": [1e-3]}, steps_per_epoch=2
    )
    params = {"item_embedding": jnp.ones((4, 2))}
    states = [one.init(params) for one in (constant, cosine, swept)]
    rng = np.random.default_rng(0)
    for step in range(7):
        grads = {"item_embedding": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)}
        found = []
        for i, one in enumerate((constant, cosine, swept)):
            updates, states[i] = one.update(grads, states[i], params)
            found.append(jax.tree.leaves(updates)[0])
        share = (1 + np.cos(np.pi * min(step / 6, 1))) / 2
        for scaled in found[1:]:
            np.testing.assert_allclose(scaled, share * found[0], rtol=1e-4, atol=1e-9)


def _after_an_epoch(**settings):
    """A trainer and the state of its two seeds."""
    split = leave_one_out(synthetic(num_users=60, num_items=40, num_communities=3))
    config = Config(dim=4, num_blocks=1, max_length=8, batch_size=16, epochs=1, **settings)
    trainer = make_trainer(config, split)
    state = start(trainer, [0, 1])
    return trainer, trainer.epoch(state, 1)[0]


def test_validation_sees_no_residual():
    """What is kept as the best parameters is the table without what psi takes later."""
    trainer, state = _after_an_epoch(residual_decay=0.9)
    kept = trainer.keep_best(state, np.array([True, True])).best_params
    residual = optax.tree.get(state.opt_state, "residual")["item_embedding"]["embedding"]
    table = state.params["item_embedding"]["embedding"]
    assert np.abs(residual).max(axis=(1, 2)).min() > 1e-4
    np.testing.assert_array_equal(kept["item_embedding"]["embedding"], table - residual)
    for name in ("position_embedding", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, kept[name], state.params[name])


def test_validation_sees_the_mean():
    """A trained run keeps the mean as its best parameters, for each seed its own."""
    trainer, state = _after_an_epoch(average_decay=0.9)
    kept = trainer.keep_best(state, np.array([True, False])).best_params
    mean, params, before = (
        tree["item_embedding"]["embedding"]
        for tree in (averages(state.opt_state, state.params), state.params, state.best_params)
    )
    np.testing.assert_array_equal(kept["item_embedding"]["embedding"][0], mean[0])
    np.testing.assert_array_equal(kept["item_embedding"]["embedding"][1], before[1])
    assert np.abs(mean - params).max() > 1e-4 and np.abs(mean[0] - mean[1]).max() > 1e-4
