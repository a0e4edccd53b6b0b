"""Scores of states and items, as dot products and as scaled cosines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import GRU4Rec, SASRec
from tests.models.toys import NUM_ITEMS, abstract

DIM, SCALE = 6, 12.0


@pytest.mark.parametrize("model", [SASRec, GRU4Rec])
def test_cosine(model):
    module = abstract(
        lambda rngs: model(NUM_ITEMS, dim=DIM, max_length=5, cosine_scale=SCALE, rngs=rngs)
    )
    rng = np.random.default_rng(0)
    states, items = (rng.normal(size=(n, DIM)).astype("float32") for n in (3, 7))

    def cosine(state, item):
        return SCALE * state @ item / np.sqrt((state @ state) * (item @ item))

    every = [[cosine(state, item) for item in items] for state in states]
    found = module.score_all(jnp.asarray(states), jnp.asarray(items))
    np.testing.assert_allclose(found, every, rtol=1e-5)
    pairs = np.stack([items[:3], items[2:5]])  # [2, 3, DIM] against states [3, DIM]
    several = [[cosine(s, i) for s, i in zip(states, row, strict=True)] for row in pairs]
    found = module.score(jnp.asarray(states), jnp.asarray(pairs))
    np.testing.assert_allclose(found, several, rtol=1e-5)
    # Neither length counts.
    longer = module.score_all(7 * jnp.asarray(states), 0.3 * jnp.asarray(items))
    np.testing.assert_allclose(longer, every, rtol=1e-5)


def test_cosine_of_an_empty_row():
    module = abstract(
        lambda rngs: SASRec(NUM_ITEMS, dim=DIM, max_length=5, cosine_scale=SCALE, rngs=rngs)
    )
    state = jnp.ones((1, DIM))
    score, gradient = jax.value_and_grad(lambda item: module.score(state, item)[0])(
        jnp.zeros((1, DIM))
    )
    assert score == 0 and np.isfinite(gradient).all()
