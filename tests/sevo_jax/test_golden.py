"""The library against records of the official PyTorch code (tests/golden/README.md).

A deviation beyond the tolerance means that the optimizer computes something else than the
published one. The records change only if the official code is run anew.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sevo_jax
from sevo_jax.layouts import Dense, Edges, Rows
from tests.helpers import GOLDEN, Golden, golden, golden_names

OPTIMIZERS = {
    "AdamWSEvo": sevo_jax.sevo_adamw,
    "AdamSEvo": sevo_jax.sevo_adam,
    "SGDSEvo": sevo_jax.sevo_sgd,
}


def test_records_are_the_ones_described():
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    assert len(manifest["cases"]) == 16
    for case in manifest["cases"]:
        digest = hashlib.sha256((GOLDEN / case["file"]).read_bytes()).hexdigest()
        assert digest == case["sha256"], case["file"]


def _tables(record: Golden, rows: np.ndarray, dtype: np.dtype) -> dict[str, jax.Array]:
    """The stacked rows as the one or two parameters of the group."""
    parts = np.split(rows, np.cumsum(record.arrays["sizes"])[:-1])
    names = ["item"] if len(parts) == 1 else ["user", "item"]
    return {name: jnp.asarray(part, dtype) for name, part in zip(names, parts, strict=True)}


def _num_layers(case: dict[str, Any]) -> int:
    """The re-release's iterative form multiplies the input by A~ anew in each layer instead of
    the previous layer: whatever its L, it is ours at L = 1.
    """
    as_one = case["aggr"] == "iterative" and case["impl"] == "latest"
    return min(case["L"], 1) if as_one else case["L"]


def _run(record: Golden, graphs: list[Any], dtype: np.dtype) -> list[list[tuple[Any, Any]]]:
    """For each graph, parameters and optimizer state after each recorded step.

    The graphs are traced arguments, so all of them share one compiled step.
    """
    case, arrays = record.case, record.arrays
    kwargs = dict(case["kwargs"])
    lr = kwargs.pop("lr")
    if "betas" in kwargs:
        kwargs["b1"], kwargs["b2"] = kwargs.pop("betas")
    assert kwargs.pop("dampening", 0) == 0
    initial = _tables(record, arrays["param0"], dtype)
    solver = OPTIMIZERS[case["optimizer"]](
        lr,
        graphs[0],
        tables=tuple(initial),
        beta=case["beta"],
        num_layers=_num_layers(case),
        method=case["aggr"],
        **kwargs,
    )
    initial["reg"] = jnp.asarray(arrays["reg_param0"], dtype)

    @jax.jit
    def step(grads: Any, state: Any, params: Any, graph: Any) -> tuple[Any, Any]:
        updates, state = solver.update(grads, state, params, graph=graph)
        return optax.apply_updates(params, updates), state

    trajectories = []
    for graph in graphs:
        params, state, trajectory = initial, solver.init(initial), []
        for grad, reg_grad in zip(arrays["grads"], arrays["reg_grads"], strict=True):
            grads = _tables(record, grad, dtype) | {"reg": jnp.asarray(reg_grad, dtype)}
            params, state = step(grads, state, params, graph)
            trajectory.append((params, state))
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
        trajectories.append(trajectory)
    return trajectories


def _stacked(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name]) for name in ("user", "item") if name in tree])


def _compare_params(record: Golden, trajectory: list[Any], key: str, tolerance: float) -> None:
    for t, (params, _) in enumerate(trajectory):
        close: Any = dict(rtol=0, atol=tolerance, err_msg=f"step {t + 1}")
        np.testing.assert_allclose(_stacked(params), record.arrays[f"{key}_params"][t], **close)
        np.testing.assert_allclose(
            params["reg"], record.arrays[f"{key}_reg_params"][t], **close
        )


def _raw_moments(record: Golden, state: Any, t: int) -> dict[str, dict[str, np.ndarray]]:
    """PyTorch's buffers of the tables and of the other parameter, from our state."""
    inner: Any = optax.tree.get(state, "inner_states")
    groups = {"": inner["table"], "reg_": inner["other"]}
    moments = {}
    for prefix, group in groups.items():
        pick = _stacked if not prefix else (lambda tree: np.asarray(tree["reg"]))
        if record.case["optimizer"] == "SGDSEvo":
            moments[prefix] = {"momentum_buffer": pick(optax.tree.get(group, "trace"))}
            continue
        corrected = record.case["optimizer"] == "AdamWSEvo" and not prefix
        names = ("mu_hat", "nu_hat") if corrected else ("mu", "nu")
        mu, nu = (pick(optax.tree.get(group, name)) for name in names)
        if corrected:
            b1, b2 = record.case["kwargs"]["betas"]
            mu, nu = mu * (1 - b1**t), nu * (1 - b2**t)
        moments[prefix] = {"exp_avg": mu, "exp_avg_sq": nu}
    return moments


@pytest.mark.parametrize("name", golden_names("optimizer"))
def test_optimizer_in_float64(name, x64):
    record = golden(name)
    built = sevo_jax.normalized_adjacency(record.graph(), layout="rows")
    graphs = [record.adjacency(Rows), built]
    trajectory, on_built_graph = _run(record, graphs, np.dtype("float64"))
    _compare_params(record, trajectory, "f64", 1e-12)
    _compare_params(record, on_built_graph, "f64", 1e-6)
    compared = 0
    for t, (_, state) in enumerate(trajectory, start=1):
        for prefix, buffers in _raw_moments(record, state, t).items():
            for buffer, value in buffers.items():
                key = f"f64_{prefix}{buffer}"
                if key in record.arrays:  # plain SGD keeps no buffer
                    expected = record.arrays[key][t - 1]
                    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
                    compared += 1
    assert compared or name == "11_sgd_plain"


@pytest.mark.parametrize("name", golden_names("optimizer"))
def test_optimizer_in_float32(name):
    record = golden(name)
    (trajectory,) = _run(record, [record.adjacency(Rows)], np.dtype("float32"))
    _compare_params(record, trajectory, "f32", 1e-5)
    for prefix, buffers in _raw_moments(record, trajectory[-1][1], len(trajectory)).items():
        for buffer, value in buffers.items():
            key = f"f32_{prefix}{buffer}_final"
            if key in record.arrays:
                np.testing.assert_allclose(value, record.arrays[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", golden_names("optimizer") + golden_names("smoother"))
def test_graph(name):
    record = golden(name)
    graph = record.graph()
    arrays = record.arrays
    if "raw_val" in arrays:
        order = np.lexsort((arrays["raw_col"], arrays["raw_row"]))
        np.testing.assert_array_equal(graph.receivers, arrays["raw_row"][order])
        np.testing.assert_array_equal(graph.senders, arrays["raw_col"][order])
        np.testing.assert_allclose(graph.edges, arrays["raw_val"][order], rtol=1e-6)
    adjacency = sevo_jax.normalized_adjacency(graph, layout="edges")
    assert isinstance(adjacency, Edges)
    np.testing.assert_array_equal(adjacency.receivers, arrays["adj_row"])
    np.testing.assert_array_equal(adjacency.senders, arrays["adj_col"])
    np.testing.assert_allclose(adjacency.weights, arrays["adj_val"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [Rows, Edges, Dense])
@pytest.mark.parametrize("name", golden_names("smoother"))
def test_smoother(name, layout, dtype):
    record = golden(name)
    adjacency = record.adjacency(layout)
    x = jnp.asarray(record.arrays["features"], dtype)
    precision, tolerance = {"float32": ("f32", 1e-5), "float64": ("f64", 1e-12)}[dtype.name]
    keys = [key for key in record.case["output_keys"] if key.startswith(precision)]
    for key in keys:
        _, impl, method, beta, num_layers = key.split("_")
        case = {"aggr": method, "impl": impl, "L": int(num_layers[1:])}
        y = sevo_jax.smooth(
            adjacency, x, beta=float(beta[1:]), num_layers=_num_layers(case), method=method
        )
        np.testing.assert_allclose(y, record.arrays[key], rtol=0, atol=tolerance, err_msg=key)
    assert keys
