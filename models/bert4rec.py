"""BERT4Rec (Sun et al., CIKM 2019), as the SEvo paper's experiments train it."""

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
    dropout,
    layer_norm,
    packed_positions,
    split_heads,
    split_key,
    uniform,
    xavier_normal,
)
from models.packing import Packed

LAYER_NORM_EPS = 1e-5


class BERT4Rec(nnx.Module):
    """A bidirectional transformer that predicts hidden items from both sides.

    Table row 0 is padding, row 1 the mask that stands for a hidden item, and item i lives in
    row i + 2. The scores come from a second table of the same rows, `output_embedding`, and a
    bias: they are logits over all rows, which training normalises over padding and mask too
    (`all_rows`). The module holds parameters only; a `dropout_key` at call time means
    training, none means evaluation.
    """

    num_special = 2

    def __init__(
        self,
        num_items: int,
        *,
        dim: int = 64,
        max_length: int = 50,
        num_blocks: int = 2,
        num_heads: int = 4,
        dropout_rate: float = 0.2,
        rngs: nnx.Rngs,
    ):
        check_heads(dim, num_heads)
        self.max_length = max_length
        self.dropout_rate = dropout_rate
        num_rows = num_items + self.num_special
        self.item_embedding, self.position_embedding, self.output_embedding = (
            nnx.Embed(rows, dim, embedding_init=clamped_xavier_normal, rngs=rngs)
            for rows in (num_rows, max_length, num_rows)
        )
        self.output_bias = nnx.Param(jnp.zeros(num_rows))
        self.input_norm = layer_norm(dim, LAYER_NORM_EPS, rngs)
        # The published network copies one block, and draws anew all but this projection.
        projection_key = rngs.params()
        self.blocks = nnx.List(
            Block(dim, num_heads, dropout_rate, projection_key, rngs=rngs)
            for _ in range(num_blocks)
        )

    def __call__(self, items: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """States of a left-padded batch.

        Args:
          items: int `[B, max_length]` table rows, oldest first, 0 for padding on the left.
          dropout_key: a random key in training.

        Returns:
          `[B, max_length, dim]`; padding slots hold arbitrary finite values.
        """
        used = items > 0
        # Without gradient to the padding row, whatever a loss makes of padding slots.
        embedded = jnp.where(used[..., None], self.embed(items), 0)
        window = Rows(used, causal=False)
        return self._states(embedded, jnp.arange(self.max_length), window, dropout_key)

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
        positions = packed_positions(stream, self.max_length)
        window = Band(stream, self.max_length, causal=False)
        return self._states(embedded, positions, window, dropout_key)

    def _states(
        self,
        embedded: jax.Array,
        positions: jax.Array,
        window: Window,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        key_input, *keys = split_key(dropout_key, 1 + len(self.blocks))
        x = self.input_norm(embedded + self.position_embedding(positions))
        x = dropout(x, self.dropout_rate, key_input)
        for block, key in zip(self.blocks, keys, strict=True):
            x = block(x, window, key)
        return x

    def embed(self, rows: jax.Array) -> jax.Array:
        """Rows of the input table, `[..., dim]`."""
        return self.item_embedding(rows)

    def items(self, rows: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Rows `[..., dim]` of the output table and their biases `[...]`; by default those of
        the items, without the special rows."""
        weights, biases = self.all_rows()
        index = slice(self.num_special, None) if rows is None else rows
        return weights[index], biases[index]

    def all_rows(self) -> tuple[jax.Array, jax.Array]:
        """`items` for every row, special ones included: the classes of the training loss."""
        return self.output_embedding.embedding[...], self.output_bias[...]

    def score(self, states: jax.Array, items: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, biases = items
        return (states * weights).sum(axis=-1) + biases

    def score_all(self, states: jax.Array, items: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, biases = items
        return states @ weights.T + biases


class Block(nnx.Module):
    """Attention and a feed-forward layer, each normalised after its residual.

    Args:
      projection_key: draws the input projection; equal keys give equal initial values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout_rate: float,
        projection_key: jax.Array,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.query_key_value = nnx.Linear(
            dim,
            3 * dim,
            kernel_init=uniform(math.sqrt(6 / (4 * dim))),
            rngs=nnx.Rngs(projection_key),
        )
        self.out, self.hidden, self.output = (
            nnx.Linear(*shape, kernel_init=clamped_xavier_normal, rngs=rngs)
            for shape in ((dim, dim), (dim, 4 * dim), (4 * dim, dim))
        )
        self.attention_norm = layer_norm(dim, LAYER_NORM_EPS, rngs)
        self.forward_norm = layer_norm(dim, LAYER_NORM_EPS, rngs)

    def __call__(self, x: jax.Array, window: Window, dropout_key: jax.Array | None):
        rate = self.dropout_rate
        key_weights, key_attention, key_hidden, key_output = split_key(dropout_key, 4)
        query, key, value = (
            split_heads(part, self.num_heads)
            for part in jnp.split(self.query_key_value(x), 3, axis=-1)
        )
        query /= math.sqrt(query.shape[-1])
        weights = attention_weights(query, key, window, rate, key_weights)
        attended = self.out(attend(weights, value, window).reshape(x.shape))
        x = self.attention_norm(x + dropout(attended, rate, key_attention))
        hidden = jax.nn.gelu(self.hidden(x), approximate=False)
        y = self.output(dropout(hidden, rate, key_hidden))
        return self.forward_norm(x + dropout(y, rate, key_output))


def clamped_xavier_normal(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
    """Xavier-normal, what lies beyond 0.02 put at 0.02: in small layers, nearly all of it."""
    return jnp.clip(xavier_normal(key, shape, dtype, out_sharding), -0.02, 0.02)
