"""An update of the table alone: AdamW's, psi's, SEvo-AdamW's, and that without psi's layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.graphs import log_of
from benchmarks.measure import turns
from experiments.presets import preset
from sevo_jax import normalized_adjacency, sevo_adamw, smooth


def updates(size: str, data: Path | None, repeats: int) -> dict[str, Any]:
    """Seconds of an update in a scan of some, on a gradient that is zero but for a batch."""
    config = preset("sasrec", "amazon_beauty", "sevo_adamw")
    log = log_of(size, data, config.batch_size)
    graph = normalized_adjacency(log.graph)
    rng, shape = np.random.default_rng(0), (graph.num_nodes, config.dim)
    values, splits = log.split.train
    items = values[: splits[config.batch_size]]
    drawn = rng.integers(0, log.split.dataset.num_items, len(items))
    touched = 1 + np.unique([items, drawn])  # row 0 is padding
    grads = np.zeros(shape, np.float32)
    grads[touched] = rng.normal(size=(len(touched), config.dim))
    table = jnp.asarray(rng.normal(0, 0.02, shape), jnp.float32)
    number = 20 if log.graph.edges.size < 1_000_000 else 3

    def scan(step: Callable[[Any, Any], Any], state: Any) -> Callable[[], Any]:
        @jax.jit
        def some(state: Any, graph: Any) -> Any:
            return jax.lax.scan(lambda s, _: (step(s, graph), None), state, None, number)[0]

        def run() -> Any:
            nonlocal state
            state = some(state, graph)
            return state

        return run

    def steps(optimizer: optax.GradientTransformation) -> Callable[[], Any]:
        solver, gradient = optax.with_extra_args_support(optimizer), jnp.asarray(grads)

        def step(state: Any, graph: Any) -> Any:
            params, moments = state
            update, moments = solver.update(gradient, moments, params, graph=graph)
            return optax.apply_updates(params, update), moments

        return scan(step, (table, solver.init(table)))

    rate, decay = config.learning_rate, config.weight_decay
    functions = {
        "adamw": steps(optax.adamw(rate, weight_decay=decay)),
        "psi": scan(lambda x, graph: smooth(graph, x), table),
        "sevo_adamw": steps(sevo_adamw(rate, graph, weight_decay=decay)),
        "sevo_adamw, L = 0": steps(sevo_adamw(rate, graph, num_layers=0, weight_decay=decay)),
    }
    taken = turns(functions, repeats)
    arms = {n: {k: s / number for k, s in times.items()} for n, times in taken.items()}
    return {
        "items": log.split.dataset.num_items,
        "edges": len(log.graph.edges),
        "real": log.real,
        "layout": type(graph).__name__.lower(),
        "touched": len(touched),
        "arms": arms,
    }
