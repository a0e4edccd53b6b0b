"""SASRec (Kang & McAuley, ICDM 2018), as the SEvo paper's experiments train it."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import (
    Band,
    Rows,
    attention,
    check_cosine_scale,
    check_heads,
    check_padded,
    check_rates,
    check_sizes,
    dropout,
    layer_norm,
    packed_causal_attention,
    packed_positions,
    split_heads,
    split_key,
    uniform,
    xavier_normal,
)
from models.packing import Packed
from models.scoring import DotProduct

LAYER_NORM_EPS = 1e-8


class SASRec(DotProduct, nnx.Module):
    """Causal self-attention over sequences of at most `max_length` items.

    Table row 0 is padding and item i lives in row i + 1. The score of an item for a state is
    the dot product of the state with the item's row. The module holds parameters only; a
    `dropout_key` at call time means training, none means evaluation.

    The published numbers come from a network with three peculiarities, which are the
    defaults: only the query of an attention layer is normalised, padding slots take part in
    the soft-max, and the embeddings are scaled by sqrt(dim) on input but not in the scores.

    Args:
      num_items: of the catalogue; the table has a row more.
      dim: width of the table and of all layers, a multiple of `num_heads`.
      max_length: columns of a padded batch, and the longest sequence in `packed`, which does
        not check it. Shorter ones depend on it, too: they stand at the right end, positions
        count from the left, and padding takes part unless `mask_padding`.
      num_blocks, num_heads: of the network.
      dropout_rate: of the input, of attention's weights and of both feed-forward layers.
      normalize_key_value: whether keys and values are normalised as queries are.
      mask_padding: whether padding slots are left out of the soft-max.
      scale_input: whether embeddings are scaled by sqrt(dim) before positions are added.
      cosine_scale: that of `scoring.DotProduct`; 0 for plain dot products.
      rngs: for the parameters.

    Raises:
      ValueError: a size, rate or scale is out of its range, or `num_heads` do not divide
        `dim`.

    References:
      Kang and McAuley, `Self-Attentive Sequential Recommendation
      <https://arxiv.org/abs/1808.09781>`_, ICDM 2018
    """

    def __init__(
        self,
        num_items: int,
        *,
        dim: int = 64,
        max_length: int = 50,
        num_blocks: int = 2,
        num_heads: int = 1,
        dropout_rate: float = 0.3,
        normalize_key_value: bool = False,
        mask_padding: bool = False,
        scale_input: bool = True,
        cosine_scale: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_heads(dim, num_heads)
        check_sizes(num_items=num_items, max_length=max_length, num_blocks=num_blocks)
        check_rates(dropout_rate=dropout_rate)
        self.max_length = max_length
        self.dropout_rate = dropout_rate
        check_cosine_scale(cosine_scale)
        self.cosine_scale = cosine_scale
        self.mask_padding = mask_padding
        self.input_scale = math.sqrt(dim) if scale_input else 1.0
        self.item_embedding = nnx.Embed(
            num_items + 1, dim, embedding_init=xavier_normal, rngs=rngs
        )
        self.position_embedding = nnx.Embed(
            max_length, dim, embedding_init=xavier_normal, rngs=rngs
        )
        self.blocks = nnx.List(
            Block(dim, num_heads, dropout_rate, normalize_key_value, rngs=rngs)
            for _ in range(num_blocks)
        )
        self.norm = layer_norm(dim, LAYER_NORM_EPS, rngs)

    def __call__(self, items: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """States of a left-padded batch.

        Args:
          items: int `[B, max_length]` table rows, oldest first, 0 for padding on the left.
          dropout_key: a random key in training.

        Returns:
          `[B, max_length, dim]`; slot t is the state after the items up to t.
        """
        check_padded(items, self.max_length)
        used = items > 0
        window = Rows(used | (not self.mask_padding), causal=True)

        def attend(query, key, value, padding, key_drop):
            return attention(query, key, value, window, self.dropout_rate, key_drop)

        embedded, positions = self.item_embedding(items), jnp.arange(self.max_length)
        return self._states(embedded, positions, used[..., None], attend, dropout_key)

    def packed(
        self, embedded: jax.Array, stream: Packed, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """States of sequences packed in one stream; equal to the padded ones.

        Args:
          embedded: `[T, dim]`, the rows of the item table for the slots of the stream.
          stream: sequences of at most `max_length` items.
          dropout_key: a random key in training.

        Returns:
          `[T, dim]`; unused slots hold arbitrary finite values.
        """

        def attend(query, key, value, padding, key_drop):
            dropped = self.dropout_rate, key_drop
            if self.mask_padding:
                window = Band(stream, self.max_length, causal=True)
                return attention(query, key, value, window, *dropped)
            return packed_causal_attention(
                query, key, value, stream, self.max_length, padding, *dropped
            )

        positions = packed_positions(stream, self.max_length)
        return self._states(embedded, positions, True, attend, dropout_key)

    def _states(
        self,
        embedded: jax.Array,
        positions: jax.Array,
        used: jax.Array | bool,
        attend: Callable,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        key_input, *keys = split_key(dropout_key, 1 + len(self.blocks))
        x = embedded * self.input_scale + self.position_embedding(positions)
        x = dropout(x, self.dropout_rate, key_input)
        x = jnp.where(used, x, 0)
        for block, key in zip(self.blocks, keys, strict=True):
            x = jnp.where(used, block(x, attend, key), 0)
        return self.norm(x)


class Block(nnx.Module):
    """Attention and a point-wise feed-forward layer, `[..., dim]` to `[..., dim]`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout_rate: float,
        normalize_key_value: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.normalize_key_value = normalize_key_value
        # The three input projections are one [3 dim, dim] matrix in the initialisation.
        in_init = uniform(math.sqrt(6 / (4 * dim)))
        conv_init = uniform(1 / math.sqrt(dim))
        self.attention_norm = layer_norm(dim, LAYER_NORM_EPS, rngs)
        self.query = nnx.Linear(dim, dim, kernel_init=in_init, rngs=rngs)
        self.key_value = nnx.Linear(dim, 2 * dim, kernel_init=in_init, rngs=rngs)
        self.out = nnx.Linear(dim, dim, kernel_init=xavier_normal, rngs=rngs)
        self.forward_norm = layer_norm(dim, LAYER_NORM_EPS, rngs)
        self.hidden, self.output = (
            nnx.Linear(dim, dim, kernel_init=conv_init, bias_init=conv_init, rngs=rngs)
            for _ in range(2)
        )

    def __call__(self, x: jax.Array, attend: Callable, dropout_key: jax.Array | None):
        key_attention, key_hidden, key_output = split_key(dropout_key, 3)
        normalized = self.attention_norm(x)
        query = split_heads(self.query(normalized), self.num_heads)
        key, value = self._key_value(normalized if self.normalize_key_value else x)
        # What a padding slot, whose state is zero, offers to attention.
        zero = jnp.zeros(x.shape[-1:], x.dtype)
        padding = self._key_value(
            self.attention_norm(zero) if self.normalize_key_value else zero
        )
        attended = attend(query, key, value, padding, key_attention)
        x = self.out(attended.reshape(x.shape)) + x
        y = self.forward_norm(x)
        hidden = nnx.relu(dropout(self.hidden(y), self.dropout_rate, key_hidden))
        return y + dropout(self.output(hidden), self.dropout_rate, key_output)

    def _key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        key, value = jnp.split(self.key_value(x), 2, axis=-1)
        return split_heads(key, self.num_heads), split_heads(value, self.num_heads)
