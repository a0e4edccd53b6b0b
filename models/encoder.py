"""What transformers that normalise after each residual share: their two forms, attention."""

from typing import Any

import jax
import jax.numpy as jnp

from models.layers import (
    Band,
    Rows,
    Window,
    attention,
    check_padded,
    dropout,
    packed_positions,
    split_heads,
    split_key,
)
from models.packing import Packed


class Encoder:
    """Blocks over the normalised sum of item and position embeddings.

    A subclass has the modules named here, and blocks that take `(x, window, dropout_key)`.
    """

    causal: bool
    max_length: int
    dropout_rate: float
    item_embedding: Any
    position_embedding: Any
    input_norm: Any
    blocks: Any

    def __call__(self, items: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """States of a left-padded batch.

        Args:
          items: int `[B, max_length]` table rows, oldest first, 0 for padding on the left.
          dropout_key: a random key in training.

        Returns:
          `[B, max_length, dim]`; padding slots hold arbitrary finite values.
        """
        check_padded(items, self.max_length)
        used = items > 0
        # Without gradient to the padding row, whatever a loss makes of padding slots.
        embedded = jnp.where(used[..., None], self.embed(items), 0)
        window = Rows(used, causal=self.causal)
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
        window = Band(stream, self.max_length, causal=self.causal)
        return self._states(embedded, positions, window, dropout_key)

    def embed(self, rows: jax.Array) -> jax.Array:
        """Rows of the input table, `[..., dim]`."""
        return self.item_embedding(rows)

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


def self_attention(
    block: Any, x: jax.Array, window: Window, rate: float, dropout_key: jax.Array | None
) -> jax.Array:
    """Multi-head attention `[..., dim]` to `[..., dim]`, by the layers of a `block`:
    `query_key_value`, `out` and `num_heads`.

    Args:
      rate, dropout_key: dropout on the weights.
    """
    query, key, value = (
        split_heads(part, block.num_heads)
        for part in jnp.split(block.query_key_value(x), 3, axis=-1)
    )
    attended = attention(query, key, value, window, rate, dropout_key)
    return block.out(attended.reshape(x.shape))
