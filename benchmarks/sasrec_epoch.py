# pyright: reportMissingImports=false
"""Seconds for an epoch of SASRec + SEvo-AdamW and for a full-ranking validation.

    python benchmarks/sasrec_epoch.py --data path/to/amazon_beauty

Measures this project's training loop, plain AdamW in it, and, where PyTorch is installed, the
padded PyTorch peer of `torch_peer.py`, one after the other in one process, and prints the
medians and their ratios as JSON. Both sides get the same allocator settings: glibc keeps large
buffers instead of returning them to the system after every use, which PyTorch's padded
batches need more than we do.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import records
from experiments.config import preset
from experiments.dataset import Split, leave_one_out
from experiments.loaders import load
from experiments.ranking import collect, metrics, ranking_data
from experiments.run import make_trainer


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median over `repeats` calls, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ours(split: Split, optimizer: str, repeats: int) -> dict[str, float]:
    config = preset("sasrec", "amazon_beauty", optimizer)
    trainer = make_trainer(config, split)
    state = trainer.init(jax.vmap(jax.random.key)(jnp.arange(1)))
    valid = split.evaluation("valid")
    (data,), num_slots = ranking_data([valid], max_length=config.max_length)
    number = iter(range(1, 1000))

    def epoch() -> None:
        nonlocal state
        state, loss = trainer.epoch(state, next(number))
        loss.block_until_ready()

    def rank() -> None:
        metrics(collect(trainer.rank(state.params, data, num_slots), len(valid.targets)))

    return {"epoch": median_seconds(epoch, repeats), "rank": median_seconds(rank, repeats)}


def torch_peer(split: Split, repeats: int) -> dict[str, Any]:
    import torch
    import torch_peer as peer

    from sevo_jax import item_graph, normalized_adjacency

    config = preset("sasrec", "amazon_beauty", "sevo_adamw")
    num_items, width = split.dataset.num_items, config.max_length
    values, splits = split.train
    graph = item_graph((values + 1, splits), num_items + 1, window=width)
    rows: Any = normalized_adjacency(graph, layout="rows")
    arrays = (
        torch.from_numpy(np.array(a)) for a in (rows.row_splits, rows.columns, rows.weights)
    )
    model = peer.SASRec(num_items)
    adjacency = torch.sparse_csr_tensor(*arrays, size=(num_items + 1,) * 2)
    optimizer = peer.SevoAdamW(model.parameters(), adjacency)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(splits) - 1)
    lengths = np.minimum(np.diff(splits) - 1, width)
    batches = []
    for users in np.array_split(order, -(-len(order) // config.batch_size)):
        starts = splits[users + 1] - 1 - lengths[users]
        inputs = peer.padded(values, starts, lengths[users], width)
        targets = peer.padded(values, starts + 1, lengths[users], width)
        negatives = torch.from_numpy(rng.integers(1, num_items + 1, inputs.shape))
        batches.append((inputs, targets, negatives * (targets > 0)))
    valid = split.evaluation("valid")
    history = np.diff(valid.history_splits)
    chunks = []
    for places in np.split(np.arange(len(history)), range(512, len(history), 512)):
        length = np.minimum(history[places], width)
        starts = valid.history_splits[places + 1] - length
        inputs = peer.padded(valid.history_values, starts, length, width)
        first, last = valid.history_splits[places[0]], valid.history_splits[places[-1] + 1]
        masked = (
            np.repeat(np.arange(len(places)), history[places]),
            valid.history_values[first:last],
        )
        masked = tuple(torch.from_numpy(m.astype(np.int64)) for m in masked)
        targets = torch.from_numpy(valid.targets[places].astype(np.int64))
        chunks.append((inputs, targets, *masked))

    def epoch() -> None:
        for batch in batches:
            peer.train_step(model, optimizer, batch)

    return {
        "epoch": median_seconds(epoch, repeats),
        "rank": median_seconds(lambda: peer.ndcg_at_10(model, chunks), repeats),
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def keep_buffers() -> None:
    """Starts the script again with settings that glibc reads at the start of a process."""
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    if not settings.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def main() -> None:
    keep_buffers()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    split = leave_one_out(load(options.data))
    found: dict[str, Any] = {
        name: ours(split, name, options.repeats) for name in ("sevo_adamw", "adamw")
    }
    try:
        found["torch"] = torch_peer(split, max(1, options.repeats // 2))
    except ImportError as error:
        print(f"PyTorch is left out: {error}")
    else:
        found["torch / ours"] = {
            part: found["torch"][part] / found["sevo_adamw"][part] for part in ("epoch", "rank")
        }
    print(json.dumps(found | records.environment(), indent=2))


if __name__ == "__main__":
    main()
