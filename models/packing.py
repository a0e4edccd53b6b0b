"""Sequences of different lengths laid end to end, so that no padded slot is computed.

A padded batch `[B, S]` of short sequences is mostly padding (88 % on Amazon Beauty with
S = 50). `pack` lays the same sequences in one stream of T slots instead; `Packed` says where
each slot would stand in the padded batch, which is all that a model needs to give the same
result.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Packed(NamedTuple):
    """A stream of T slots that holds B sequences one after the other."""

    index: jax.Array  # int32 [T], where the slot's item stands in the ragged values
    segment: jax.Array  # int32 [T], which of the B sequences; B for an unused slot
    offset: jax.Array  # int32 [T], place in the sequence, 0 the oldest
    lengths: jax.Array  # int32 [B]

    @property
    def used(self) -> jax.Array:
        """Whether a slot holds an item, bool `[T]`."""
        return self.segment < self.lengths.shape[0]

    @property
    def last(self) -> jax.Array:
        """The slot of each sequence's newest item, int32 `[B]`; of an empty one, which has
        none, that of the sequence before it, or 0."""
        return jnp.maximum(jnp.cumsum(self.lengths) - 1, 0)

    def num_padding(self, max_length: int) -> jax.Array:
        """Padding slots left of the slot's sequence in a padded batch, int32 `[T]`."""
        lengths = jnp.append(self.lengths, 0)  # unused slots
        return max_length - lengths[self.segment]


def pack(starts: ArrayLike, lengths: ArrayLike, num_slots: int) -> Packed:
    """Packs the sequences `values[starts[b] : starts[b] + lengths[b]]` into one stream.

    Args:
      starts: int `[B]`, where each sequence begins in the ragged values.
      lengths: int `[B]`; a length of 0 takes no slot.
      num_slots: T, the static size of the stream. The caller must choose it at least as large
        as the sum of the lengths: what does not fit is cut off, and cannot be reported from
        inside compiled code.
    """
    starts, lengths = jnp.asarray(starts), jnp.asarray(lengths)
    if starts.shape != lengths.shape or starts.ndim != 1:
        raise ValueError(
            f"`starts` and `lengths` must have one shape [B], got {starts.shape} and "
            f"{lengths.shape}."
        )
    for name, array in (("starts", starts), ("lengths", lengths)):
        if len(array) and not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"`{name}` must be integers, got {array.dtype}.")
    starts, lengths = starts.astype(jnp.int32), lengths.astype(jnp.int32)
    ends = jnp.cumsum(lengths)
    # Slot t belongs to the first sequence that ends after it: count the ends at or before t.
    ended = jnp.zeros(num_slots, jnp.int32).at[ends].add(1, mode="drop")
    segment = jnp.cumsum(ended)
    begins = jnp.append(ends - lengths, 0)
    offset = jnp.where(
        segment < lengths.shape[0], jnp.arange(num_slots) - begins[segment], 0
    ).astype(jnp.int32)
    return Packed(jnp.append(starts, 0)[segment] + offset, segment, offset, lengths)
