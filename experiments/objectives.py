"""What a step of training draws and minimises, and what a model is asked when it ranks.

An objective joins a kind of model to the one training loop (`training.Trainer`): it shuffles an
epoch, draws a batch, gives its loss, and scores the catalogue for histories.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp

from experiments import batching
from experiments.batching import Batch, TrainData
from experiments.config import Loss
from experiments.ranking import Histories
from models import BERT4Rec, losses
from models.layers import check_sizes
from models.packing import Packed
from models.scoring import SequenceModel


class Objective(Protocol):
    """The part of training that depends on the kind of model."""

    num_queries: int
    """Slots that ranking adds to a history; it then has room for so many items fewer."""

    def check(self, data: TrainData) -> None:
        """Refuses data that it cannot draw from; asked once, outside compiled code."""
        ...

    def order(self, key: jax.Array, data: TrainData, batch_size: int) -> jax.Array:
        """An epoch's windows, int32 `[steps, batch_size]`; `num_windows` where one is free."""
        ...

    def sample(
        self, key: jax.Array, data: TrainData, windows: jax.Array, num_slots: int
    ) -> Any:
        """A batch of `windows` `[batch_size]`, at most `num_slots` slots long."""
        ...

    def loss(self, module: Any, batch: Any, dropout_key: jax.Array, context: Any) -> jax.Array:
        """The batch's loss `[]`; `context` is the trainer's."""
        ...

    def rows(self, batch: Any) -> jax.Array:
        """Table rows of the batch's sequences, int32 `[n]`, with repeats and those of free
        slots; drawn negatives are not among them."""
        ...

    def scorer(
        self, module: Any, num_slots: int, context: Any
    ) -> Callable[[Histories], jax.Array]:
        """A function from the histories of C users to scores `[C, num_items]`."""
        ...


@dataclass(frozen=True)
class NextItem:
    """Each slot of a sequence predicts the next item, against drawn negatives or all items.

    Args:
      kind: `"bce"`, `"bpr"` and `"gbce"` draw `num_negatives` items for each target;
        `"sampled_softmax"` draws as many once for the whole batch; `"cross_entropy"` takes the
        whole catalogue.
      num_items: of the catalogue.
      num_negatives: n.
      label_smoothing: of `"cross_entropy"`.
      gbce_t: the calibration t of `"gbce"`, 0 for plain BCE and 1 for a calibrated one.
      pvn_weight: of STOSA's second term, which is added to `"bce"` and `"bpr"`: the mean of
        relu(score of positive and negative item - score of the positive).
      workers: of an epoch's order, see `batching.in_batches`.
    """

    kind: str
    num_items: int
    num_negatives: int = 1
    label_smoothing: float = 0.0
    gbce_t: float = 0.75
    pvn_weight: float = 0.0
    workers: int = 1
    num_queries = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Loss):
            raise ValueError(f"`kind` must be one of {get_args(Loss)}, got {self.kind!r}.")
        if self.pvn_weight and self.kind not in losses.LOSSES:
            raise ValueError(
                f"`pvn_weight` is for {' and '.join(losses.LOSSES)}, got it for {self.kind!r}."
            )
        check_sizes(
            num_items=self.num_items, num_negatives=self.num_negatives, workers=self.workers
        )

    @property
    def draws_for_each(self) -> bool:
        """Whether each target has negatives of its own."""
        return self.kind in ("bce", "bpr", "gbce")

    def check(self, data: TrainData) -> None:
        if self.draws_for_each:
            batching.check_negatives(data)

    def order(self, key: jax.Array, data: TrainData, batch_size: int) -> jax.Array:
        return batching.epoch_order(key, data, batch_size, self.workers)

    def sample(
        self, key: jax.Array, data: TrainData, windows: jax.Array, num_slots: int
    ) -> Batch:
        if self.draws_for_each:
            return batching.sample_batch(key, data, windows, num_slots, self.num_negatives)
        batch = batching.sample_batch(key, data, windows, num_slots, 0)
        if self.kind == "cross_entropy":
            return batch
        shared = jax.random.randint(key, (self.num_negatives,), 1, data.num_items + 1)
        return batch._replace(negatives=shared)

    def loss(
        self, module: SequenceModel, batch: Batch, dropout_key: jax.Array, context: Any = None
    ) -> jax.Array:
        del context
        return self.against(module, batch, *self.forward(module, batch, dropout_key))

    def forward(
        self, module: SequenceModel, batch: Batch, dropout_key: jax.Array | None
    ) -> tuple[Any, Any]:
        """The slots' states, and their items `[1 + n, T, ...]`: targets, then what was drawn
        for each."""
        rows = jnp.stack([batch.inputs, batch.targets])
        if self.draws_for_each:
            rows = jnp.concatenate([rows, batch.negatives.T])
        # One gather, and so one scatter in its gradient, for all uses of the table.
        embedded = module.embed(rows)
        inputs = jax.tree.map(operator.itemgetter(0), embedded)
        states = module.packed(inputs, batch.stream, dropout_key=dropout_key)
        return states, jax.tree.map(operator.itemgetter(slice(1, None)), embedded)

    def against(
        self, module: SequenceModel, batch: Batch, states: Any, items: Any
    ) -> jax.Array:
        """The loss `[]` of what `forward` gave."""
        targets = jax.tree.map(operator.itemgetter(0), items)
        positive, weights = module.score(states, targets), batch.weights
        if self.kind == "cross_entropy":
            return losses.cross_entropy(
                module.score_all,
                states,
                module.items(),
                positive,
                weights,
                label_smoothing=self.label_smoothing,
            )
        if self.kind == "sampled_softmax":
            negative = module.score_all(states, module.items(batch.negatives))
            hit = batch.targets[:, None] == batch.negatives
            return losses.sampled_softmax(
                positive, negative, weights, num_items=self.num_items, hits=hit
            )
        drawn = jax.tree.map(operator.itemgetter(slice(1, None)), items)
        negative = module.score(states, drawn).T
        if self.kind == "gbce":
            return losses.gbce(
                positive, negative, weights, num_items=self.num_items, t=self.gbce_t
            )
        total = losses.LOSSES[self.kind](positive, negative, weights)
        if self.pvn_weight:
            pair: Any = module
            between = pair.item_score(targets, drawn).T - positive[:, None]
            total += self.pvn_weight * losses.weighted_mean(
                jax.nn.relu(between).mean(axis=1), weights
            )
        return total

    def rows(self, batch: Batch) -> jax.Array:
        return jnp.concatenate([batch.inputs, batch.targets])

    def scorer(
        self, module: SequenceModel, num_slots: int, context: Any = None
    ) -> Callable[[Histories], jax.Array]:
        del context
        items = module.items()

        def scores_of(histories: Histories) -> jax.Array:
            stream, rows = histories.pack(num_slots, module.num_special)
            states = module.packed(module.embed(rows), stream)
            # Without a history there is no newest item, and another user's is none of theirs.
            known = (histories.lengths > 0)[:, None]
            newest = jax.tree.map(lambda x: jnp.where(known, x[stream.last], 0), states)
            return module.score_all(newest, items)

        return scores_of


class MaskedBatch(NamedTuple):
    """A packed stream in which some items are hidden."""

    stream: Packed
    inputs: jax.Array  # int32 [T], table rows
    slots: jax.Array  # int32 [M], where the hidden items stand
    targets: jax.Array  # int32 [M], their table rows
    weights: jax.Array  # float32 [M]


@dataclass(frozen=True)
class MaskedItem:
    """Hidden items of a sequence are predicted from both sides, by soft-max (BERT4Rec).

    The soft-max runs over all rows of the output table, padding and mask among them, as in the
    official code.

    Args:
      mask_prob: each item is hidden with this probability.
      workers: of an epoch's order, see `batching.in_batches`.
    """

    mask_prob: float
    workers: int = 1
    num_queries = 1
    MASK = 1  # its table row

    def __post_init__(self) -> None:
        if not 0 < self.mask_prob <= 1:
            raise ValueError(f"`mask_prob` must be in (0, 1], got {self.mask_prob}.")
        check_sizes(workers=self.workers)

    def check(self, data: TrainData) -> None:
        del data  # it draws no negatives

    def order(self, key: jax.Array, data: TrainData, batch_size: int) -> jax.Array:
        return batching.epoch_order(key, data, batch_size, self.workers)

    def sample(
        self, key: jax.Array, data: TrainData, windows: jax.Array, num_slots: int
    ) -> MaskedBatch:
        num_special = BERT4Rec.num_special
        stream, rows = batching.sample_items(data, windows, num_slots, num_special)
        hidden = stream.used & jax.random.bernoulli(key, self.mask_prob, (num_slots,))
        # Only hidden slots meet the output table. There is room for eight standard deviations
        # more of them than are expected: that many are not hidden in 10^15 batches.
        spread = (num_slots * self.mask_prob * (1 - self.mask_prob)) ** 0.5
        room = min(num_slots, int(num_slots * self.mask_prob + 8 * spread) + 1)
        (slots,) = jnp.nonzero(hidden, size=room, fill_value=num_slots)
        weights = (slots < num_slots).astype(jnp.float32)
        slots = jnp.minimum(slots, num_slots - 1)
        inputs = jnp.where(hidden, self.MASK, rows)
        return MaskedBatch(stream, inputs, slots, rows[slots], weights)

    def loss(
        self, module: Any, batch: MaskedBatch, dropout_key: jax.Array, context: Any = None
    ) -> jax.Array:
        del context
        states = module.packed(
            module.embed(batch.inputs), batch.stream, dropout_key=dropout_key
        )[batch.slots]
        positive = module.score(states, module.items(batch.targets))
        return losses.cross_entropy(
            module.score_all, states, module.all_rows(), positive, batch.weights
        )

    def rows(self, batch: MaskedBatch) -> jax.Array:
        return jnp.concatenate([batch.inputs, batch.targets])

    def scorer(
        self, module: Any, num_slots: int, context: Any = None
    ) -> Callable[[Histories], jax.Array]:
        del context
        items = module.items()

        def scores_of(histories: Histories) -> jax.Array:
            # The newest items and a mask after them; what the mask hides is the answer.
            longer = histories._replace(lengths=histories.lengths + 1)
            stream, rows = longer.pack(num_slots + len(longer.lengths), module.num_special)
            rows = rows.at[stream.last].set(self.MASK)
            states = module.packed(module.embed(rows), stream)[stream.last]
            return module.score_all(states, items)

        return scores_of


class Pairs(NamedTuple):
    """A positive and a negative for each of B users."""

    users: jax.Array  # int32 [B]
    positives: jax.Array  # int32 [B], table rows
    negatives: jax.Array  # int32 [B], table rows
    weights: jax.Array  # float32 [B]


@dataclass(frozen=True)
class UserItem:
    """Users drawn with replacement, a positive and a negative for each (MF-BPR, LightGCN).

    An epoch has as many draws as there are training interactions. A model that propagates over
    the user-item graph gets it as the trainer's `context`.

    Args:
      workers: of an epoch's order, see `batching.in_batches`.
      l2: this times half the squared length of a pair's three rows is added to its loss. Of a
        model that propagates, they are those of its tables.
    """

    workers: int = 1
    l2: float = 0.0
    num_queries = 0

    def check(self, data: TrainData) -> None:
        batching.check_negatives(data)

    def order(self, key: jax.Array, data: TrainData, batch_size: int) -> jax.Array:
        def drawn(key: jax.Array) -> jax.Array:
            return jax.random.randint(key, data.values.shape, 0, data.num_windows, jnp.int32)

        return batching.in_batches(drawn, key, batch_size, self.workers, data.num_windows)

    def sample(
        self, key: jax.Array, data: TrainData, windows: jax.Array, num_slots: int
    ) -> Pairs:
        del num_slots
        return Pairs(*batching.draw_pairs(key, data, windows))

    def loss(
        self, module: Any, batch: Pairs, dropout_key: jax.Array, context: Any
    ) -> jax.Array:
        del dropout_key
        rows = jnp.stack([batch.positives, batch.negatives])
        tables = module.users(batch.users), module.items(rows)
        states, items = tables
        if context is not None:
            all_users, all_items = module.propagate(context)
            states, items = all_users[batch.users], all_items[rows]
        positive, negative = module.score(states, items)
        loss = losses.bpr(positive, negative[:, None], batch.weights)
        if self.l2:
            users, pairs = tables
            squares = (users**2).sum(-1) + (pairs**2).sum((0, -1))
            loss += self.l2 / 2 * losses.weighted_mean(squares, batch.weights)
        return loss

    def rows(self, batch: Pairs) -> jax.Array:
        # Free places hold a pair, too; no table has this row.
        return jnp.where(batch.weights > 0, batch.positives, jnp.iinfo(jnp.int32).max)

    def scorer(
        self, module: Any, num_slots: int, context: Any
    ) -> Callable[[Histories], jax.Array]:
        del num_slots
        if context is None:
            users, items = module.users, module.items()
        else:
            all_users, items = module.propagate(context)
            users = all_users.__getitem__
        return lambda histories: module.score_all(users(histories.users), items)
