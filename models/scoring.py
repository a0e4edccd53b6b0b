"""What the training loop asks of a backbone, whatever its architecture.

Table row r holds item r - P, where the P rows in front (`num_special`) are padding and, in
BERT4Rec, the mask. *Items* here means whatever of an item enters its score: a row of the
embedding table, or a tuple of such rows; `states` likewise. Both are pytrees of arrays, and a
leaf of n items has the shape `[n, ...]`.
"""

from typing import Any, Protocol

import jax

from models.packing import Packed

Items = Any
States = Any


class Scorer(Protocol):
    """Scores items for states."""

    def items(self, rows: jax.Array | None = None) -> Items:
        """Table rows `[...]` as items with leaves `[..., d]`; by default the whole catalogue,
        `[num_items, d]`, without the special rows."""
        ...

    def score(self, states: States, items: Items) -> jax.Array:
        """One score for each pair; leaves `[..., d]` that broadcast, to `[...]`."""
        ...

    def score_all(self, states: States, items: Items) -> jax.Array:
        """Every state `[T, d]` with every item `[n, d]`, `[T, n]`."""
        ...


class SequenceModel(Scorer, Protocol):
    """A backbone that turns a packed stream of sequences into states."""

    num_special: int
    """P, the rows of the item table in front of the items."""

    def embed(self, rows: jax.Array) -> Any:
        """The input embeddings of table rows `[...]`, leaves `[..., d]`."""
        ...

    def packed(
        self, embedded: Any, stream: Packed, *, dropout_key: jax.Array | None = None
    ) -> States:
        """Embedded slots `[T, d]` of a stream to states `[T, d]`."""
        ...


class DotProduct:
    """Items are rows of the model's `item_embedding`; a score is a dot product.

    With a `cosine_scale` of more than 0 it is that times the cosine of state and item instead
    (Wang et al., `NormFace <https://arxiv.org/abs/1704.06369>`_, 2017; the reciprocal is often
    called a temperature). The length of a row, which grows with the item's popularity, then
    has no part in the score.
    """

    item_embedding: Any
    num_special = 1
    cosine_scale = 0.0

    def embed(self, rows: jax.Array) -> jax.Array:
        return self.item_embedding(rows)

    def items(self, rows: jax.Array | None = None) -> jax.Array:
        if rows is None:
            return self.item_embedding.embedding[self.num_special :]
        return self.item_embedding(rows)

    def score(self, states: jax.Array, items: jax.Array) -> jax.Array:
        states, items = self._scored(states, items)
        return (states * items).sum(axis=-1)

    def score_all(self, states: jax.Array, items: jax.Array) -> jax.Array:
        states, items = self._scored(states, items)
        return states @ items.T

    def _scored(self, states: jax.Array, items: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is multiplied."""
        if not self.cosine_scale:
            return states, items
        return self.cosine_scale * _unit(states), _unit(items)


def _unit(x: jax.Array) -> jax.Array:
    """Rows of length one; a row of zeros stays, with a finite gradient. The term in the root is
    small beside a new row's squared length, 1e-2 for ten thousand items and 1e-5 for ten
    million."""
    return x * jax.lax.rsqrt((x**2).sum(axis=-1, keepdims=True) + 1e-8)
