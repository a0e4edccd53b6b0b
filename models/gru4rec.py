"""GRU4Rec (Hidasi et al., ICLR 2016), as the SEvo paper's experiments train it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import (
    check_cosine_scale,
    check_rates,
    check_sizes,
    dropout,
    uniform,
    xavier_normal,
)
from models.packing import Packed
from models.recurrence import packed_gru, scan_gru
from models.scoring import DotProduct


class GRU4Rec(DotProduct, nnx.Module):
    """One gated recurrent layer without biases, and a dense layer back to the items' width.

    Table row 0 is padding and item i lives in row i + 1. The score of an item for a state is
    the dot product of the state with the item's row. The only dropout is on the embeddings. The
    module holds parameters only; a `dropout_key` at call time means training, none means
    evaluation.

    Args:
      num_items: of the catalogue; the table has a row more.
      dim: width of the table and of the states that are scored.
      hidden_dim: width of the recurrent state.
      max_length: of `packed`, the longest sequence; a padded batch may have any length.
      dropout_rate: of the embeddings.
      cosine_scale: that of `scoring.DotProduct`; 0 for plain dot products.
      rngs: for the parameters.

    Raises:
      ValueError: a size, rate or scale is out of its range.

    References:
      Hidasi et al, `Session-based Recommendations with Recurrent Neural Networks
      <https://arxiv.org/abs/1511.06939>`_, ICLR 2016
    """

    def __init__(
        self,
        num_items: int,
        *,
        dim: int = 64,
        hidden_dim: int = 64,
        max_length: int = 50,
        dropout_rate: float = 0.4,
        cosine_scale: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_rates(dropout_rate=dropout_rate)
        check_sizes(num_items=num_items, dim=dim, hidden_dim=hidden_dim, max_length=max_length)
        check_cosine_scale(cosine_scale)
        self.max_length = max_length
        self.dropout_rate = dropout_rate
        self.cosine_scale = cosine_scale
        self.hidden_dim = hidden_dim
        self.item_embedding = nnx.Embed(
            num_items + 1, dim, embedding_init=xavier_normal, rngs=rngs
        )
        # Xavier-uniform on the stacked [3 hidden_dim, ...] matrices of the three gates.
        self.input_gates = nnx.Linear(
            dim,
            3 * hidden_dim,
            use_bias=False,
            kernel_init=uniform(math.sqrt(6 / (3 * hidden_dim + dim))),
            rngs=rngs,
        )
        self.hidden_gates = nnx.Linear(
            hidden_dim,
            3 * hidden_dim,
            use_bias=False,
            kernel_init=uniform(math.sqrt(6 / (4 * hidden_dim))),
            rngs=rngs,
        )
        dense_init = uniform(1 / math.sqrt(hidden_dim))
        self.dense = nnx.Linear(
            hidden_dim, dim, kernel_init=dense_init, bias_init=dense_init, rngs=rngs
        )

    def __call__(self, items: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """States of a right-padded batch.

        Args:
          items: int `[B, S]` table rows, oldest first, 0 for padding on the right.
          dropout_key: a random key in training.

        Returns:
          `[B, S, dim]`; slot t is the state after the items up to t.
        """
        if items.ndim != 2:
            raise ValueError(f"`items` must have the shape [B, S], got {items.shape}.")
        # A padding slot contributes no gradient to the table's row 0.
        embedded = jnp.where((items > 0)[..., None], self.item_embedding(items), 0)
        embedded = dropout(embedded, self.dropout_rate, dropout_key)
        gates = jnp.swapaxes(self.input_gates(embedded), 0, 1)
        states = scan_gru(self.hidden_gates.kernel[...], gates)
        return self.dense(jnp.swapaxes(states, 0, 1))

    def packed(
        self, embedded: jax.Array, stream: Packed, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """States of sequences packed in one stream; equal to the padded ones.

        Args:
          embedded: `[T, dim]`, the rows of the item table for the slots of the stream.
          stream: B sequences of at most `max_length` items.
          dropout_key: a random key in training.

        Returns:
          `[T, dim]`; unused slots hold arbitrary finite values.
        """
        embedded = dropout(embedded, self.dropout_rate, dropout_key)
        gates, weights = self.input_gates(embedded), self.hidden_gates.kernel[...]
        return self.dense(packed_gru(weights, gates, stream, self.max_length))
