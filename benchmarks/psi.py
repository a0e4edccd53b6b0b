# pyright: reportMissingImports=false
"""The smoothing alone: against PyTorch and PyG, with S tables at once, and as sizes grow."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.graphs import Size, blocks, log_of
from benchmarks.measure import copy_bandwidth, on_accelerator, turns
from sevo_jax import item_graph, native, normalized_adjacency, smooth

DIM, LAYERS = 64, 3
MOST_EDGES = 11_000_000  # of what holds an edges x d array, and PyG an index of its size
PADDED_EDGES = 1_000_000  # on a CPU this layout is far behind, and slow to prepare
DENSE_EDGES = 1_000_000
ROUNDS = 20  # of psi in a program, on an accelerator


def arms(graph: Any) -> dict[str, Any]:
    """Adjacencies by name: those of our layouts that run here at this size."""
    edges = len(graph.edges)
    if on_accelerator():
        options: dict[str, dict[str, Any]] = {
            "edges": {"layout": "edges"},
            "edges, bfloat16": {"layout": "edges", "messages": "bfloat16"},
            "padded": {"layout": "padded"},
        }
        if edges <= DENSE_EDGES:
            options["dense"] = {"layout": "dense"}
        return {name: normalized_adjacency(graph, **given) for name, given in options.items()}
    options = {"rows": {"layout": "rows"}, "auto": {}}
    if edges <= MOST_EDGES:
        options["edges"] = {"layout": "edges"}
    if edges <= PADDED_EDGES:
        options["padded"] = {"layout": "padded"}
    if native.is_built():
        options["compiled"] = {"layout": "compiled"}
        options["compiled, bfloat16"] = {"layout": "compiled", "messages": "bfloat16"}
    return {name: normalized_adjacency(graph, **given) for name, given in options.items()}


def peers(graph: Any, x: np.ndarray) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """psi by PyTorch and by PyG, and how, or why not."""
    try:
        import torch

        from benchmarks import torch_peer
    except ImportError:
        return {}, {"torch CSR": "torch is not installed", "PyG": "torch is not installed"}
    found: dict[str, Callable[[], Any]] = {}
    how = {"torch CSR": "torch.sparse, CSR"}
    table, matrix = torch.from_numpy(x).to(torch_peer.device()), torch_peer.csr(graph)
    found["torch CSR"] = lambda: torch_peer.smooth(lambda y: matrix @ y, table)
    try:
        from torch_sparse import SparseTensor, matmul
    except (ImportError, OSError):
        pass
    else:
        sparse = SparseTensor(
            rowptr=matrix.crow_indices().long(),
            col=matrix.col_indices().long(),
            value=matrix.values(),
            sparse_sizes=tuple(matrix.shape),
            is_sorted=True,
        )
        how["PyG"] = "torch_sparse.matmul, compiled"
        found["PyG"] = lambda: torch_peer.smooth(lambda y: matmul(sparse, y), table)
        return found, how
    try:
        from torch_geometric.utils import scatter
    except ImportError:
        return found, how | {"PyG": "torch_geometric is not installed"}
    if len(graph.edges) > MOST_EDGES:
        return found, how | {"PyG": "without torch_sparse it would hold edges x d"}
    how["PyG"] = "gather and torch_geometric.utils.scatter, as torch_sparse is not installed"
    receivers = torch.from_numpy(np.array(graph.receivers, np.int64)).to(table.device)
    columns, weights = matrix.col_indices().long(), matrix.values()[:, None]
    found["PyG"] = lambda: torch_peer.smooth(
        lambda y: scatter(weights * y[columns], receivers, dim_size=len(y)), table
    )
    return found, how


def moved(num_nodes: int, num_edges: int, message_bytes: int = 4) -> int:
    """Bytes of psi: a layer takes an index, a weight and a row for an edge, and two tables."""
    return LAYERS * (num_edges * (8 + DIM * message_bytes) + 2 * 4 * num_nodes * DIM)


def alone(size: str, data: Path | None, repeats: int) -> dict[str, Any]:
    """Each arm's seconds, GB/s, temporary memory in tables and seconds of compilation."""
    log = log_of(size, data, 512)
    adjacencies = arms(log.graph)
    num_nodes = len(next(iter(adjacencies.values())).isolated)
    x = np.random.default_rng(0).normal(size=(num_nodes, DIM)).astype(np.float32)
    table = jnp.asarray(x)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(table))  # XLA itself has started then
    functions, about, rounds = {}, {}, {}
    for name, adjacency in adjacencies.items():
        began = time.perf_counter()
        psi = jax.jit(lambda adjacency, x: smooth(adjacency, x)).lower(adjacency, table)
        compiled = psi.compile()
        seconds = time.perf_counter() - began
        memory: Any = compiled.memory_analysis()
        about[name] = {
            "compile": seconds,
            "tables": memory.temp_size_in_bytes / table.nbytes,
            "layout": type(adjacency).__name__,
        }
        functions[name] = lambda run=compiled, adjacency=adjacency: run(adjacency, table)
        if on_accelerator():
            # There a call from Python takes longer than psi of a small table does; in a
            # compiled epoch it is not called from there.
            again = jax.jit(_rounds).lower(adjacency, table).compile()
            rounds[name] = lambda run=again, adjacency=adjacency: run(adjacency, table)
    others, how = peers(log.graph, x)
    bandwidth = copy_bandwidth()
    times = turns(functions | rounds | others, repeats)
    edges = len(log.graph.edges)
    reference = _host(functions["edges" if on_accelerator() else "rows"]())
    found = {}
    for name, taken in times.items():
        if name in rounds:
            taken = {key: seconds / ROUNDS for key, seconds in taken.items()}
        wide = moved(num_nodes, edges, 2 if "bfloat16" in name else 4)
        result = _host((functions | others)[name]())
        error = np.linalg.norm(result - reference) / np.linalg.norm(reference)
        speed = {"GB/s": wide / taken["median"] / 1e9, "off": float(error)}
        found[name] = taken | speed | about.get(name, {})
    return {
        "items": num_nodes - 1,
        "edges": edges,
        "real": log.real,
        "copy GB/s": bandwidth,
        "peers": how,
        "arms": found,
    }


def _rounds(adjacency: Any, x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, ROUNDS, lambda _, y: smooth(adjacency, y), x)


def _host(result: Any) -> np.ndarray:
    """Of JAX or of PyTorch, from any device."""
    return np.asarray(result.cpu() if hasattr(result, "cpu") else result)


def seeds(size: str, data: Path | None, repeats: int, number: int = 4) -> dict[str, Any]:
    """psi of several tables under `vmap` against that of one; in a program, as `alone`."""
    log = log_of(size, data, 512)
    rng, functions = np.random.default_rng(0), {}
    psi, rounds = (_rounds, ROUNDS) if on_accelerator() else (smooth, 1)
    for name, adjacency in arms(log.graph).items():
        if name not in ("rows", "compiled", "edges", "padded"):
            continue
        if name in ("edges", "padded") and not on_accelerator():
            continue
        shape = (number, adjacency.num_nodes, DIM)
        tables = jnp.asarray(rng.normal(size=shape), jnp.float32)
        one = jax.jit(lambda adjacency, x: psi(adjacency, x))
        many = jax.jit(jax.vmap(psi, (None, 0)))
        functions[f"{name}, 1"] = lambda f=one, a=adjacency, x=tables[0]: f(a, x)
        functions[f"{name}, {number}"] = lambda f=many, a=adjacency, x=tables: f(a, x)
    times = {
        name: {key: seconds / rounds for key, seconds in taken.items()}
        for name, taken in turns(functions, repeats).items()
    }
    kept = {"number": number, "edges": len(log.graph.edges), "real": log.real, "arms": times}
    return kept | ({"rounds": rounds} if rounds > 1 else {})


# A base, and for each quantity the values that it takes while the others stay.
BASE = {"edges": 2_000_000, "items": 100_000, "width": 64, "layers": 3}
SWEEPS = {
    "edges": (500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000),
    "items": (25_000, 50_000, 100_000, 200_000, 400_000),
    "width": (16, 32, 64, 128, 256),
    "layers": (1, 2, 3, 4, 6),
}


def growth(repeats: int, scale: float = 1.0) -> dict[str, Any]:
    """Seconds of psi in the layout "auto" as one quantity grows, and fits.

    `scale` multiplies edges and items, to try it out.
    """
    found = {}
    for quantity, values in SWEEPS.items():
        functions, at = {}, {}
        for value in values:
            point = BASE | {quantity: value}
            size = Size(int(scale * point["items"]), int(scale * point["edges"] / 14))
            graph: Any = item_graph(blocks(size), size.num_items)
            rng = np.random.default_rng(0)
            x = jnp.asarray(rng.normal(size=(size.num_items, point["width"])), jnp.float32)
            psi = jax.jit(smooth, static_argnames="num_layers")
            adjacency = normalized_adjacency(graph)
            functions[str(value)] = lambda f=psi, a=adjacency, x=x, n=point["layers"]: f(
                a, x, num_layers=n
            )
            sizes = {"edges": len(graph.edges), "items": size.num_items}
            at[str(value)] = sizes.get(quantity, value)
        times = turns(functions, repeats)
        points = [[at[name], taken["median"]] for name, taken in times.items()]
        found[quantity] = {"points": points, **fit(*np.array(points).T)}
    return {"base": BASE, "scale": scale, "sweeps": found}


def fit(size: np.ndarray, seconds: np.ndarray) -> dict[str, float]:
    """The exponent p of seconds ~ size^p, and how much a straight line explains, R^2."""
    power = np.polyfit(np.log(size), np.log(seconds), 1)[0]
    rest = seconds - np.polyval(np.polyfit(size, seconds, 1), size)
    return {"exponent": float(power), "R2": float(1 - rest.var() / seconds.var())}
