"""The bits of dropout: against JAX's own, and what is drawn from both words of a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from models.random_bits import random_mask, threefry


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("shape", [(1,), (1000,), (7, 11)])
def test_the_words_of_a_block_are_jax_s_before_it_joins_them(seed, shape):
    key = jax.random.key(seed)
    count = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    left, right = jax.jit(threefry)(jax.random.key_data(key), count)
    np.testing.assert_array_equal(left ^ right, jax.random.bits(key, shape, jnp.uint32))


@pytest.mark.parametrize("keep", [1, 20_000, 2**16 - 1])
@pytest.mark.parametrize("shape", [(0,), (1,), (4095,), (4096,), (3, 1367), ()])
def test_an_entry_is_one_of_four_parts_of_a_block(shape, keep):
    size = int(np.prod(shape))
    num_blocks = 1024 * -(-size // 4096)
    key = jax.random.key(3)
    words = threefry(jax.random.key_data(key), jnp.arange(num_blocks, dtype=jnp.uint32))
    left, right = (np.asarray(word).astype(int) for word in words)
    parts = np.concatenate([left % 2**16, right % 2**16, left // 2**16, right // 2**16])
    mask = random_mask(key, shape, keep)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, (parts < keep)[:size].reshape(shape))


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("keep", [6554, 2**15])
def test_entries_have_the_probability_and_are_independent(kind, keep):
    size = 4 * 100 * 1024
    mask = np.asarray(random_mask(jax.random.key(4, impl=kind), (size,), keep))
    p = keep / 2**16
    assert stats.binomtest(int(mask.sum()), size, p).pvalue > 1e-3
    # With its neighbours, and with the other parts of its block, quarters of all away.
    for lag in (1, 2, 3, size // 4, size // 2, 3 * size // 4):
        pairs = np.bincount(mask[:-lag] * 2 + mask[lag:], minlength=4)
        expected = np.outer([1 - p, p], [1 - p, p]).ravel() * pairs.sum()
        assert stats.chisquare(pairs, expected).pvalue > 1e-3


def test_keys_of_before_typed_keys_draw_the_same():
    old, new = jax.random.PRNGKey(5), jax.random.key(5)
    np.testing.assert_array_equal(
        random_mask(old, (99,), 2**15), random_mask(new, (99,), 2**15)
    )


def test_a_batch_of_keys_draws_each_one_s_own():
    keys = jax.random.split(jax.random.key(6), 3)
    together = jax.vmap(lambda key: random_mask(key, (50,), 2**15))(keys)
    each = [random_mask(key, (50,), 2**15) for key in keys]
    np.testing.assert_array_equal(together, each)
