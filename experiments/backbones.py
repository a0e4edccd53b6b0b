"""The models, objectives and optimizers that a `Config` names: one entry a backbone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import models
from experiments.averaging import averaged
from experiments.batching import TrainData
from experiments.config import ARGUMENTS, Config
from experiments.dataset import Split, distinct_pairs
from experiments.objectives import MaskedItem, NextItem, Objective, UserItem
from models.distillation import Groups
from sevo_jax import (
    attribute_graph,
    bipartite_graph,
    item_graph,
    normalized_adjacency,
    sevo,
    sevo_adam,
    sevo_adamw,
    sevo_sgd,
)
from sevo_jax.layouts import Adjacency
from sevo_jax.smoothing import coefficients_of
from sevo_jax.tables import table_mask

TABLE = "item_embedding"
WIDER = 10  # how many times a teacher's width is its student's


@dataclass(frozen=True)
class Backbone:
    """What the one training loop needs to know of a model.

    Args:
      module: the class, from `models`.
      objective: how it trains and ranks, from the number of items and the settings.
      knows_users: the class also takes the number of users.
      tables: the pattern of the tables that SEvo smooths, see `sevo_jax.sevo`.
      vectors: the one of them whose rows stand for the items, where something looks at it.
    """

    module: Any
    objective: Callable[[int, Config], Objective]
    knows_users: bool = False
    tables: str = TABLE
    vectors: str = TABLE

    def build(self, num_users: int, num_items: int, config: Config, rngs: nnx.Rngs) -> Any:
        sizes = (num_items, num_users) if self.knows_users else (num_items,)
        arguments = ARGUMENTS[config.model].items()
        settings = {name: getattr(config, field) for name, field in arguments}
        module = self.module(*sizes, **settings, rngs=rngs)
        if config.distil == "htd":
            module.groups = Groups(config.dim, WIDER * config.dim, rngs=rngs)
        return module


def _next_item(num_items: int, config: Config) -> NextItem:
    return NextItem(
        config.loss,
        num_items,
        num_negatives=config.num_negatives,
        label_smoothing=config.label_smoothing,
        gbce_t=config.gbce_t,
        # A preset may have it beside a loss that has no place for it.
        pvn_weight=0.0 if "pvn_weight" in config.without_effect() else config.pvn_weight,
        workers=config.loader_workers,
    )


BACKBONES: dict[str, Backbone] = {
    "sasrec": Backbone(models.SASRec, _next_item),
    "gru4rec": Backbone(models.GRU4Rec, _next_item),
    "bert4rec": Backbone(
        models.BERT4Rec,
        lambda _, config: MaskedItem(config.mask_prob, config.loader_workers),
        tables="(item|output)_embedding",
    ),
    "stosa": Backbone(
        models.STOSA,
        _next_item,
        tables="item_(mean|covariance)",
        vectors="item_mean",
    ),
    "bsarec": Backbone(models.BSARec, _next_item),
    "mf": Backbone(
        models.MF,
        lambda _, config: UserItem(config.loader_workers, config.pair_l2),
        knows_users=True,
    ),
    "lightgcn": Backbone(
        models.LightGCN,
        lambda _, config: UserItem(config.loader_workers, config.pair_l2),
        knows_users=True,
    ),
}


def make_graph(config: Config, split: Split) -> Any:
    """The graph that SEvo smooths over, one node for each row of the table.

    Of `attributes`, two items are joined by the number of those that they share, the plainest
    reading of the paper's "movies of the same genre". On MovieLens-1M that is a third of all
    pairs, and yet no genre is left out: without Drama and Comedy, which have over 1,000 movies
    each, 1,242 of the 3,416 movies would have no neighbour. The normalisation takes care that
    a movie of a common genre hears as much from its many neighbours as others from their few.
    """
    values, row_splits = split.train
    num_items = split.dataset.num_items
    if config.graph == "users_items":
        return user_item_graph(split)
    # Special rows in front of the items are isolated nodes.
    num_special = BACKBONES[config.model].module.num_special
    if config.graph == "attributes":
        attributes = split.dataset.known_attributes()
        rows = np.concatenate([np.zeros(num_special, np.int64), attributes.row_splits])
        graph = attribute_graph((attributes.values, rows), max_items=config.graph_max_items)
    else:
        graph = item_graph(
            (values + num_special, row_splits),
            num_items + num_special,
            window=config.graph_window,
            max_distance=config.graph_distance,
            weighting=config.graph_weighting,
            keep=config.graph_keep,
        )
    if int(np.sum(graph.n_edge)) == 0:
        raise ValueError(
            f"the graph of {config.graph!r} has no edge to smooth over; see `graph_window`, "
            "`graph_distance` and `graph_max_items`."
        )
    return graph


def prepare(graph: Any) -> Any:
    """The normalised adjacency; an adjacency that is prepared already is returned as it is.

    A graph with more than a fifth of all pairs, as attributes make, becomes a plain matrix: it
    needs about the memory of a list of edges, and with a third of the pairs of MovieLens-1M
    psi takes less than half the time of compressed rows, measured on one core.
    """
    full = not isinstance(graph, Adjacency) and 5 * len(graph.edges) > np.sum(graph.n_node) ** 2
    return normalized_adjacency(graph, layout="dense" if full else "auto")


def user_item_graph(split: Split) -> Any:
    """Users first, then items; each distinct training pair is an edge of weight 1."""
    users, items = distinct_pairs(*split.train)
    return bipartite_graph(users, items, split.dataset.num_users, split.dataset.num_items)


def windows_per_step(config: Config, data: TrainData) -> int:
    """How many windows make a step of `config.batch_size` samples."""
    if config.windows != "whole":
        return config.batch_size
    return max(1, round(config.batch_size * data.num_windows / int(data.num_targets)))


# Settings of the optimizer that a sweep may vary within one compiled program.
SWEPT = (
    "learning_rate",
    "weight_decay",
    "beta",
    "num_layers",
    "rescale",
    "correct_moments",
    "residual_decay",
)


def fixed(config: Config) -> dict[str, Any]:
    """What all runs of one compiled program share, of the settings of `SWEPT` too."""
    settings = {name: value for name, value in asdict(config).items() if name not in SWEPT}
    settings["has a residual"] = config.residual_decay > 0
    # The exact inverse and a schedule of beta have no coefficients, and all runs start alike.
    if config.method == "exact" or config.placement == "switch" or config.smooth_start:
        settings["number of layers"] = config.num_layers
    return settings


def make_optimizer(
    config: Config,
    graph: Any,
    swept: Mapping[str, Sequence[float]] | None = None,
    steps_per_epoch: int = 1,
) -> optax.GradientTransformation:
    """The optimizer that `config` names, with `graph` to smooth the item table over.

    Args:
      config: settings.
      graph: a prepared adjacency, or `None` for a plain optimizer.
      swept: by name of `SWEPT`, the values of all runs. These settings become entries of the
        state's `hyperparams`, as `optax.inject_hyperparams` makes them, so that each run can
        have its own.
      steps_per_epoch: tells the placement `"switch"` and the schedule when to.
    """
    swept = swept or {}
    if unknown := set(swept) - set(SWEPT):
        raise ValueError(f"`swept` may name {SWEPT}, got {sorted(unknown)}.")
    if not swept:
        values = {name: getattr(config, name) for name in SWEPT}
        return _optimizer(config, graph, steps_per_epoch, **values)
    if "num_layers" in swept:  # the polynomial of every run is as long as the longest
        config = replace(config, num_layers=max(swept["num_layers"]))

    def build(
        learning_rate,
        weight_decay,
        beta,
        num_layers,
        rescale,
        correct_moments,
        residual_decay,
    ):
        traced = learning_rate, weight_decay, beta, num_layers, rescale, correct_moments
        return _optimizer(config, graph, steps_per_epoch, *traced, residual_decay)

    injected = optax.inject_hyperparams(
        build, static_args=set(SWEPT) - set(swept), hyperparam_dtype=jnp.float32
    )
    # Optax injects numbers, of which it holds True and False to be none.
    values = {name: getattr(config, name) for name in SWEPT}
    return injected(**{k: float(v) if k in swept else v for k, v in values.items()})


def _optimizer(config: Config, *args: Any, **kwargs: Any) -> optax.GradientTransformation:
    steps = _steps(config, *args, **kwargs)
    return optax.chain(steps, averaged(config.average_decay)) if config.average_decay else steps


def _steps(
    config: Config,
    graph: Any,
    steps_per_epoch: int,
    learning_rate: Any,
    weight_decay: Any,
    beta: Any,
    num_layers: Any,
    rescale: Any,
    correct_moments: Any,
    residual_decay: Any,
) -> optax.GradientTransformation:
    adam: Any = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    rate, decay = learning_rate, weight_decay
    if config.schedule == "cosine":
        shape = optax.cosine_decay_schedule(1.0, max(1, config.epochs * steps_per_epoch))

        def rate(count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
            return learning_rate * shape(count)

    psi: Any = {
        "tables": tables_of(config),
        "beta": beta * np.linspace(0, 1, config.dim) if config.beta_ramp else beta,
        "num_layers": config.num_layers,
        "method": config.method,
        "rescale": rescale,
        "isolated": config.isolated,
        "every": config.smooth_every,
        "residual_decay": residual_decay if config.residual_decay else None,
    }
    if isinstance(num_layers, jax.Array):
        rows = coefficients_of(
            psi["beta"], num_layers, config.method, rescale, config.num_layers
        )
        psi["coefficients"] = jnp.stack(rows)
    plain = {
        "adamw": lambda: optax.adamw(rate, weight_decay=decay, **adam),
        "adam": lambda: optax.chain(optax.add_decayed_weights(decay), optax.adam(rate, **adam)),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(rate, momentum=config.momentum)
        ),
    }
    base = config.base
    if not config.has_sevo:
        return plain[base]()
    if config.placement == "gradient":
        return optax.chain(sevo(graph, **psi), plain[base]())
    first: list[optax.GradientTransformation] = []
    if config.placement == "both":
        # The residual is that of what is added to the tables, which the gradient is not.
        first = [sevo(graph, **psi | {"residual_decay": None})]
    elif config.placement == "switch":
        steps = round(config.switch_at * config.epochs * steps_per_epoch)
        # At beta 0 psi is the identity.
        strength = psi["beta"]
        before = psi | {"beta": lambda count: jnp.where(count < steps, strength, 0.0)}
        psi["beta"] = lambda count: jnp.where(count < steps, 0.0, strength)
        first = [sevo(graph, **before)]
    if base == "adamw":
        traced = isinstance(correct_moments, jax.Array)
        after = sevo_adamw(
            rate,
            graph,
            correct_moments=traced or correct_moments,
            weight_decay=decay,
            **adam,
            **psi,
        )
        after = _correct_where(correct_moments, after) if traced else after
    elif base == "adam":
        after = sevo_adam(rate, graph, weight_decay=decay, **adam, **psi)
    else:
        after = sevo_sgd(rate, graph, momentum=config.momentum, weight_decay=decay, **psi)
    return optax.chain(*first, after) if first else after


def tables_of(config: Config) -> str | tuple[str, ...]:
    """The tables that SEvo smooths."""
    if config.graph == "users_items":
        return ("user_embedding", TABLE)
    return BACKBONES[config.model].tables


def smooth_tables(module: Any, config: Config, adjacency: Adjacency) -> None:
    """Smooths a new module's tables along the graph, by psi with `config.smooth_start` as beta.

    What is drawn at random differs between neighbours as much as between any two rows. Each
    table keeps the spread that it was drawn with.
    """
    tables = tables_of(config)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    psi = sevo(adjacency, tables=tables, beta=config.smooth_start, num_layers=config.num_layers)
    smoothed, _ = psi.update(params, psi.init(params))
    mask = table_mask(params, tables, adjacency.num_nodes)

    def scaled(old: jax.Array, new: jax.Array, is_table: bool) -> jax.Array:
        return new * (old.std() / new.std()) if is_table else old

    nnx.update(module, jax.tree.map(scaled, params, smoothed, mask))


def _correct_where(
    correct: jax.Array, optimizer: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Corrects moments unless the traced `correct` is 0: then every row counts as touched."""

    def update(updates, state, params=None, *, touched=None, **extra_args):
        def rows(g: jax.Array) -> jax.Array:
            nonzero = jnp.any(g != 0, axis=tuple(range(1, g.ndim)))
            return (nonzero if touched is None else touched) | (correct == 0)

        touched = jax.tree.map(rows, updates)
        return optimizer.update(updates, state, params, touched=touched, **extra_args)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
