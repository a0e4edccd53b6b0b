"""Random masks for dropout, of the bits of Threefry, none of which is thrown away."""

import math

import jax
import jax.numpy as jnp

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def random_mask(key: jax.Array, shape: tuple[int, ...], keep: int) -> jax.Array:
    """Entries that are true with probability `keep / 2^16`, bool `shape`.

    `jax.random.bits` xors the two words that a block of Threefry gives to one, so that a
    block decides two entries; here it decides four. That, and rounds that the compiler sees
    as one loop over the blocks, is a tenth of a training step of SASRec on a CPU. Keys of other
    generators draw by `jax.random.bits`.

    Args:
      key: a key, typed or not.
      keep: an integer in [0, 2^16).
    """
    size = math.prod(shape)
    # Of an odd number, each takes XLA's CPU backend eight times as long.
    num_blocks = -(-size // 4096) * 1024
    if str(jax.random.key_impl(key)) == "threefry2x32":
        count = jax.lax.iota(jnp.uint32, num_blocks)
        blocks = threefry(jax.random.key_data(key), count)
        # Without the barrier a GPU's compiler repeats rounds in what uses the mask.
        words = jnp.concatenate(jax.lax.optimization_barrier(blocks))
    else:
        words = jax.random.bits(key, (2 * num_blocks,), jnp.uint32)
    mask = jnp.concatenate([(words & 0xFFFF) < keep, (words >> 16) < keep])
    return mask[:size].reshape(shape)


def threefry(key: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both words of the blocks (0, count) of Threefry-2x32 with 20 rounds.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    The xor of the two is `jax.random.bits(key, count.shape, jnp.uint32)` where `count` is
    0, 1, 2, ...

    Args:
      key: uint32 `[2]`.
      count: uint32, any shape.
    """
    first, second = key
    keys = first, second, first ^ second ^ jnp.uint32(0x1BD11BDA)
    left = jnp.broadcast_to(keys[0], count.shape)
    right = count + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left += right
            right = (right << rotation) | (right >> (32 - rotation))
            right ^= left
        left += keys[(group + 1) % 3]
        right += keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return left, right
