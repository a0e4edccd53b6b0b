"""BERT4Rec (Sun et al., CIKM 2019), as the SEvo paper's experiments train it."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoder import Encoder, self_attention
from models.layers import (
    Window,
    check_heads,
    check_rates,
    check_sizes,
    dropout,
    layer_norm,
    split_key,
    uniform,
    xavier_normal,
)

LAYER_NORM_EPS = 1e-5


class BERT4Rec(Encoder, nnx.Module):
    """A bidirectional transformer that predicts hidden items from both sides.

    Table row 0 is padding, row 1 the mask that stands for a hidden item, and item i lives in
    row i + 2. The scores come from a second table of the same rows, `output_embedding`, and a
    bias: they are logits over all rows, which training normalises over padding and mask too
    (`all_rows`). The module holds parameters only; a `dropout_key` at call time means
    training, none means evaluation.

    Args:
      num_items: of the catalogue; the tables have two rows more.
      dim: width of the tables and of all layers, a multiple of `num_heads`.
      max_length: columns of a padded batch, and the longest sequence in `packed`, which does
        not check it; at test the mask at the end is one of its items.
      num_blocks, num_heads: of the network.
      dropout_rate: of the input, of attention's weights and output, and of both feed-forward
        layers.
      rngs: for the parameters.

    Raises:
      ValueError: a size or rate is out of its range, or `dim` no multiple of `num_heads`.

    References:
      Sun et al, `BERT4Rec: Sequential Recommendation with Bidirectional Encoder
      Representations from Transformer <https://arxiv.org/abs/1904.06690>`_, CIKM 2019
    """

    num_special = 2
    causal = False

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
        check_sizes(num_items=num_items, max_length=max_length, num_blocks=num_blocks)
        check_rates(dropout_rate=dropout_rate)
        self.max_length = max_length
        self.dropout_rate = dropout_rate
        num_rows = num_items + self.num_special
        self.item_embedding, self.position_embedding, self.output_embedding = (
            nnx.Embed(rows, dim, embedding_init=clamped_xavier_normal, rngs=rngs)
            for rows in (num_rows, max_length, num_rows)
        )
        self.output_bias = nnx.Param(jnp.zeros(num_rows, jnp.float32))
        self.input_norm = layer_norm(dim, LAYER_NORM_EPS, rngs)
        # The published network copies one block, and draws anew all but this projection.
        projection_key = rngs.params()
        self.blocks = nnx.List(
            Block(dim, num_heads, dropout_rate, projection_key, rngs=rngs)
            for _ in range(num_blocks)
        )

    def items(self, rows: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Rows `[..., dim]` of the output table and their biases `[...]`; by default those of
        the items, without the special rows."""
        weights, biases = self.all_rows()
        if rows is None:
            return weights[self.num_special :], biases[self.num_special :]
        # Not by brackets, which take the last row for one that is not there.
        return jnp.take(weights, rows, axis=0), jnp.take(biases, rows)

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
        attended = self_attention(self, x, window, rate, key_weights)
        x = self.attention_norm(x + dropout(attended, rate, key_attention))
        hidden = jax.nn.gelu(self.hidden(x), approximate=False)
        y = self.output(dropout(hidden, rate, key_hidden))
        return self.forward_norm(x + dropout(y, rate, key_output))


def clamped_xavier_normal(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
    """Xavier-normal, what lies beyond 0.02 put at 0.02: in small layers, nearly all of it."""
    return jnp.clip(xavier_normal(key, shape, dtype, out_sharding), -0.02, 0.02)
