"""BSARec (Shin et al., AAAI 2024): self-attention beside a filter of low frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.encoder import Encoder, self_attention
from models.layers import (
    Window,
    attend,
    check_cosine_scale,
    check_heads,
    check_number,
    check_rates,
    check_sizes,
    dropout,
    layer_norm,
    split_key,
    xavier_normal,
)
from models.scoring import DotProduct

LAYER_NORM_EPS = 1e-12

narrow_normal = jax.nn.initializers.normal(0.02)


class BSARec(Encoder, DotProduct, nnx.Module):
    """Causal self-attention mixed with a filter that keeps a sequence's low frequencies.

    Table row 0 is padding and item i lives in row i + 1. The score of an item for a state is
    the dot product of the state with the item's row. The module holds parameters only; a
    `dropout_key` at call time means training, none means evaluation. `cosine_scale` is that of
    `scoring.DotProduct`.

    The published network filters whole padded rows, so that a slot sees the items after it,
    and trains on the last slot of a row for every prefix. Here the filter is causal, with the
    weights that the published one has for a row's last slot, and padding is silence to it. So
    every slot can have a target, in one pass over a sequence. Initial values are those of the
    other networks here, Xavier-normal and drawn for each block; the authors' code draws all
    from N(0, 0.02) and copies one block.

    Args:
      num_items: of the catalogue.
      dim: width of the table and of all layers.
      max_length: the longest sequence, and the length of the Fourier transform.
      num_blocks, num_heads: of the network.
      dropout_rate, attention_dropout_rate: of the layers' outputs, and of attention's weights.
      filter_weight: share of the filter beside attention (the paper's alpha).
      filter_cutoff: the lowest `filter_cutoff // 2 + 1` frequencies count as low (its c).
      rngs: for the parameters.
    """

    causal = True

    def __init__(
        self,
        num_items: int,
        *,
        dim: int = 64,
        max_length: int = 50,
        num_blocks: int = 2,
        num_heads: int = 1,
        dropout_rate: float = 0.5,
        attention_dropout_rate: float = 0.5,
        filter_weight: float = 0.7,
        filter_cutoff: int = 5,
        cosine_scale: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_heads(dim, num_heads)
        check_sizes(
            num_items=num_items,
            max_length=max_length,
            num_blocks=num_blocks,
            filter_cutoff=filter_cutoff,
        )
        check_rates(dropout_rate=dropout_rate, attention_dropout_rate=attention_dropout_rate)
        check_number("filter_weight", filter_weight)
        if not 0 <= filter_weight <= 1:
            raise ValueError(f"`filter_weight` must be in [0, 1], got {filter_weight}.")
        self.max_length = max_length
        self.dropout_rate = dropout_rate
        check_cosine_scale(cosine_scale)
        self.cosine_scale = cosine_scale
        self.item_embedding, self.position_embedding = (
            nnx.Embed(rows, dim, embedding_init=narrow_normal, rngs=rngs)
            for rows in (num_items + self.num_special, max_length)
        )
        self.input_norm = layer_norm(dim, LAYER_NORM_EPS, rngs)
        kernel = low_pass(max_length, filter_cutoff)
        self.blocks = nnx.List(
            Block(
                dim,
                num_heads,
                dropout_rate,
                attention_dropout_rate,
                filter_weight,
                kernel,
                rngs=rngs,
            )
            for _ in range(num_blocks)
        )


class Block(nnx.Module):
    """A filter and attention side by side, and a feed-forward layer after them."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout_rate: float,
        attention_dropout_rate: float,
        filter_weight: float,
        kernel: np.ndarray,
        *,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate
        self.attention_dropout_rate = attention_dropout_rate
        self.filter_weight = filter_weight
        # Not an array: Flax compares a module's static attributes, and needs their hash.
        self.kernel = tuple(kernel.tolist())
        # What is kept of the high frequencies is the square of this (the paper's beta).
        self.root_high = nnx.Param(jax.random.normal(rngs.params(), (dim,), jnp.float32))
        self.query_key_value = nnx.Linear(
            dim, 3 * dim, kernel_init=three_xavier_normal, rngs=rngs
        )
        self.out, self.hidden, self.output = (
            nnx.Linear(*shape, kernel_init=xavier_normal, rngs=rngs)
            for shape in ((dim, dim), (dim, 4 * dim), (4 * dim, dim))
        )
        self.filter_norm, self.attention_norm, self.forward_norm = (
            layer_norm(dim, LAYER_NORM_EPS, rngs) for _ in range(3)
        )

    def __call__(
        self, x: jax.Array, window: Window, dropout_key: jax.Array | None
    ) -> jax.Array:
        rate = self.dropout_rate
        key_filter, key_weights, key_attention, key_output = split_key(dropout_key, 4)
        y = dropout(self._filtered(x, window), rate, key_filter)
        filtered = self.filter_norm(x + y)
        y = self_attention(self, x, window, self.attention_dropout_rate, key_weights)
        attended = self.attention_norm(x + dropout(y, rate, key_attention))
        x = self.filter_weight * filtered + (1 - self.filter_weight) * attended
        y = self.output(jax.nn.gelu(self.hidden(x), approximate=False))
        return self.forward_norm(x + dropout(y, rate, key_output))

    def _filtered(self, x: jax.Array, window: Window) -> jax.Array:
        kernel = jnp.array(self.kernel, x.dtype)[jnp.maximum(window.lags, 0)]
        weights = jnp.where(window.mask, kernel, 0)
        low = attend(weights[None], x[..., None, :], window).reshape(x.shape)
        return low + self.root_high[...] ** 2 * (x - low)


def low_pass(length: int, cutoff: int) -> np.ndarray:
    """The weight of an item by how many slots it lies back, `[length]`.

    A discrete Fourier transform over `length` slots, all but the lowest `cutoff // 2 + 1`
    frequencies put to zero, and transformed back (the paper's equation 6), is a convolution
    with this.
    """
    frequencies = np.zeros(length // 2 + 1)
    frequencies[: cutoff // 2 + 1] = 1
    return np.fft.irfft(frequencies, length)


def three_xavier_normal(key, shape, dtype=jnp.float32, out_sharding=None) -> jax.Array:
    """Three matrices, Xavier-normal each, side by side: `[n, 3 n]`."""
    del out_sharding
    rows, columns = shape
    keys = jax.random.split(key, 3)
    parts = [xavier_normal(one, (rows, columns // 3), dtype) for one in keys]
    return jnp.concatenate(parts, axis=1)
