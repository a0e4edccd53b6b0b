# pyright: reportMissingImports=false
"""The same training and ranking as padded PyTorch, to measure against.

Written for this comparison, in the form that the official code has: padded batches, PyTorch's
own attention, its fused AdamW, moment correction and psi by sparse CSR products, ranking by a
masked score matrix and top-k. Batches are prepared outside of the timed part, which the
official code's data loader does not get for free.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import on_accelerator
from sevo_jax import normalized_adjacency


def device() -> str:
    """Where to run: a GPU if JAX has one too."""
    return "cuda" if on_accelerator() and torch.cuda.is_available() else "cpu"


def csr(graph: Any) -> torch.Tensor:
    """The normalised adjacency of a graph as a sparse matrix of PyTorch."""
    rows: Any = normalized_adjacency(graph, layout="rows")
    arrays = (np.array(a) for a in (rows.row_splits, rows.columns, rows.weights))
    size = (rows.num_nodes,) * 2
    return torch.sparse_csr_tensor(*map(torch.from_numpy, arrays), size=size).to(device())


@torch.no_grad()
def smooth(
    product: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    beta: float = 0.99,
    layers: int = 3,
) -> torch.Tensor:
    """psi, from a function that multiplies by the adjacency."""
    total = x
    for _ in range(layers):
        x = beta * product(x)
        total = total + x
    return total * ((1 - beta) / (1 - beta ** (layers + 1)))


class SASRec(nn.Module):
    def __init__(self, num_items: int, dim: int = 64, length: int = 50, rate: float = 0.3):
        super().__init__()
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(length, dim)
        for table in (self.items, self.positions):
            nn.init.xavier_normal_(table.weight)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-8) for _ in range(5))
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(dim, 1, dropout=rate, batch_first=True) for _ in range(2)
        )
        self.dense = nn.ModuleList(nn.Linear(dim, dim) for _ in range(4))
        self.dropout = nn.Dropout(rate)
        self.register_buffer("mask", torch.triu(torch.ones(length, length), 1).bool())

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """States `[B, S, dim]` of left-padded rows `[B, S]`."""
        used = (items > 0).unsqueeze(-1)
        x = self.items(items) * self.items.embedding_dim**0.5 + self.positions.weight
        x = self.dropout(x) * used
        for block in range(2):
            query = self.norms[2 * block](x)
            x = (
                x
                + self.attention[block](query, x, x, attn_mask=self.mask, need_weights=False)[0]
            )
            y = self.norms[2 * block + 1](x)
            hidden = F.relu(self.dropout(self.dense[2 * block](y)))
            x = (y + self.dropout(self.dense[2 * block + 1](hidden))) * used
        return self.norms[4](x)


class SevoAdamW:
    """PyTorch's AdamW; with an adjacency, the table's step is corrected and smoothed."""

    def __init__(
        self,
        model: SASRec,
        adjacency: torch.Tensor | None,
        lr: float = 1e-3,
        b1: float = 0.9,
        b2: float = 0.98,
        decay: float = 0.1,
    ):
        self.adjacency, self.lr, self.b1, self.b2, self.decay = adjacency, lr, b1, b2, decay
        self.table = model.items.weight
        self.m, self.v = torch.zeros_like(self.table), torch.zeros_like(self.table)
        self.time = 0
        plain = [p for p in model.parameters() if adjacency is None or p is not self.table]
        self.plain = torch.optim.AdamW(
            plain, lr, betas=(b1, b2), eps=1e-8, weight_decay=decay, fused=True
        )

    def zero_grad(self) -> None:
        self.plain.zero_grad()
        self.table.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.plain.step()
        if (matrix := self.adjacency) is None:
            return
        self.time += 1
        t, b1, b2, grad = self.time, self.b1, self.b2, self.table.grad
        empty = (grad == 0).all(dim=1, keepdim=True)
        before = max(1, t - 1)
        square = torch.where(empty, self.v / (1 - b2**before), grad * grad)
        grad = torch.where(empty, self.m / (1 - b1**before), grad)
        self.m.mul_(b1).add_(grad, alpha=1 - b1)
        self.v.mul_(b2).add_(square, alpha=1 - b2)
        delta = (self.m / (1 - b1**t)) / ((self.v / (1 - b2**t)).sqrt() + 1e-8)
        delta = smooth(lambda y: matrix @ y, delta)
        self.table.mul_(1 - self.lr * self.decay).add_(delta, alpha=-self.lr)


def padded(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int):
    """Left-padded table rows `[B, width]` of ragged items."""
    column = np.arange(width) - (width - lengths[:, None])
    index = starts[:, None] + np.maximum(column, 0)
    return torch.from_numpy(np.where(column >= 0, values[index] + 1, 0))


def training_batches(split: Any, batch_size: int, width: int) -> list[tuple[torch.Tensor, ...]]:
    """An epoch of padded inputs, targets and negatives, `[B, width]` each."""
    rng = np.random.default_rng(0)
    values, splits = split.train
    order = rng.permutation(len(splits) - 1)
    lengths = np.minimum(np.diff(splits) - 1, width)
    batches = []
    for users in np.array_split(order, -(-len(order) // batch_size)):
        starts = splits[users + 1] - 1 - lengths[users]
        inputs = padded(values, starts, lengths[users], width)
        targets = padded(values, starts + 1, lengths[users], width)
        drawn = rng.integers(1, split.dataset.num_items + 1, inputs.shape)
        batch = inputs, targets, torch.from_numpy(drawn) * (targets > 0)
        batches.append(tuple(part.to(device()) for part in batch))
    return batches


def train_step(model: SASRec, optimizer: SevoAdamW, batch) -> float:
    inputs, targets, negatives = batch
    states, used = model(inputs), targets > 0
    states = states[used]
    positive = (states * model.items(targets[used])).sum(-1)
    negative = (states * model.items(negatives[used])).sum(-1)
    loss = F.softplus(-positive).mean() + F.softplus(negative).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def ndcg_at_10(model: SASRec, chunks) -> float:
    """Mean over chunks of (inputs, targets, rows and items of the history to mask)."""
    model.eval()
    total, count = 0.0, 0
    place = torch.arange(2, 12, device=device()).log2()
    for inputs, targets, rows, items in chunks:
        scores = model(inputs)[:, -1] @ model.items.weight[1:].T
        scores[rows, items] = -1e23
        hits = scores.topk(10).indices == targets[:, None]
        total += float((hits / place).sum())
        count += len(targets)
    model.train()
    return total / count
