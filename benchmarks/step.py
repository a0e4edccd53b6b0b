# pyright: reportMissingImports=false
"""A training step of SASRec, with and without SEvo; and packed against padded."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.graphs import log_of
from benchmarks.measure import on_accelerator, turns
from experiments.backbones import BACKBONES, TABLE, make_optimizer
from experiments.batching import Batch, epoch_order, sample_batch
from experiments.config import Config
from experiments.presets import preset
from experiments.run import make_trainer, start
from experiments.training import Trainer
from models.losses import bce
from sevo_jax import native, normalized_adjacency
from sevo_jax.adjacency import Layout

STEPS = 4  # of an epoch on generated logs


def steps(size: str, data: Path | None, repeats: int, with_torch: bool) -> dict[str, Any]:
    """Seconds of a step: ours in a scan over an epoch, and PyTorch's, padded."""
    config = preset("sasrec", "amazon_beauty", "sevo_adamw")
    log = log_of(size, data, STEPS * config.batch_size)
    number = -(-log.split.dataset.num_users // config.batch_size)
    layouts: tuple[Layout, ...] = ("rows", "compiled") if native.is_built() else ("rows",)
    if on_accelerator():
        layouts = ("padded", "edges")
    graphs = {name: normalized_adjacency(log.graph, layout=name) for name in layouts}
    if "compiled" in layouts:
        half = normalized_adjacency(log.graph, layout="compiled", messages="bfloat16")
        graphs["compiled, bfloat16"] = half
    chosen = {"adamw": None} | {f"sevo, {name}": graph for name, graph in graphs.items()}
    functions = {}
    for name, graph in chosen.items():
        one = dataclasses.replace(config, optimizer="adamw" if graph is None else "sevo_adamw")
        functions[name] = epochs(make_trainer(one, log.split, graph=graph))
    others, note = _torch(log, config) if with_torch else ({}, "left out; see `--full`")
    times = turns(functions | others, repeats)
    each = {n: {k: s / number for k, s in taken.items()} for n, taken in times.items()}
    found = {
        "items": log.split.dataset.num_items,
        "edges": len(log.graph.edges),
        "real": log.real,
        "steps": number,
        "torch": note,
        "arms": each,
    }
    if size in ("beauty", "tiny") and not on_accelerator():
        best = graphs[layouts[-1]]
        trainer = make_trainer(config, log.split, graph=best)
        first, again = (_seconds(epochs(trainer)) for _ in range(2))
        found["compile"] = first - again  # the second time, the program is there
        found["padded"], found["difference"] = padded(log, config, best, repeats)
    return found


def epochs(trainer: Trainer) -> Callable[[], Any]:
    """A function that trains one epoch after the other."""
    state, number = start(trainer, [0]), 0

    def epoch() -> Any:
        nonlocal state, number
        number += 1
        state, loss = trainer.epoch(state, number)
        return state, loss

    return epoch


def _seconds(epoch: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(epoch())
    return time.perf_counter() - began


def _torch(log: Any, config: Config) -> tuple[dict[str, Callable[[], Any]], str]:
    try:
        from benchmarks import torch_peer as peer
    except ImportError:
        return {}, "torch is not installed"
    batches = peer.training_batches(log.split, config.batch_size, config.max_length)
    functions = {}
    for name, adjacency in (("torch adamw", None), ("torch sevo", peer.csr(log.graph))):
        model = peer.SASRec(log.split.dataset.num_items).to(peer.device())
        optimizer = peer.SevoAdamW(model, adjacency)

        def epoch(model: Any = model, optimizer: Any = optimizer) -> None:
            for batch in batches:
                peer.train_step(model, optimizer, batch)

        functions[name] = epoch
    return functions, "padded; fused AdamW, and SEvo by CSR"


def padded(
    log: Any, config: Config, graph: Any, repeats: int
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Seconds of a padded step of ours; and how far packed and padded differ without dropout.

    Returns:
      The times by optimizer; and of the same batch in both forms the difference of the losses,
      and the largest of any entry of the gradients, relative to the largest entry.
    """
    trainer = make_trainer(config, log.split, graph=graph)
    data, size = trainer.data, config.batch_size
    order = epoch_order(jax.random.key(0), data, size)[0]
    batch = sample_batch(jax.random.key(1), data, order, size * config.max_length)
    stream = batch.stream
    column = config.max_length - stream.lengths[stream.segment] + stream.offset
    column = jnp.where(stream.used, column, config.max_length)  # beyond the end: dropped

    def laid_out(leaf: jax.Array) -> jax.Array:
        grid = jnp.zeros((size, config.max_length), leaf.dtype)
        return grid.at[stream.segment, column].set(leaf, mode="drop")

    grids = (batch.inputs, batch.targets, batch.negatives[:, 0], batch.weights)
    arrays = tuple(map(laid_out, grids))
    backbone = BACKBONES[config.model]

    def loss(params: Any, grids: tuple[jax.Array, ...], key: jax.Array | None) -> jax.Array:
        inputs, targets, negatives, weights = grids
        module = nnx.merge(trainer.graphdef, params)
        states, table = module(inputs, dropout_key=key), params[TABLE]["embedding"]
        positive, negative = ((states * table[ids]).sum(-1) for ids in (targets, negatives))
        return bce(positive.ravel(), negative.ravel(), weights.ravel())

    def packed_loss(params: Any, batch: Batch) -> jax.Array:
        objective: Any = trainer.objective
        return objective.loss(nnx.merge(trainer.graphdef, params), batch, None)

    module = backbone.build(0, log.split.dataset.num_items, config, nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    one, grad = jax.jit(jax.value_and_grad(packed_loss))(params, batch)
    other, grad_padded = jax.jit(jax.value_and_grad(lambda p, g: loss(p, g, None)))(
        params, arrays
    )
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grad))
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), grad, grad_padded)
    difference = {
        "loss": abs(float(one - other)),
        "gradient": max(jax.tree.leaves(apart)) / largest,
    }
    functions = {}
    for name in ("adamw", "sevo_adamw"):
        used = graph if name == "sevo_adamw" else None
        settings = dataclasses.replace(config, optimizer=name)
        optimizer = optax.with_extra_args_support(make_optimizer(settings, used))

        def step(params: Any, state: Any, graph: Any, optimizer: Any = optimizer) -> Any:
            grads = jax.grad(loss)(params, arrays, jax.random.key(2))
            updates, state = optimizer.update(grads, state, params, graph=graph)
            return optax.apply_updates(params, updates), state

        run, state = jax.jit(step), optimizer.init(params)
        functions[name] = lambda run=run, state=state, used=used: run(params, state, used)
    return turns(functions, repeats), difference
