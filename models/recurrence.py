"""A gated recurrence over packed sequences that skips the padding.

Run over a padded batch, a recurrence takes as many steps as the longest sequence has items, for
every sequence; on the prefixes of Amazon Beauty five slots of six are padding. Here sequences
are sorted by length, so that those still alive at a step are the first ones, and each step is
cut into tiles of a few rows: a tile whose sequences have all ended is never computed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.packing import Packed


class Tiles(NamedTuple):
    """Where the slots of a stream stand among K tiles of R rows, step after step."""

    row: jax.Array  # int32 [T], the slot's row among K R; K R for an unused slot
    previous: jax.Array  # int32 [K], the tile of the step before; K for the first step's tiles
    count: jax.Array  # int32 [], tiles in use


def gru_cell(weights: jax.Array, hidden: jax.Array, inputs: jax.Array) -> jax.Array:
    """One step of a gated recurrent unit without biases.

    Args:
      weights: `[H, 3 H]`, from the hidden state to the reset, update and new gates.
      hidden: `[..., H]`.
      inputs: `[..., 3 H]`, what the step's input gives to the gates.

    Returns:
      The new hidden state, `[..., H]`.
    """
    reset_in, update_in, new_in = jnp.split(inputs, 3, axis=-1)
    reset_h, update_h, new_h = jnp.split(hidden @ weights, 3, axis=-1)
    update = jax.nn.sigmoid(update_in + update_h)
    new = jnp.tanh(new_in + jax.nn.sigmoid(reset_in + reset_h) * new_h)
    return (1 - update) * new + update * hidden


def packed_gru(
    weights: jax.Array, inputs: jax.Array, stream: Packed, max_length: int
) -> jax.Array:
    """The hidden states of a gated recurrent unit along packed sequences, each from zero.

    Args:
      weights: `[H, 3 H]`, see `gru_cell`.
      inputs: `[T, 3 H]`, what each slot's input gives to the gates.
      stream: B sequences of at most `max_length` items in T slots.
      max_length: the longest sequence allowed.

    Returns:
      `[T, H]`; unused slots hold arbitrary finite values.
    """
    num_slots, num_sequences = len(inputs), len(stream.lengths)
    # Small tiles waste little on sequences that have just ended. An accelerator rather takes
    # the whole batch at once, in `max_length` steps.
    tile_rows = 32 if jax.default_backend() == "cpu" else num_sequences
    num_tiles = min(
        num_slots // tile_rows + max_length, -(-num_sequences // tile_rows) * max_length
    )
    tiles = _tiles(stream, max_length, tile_rows, num_tiles)
    num_rows = num_tiles * tile_rows
    slot = (
        jnp.zeros(num_rows, jnp.int32)
        .at[tiles.row]
        .set(jnp.arange(num_slots, dtype=jnp.int32), mode="drop")
    )
    states = _recurrence(weights, inputs[slot].reshape(num_tiles, tile_rows, -1), tiles)
    return states.reshape(num_rows, -1)[jnp.minimum(tiles.row, num_rows - 1)]


def _tiles(stream: Packed, max_length: int, tile_rows: int, num_tiles: int) -> Tiles:
    lengths = stream.lengths
    longest_first = jnp.argsort(-lengths)
    rank = jnp.argsort(longest_first).astype(jnp.int32)
    alive = (lengths > jnp.arange(max_length)[:, None]).sum(axis=1, dtype=jnp.int32)
    tiles = -(-alive // tile_rows)
    ends = jnp.cumsum(tiles)  # step after step
    first = ends - tiles  # the step's first tile
    row = first[stream.offset] * tile_rows + jnp.append(rank, 0)[stream.segment]
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    step = jnp.searchsorted(ends, tile, side="right")
    before = tile - first[step] + first[step - 1]
    return Tiles(
        jnp.where(stream.used, row, num_tiles * tile_rows),
        jnp.where(step > 0, before, num_tiles),
        ends[-1],
    )


@jax.custom_vjp
def _recurrence(weights: jax.Array, inputs: jax.Array, tiles: Tiles) -> jax.Array:
    """Inputs `[K, R, 3 H]` to states `[K, R, H]`, tile after tile."""

    def step(tile: jax.Array, states: jax.Array) -> jax.Array:
        # The tile past the end stays zero: the state before the first step.
        new = gru_cell(weights, states[tiles.previous[tile]], inputs[tile])
        return states.at[tile].set(new)

    num_tiles, tile_rows, _ = inputs.shape
    start = jnp.zeros((num_tiles + 1, tile_rows, weights.shape[0]), inputs.dtype)
    return jax.lax.fori_loop(0, tiles.count, step, start)[:-1]


def _forward(weights: jax.Array, inputs: jax.Array, tiles: Tiles):
    states = _recurrence(weights, inputs, tiles)
    return states, (weights, inputs, tiles, states)


def _backward(kept: tuple, gradient: jax.Array):
    # JAX does not differentiate loops of unknown length, so the tiles are retraced by hand;
    # the gradient of a tile's state is complete once all tiles after it are done.
    weights, inputs, tiles, states = kept
    zero = jnp.zeros_like(states[:1])
    states = jnp.concatenate([states, zero])

    def step(i: jax.Array, carry: tuple):
        state_grads, input_grads, weight_grad = carry
        tile = tiles.count - 1 - i
        previous = tiles.previous[tile]
        _, pull_back = jax.vjp(gru_cell, weights, states[previous], inputs[tile])
        to_weights, to_previous, to_inputs = pull_back(state_grads[tile])
        return (
            state_grads.at[previous].add(to_previous),
            input_grads.at[tile].set(to_inputs),
            weight_grad + to_weights,
        )

    start = (
        jnp.concatenate([gradient, zero]),
        jnp.zeros_like(inputs),
        jnp.zeros_like(weights),
    )
    _, to_inputs, to_weights = jax.lax.fori_loop(0, tiles.count, step, start)
    return to_weights, to_inputs, None


_recurrence.defvjp(_forward, _backward)
