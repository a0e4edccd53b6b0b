"""The models and optimizers that a `Config` names."""

from collections.abc import Callable
from typing import Any

import optax
from flax import nnx

import models
from experiments.batching import TrainData
from experiments.config import Config
from sevo_jax import sevo, sevo_adam, sevo_adamw, sevo_sgd

TABLE = "item_embedding"


def _sasrec(num_items: int, config: Config, rngs: nnx.Rngs) -> models.SASRec:
    return models.SASRec(
        num_items,
        dim=config.dim,
        max_length=config.max_length,
        num_blocks=config.num_blocks,
        num_heads=config.num_heads,
        dropout_rate=config.dropout_rate,
        rngs=rngs,
    )


def _gru4rec(num_items: int, config: Config, rngs: nnx.Rngs) -> models.GRU4Rec:
    return models.GRU4Rec(
        num_items,
        dim=config.dim,
        hidden_dim=config.dim,
        max_length=config.max_length,
        dropout_rate=config.dropout_rate,
        rngs=rngs,
    )


# From the number of items, the settings and the keys of the initial values.
BACKBONES: dict[str, Callable[[int, Config, nnx.Rngs], Any]] = {
    "sasrec": _sasrec,
    "gru4rec": _gru4rec,
}


def windows_per_step(config: Config, data: TrainData) -> int:
    """How many windows make a step of `config.batch_size` samples."""
    if config.windows != "whole":
        return config.batch_size
    return max(1, round(config.batch_size * data.num_windows / int(data.num_targets)))


def make_optimizer(config: Config, graph: Any) -> optax.GradientTransformation:
    """The optimizer that `config` names, with `graph` to smooth the item table over."""
    adam: Any = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    rate, decay = config.learning_rate, config.weight_decay
    psi: Any = {
        "tables": TABLE,
        "beta": config.beta,
        "num_layers": config.num_layers,
        "method": config.method,
        "rescale": config.rescale,
    }
    plain = {
        "adamw": lambda: optax.adamw(rate, weight_decay=decay, **adam),
        "adam": lambda: optax.chain(optax.add_decayed_weights(decay), optax.adam(rate, **adam)),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay), optax.sgd(rate, momentum=config.momentum)
        ),
    }
    base = config.optimizer.removeprefix("sevo_")
    if base == config.optimizer:
        return plain[base]()
    if config.placement == "gradient":
        return optax.chain(sevo(graph, **psi), plain[base]())
    if base == "adamw":
        return sevo_adamw(
            rate,
            graph,
            correct_moments=config.correct_moments,
            weight_decay=decay,
            **adam,
            **psi,
        )
    if base == "adam":
        return sevo_adam(rate, graph, weight_decay=decay, **adam, **psi)
    return sevo_sgd(rate, graph, momentum=config.momentum, weight_decay=decay, **psi)
