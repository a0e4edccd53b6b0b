"""The bits of dropout: against JAX's own, and what is drawn from both words of a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from models.random_bits import random_halves, threefry


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("shape", [(1,), (1000,), (7, 11)])
def test_the_words_of_a_block_are_jax_s_before_it_joins_them(seed, shape):
    key = jax.random.key(seed)
    count = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    left, right = jax.jit(threefry)(jax.random.key_data(key), count)
    np.testing.assert_array_equal(left ^ right, jax.random.bits(key, shape, jnp.uint32))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 1001])
def test_halves_are_of_both_words(size):
    key = jax.random.key(3)
    words = threefry(jax.random.key_data(key), jnp.arange(-(-size // 4), dtype=jnp.uint32))
    halves = random_halves(key, size)
    assert halves.shape == (size,)
    assert halves.dtype == jnp.uint16
    np.testing.assert_array_equal(halves, np.concatenate(words).view(np.uint16)[:size])


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_halves_are_uniform_and_independent(kind):
    halves = np.asarray(random_halves(jax.random.key(4, impl=kind), 200_000))
    high, low = halves >> 8, halves & 255
    for part in (high, low):
        assert stats.chisquare(np.bincount(part, minlength=256)).pvalue > 1e-3
    # With its neighbours, and with the other word of its block, which lies half of all on.
    for lag in (1, 2, 3, 100_000, 100_001):
        pairs = (halves[:-lag] >> 12).astype(int) * 16 + (halves[lag:] >> 12)
        assert stats.chisquare(np.bincount(pairs[::2], minlength=256)).pvalue > 1e-3


def test_keys_of_before_typed_keys_draw_the_same():
    old, new = jax.random.PRNGKey(5), jax.random.key(5)
    np.testing.assert_array_equal(random_halves(old, 99), random_halves(new, 99))


def test_a_batch_of_keys_draws_each_one_s_own():
    keys = jax.random.split(jax.random.key(6), 3)
    together = jax.vmap(lambda key: random_halves(key, 10))(keys)
    each = [random_halves(key, 10) for key in keys]
    np.testing.assert_array_equal(together, each)
