"""What the backbones share: initial values, dropout, attention over a packed stream."""

import math
import numbers
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer, variance_scaling

from models.packing import Packed
from models.random_bits import random_mask

xavier_normal = variance_scaling(1.0, "fan_avg", "normal")


def masked(dtype: jax.typing.DTypeLike) -> float:
    """A logit that the soft-max takes to 0. Finite, so that a query that sees no key stays
    finite."""
    return max(-1e30, float(jnp.finfo(dtype).min))


def uniform(bound: float) -> Initializer:
    """Uniform on [-bound, bound)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries of `x` with probability `rate` and scales the others by 1/(1 - rate).

    Without a `key`, or with rate 0, `x` passes unchanged (evaluation). The rate is rounded to
    a multiple of 2^-16, since 16 random bits decide an entry.
    """
    keep = max(1, round((1 - rate) * 2**16))
    if key is None or keep == 2**16:
        return x
    return jnp.where(random_mask(key, x.shape, keep), x * (2**16 / keep), 0)


def split_key(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """`num` keys from one, or as many `None` in evaluation."""
    return [None] * num if key is None else list(jax.random.split(key, num))


def layer_norm(dim: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 cancels badly next to a small epsilon.
    return nnx.LayerNorm(dim, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def check_sizes(**sizes: int) -> None:
    """Refuses sizes, by their names, that are no positive integers."""
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {size!r}.")


def check_number(name: str, value: float) -> None:
    """Refuses what is no real number, by its name."""
    scalar = isinstance(value, jax.Array) and value.ndim == 0
    if isinstance(value, bool) or not (scalar or isinstance(value, numbers.Real)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")


def check_positive(**values: float) -> None:
    """Refuses numbers, by their names, that are not positive and finite."""
    for name, value in values.items():
        check_number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive, got {value}.")


def check_cosine_scale(cosine_scale: float) -> None:
    check_number("cosine_scale", cosine_scale)
    if not 0 <= cosine_scale < math.inf:
        raise ValueError(f"`cosine_scale` must be at least 0, got {cosine_scale}.")


def check_heads(dim: int, num_heads: int) -> None:
    """Refuses a width that heads cannot share equally."""
    check_sizes(dim=dim, num_heads=num_heads)
    if dim % num_heads:
        raise ValueError(f"`dim` must be a multiple of `num_heads`, got {dim}, {num_heads}.")


def check_rates(**rates: float) -> None:
    """Refuses rates of dropout, by their names, that are no share below one."""
    for name, rate in rates.items():
        check_number(name, rate)
        if not 0 <= rate < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {rate}.")


def check_padded(items: jax.Array, max_length: int) -> None:
    """Refuses a batch whose rows would be spread over, or not fit, the learned positions."""
    if items.ndim != 2 or items.shape[1] != max_length:
        raise ValueError(
            f"`items` must have the shape [B, max_length={max_length}], filled up with 0 on "
            f"the left, got {items.shape}."
        )


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """`[..., D]` to `[..., heads, D / heads]`."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def packed_positions(stream: Packed, max_length: int) -> jax.Array:
    """The column of each slot in a left-padded batch `[B, max_length]`, int32 `[T]`."""
    positions = stream.num_padding(max_length) + stream.offset
    return jnp.minimum(positions, max_length - 1)  # unused slots


class Window(Protocol):
    """What each query of some sequences may attend to, as tiles of queries and of keys."""

    mask: jax.Array  # bool, broadcasts to [tiles, queries, keys]
    lags: np.ndarray  # int [queries, keys], how many slots a key lies before a query

    def queries(self, x: jax.Array) -> jax.Array:
        """`[..., heads, d]` to `[heads, tiles, queries, d]`."""
        ...

    def keys(self, x: jax.Array) -> jax.Array:
        """`[..., heads, d]` to `[heads, tiles, keys, d]`."""
        ...

    def join(self, x: jax.Array) -> jax.Array:
        """`[heads, tiles, queries, d]` to `[..., heads, d]`."""
        ...


class Rows:
    """The rows of a left-padded batch, each a tile.

    Args:
      used: bool `[B, S]`, slots that hold an item: the only keys.
      causal: whether a query sees no slot after its own.
    """

    def __init__(self, used: jax.Array, *, causal: bool):
        num_slots = used.shape[1]
        self.lags = np.subtract.outer(np.arange(num_slots), np.arange(num_slots))
        self.mask = used[:, None, :] & ((self.lags >= 0) | (not causal))

    def queries(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 2, 0)

    keys = queries

    def join(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 2)


class Band:
    """A packed stream in tiles of half the maximal length.

    The keys of a tile are its own slots and those of as many tiles before it, and after it
    unless `causal`, as a sequence can reach, masked to the query's sequence.

    Args:
      stream: the packed sequences, none longer than `max_length`.
      max_length: S, the length of a row of the padded batch.
      causal: whether a query sees no slot after its own.
    """

    def __init__(self, stream: Packed, max_length: int, *, causal: bool):
        self.num_slots = stream.segment.shape[0]
        self.tile = -(-max_length // 2)
        self.num_tiles = -(-self.num_slots // self.tile)
        self.num_before = -(-(max_length - 1) // self.tile)
        self.num_after = 0 if causal else self.num_before
        segment = stream.segment
        self.mask = self.tiles(segment, -1)[:, :, None] == self.windows(segment, -2)[:, None, :]
        num_keys = (self.num_before + 1 + self.num_after) * self.tile
        first = self.num_before * self.tile  # where a tile's own slots stand among its keys
        self.lags = np.subtract.outer(first + np.arange(self.tile), np.arange(num_keys))
        if causal:
            self.mask &= self.lags >= 0

    def tiles(self, x: jax.Array, fill=0) -> jax.Array:
        """`[T, ...]` to `[num_tiles, tile, ...]`, the last one filled up."""
        rest = self.num_tiles * self.tile - self.num_slots
        x = jnp.pad(x, [(0, rest)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(self.num_tiles, self.tile, *x.shape[1:])

    def windows(self, x: jax.Array, fill=0) -> jax.Array:
        """`[T, ...]` to `[num_tiles, keys, ...]`: every tile between its neighbours."""
        x = self.tiles(x, fill)
        edge = [jnp.full_like(x[:1], fill)]
        padded = jnp.concatenate(edge * self.num_before + [x] + edge * self.num_after)
        shifts = range(self.num_before + 1 + self.num_after)
        return jnp.concatenate([padded[i : i + self.num_tiles] for i in shifts], axis=1)

    # With the batch axes in front, the products and their gradients need no transposition.

    def queries(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(self.tiles(x), 2, 0)

    def keys(self, x: jax.Array) -> jax.Array:
        return jnp.moveaxis(self.windows(x), 2, 0)

    def join(self, x: jax.Array) -> jax.Array:
        num_heads, *_, width = x.shape
        return jnp.moveaxis(x, 0, 2).reshape(-1, num_heads, width)[: self.num_slots]


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    window: Window,
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Soft-max of <query, key> over the keys of a window, `[heads, tiles, queries, keys]`.

    A query that may see no key, as padding does, gets equal weights, so as to stay finite.

    Args:
      query: `[..., heads, d]`, scaled by the caller.
      key: `[..., heads, d]`.
      window: which keys a query sees.
      rate, dropout_key: dropout on the weights.
    """
    logits = jnp.einsum("hnqd,hnkd->hnqk", window.queries(query), window.keys(key))
    weights = jax.nn.softmax(jnp.where(window.mask, logits, masked(logits.dtype)), axis=-1)
    return dropout(weights, rate, dropout_key)


def attend(weights: jax.Array, value: jax.Array, window: Window) -> jax.Array:
    """Sums of the values `[..., heads, d]` under attention weights, `[..., heads, d]`."""
    return window.join(jnp.einsum("hnqk,hnkd->hnqd", weights, window.keys(value)))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: Window,
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention, all `[..., heads, D / heads]`.

    Args:
      query, key, value: of each slot.
      window: which keys a query sees.
      rate, dropout_key: dropout on the weights.
    """
    query /= math.sqrt(query.shape[-1])
    return attend(attention_weights(query, key, window, rate, dropout_key), value, window)


def packed_causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    stream: Packed,
    max_length: int,
    padding: tuple[jax.Array, jax.Array],
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Causal attention inside each sequence of a packed stream, and to padding left of it.

    The stream is cut into tiles, see `Band`. The padding slots that a padded batch would hold
    left of a sequence all have the same key and value, so one virtual key stands for all of
    them, its logit raised by the log of their number: exactly what the soft-max over the
    padded row gives.

    Args:
      query, key, value: `[T, heads, D / heads]`.
      stream: the packed sequences, none longer than `max_length`.
      max_length: S, the length of a row of the padded batch.
      padding: key and value of a padding slot, `[heads, D / heads]` each.
      rate, dropout_key: dropout on the attention weights. The number of padding slots that
        dropout keeps is drawn from its binomial distribution, as if each were dropped alone.

    Returns:
      `[T, heads, D / heads]`; unused slots hold arbitrary finite values.
    """
    band = Band(stream, max_length, causal=True)
    scale = 1 / math.sqrt(query.shape[-1])
    query, key, value = band.queries(query), band.keys(key), band.keys(value)
    logits = jnp.einsum("hnqd,hnkd->hnqk", query, key) * scale
    logits = jnp.where(band.mask, logits, masked(logits.dtype))
    virtual_key, virtual_value = padding
    num_padding = band.tiles(stream.num_padding(max_length))
    virtual = jnp.einsum("hnqd,hd->hnq", query, virtual_key) * scale
    # As wide as the logits: the logarithm of an int32 has single precision at most.
    wide = jnp.promote_types(virtual.dtype, jnp.float32)
    virtual += jnp.where(
        num_padding > 0, jnp.log(jnp.maximum(num_padding, 1).astype(wide)), masked(wide)
    )
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(-1), virtual))
    weights = jnp.exp(logits - top[..., None])
    virtual = jnp.exp(virtual - top)
    total = weights.sum(-1) + virtual
    if dropout_key is not None and rate > 0:
        key_weights, key_padding = jax.random.split(dropout_key)
        weights = dropout(weights, rate, key_weights)
        kept = binomial(key_padding, num_padding, 1 - rate, max_length, virtual.shape)
        virtual *= kept / (jnp.maximum(num_padding, 1) * (1 - rate))
    out = jnp.einsum("hnqk,hnkd->hnqd", weights, value)
    out += virtual[..., None] * virtual_value[:, None, None]
    return band.join(out / total[..., None]).astype(value.dtype)


def binomial(
    key: jax.Array, count: jax.Array, probability: float, max_count: int, shape
) -> jax.Array:
    """Draws of Binomial(count, probability) by inversion, `[*shape]`, to which `count`
    broadcasts.

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
