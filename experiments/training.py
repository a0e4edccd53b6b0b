"""The training step, the epoch and the state, compiled once for any backbone and optimizer."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.averaging import averages
from experiments.batching import TrainData, most_slots
from experiments.objectives import Objective
from experiments.ranking import RankingData, rank_targets
from sevo_jax import eval_params

Params = dict[str, Any]


class TrainState(NamedTuple):
    """All that training needs to go on; every leaf has a leading axis of S seeds."""

    params: Params
    opt_state: optax.OptState
    key: jax.Array  # [S], the seed's key; an epoch's randomness is folded from it
    best_params: Params  # what validation saw when it was best

    @property
    def evaluated(self) -> Params:
        """What validation and test see: the parameters, or their mean where one is kept, and
        without what psi takes from them later."""
        return averages(self.opt_state, eval_params(self.opt_state, self.params))


class Trainer:
    """Compiled functions over the seeds of one model, optimizer and data set.

    Modules are split once; inside the loss they are merged with the parameters, a plain
    nested dict, so that only JAX's own transformations run in the loop.

    Args:
      build: makes the module from `nnx.Rngs`.
      optimizer: any Optax transformation; `update` gets the adjacency as `graph`.
      objective: what a step draws and minimises.
      graph: an adjacency prepared by `sevo_jax.normalized_adjacency`, passed to the compiled
        epoch as data, or `None`.
      data: from `training_data`; the objective's `check` must have passed.
      batch_size: windows in a batch.
      context: arrays that the objective needs beside the parameters, such as the graph that a
        model propagates over; passed to the compiled epoch as data.
      touched: tell the optimizer that the rows of the batch's items are `touched`, in place of
        those with a gradient; see `sevo_jax.scale_by_corrected_adam`.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], Any],
        optimizer: optax.GradientTransformation,
        objective: Objective,
        graph: Any,
        data: TrainData,
        batch_size: int,
        context: Any = None,
        touched: bool = False,
    ):
        self.build = build
        self.graphdef = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))[0]
        self.optimizer = optax.with_extra_args_support(optimizer)
        self.objective = objective
        self.graph = graph
        self.data = data
        self.batch_size = batch_size
        self.context = context
        self.touched = touched
        order = jax.eval_shape(lambda: objective.order(jax.random.key(0), data, batch_size))
        self.num_steps = order.shape[0]  # of an epoch
        self.windows_per_stream = order.shape[-1]
        seeds = over_seeds()
        self.init = jax.jit(seeds(self._init))
        self._most_slots = jax.jit(
            lambda keys, data: seeds(
                lambda key: most_slots(objective.order(key, data, batch_size), data)
            )(keys)
        )
        self._epoch_jit = jax.jit(
            lambda trained, keys, data, graph, context, num_slots: seeds(
                lambda seed: self._epoch(seed, data, graph, context, num_slots)
            )((trained, keys)),
            static_argnums=5,
            donate_argnums=0,
        )
        self._rank_jit = jax.jit(
            lambda params, data, context, num_slots: seeds(
                lambda seed: self._rank(seed, data, context, num_slots)
            )(params),
            static_argnums=3,
        )

    @functools.cached_property
    def usual_slots(self) -> int:
        """Slots that are enough for all but the longest of thousands of streams."""
        lengths = np.asarray(self.data.lengths)
        spread = 4.5 * math.sqrt(self.windows_per_stream) * lengths.std()
        most = self.windows_per_stream * int(lengths.max())
        return min(int(self.windows_per_stream * lengths.mean() + spread), most)

    def _init(self, key: jax.Array) -> TrainState:
        init_key, train_key = jax.random.split(key)
        module = self.build(nnx.Rngs(init_key))
        params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        return TrainState(params, self.optimizer.init(params), train_key, params)

    def epoch(self, state: TrainState, number: int) -> tuple[TrainState, jax.Array]:
        """Trains epoch `number` (from 1); returns the state and the mean loss, `[S]`.

        The new state takes the memory of the one that is given, which is used up but for its
        `best_params`. The randomness depends on the seed and the number alone, so an epoch
        that was interrupted can be run again from what was saved.
        """
        order_keys, step_keys = _epoch_keys(state.key, number)
        # Batches differ in length. As there is room for nearly all, epochs share one compiled
        # program; one that needs more slots gets more, and only in such a rare epoch do a
        # seed's draws depend on the seeds beside it.
        slots = max(self.usual_slots, int(self._most_slots(order_keys, self.data).max()))
        num_slots = round_up(slots, 128)
        params, opt_state, losses = self._epoch_jit(
            (state.params, state.opt_state),
            (order_keys, step_keys),
            self.data,
            self.graph,
            self.context,
            num_slots,
        )
        return state._replace(params=params, opt_state=opt_state), losses

    def _epoch(self, seed, data: TrainData, graph: Any, context: Any, num_slots: int):
        trained, (order_key, step_key) = seed
        order = self.objective.order(order_key, data, self.batch_size)

        def step(carry, inputs):
            params, opt_state = carry
            windows, key = inputs
            batch_key, dropout_key = jax.random.split(key)
            batch = self.objective.sample(batch_key, data, windows, num_slots)
            loss, grads = jax.value_and_grad(self._loss)(params, batch, dropout_key, context)
            extra = {"graph": graph}
            if self.touched:
                none = jnp.zeros(graph.num_nodes, bool)
                extra["touched"] = none.at[self.objective.rows(batch)].set(True)
            updates, opt_state = self.optimizer.update(grads, opt_state, params, **extra)
            params = optax.apply_updates(params, updates)
            num_windows = (windows < data.num_windows).sum()
            return (params, opt_state), (loss, num_windows)

        step_keys = jax.random.split(step_key, len(order))
        (params, opt_state), (losses, counts) = jax.lax.scan(step, trained, (order, step_keys))
        return params, opt_state, (losses * counts).sum() / counts.sum()

    def _loss(self, params, batch, dropout_key, context):
        return self.objective.loss(self.module(params), batch, dropout_key, context)

    def module(self, params: Params) -> Any:
        """The module with the parameters of one seed."""
        return nnx.merge(self.graphdef, params)

    def keep_best(self, state: TrainState, improved: jax.typing.ArrayLike) -> TrainState:
        """Takes what validation saw as the best so far for the seeds where `improved` `[S]`."""
        return state._replace(
            best_params=_where_seed(jnp.asarray(improved), state.evaluated, state.best_params)
        )

    def rank(self, params: Params, data: RankingData, num_slots: int):
        """`(above, ties)` `[S, chunks, C]` of the targets; see `ranking.rank_targets`."""
        return self._rank_jit(params, data, self.context, num_slots)

    def _rank(self, params, data, context, num_slots):
        scorer = self.objective.scorer(self.module(params), num_slots, context)
        return rank_targets(scorer, data)


@jax.jit  # each time anew, tracing would take longer than a short epoch
def _epoch_keys(keys: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Keys of an epoch's order and of its steps, `[S]` each."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    order, steps = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return order, steps


@jax.jit
def _where_seed(condition: jax.Array, new: Params, old: Params) -> Params:
    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)


def over_seeds() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How a function of one seed becomes a function of S, by the backend.

    An accelerator trains several seeds at once, as a batch (`vmap`), which computes both
    branches of every `cond`. On a CPU one seed alone keeps the cores busy, and batched
    products, gathers and scatters run slower than plain ones: one, two and four seeds took 1.5,
    1.7 and 1.2 times as long as one after the other (`lax.map`).
    """
    in_turn = jax.default_backend() == "cpu"

    def over(function: Callable[..., Any]) -> Callable[..., Any]:
        def of_all(seeded: Any) -> Any:
            if in_turn or len(jax.tree.leaves(seeded)[0]) == 1:
                return jax.lax.map(function, seeded)
            return jax.vmap(function)(seeded)

        return of_all

    return over


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
