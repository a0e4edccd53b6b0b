"""The paper's two theorems as measurements, on graphs and a problem drawn at random.

Theorem 1: an approximation of the smoothing is direction-aware, that is `<psi(x), x>` is
positive for every x but zero, for all graphs and L: the iterative one if and only if beta is
below 1/2, the Neumann series for every beta. It is so when the smallest eigenvalue of psi is
positive.

Theorem 2: gradient descent whose embedding steps are smoothed takes O(1 / (1 - beta)^2) times
the steps of plain gradient descent to bring the gradient down, and O(1 / (1 - beta)) times with
the learning rate rescaled.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from rich.console import Console

from experiments.options import Ablate
from experiments.study import Finding
from sevo_jax import normalized_adjacency, smooth
from sevo_jax.adjacency import Graph
from sevo_jax.smoothing import coefficients_of

NEEDS_DATA = False
BETAS = (0.1, 0.3, 0.49, 0.51, 0.7, 0.9, 0.99)
LAYERS = range(7)
NODES = 40
# Of gradient descent: items, their dimension, observations, and how far down the squared norm
# of the gradient has to come.
ITEMS, DIM, OBSERVED, TARGET, MAX_STEPS = 60, 4, 240, 1e-3, 20_000
RATE_BETAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


def study(options: Ablate, out: Path, console: Console) -> list[Finding]:
    """Smallest eigenvalues, and steps of gradient descent; needs no data.

    Every seed of the options draws its own graphs and its own problem.
    """
    if options != Ablate(name=options.name, seeds=options.seeds, out=options.out):
        raise ValueError("`theory` takes `seeds` and `out` alone.")
    return [_direction_aware(options.seeds), _rate(options.seeds)]


def _direction_aware(seeds: tuple[int, ...]) -> Finding:
    graphs = [normalized_adjacency(draw(seed)) for seed in seeds for draw in FAMILIES.values()]
    rows = []
    for beta in BETAS:
        cells = [f"{beta}"]
        for method in ("neumann", "iterative"):
            found = [
                (smallest_eigenvalue(graph, beta, num, method), num)
                for num in LAYERS
                for graph in graphs
            ]
            lowest, where = min(found)
            bound = min(lower_bound(beta, num, method) for num in LAYERS)
            aware = "yes" if lowest > 0 else f"no, L={where}"
            cells += [f"{lowest:+.4f}", f"{bound:+.4f}", aware]
        rows.append(cells)
    head = ["beta"]
    for method in ("Neumann", "iterative"):
        head += [f"{method}: smallest", "bound", "direction-aware"]
    title = (
        f"Theorem 1: the smallest eigenvalue of psi over {len(graphs)} graphs of "
        f"{NODES} nodes ({', '.join(FAMILIES)}) and L = {min(LAYERS)} to {max(LAYERS)}; the "
        "bound is that of any graph"
    )
    return Finding(title, head, rows)


def smallest_eigenvalue(graph: Graph, beta: float, num_layers: int, method: str) -> float:
    """Of psi as a matrix `[num_nodes, num_nodes]`, by smoothing the identity."""
    adjacency = normalized_adjacency(graph)
    settings: Any = {"beta": beta, "num_layers": num_layers, "method": method}
    psi = smooth(adjacency, jnp.eye(adjacency.num_nodes), **settings)
    return float(np.linalg.eigvalsh(np.asarray(psi, np.float64))[0])


def lower_bound(beta: float, num_layers: int, method: str) -> float:
    """The least value of psi's polynomial on [-1, 1], where all eigenvalues of A~ lie."""
    powers = coefficients_of(beta, num_layers, method, True)  # type: ignore[arg-type]
    polynomial = np.polynomial.Polynomial(powers)
    turns = [r.real for r in polynomial.deriv().roots() if abs(r.imag) < 1e-9 and abs(r) <= 1]
    return float(min(polynomial(point) for point in (-1.0, 1.0, *turns)))


def _graph(edges: np.ndarray, num_nodes: int, rng: np.random.Generator) -> jraph.GraphsTuple:
    """Random weights in [1, 5) on undirected edges `[E, 2]`."""
    weights = np.tile(rng.uniform(1, 5, len(edges)).astype(np.float32), 2)
    fields: Any = {  # jraph's annotations know JAX's arrays alone
        "edges": weights,
        "senders": np.concatenate([edges[:, 0], edges[:, 1]]),
        "receivers": np.concatenate([edges[:, 1], edges[:, 0]]),
        "n_node": np.array([num_nodes]),
        "n_edge": np.array([len(weights)]),
    }
    return jraph.GraphsTuple(nodes=None, globals=None, **fields)


def _uniform(seed: int) -> jraph.GraphsTuple:
    """Each pair is an edge with the same chance, four edges a node on average."""
    rng = np.random.default_rng([seed, 0])
    pairs = np.stack(np.triu_indices(NODES, 1), axis=1)
    return _graph(pairs[rng.random(len(pairs)) < 4 / NODES], NODES, rng)


def _preferential(seed: int) -> jraph.GraphsTuple:
    """Each node joins two earlier ones, popular ones more often: a long tail of degrees."""
    rng = np.random.default_rng([seed, 1])
    ends, edges = [0, 1], {(0, 1)}
    for node in range(2, NODES):
        for other in {int(ends[i]) for i in rng.integers(len(ends), size=2)}:
            edges.add((other, node))
            ends += [other, node]
    return _graph(np.array(sorted(edges)), NODES, rng)


def _bipartite(seed: int) -> jraph.GraphsTuple:
    """Edges between two halves alone, so that -1 is an eigenvalue of A~."""
    rng = np.random.default_rng([seed, 2])
    half = NODES // 2
    left, right = np.divmod(np.arange(half * half), half)
    kept = rng.random(len(left)) < 4 / half
    return _graph(np.stack([left, half + right], axis=1)[kept], NODES, rng)


FAMILIES: dict[str, Callable[[int], jraph.GraphsTuple]] = {
    "uniform": _uniform,
    "preferential": _preferential,
    "bipartite": _bipartite,
}


def _rate(seeds: tuple[int, ...]) -> Finding:
    steps = {
        rescale: np.array([steps_needed(seed, RATE_BETAS, rescale) for seed in seeds])
        for rescale in (False, True)
    }
    rows = [
        [f"{beta}", *(cell for found in steps.values() for cell in _cells(found, i))]
        for i, beta in enumerate(RATE_BETAS)
    ]
    slopes = ["exponent p"]
    for found in steps.values():
        p = exponent(RATE_BETAS, found.mean(axis=0))
        slopes += ["" if np.isnan(p) else f"{p:.2f}", ""]
    head = ["beta", "steps, not rescaled", "ratio", "steps, rescaled", "ratio"]
    title = (
        f"Theorem 2: steps of gradient descent (L = 3, {len(seeds)} seed(s), mean) until the "
        f"squared norm of the gradient is {TARGET:g} of the first; exponent p of steps ~ "
        "(1 - beta)^-p, at most 2 and 1 by the theorem"
    )
    return Finding(title, head, [*rows, slopes])


def _cells(found: np.ndarray, place: int) -> list[str]:
    if np.isnan(found[:, place]).any():
        return [f"> {MAX_STEPS}", ""]
    ratio = found[:, place].mean() / found[:, 0].mean()
    return [f"{found[:, place].mean():.0f}", f"{ratio:.2f}"]


def exponent(betas: tuple[float, ...], steps: np.ndarray) -> float:
    """The least-squares slope of log steps over -log(1 - beta), where there are two points."""
    held = np.isfinite(steps)
    if held.sum() < 2:
        return float("nan")
    x, y = -np.log1p(-np.array(betas))[held], np.log(steps[held])
    return float(np.polyfit(x, y, 1)[0])


def steps_needed(seed: int, betas: tuple[float, ...], rescale: bool) -> np.ndarray:
    """Steps `[len(betas)]` until the gradient is small; not a number where it never is.

    The loss is smooth and not convex: for a random sparse matrix B and noisy targets Y, the
    sum of r^2 / (1 + r^2) / 2 over the entries r of B E - Y. Its second derivative is at most 1
    in r, so the gradient's Lipschitz constant C is at most the largest eigenvalue of B^T B,
    and the learning rate is 1 / C for every beta, as in the theorem. The graph links two
    pairs of the four items of each row of B.
    """
    rng = np.random.default_rng([seed, 3])
    rows = np.stack([rng.choice(ITEMS, 4, replace=False) for _ in range(OBSERVED)])
    matrix = np.zeros((OBSERVED, ITEMS), np.float32)
    np.put_along_axis(matrix, rows, 0.5, axis=1)
    targets = matrix @ rng.normal(size=(ITEMS, DIM)) + 0.1 * rng.normal(size=(OBSERVED, DIM))
    pairs = np.unique(np.sort(np.concatenate([rows[:, [0, 1]], rows[:, [2, 3]]])), axis=0)
    adjacency = normalized_adjacency(_graph(pairs, ITEMS, rng))
    lipschitz = np.linalg.eigvalsh(matrix.T @ matrix)[-1]

    def loss(table: jax.Array) -> jax.Array:
        squared = (matrix @ table - targets.astype(np.float32)) ** 2
        return jnp.sum(squared / (1 + squared)) / 2

    @partial(jax.jit, static_argnums=0)
    def descend(num: int, betas: jax.Array) -> jax.Array:
        def step(tables, _):
            grads = jax.vmap(jax.grad(loss))(tables)
            psi = partial(smooth, adjacency, rescale=rescale)
            moves = jax.vmap(lambda g, beta: psi(g, beta=beta))(grads, betas)
            return tables - moves / lipschitz, jnp.sum(grads**2, axis=(1, 2))

        start = jnp.zeros((len(betas), ITEMS, DIM))
        return jax.lax.scan(step, start, None, length=num)[1]

    norms = np.asarray(descend(MAX_STEPS, jnp.array(betas)))  # [steps, betas]
    small = norms <= TARGET * norms[0]
    return np.where(small.any(axis=0), small.argmax(axis=0), np.nan)
