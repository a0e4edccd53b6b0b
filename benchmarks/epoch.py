# pyright: reportMissingImports=false
"""An epoch of SASRec + SEvo-AdamW, and a full-ranking validation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.graphs import Log, log_of
from benchmarks.measure import turns
from benchmarks.step import epochs
from experiments.dataset import Split
from experiments.presets import preset
from experiments.ranking import collect, metrics, ranking_data
from experiments.run import make_trainer, start


def epoch(size: str, data: Path | None, repeats: int) -> dict[str, Any]:
    """Seconds of both, for this project, plain AdamW in it, and padded PyTorch."""
    log = log_of(size, data)
    functions = {}
    for name in ("sevo_adamw", "adamw"):
        config = preset("sasrec", "amazon_beauty", name)
        trainer = make_trainer(config, log.split, graph=log.graph)
        functions[f"epoch, {name}"] = epochs(trainer)
        if name == "sevo_adamw":
            functions["ranking"] = _ranking(trainer, log.split, config.max_length)
    others, note = _torch(log)
    times = turns(functions | others, repeats)
    return {"real": log.real, "torch": note, "arms": times}


def _ranking(trainer: Any, split: Split, max_length: int) -> Callable[[], Any]:
    valid = split.evaluation("valid")
    (data,), num_slots = ranking_data([valid], max_length=max_length)
    params = start(trainer, [0]).params

    def rank() -> Any:
        return metrics(collect(trainer.rank(params, data, num_slots), len(valid.targets)))

    return rank


def _torch(log: Log) -> tuple[dict[str, Callable[[], Any]], str]:
    try:
        import torch

        from benchmarks import torch_peer as peer
    except ImportError:
        return {}, "torch is not installed"
    config, split = preset("sasrec", "amazon_beauty", "sevo_adamw"), log.split
    model = peer.SASRec(split.dataset.num_items).to(peer.device())
    optimizer = peer.SevoAdamW(model, peer.csr(log.graph))
    batches = peer.training_batches(split, config.batch_size, config.max_length)
    valid = split.evaluation("valid")
    history = np.diff(valid.history_splits)
    chunks = []
    for places in np.split(np.arange(len(history)), range(512, len(history), 512)):
        length = np.minimum(history[places], config.max_length)
        starts = valid.history_splits[places + 1] - length
        inputs = peer.padded(valid.history_values, starts, length, config.max_length)
        first, last = valid.history_splits[places[0]], valid.history_splits[places[-1] + 1]
        masked = (
            np.repeat(np.arange(len(places)), history[places]),
            valid.history_values[first:last],
            valid.targets[places],
        )
        rows, items, targets = (torch.from_numpy(m.astype(np.int64)) for m in masked)
        chunks.append(tuple(part.to(peer.device()) for part in (inputs, targets, rows, items)))

    def train() -> None:
        for batch in batches:
            peer.train_step(model, optimizer, batch)

    functions = {
        "torch epoch": train,
        "torch ranking": lambda: peer.ndcg_at_10(model, chunks),
    }
    where = "cuda" if peer.device() == "cuda" else f"{torch.get_num_threads()} threads"
    return functions, f"padded; fused AdamW, and SEvo by CSR; {where}"
