"""STOSA (Fan et al., WWW 2022), as the SEvo paper's experiments train it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import (
    Band,
    Rows,
    Window,
    attend,
    attention_weights,
    check_heads,
    check_padded,
    check_rates,
    check_sizes,
    dropout,
    layer_norm,
    packed_positions,
    split_heads,
    split_key,
)
from models.packing import Packed

LAYER_NORM_EPS = 1e-12

# Mean and covariance, leaves [..., dim].
Distribution = tuple[jax.Array, jax.Array]


class STOSA(nnx.Module):
    """Causal self-attention over items that are Gaussian distributions.

    An item has a mean and a diagonal covariance, rows of the tables `item_mean` and
    `item_covariance`, and the same rows are its input and what it is scored by; the
    covariance is ELU + 1 of its row. Table row 0 is padding and item i lives in row i + 1.
    States are pairs (mean, covariance), the covariance positive, and a score is minus the
    squared 2-Wasserstein distance. The module holds parameters only; a `dropout_key` at call
    time means training, none means evaluation.

    In the published code, by a misspelt variable, the mean of a state is that of the newest
    item with its position: the history reaches a score through the covariance alone, and the
    values, output and feed-forward layers of the means are not trained. Its numbers come from
    that network, the default.

    Args:
      num_items: of the catalogue; each table has a row more.
      dim: width of each table and of all layers, a multiple of `num_heads`.
      max_length: columns of a padded batch, and the longest sequence in `packed`, which does
        not check it.
      num_blocks, num_heads: of the network.
      dropout_rate: of the input, of attention's output and of the feed-forward block's.
      attention_dropout_rate: of attention's weights.
      fixed: take the means that the layers compute; False for those of the published code.
      rngs: for the parameters.

    Raises:
      ValueError: a size or rate is out of its range, or `dim` no multiple of `num_heads`.

    References:
      Fan et al, `Sequential Recommendation via Stochastic Self-Attention
      <https://arxiv.org/abs/2201.06035>`_, WWW 2022
    """

    num_special = 1

    def __init__(
        self,
        num_items: int,
        *,
        dim: int = 64,
        max_length: int = 100,
        num_blocks: int = 1,
        num_heads: int = 4,
        dropout_rate: float = 0.2,
        attention_dropout_rate: float = 0.5,
        fixed: bool = False,
        rngs: nnx.Rngs,
    ):
        check_heads(dim, num_heads)
        check_sizes(num_items=num_items, max_length=max_length, num_blocks=num_blocks)
        check_rates(dropout_rate=dropout_rate, attention_dropout_rate=attention_dropout_rate)
        self.max_length = max_length
        self.dropout_rate = dropout_rate
        num_rows = num_items + self.num_special
        self.item_mean, self.item_covariance = (
            nnx.Embed(num_rows, dim, embedding_init=shifted_normal, rngs=rngs) for _ in range(2)
        )
        self.position_mean, self.position_covariance = (
            nnx.Embed(max_length, dim, embedding_init=shifted_normal, rngs=rngs)
            for _ in range(2)
        )
        self.input_norm = layer_norm(dim, LAYER_NORM_EPS, rngs)
        self.blocks = nnx.List(
            Block(dim, num_heads, dropout_rate, attention_dropout_rate, fixed, rngs=rngs)
            for _ in range(num_blocks)
        )

    def __call__(
        self, items: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> Distribution:
        """States of a left-padded batch.

        Args:
          items: int `[B, max_length]` table rows, oldest first, 0 for padding on the left.
          dropout_key: a random key in training.

        Returns:
          Mean and covariance `[B, max_length, dim]`; slot t is the state after the items up
          to t, and padding slots hold arbitrary finite values.
        """
        check_padded(items, self.max_length)
        used = items > 0
        # Without gradient to the padding row, whatever a loss makes of padding slots.
        mean, covariance = (jnp.where(used[..., None], x, 0) for x in self.embed(items))
        window = Rows(used, causal=True)
        positions = jnp.arange(self.max_length)
        return self._states((mean, covariance), positions, window, dropout_key)

    def packed(
        self,
        embedded: Distribution,
        stream: Packed,
        *,
        dropout_key: jax.Array | None = None,
    ) -> Distribution:
        """States of sequences packed in one stream; equal to the padded ones.

        Args:
          embedded: `[T, dim]` each, the rows of the item tables for the slots of the stream.
          stream: sequences of at most `max_length` items.
          dropout_key: a random key in training.

        Returns:
          Mean and covariance `[T, dim]`; unused slots hold arbitrary finite values.
        """
        positions = packed_positions(stream, self.max_length)
        window = Band(stream, self.max_length, causal=True)
        return self._states(embedded, positions, window, dropout_key)

    def _states(
        self,
        embedded: Distribution,
        positions: jax.Array,
        window: Window,
        dropout_key: jax.Array | None,
    ) -> Distribution:
        key_mean, key_covariance, *keys = split_key(dropout_key, 2 + len(self.blocks))
        mean = self.input_norm(embedded[0] + self.position_mean(positions))
        mean = jax.nn.elu(dropout(mean, self.dropout_rate, key_mean))
        covariance = self.input_norm(embedded[1] + self.position_covariance(positions))
        covariance = positive(dropout(covariance, self.dropout_rate, key_covariance))
        for block, key in zip(self.blocks, keys, strict=True):
            mean, covariance = block(mean, covariance, window, key)
        return mean, covariance

    def embed(self, rows: jax.Array) -> Distribution:
        """Rows of the tables of means and covariances, `[..., dim]` each."""
        return self.item_mean(rows), self.item_covariance(rows)

    def items(self, rows: jax.Array | None = None) -> Distribution:
        """The rows of `embed`; by default those of the whole catalogue."""
        if rows is not None:
            return self.embed(rows)
        tables = self.item_mean, self.item_covariance
        mean, covariance = (table.embedding[self.num_special :] for table in tables)
        return mean, covariance

    def score(self, states: Distribution, items: Distribution) -> jax.Array:
        return -_distance(_point(*states), _item_point(items))

    def item_score(self, items: Distribution, others: Distribution) -> jax.Array:
        """`score` with items in the place of states, `[..., dim]` to `[...]`."""
        return -_distance(_item_point(items), _item_point(others))

    def score_all(self, states: Distribution, items: Distribution) -> jax.Array:
        state, item = _point(*states), _item_point(items)
        squares = (state**2).sum(axis=-1)[:, None] + (item**2).sum(axis=-1)
        return 2 * state @ item.T - squares


class Block(nnx.Module):
    """Attention by distance and a feed-forward layer, on means and covariances."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        fixed: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.attention_dropout_rate = attention_dropout_rate
        self.fixed = fixed
        self.mean, self.covariance = (Layers(dim, rngs=rngs) for _ in range(2))
        self.attention_norm = layer_norm(dim, LAYER_NORM_EPS, rngs)  # of both

    def __call__(
        self,
        mean: jax.Array,
        covariance: jax.Array,
        window: Window,
        dropout_key: jax.Array | None,
    ) -> Distribution:
        key_weights, key_mean, key_covariance = split_key(dropout_key, 3)
        weights = self._weights(mean, covariance, window, key_weights)
        # Independent values add up with squared weights in their covariance.
        value = self._heads(positive(self.covariance.value(covariance)))
        attended = attend(weights**2, value, window)
        covariance = positive(
            self._forward(self.covariance, attended, covariance, key_covariance)
        )
        if self.fixed:
            attended = attend(weights, self._heads(self.mean.value(mean)), window)
            mean = self._forward(self.mean, attended, mean, key_mean)
        return mean, covariance

    def _weights(
        self,
        mean: jax.Array,
        covariance: jax.Array,
        window: Window,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Soft-max of minus the distance of query and key, over sqrt(dim / heads).

        Of |q - k|^2 = |q|^2 + |k|^2 - 2 <q, k> the soft-max over keys needs no |q|^2, and
        with one more column the rest is a single product.
        """
        mean_query, mean_key = jnp.split(self.mean.query_key(mean), 2, axis=-1)
        covariance_query, covariance_key = jnp.split(
            positive(self.covariance.query_key(covariance)), 2, axis=-1
        )
        query = _point(self._heads(mean_query), self._heads(covariance_query))
        key = _point(self._heads(mean_key), self._heads(covariance_key))
        query = jnp.concatenate([2 * query, jnp.ones_like(query[..., :1])], axis=-1)
        squares = (key**2).sum(axis=-1, keepdims=True)
        key = jnp.concatenate([key, -squares], axis=-1)
        query /= math.sqrt(mean.shape[-1] // self.num_heads)
        return attention_weights(query, key, window, self.attention_dropout_rate, dropout_key)

    def _forward(
        self, layers: "Layers", attended: jax.Array, x: jax.Array, dropout_key: jax.Array | None
    ) -> jax.Array:
        key_attention, key_output = split_key(dropout_key, 2)
        attended = layers.out(attended.reshape(x.shape))
        x = self.attention_norm(dropout(attended, self.dropout_rate, key_attention) + x)
        y = layers.output(jax.nn.elu(layers.hidden(x)))
        return layers.forward_norm(dropout(y, self.dropout_rate, key_output) + x)

    def _heads(self, x: jax.Array) -> jax.Array:
        return split_heads(x, self.num_heads)


class Layers(nnx.Module):
    """What means and covariances have each of their own in a block."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.query_key, self.value, self.out, self.hidden, self.output = (
            nnx.Linear(*shape, kernel_init=shifted_normal, rngs=rngs)
            for shape in (
                (dim, 2 * dim),
                (dim, dim),
                (dim, dim),
                (dim, 4 * dim),
                (4 * dim, dim),
            )
        )
        self.forward_norm = layer_norm(dim, LAYER_NORM_EPS, rngs)


def positive(x: jax.Array) -> jax.Array:
    """ELU + 1."""
    return jax.nn.elu(x) + 1


def _point(mean: jax.Array, covariance: jax.Array) -> jax.Array:
    """A diagonal Gaussian as a point `[..., 2 dim]` of a Euclidean space: for such ones the
    2-Wasserstein distance is that of the means and standard deviations."""
    # ELU + 1 rounds to 0 far below 0, where a root has no gradient.
    deviation = jnp.sqrt(jnp.maximum(covariance, 1e-24))
    return jnp.concatenate([mean, deviation], axis=-1)


def _item_point(items: Distribution) -> jax.Array:
    mean, covariance = items
    return _point(mean, positive(covariance))


def _distance(x: jax.Array, y: jax.Array) -> jax.Array:
    return ((x - y) ** 2).sum(axis=-1)


def shifted_normal(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
    """Normal with mean 0.01 and standard deviation 0.02."""
    del out_sharding
    return 0.01 + 0.02 * jax.random.normal(key, shape, dtype)
