"""Tables of cases, golden records, and slow NumPy references of sevo_jax.

The references follow the paper and the official code line by line, on dense matrices and
with loops over rows. They share no code with the library.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

import sevo_jax

GOLDEN = Path(__file__).parent / "golden"


# --- references -------------------------------------------------------------------------


def reference_graph(
    sequences: Sequence[Sequence[int]], num_nodes: int, window: int, max_distance: int
) -> np.ndarray:
    """Dense raw weights: every pair of positions, both directions, 1/h each."""
    weights = np.zeros((num_nodes, num_nodes))
    for sequence in sequences:
        kept = list(sequence)[-window:]
        for p in range(len(kept)):
            for h in range(1, max_distance + 1):
                if p + h < len(kept):
                    weights[kept[p], kept[p + h]] += 1 / h
                    weights[kept[p + h], kept[p]] += 1 / h
    return weights


def reference_normalized(weights: np.ndarray) -> np.ndarray:
    """D^-1/2 A D^-1/2 with 1/sqrt(0) := 0."""
    degree = weights.sum(axis=1)
    scale = np.array([1 / np.sqrt(d) if d > 0 else 0.0 for d in degree])
    return np.diag(scale) @ weights @ np.diag(scale)


def reference_smooth(
    adjacency: np.ndarray,
    x: np.ndarray,
    beta: float,
    num_layers: int,
    method: str,
    rescale=True,
) -> np.ndarray:
    """The loops of MODELS.md section 8."""
    if method == "iterative":
        y = x
        for _ in range(num_layers):
            y = beta * adjacency @ y + (1 - beta) * x
        return y
    y = x
    for _ in range(num_layers):
        x = beta * (adjacency @ x)
        y = y + x
    return y * (1 - beta) / (1 - beta ** (num_layers + 1) if rescale else 1)


def reference_adamw(
    adjacency: np.ndarray,
    table: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    lr: float,
    beta: float,
    num_layers: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Algorithm 1 as the official code runs it: table, raw m and raw v after each step."""
    p, m, v = table.copy(), np.zeros_like(table), np.zeros_like(table)
    trajectory = []
    for t, grad in enumerate(grads, start=1):
        p = p * (1 - lr * weight_decay)
        s = max(1, t - 1)
        for i in range(len(p)):
            if (grad[i] == 0).all():
                g, g2 = m[i] / (1 - b1**s), v[i] / (1 - b2**s)
            else:
                g, g2 = grad[i], grad[i] ** 2
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g2
        delta = m / (1 - b1**t) / (np.sqrt(v) / np.sqrt(1 - b2**t) + eps)
        p = p - lr * reference_smooth(adjacency, delta, beta, num_layers, "neumann")
        trajectory.append((p, m.copy(), v.copy()))
    return trajectory


# --- graphs -----------------------------------------------------------------------------


def random_sequences(seed: int, num_nodes: int, count: int = 30) -> list[np.ndarray]:
    """Sequences over all nodes but the first and the last, which stay isolated."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, num_nodes - 1, rng.integers(1, 15)) for _ in range(count)]


def random_graph(seed: int = 0, num_nodes: int = 20, **kwargs: Any) -> Any:
    return sevo_jax.item_graph(random_sequences(seed, num_nodes), num_nodes, **kwargs)


def dense(graph: Any) -> np.ndarray:
    """Raw weights of a `GraphsTuple` as a matrix."""
    num_nodes = int(np.sum(graph.n_node))
    weights = np.zeros((num_nodes, num_nodes))
    np.add.at(weights, (np.asarray(graph.receivers), np.asarray(graph.senders)), graph.edges)
    return weights


# --- golden records of the official code ---------------------------------------------------


class Golden(NamedTuple):
    """One record: its entry in the manifest and its arrays."""

    case: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def num_nodes(self) -> int:
        return len(self.arrays["param0" if "param0" in self.arrays else "features"])

    def adjacency(self, layout: Any) -> Any:
        """The record's own normalised adjacency."""
        a = self.arrays
        return layout.from_edges(a["adj_row"], a["adj_col"], a["adj_val"], self.num_nodes)

    def sequences(self) -> list[np.ndarray]:
        """Its sequences as rows of the table, of which the first is padding."""
        a = self.arrays
        return np.split(a["seqs_flat"] + 1, a["seqs_ptr"][1:-1])

    def graph(self) -> Any:
        """The graph built from its sequences by the library."""
        if self.case.get("graph") == "user_item":
            num_users, num_items = self.arrays["sizes"]
            users = np.repeat(np.arange(num_users), np.diff(self.arrays["seqs_ptr"]))
            items = self.arrays["seqs_flat"]
            return sevo_jax.bipartite_graph(users, items, num_users, num_items)
        return sevo_jax.item_graph(
            self.sequences(),
            self.num_nodes,
            window=self.case["maxlen"],
            max_distance=self.case["H"],
        )


def golden_names(kind: str) -> list[str]:
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    return [case["name"] for case in manifest["cases"] if case["kind"] == kind]


def golden(name: str) -> Golden:
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    (case,) = [case for case in manifest["cases"] if case["name"] == name]
    with np.load(GOLDEN / case["file"]) as file:
        return Golden(case, dict(file))


# --- every optimizer and placement, for the common suite ---------------------------------

Factory = Callable[..., Any]


def _gradient_adamw(graph: Any, **kwargs: Any) -> optax.GradientTransformation:
    return optax.chain(sevo_jax.sevo(graph, **kwargs), optax.adamw(0.03, weight_decay=0.0))


def _chained_adamw(graph: Any, **kwargs: Any) -> optax.GradientTransformation:
    return optax.chain(
        sevo_jax.scale_by_corrected_adam(),
        sevo_jax.sevo(graph, **kwargs),
        optax.scale_by_learning_rate(0.03),
    )


def _masked(graph: Any, **kwargs: Any) -> optax.GradientTransformation:
    """The smoother inside of Optax's own `masked`."""
    smoother = sevo_jax.sevo(graph, **kwargs)
    only_table = optax.masked(smoother, lambda tree: {"item": True, "bias": False})
    return optax.chain(only_table, optax.sgd(0.1))


def _alias(factory: Callable[..., Any], *args: Any, **fixed: Any) -> Factory:
    return lambda graph, **kwargs: factory(*args, graph, **fixed, **kwargs)


PLACEMENTS: dict[str, Factory] = {
    "sevo_adamw": _alias(sevo_jax.sevo_adamw, 0.03, weight_decay=1e-4),
    "sevo_adamw_uncorrected": _alias(
        sevo_jax.sevo_adamw, 0.03, correct_moments=False, weight_decay=0.0
    ),
    "sevo_adamw_residual": _alias(
        sevo_jax.sevo_adamw, 0.03, residual_decay=0.5, weight_decay=1e-4
    ),
    "sevo_adamw_every_2": _alias(sevo_jax.sevo_adamw, 0.03, every=2, weight_decay=1e-4),
    "sevo_adam": _alias(sevo_jax.sevo_adam, 0.03, weight_decay=1e-4),
    "sevo_sgd": _alias(sevo_jax.sevo_sgd, 0.03),
    "sevo_sgd_nesterov": _alias(sevo_jax.sevo_sgd, 0.03, nesterov=True, weight_decay=1e-4),
    "chain_gradient_adamw": _gradient_adamw,
    "chain_corrected_adam": _chained_adamw,
    "masked": _masked,
}


def of_tables(state: Any, name: str) -> Any:
    """What the state of one of the library's optimizers has of its tables, as `"mu_hat"`."""
    return optax.tree.get(optax.tree.get(state, "inner_states")["table"], name)
