"""What the backbones share: initial values, dropout, attention over a packed stream."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer, variance_scaling

from models.packing import Packed

xavier_normal = variance_scaling(1.0, "fan_avg", "normal")


def uniform(bound: float) -> Initializer:
    """Uniform on [-bound, bound)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries of `x` with probability `rate` and scales the others by 1/(1 - rate).

    Without a `key`, or with rate 0, `x` passes unchanged (evaluation). The rate is rounded to
    a multiple of 2^-16: one 32-bit random word decides two entries, which halves the cost of
    dropout on a CPU.
    """
    keep = round((1 - rate) * 2**16)
    if key is None or keep == 2**16:
        return x
    words = jax.random.bits(key, ((x.size + 1) // 2,), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[: x.size]
    return jnp.where(halves.reshape(x.shape) < keep, x * (2**16 / keep), 0)


def split_key(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """`num` keys from one, or as many `None` in evaluation."""
    return [None] * num if key is None else list(jax.random.split(key, num))


def padded_causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, dropout_fn
) -> jax.Array:
    """Multi-head causal attention over a padded batch.

    Args:
      query, key, value: `[B, S, heads, D / heads]`.
      mask: bool `[B, S]`, keys that may be attended to; `None` for all. A query may always
        attend to its own slot, so that a fully masked row stays finite.
      dropout_fn: applied to the attention weights `[B, heads, S, S]`.

    Returns:
      `[B, S, heads, D / heads]`.
    """
    num_slots = query.shape[1]
    allowed = jnp.tril(jnp.ones((num_slots, num_slots), bool))
    if mask is not None:
        allowed = (allowed & mask[:, None, None, :]) | jnp.eye(num_slots, dtype=bool)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", dropout_fn(weights), value)


def packed_causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    stream: Packed,
    max_length: int,
    padding: tuple[jax.Array, jax.Array] | None = None,
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Multi-head causal attention inside each sequence of a packed stream.

    The stream is cut into tiles of half the maximal length; a query sees its own tile and as
    many before it as a sequence can reach back, masked to its own sequence. The padding slots
    that a padded batch would hold left of a sequence all have the same key and value, so one
    virtual key stands for all of them, its logit raised by the log of their number: exactly
    what the soft-max over the padded row gives.

    Args:
      query, key, value: `[T, heads, D / heads]`.
      stream: the packed sequences, none longer than `max_length`.
      max_length: S, the length of a row of the padded batch.
      padding: key and value of a padding slot, `[heads, D / heads]` each, or `None` when
        padding is masked.
      rate, dropout_key: dropout on the attention weights. The number of padding slots that
        dropout keeps is drawn from its binomial distribution, as if each were dropped alone.

    Returns:
      `[T, heads, D / heads]`; unused slots hold arbitrary finite values.
    """
    num_slots, num_heads, head_dim = query.shape
    tile = -(-max_length // 2)
    num_before = -(-(max_length - 1) // tile)
    num_tiles = -(-num_slots // tile)

    def tiles(x: jax.Array, fill=0) -> jax.Array:
        """[T, ...] -> [num_tiles, tile, ...]"""
        rest = num_tiles * tile - num_slots
        x = jnp.pad(x, [(0, rest)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(num_tiles, tile, *x.shape[1:])

    def windows(x: jax.Array, fill=0) -> jax.Array:
        """[T, ...] -> [num_tiles, (num_before + 1) * tile, ...], a tile after those before."""
        x = tiles(x, fill)
        before = jnp.full_like(x[:1], fill)
        padded = jnp.concatenate([before] * num_before + [x])
        shifted = [padded[i : i + num_tiles] for i in range(num_before + 1)]
        return jnp.concatenate(shifted, axis=1)

    def heads(x: jax.Array) -> jax.Array:
        """[num_tiles, slots, heads, d] -> [heads, num_tiles, slots, d]

        With the batch axes in front, the products and their gradients need no transposition.
        """
        return jnp.moveaxis(x, 2, 0)

    scale = 1 / math.sqrt(head_dim)
    query, key, value = heads(tiles(query)), heads(windows(key)), heads(windows(value))
    logits = jnp.einsum("hnqd,hnkd->hnqk", query, key) * scale
    own = tiles(stream.segment, -1)[:, :, None] == windows(stream.segment, -2)[:, None, :]
    causal = jnp.arange(tile)[:, None] + num_before * tile >= jnp.arange(
        (num_before + 1) * tile
    )
    # Finite, so that the slots that fill the last tile, which see no key, stay finite.
    logits = jnp.where(own & causal, logits, -1e30)
    virtual_key, virtual_value = padding or (jnp.zeros((num_heads, head_dim)),) * 2
    num_padding = tiles(stream.num_padding(max_length)) if padding else jnp.zeros((1, 1))
    virtual = jnp.einsum("hnqd,hd->hnq", query, virtual_key) * scale
    # As wide as the logits: the logarithm of an int32 has single precision at most.
    wide = jnp.promote_types(virtual.dtype, jnp.float32)
    virtual += jnp.where(
        num_padding > 0, jnp.log(jnp.maximum(num_padding, 1).astype(wide)), -1e30
    )
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(-1), virtual))
    weights = jnp.exp(logits - top[..., None])
    virtual = jnp.exp(virtual - top)
    total = weights.sum(-1) + virtual
    if dropout_key is not None and rate > 0:
        key_weights, key_padding = jax.random.split(dropout_key)
        weights = dropout(weights, rate, key_weights)
        if padding:
            kept = binomial(key_padding, num_padding, 1 - rate, max_length, virtual.shape)
            virtual *= kept / (jnp.maximum(num_padding, 1) * (1 - rate))
    out = jnp.einsum("hnqk,hnkd->hnqd", weights, value)
    out += virtual[..., None] * virtual_value[:, None, None]
    out /= total[..., None]
    return jnp.moveaxis(out, 0, 2).reshape(-1, num_heads, head_dim)[:num_slots]


def binomial(
    key: jax.Array, count: jax.Array, probability: float, max_count: int, shape
) -> jax.Array:
    """Draws of Binomial(count, probability) by inversion, `shape` + broadcast of `count`.

    The distribution function is tabulated for every count up to `max_count`, which is a few
    thousand numbers, and a uniform draw is compared with one row of it.
    """
    table = jnp.asarray(_binomial_cdf(max_count, probability))
    draws = jax.random.uniform(key, shape)
    return (draws[..., None] >= table[count]).sum(-1)


def _binomial_cdf(max_count: int, probability: float) -> np.ndarray:
    """P(X <= k) for n = 0..max_count in rows and k = 0..max_count - 1, by Pascal's rule."""
    pmf = np.zeros((max_count + 1, max_count + 2))
    pmf[0, 0] = 1
    for n in range(max_count):
        pmf[n + 1] = (1 - probability) * pmf[n]
        pmf[n + 1, 1:] += probability * pmf[n, :-1]
    cdf = np.cumsum(pmf, axis=1)[:, :max_count]
    cdf[np.arange(max_count + 1)[:, None] <= np.arange(max_count)] = 2  # X never exceeds n
    return cdf.astype(np.float32)
