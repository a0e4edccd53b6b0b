"""A gated recurrence over packed sequences, which on a CPU skips the padding.

Run over a padded batch, a recurrence takes as many steps as the longest sequence has items, for
every sequence; on the prefixes of Amazon Beauty five slots of six are padding. On a CPU the
sequences are sorted by length, so that those still alive at a step are the first ones, and each
step is cut into tiles of a few rows: a tile whose sequences have all ended is never computed. A
GPU's time goes with the number of kernels that it runs one after the other, however small they
are: it takes the padded batch, in few kernels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.packing import Packed

_INSIDE = "promise_in_bounds"  # or each tile is checked to be there
# Steps in an iteration of an accelerator's loops, which saves the kernels that each iteration
# has for itself. More of them take longer to compile.
_UNROLL = 5


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
    return _gated(hidden @ weights, hidden, inputs)


def _gated(gates: jax.Array, hidden: jax.Array, inputs: jax.Array) -> jax.Array:
    """`gru_cell` from what the hidden state gives to the gates, `[..., 3 H]`."""
    reset_in, update_in, new_in = jnp.split(inputs, 3, axis=-1)
    reset_h, update_h, new_h = jnp.split(gates, 3, axis=-1)
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
    dtype = jnp.result_type(weights, inputs)
    weights, inputs = weights.astype(dtype), inputs.astype(dtype)
    num_slots, num_sequences = len(inputs), len(stream.lengths)
    if jax.default_backend() == "cpu":
        # A small tile wastes little on sequences that have just ended.
        tile_rows = min(32, num_sequences)
        num_tiles = min(
            num_slots // tile_rows + max_length, -(-num_sequences // tile_rows) * max_length
        )
        tiles = _tiles(stream, max_length, tile_rows, num_tiles)
        row, shape = tiles.row, (num_tiles, tile_rows)
    else:
        tiles, shape = None, (max_length, num_sequences)
        row = stream.offset * num_sequences + stream.segment
        row = jnp.where(stream.used, row, max_length * num_sequences)
    num_rows = shape[0] * shape[1]
    slot = (
        jnp.zeros(num_rows, jnp.int32)
        .at[row]
        .set(jnp.arange(num_slots, dtype=jnp.int32), mode="drop")
    )
    placed = inputs[slot].reshape(*shape, -1)
    if tiles is None:
        states = _padded(weights, placed)
    else:
        states = _tiled(weights, placed, tiles)
    return states.reshape(num_rows, -1)[jnp.minimum(row, num_rows - 1)]


def scan_gru(weights: jax.Array, inputs: jax.Array) -> jax.Array:
    """The hidden states of B sequences of S steps, each from zero.

    Args:
      weights: `[H, 3 H]`, see `gru_cell`.
      inputs: `[S, B, 3 H]`, what each step's input gives to the gates.

    Returns:
      `[S, B, H]`.
    """

    def step(hidden: jax.Array, inputs: jax.Array):
        hidden = gru_cell(weights, hidden, inputs)
        return hidden, hidden

    start = jnp.zeros((inputs.shape[1], len(weights)), inputs.dtype)
    return jax.lax.scan(step, start, inputs, unroll=_unroll())[1]


def _unroll() -> int:
    return 1 if jax.default_backend() == "cpu" else _UNROLL


def _tiles(stream: Packed, max_length: int, tile_rows: int, num_tiles: int) -> Tiles:
    # What the stream holds of each sequence: it may have been cut at its end.
    begins = jnp.cumsum(stream.lengths) - stream.lengths
    room = jnp.clip(len(stream.offset) - begins, 0, max_length)
    lengths = jnp.minimum(stream.lengths, room)
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
def _tiled(weights: jax.Array, inputs: jax.Array, tiles: Tiles) -> jax.Array:
    """Inputs `[K, R, 3 H]` to states `[K, R, H]`, tile after tile."""

    def step(tile: jax.Array, states: jax.Array) -> jax.Array:
        # The tile past the end stays zero: the state before the first step.
        new = gru_cell(weights, states[tiles.previous[tile]], inputs[tile])
        return states.at[tile].set(new, mode=_INSIDE)

    num_tiles, tile_rows, _ = inputs.shape
    start = jnp.zeros((num_tiles + 1, tile_rows, weights.shape[0]), inputs.dtype)
    return jax.lax.fori_loop(0, tiles.count, step, start)[:-1]


def _tiled_forward(weights: jax.Array, inputs: jax.Array, tiles: Tiles):
    states = _tiled(weights, inputs, tiles)
    return states, (weights, inputs, tiles, states)


def _tiled_backward(kept: tuple, gradient: jax.Array):
    # JAX does not differentiate loops of unknown length, so the tiles are retraced by hand;
    # the gradient of a tile's state is complete once all tiles after it are done. What needs
    # no order, the gates and the weights' gradient, is one product for all tiles.
    weights, inputs, tiles, states = kept
    zero = jnp.zeros_like(states[:1])
    before = jnp.concatenate([states, zero])[tiles.previous]
    gates = before @ weights

    def step(i: jax.Array, carry: tuple):
        state_grads, gate_grads, input_grads = carry
        tile = tiles.count - 1 - i
        _, pull_back = jax.vjp(_gated, gates[tile], before[tile], inputs[tile])
        to_gates, to_before, to_inputs = pull_back(state_grads[tile])
        to_before += to_gates @ weights.T
        return (
            state_grads.at[tiles.previous[tile]].add(to_before, mode=_INSIDE),
            gate_grads.at[tile].set(to_gates, mode=_INSIDE),
            input_grads.at[tile].set(to_inputs, mode=_INSIDE),
        )

    start = (
        jnp.concatenate([gradient, zero]),
        jnp.zeros_like(inputs),
        jnp.zeros_like(inputs),
    )
    _, gate_grads, to_inputs = jax.lax.fori_loop(0, tiles.count, step, start)
    to_weights = jnp.einsum("krh,krg->hg", before, gate_grads)
    return to_weights.astype(weights.dtype), to_inputs, None


_tiled.defvjp(_tiled_forward, _tiled_backward)


_padded = jax.custom_vjp(scan_gru)


def _padded_forward(weights: jax.Array, inputs: jax.Array):
    states = scan_gru(weights, inputs)
    return states, (weights, inputs, states)


def _padded_backward(kept: tuple, gradient: jax.Array):
    # As above: the loop has only what needs an order.
    weights, inputs, states = kept
    before = jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])

    def step(later: jax.Array, slot: tuple):
        gates, before, inputs, gradient = slot
        _, pull_back = jax.vjp(_gated, gates, before, inputs)
        to_gates, to_before, to_inputs = pull_back(gradient + later)
        return to_before + to_gates @ weights.T, (to_gates, to_inputs)

    slots = before @ weights, before, inputs, gradient
    start = jnp.zeros_like(states[0])
    _, (to_gates, to_inputs) = jax.lax.scan(step, start, slots, reverse=True, unroll=_unroll())
    to_weights = jnp.einsum("sbh,sbg->hg", before, to_gates)
    return to_weights.astype(weights.dtype), to_inputs


_padded.defvjp(_padded_forward, _padded_backward)
