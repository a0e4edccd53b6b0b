"""Matrix factorisation: scores and initial values."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import MF
from models.mf import INIT_STD
from tests.models.toys import assert_normal, initial_params, paths

NUM_USERS, NUM_ITEMS, DIM = 5, 7, 4


def test_scores():
    rng = np.random.default_rng(0)
    users, items = (rng.normal(size=(n, DIM)).astype("float32") for n in (NUM_USERS, NUM_ITEMS))
    params = {"user_embedding": {"embedding": users}, "item_embedding": {"embedding": items}}
    abstract = nnx.eval_shape(lambda: MF(NUM_ITEMS, NUM_USERS, dim=DIM, rngs=nnx.Rngs(0)))
    model = nnx.merge(nnx.split(abstract)[0], params)
    ids, rows = np.array([4, 0, 2]), np.array([[6, 0, 3], [1, 1, 5]])
    states = model.users(jnp.asarray(ids))
    np.testing.assert_array_equal(states, users[ids])
    np.testing.assert_array_equal(model.items(jnp.asarray(rows)), items[rows])
    np.testing.assert_array_equal(model.items(), items)
    pairs = [[users[u] @ items[i] for u, i in zip(ids, row, strict=True)] for row in rows]
    np.testing.assert_allclose(model.score(states, jnp.asarray(items[rows])), pairs, rtol=1e-5)
    every = [[user @ item for item in items] for user in users[ids]]
    np.testing.assert_allclose(model.score_all(states, model.items()), every, rtol=1e-5)


def test_initial_values():
    params = initial_params(lambda rngs: MF(120, 80, dim=16, rngs=rngs))
    assert paths(params) == ["item_embedding/embedding", "user_embedding/embedding"]
    users, items = (params[f"{kind}_embedding"]["embedding"] for kind in ("user", "item"))
    assert users.shape == (80, 16) and items.shape == (120, 16)
    assert np.any(items[:80] != users)
    for leaf in jax.tree.leaves(params):
        assert_normal(leaf, INIT_STD)
