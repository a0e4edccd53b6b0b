"""The studies against slow references, and how they are kept and reported."""

import itertools
import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments import cli, cost, smoothness, study, theory
from experiments.config import Config
from experiments.dataset import leave_one_out
from experiments.options import Ablate
from experiments.page import write_page
from experiments.presets import preset
from experiments.report import keep, write_report
from experiments.synthetic import synthetic
from sevo_jax import normalized_adjacency, sevo_adamw
from tests.helpers import dense, of_tables, random_graph, reference_normalized, reference_smooth

TINY = Config(dim=4, num_blocks=1, max_length=10, batch_size=64, epochs=2, eval_every=1)


def energy_of(graph, table):
    """Tr(X^T (I - A~) X) in NumPy."""
    laplacian = np.eye(len(table)) - reference_normalized(dense(graph))
    return np.trace(table.T @ laplacian @ table)


def test_monitors_measure_both_sides_of_psi_and_change_nothing(x64):
    graph = random_graph(0)
    adjacency = normalized_adjacency(graph)
    config = replace(TINY, beta=0.9, learning_rate=0.1, weight_decay=0.01)
    monitored = smoothness.monitored_adamw(config, adjacency, config.beta)
    adam: Any = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    plain = sevo_adamw(0.1, adjacency, beta=0.9, weight_decay=0.01, **adam)
    rng = np.random.default_rng(0)
    params = {"item_embedding": jnp.asarray(rng.normal(size=(20, 3))), "bias": jnp.ones(3)}
    states: Any = (monitored.init(params), plain.init(params))
    memory, weight = {"before": 0.0, "after": 0.0}, 0.0
    mu: Any
    nu: Any
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
        found, first = monitored.update(grads, states[0], params)
        expected, second = plain.update(grads, states[1], params)
        states = first, second
        # But for rounding: the library smooths after the learning rate.
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
        # The direction before the smoothing, as the state of the plain chain has it.
        mu, nu = (of_tables(states[1], name) for name in ("mu_hat", "nu_hat"))
        direction = mu["item_embedding"] / (np.sqrt(nu["item_embedding"]) + config.eps)
        after = reference_smooth(
            reference_normalized(dense(graph)), direction, 0.9, 3, "neumann"
        )
        weight = smoothness.MEMORY * weight + 1 - smoothness.MEMORY
        for name, table in (("before", direction), ("after", after)):
            mean = smoothness.MEMORY * memory[name]
            memory[name] = mean + (1 - smoothness.MEMORY) * energy_of(graph, np.asarray(table))
            measured = optax.tree.get(states[0], name)
            np.testing.assert_allclose(measured, memory[name] / weight, rtol=1e-4)


def test_smoothness_along_training():
    split = leave_one_out(synthetic(num_users=120, num_items=60, num_communities=3))
    small: Any = {"dim": 4, "batch_size": 64, "epochs": 2, "eval_every": 1}
    config = preset("mf", "synthetic", "sevo_adamw", **small)  # the quickest to compile
    found = dict(smoothness.measure(config, split, (0.0, 0.9), (3, 4)))
    assert list(found) == [1, 2]
    for values in found.values():
        assert {v.shape for v in values.values()} == {(2, 2)}
        np.testing.assert_allclose(values["after"][0], values["before"][0], rtol=1e-5)
        assert (values["after"][1] < values["before"][1] / 4).all()
        assert len(set(values["table"].ravel())) == 4  # each beta and seed is its own run
    assert (found[2]["NDCG@10"] >= 0).all()
    diverging = replace(config, learning_rate=1e38)
    with pytest.raises(FloatingPointError, match="the loss is not finite in epoch"):
        list(smoothness.measure(diverging, split, (0.5,), (3,)))


@pytest.mark.parametrize("family", theory.FAMILIES)
@pytest.mark.parametrize("method", ["neumann", "iterative"])
def test_smallest_eigenvalue(family, method):
    graph = theory.FAMILIES[family](1)
    weights = dense(graph)
    np.testing.assert_array_equal(weights, weights.T)
    psi = reference_smooth(reference_normalized(weights), np.eye(len(weights)), 0.7, 3, method)
    smallest = np.linalg.eigvalsh(psi)[0]
    assert theory.smallest_eigenvalue(graph, 0.7, 3, method) == pytest.approx(
        smallest, abs=1e-5
    )
    bound = theory.lower_bound(0.7, 3, method)
    assert smallest >= bound - 1e-9
    if family == "bipartite":  # has the eigenvalue -1, where both are lowest for odd L
        assert smallest == pytest.approx(bound, abs=1e-9)


@pytest.mark.parametrize("num_layers", range(7))
@pytest.mark.parametrize("method", ["neumann", "iterative"])
def test_lower_bound_is_the_least_value_of_the_polynomial(num_layers, method):
    points = np.linspace(-1, 1, 20_001)[:, None]  # as a table of one-node graphs
    values = [reference_smooth(np.array([[x]]), np.ones((1, 1)), 0.8, num_layers, method)
              for x in points[::40, 0]]  # fmt: skip
    bound = theory.lower_bound(0.8, num_layers, method)
    assert bound == pytest.approx(np.min(values), abs=1e-3) and bound <= np.min(values) + 1e-9


def test_steps_of_gradient_descent(monkeypatch):
    monkeypatch.setattr(theory, "MAX_STEPS", 150)
    plain, smoothed, strong = theory.steps_needed(0, (0.0, 0.5, 0.99), rescale=False)
    assert plain < smoothed < 150 and np.isnan(strong)
    rescaled = theory.steps_needed(0, (0.0, 0.5), rescale=True)
    assert rescaled[0] == plain and plain < rescaled[1] < smoothed
    steps = np.array([3.0, 6.0, 15.0, np.nan])
    assert theory.exponent((0.0, 0.5, 0.8, 0.9), steps) == pytest.approx(1)


def test_alternate_takes_turns_and_returns_medians():
    calls: list[str] = []
    times = iter([0, 9, 10, 99, 100, 101, 200, 204, 300, 303, 400, 402, 500, 502, 600, 607])

    def function(name):
        return lambda: calls.append(name)

    found = cost.alternate([function("a"), function("b")], 3, clock=lambda: next(times))
    assert calls == ["a", "b"] * 4  # the first turn compiles and does not count
    assert found == [2, 4]


def test_cost_of_backbones(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 2)
    options = Ablate(name="cost", arms=("mf",), batch_size=512, dim=4)
    (found,) = cost.study(options, tmp_path, Console())
    (row,) = (dict(zip(found.head, row, strict=True)) for row in found.rows)
    assert row["model"] == "mf" and row["published overhead"] == "+6.0 %"
    for what, ratio in (("s/epoch", row["overhead"]), ("s/ranking", row["more"])):
        plain, sevo = (float(row[f"{what}, {name}"]) for name in ("AdamW", "SEvo"))
        assert min(plain, sevo) > 0
        # The seconds are printed with four digits after the point.
        assert float(ratio.removesuffix(" %")) / 100 + 1 == pytest.approx(
            sevo / plain, rel=0.05
        )
    for change, message in (
        ({"arms": ("gpt",)}, "`arms` must be of"),
        ({"model": "mf"}, "`cost` takes models as `arms` and one seed, got `model` 'mf'"),
        ({"seeds": (0, 1)}, "`cost` takes models as `arms` and one seed, .* `seeds` .0, 1."),
        ({"momentum": 0.3}, "`momentum` changes nothing"),
        ({"epochs": 7}, "`epochs` changes nothing in `cost` without"),
        ({"eval_every": 3}, "`eval_every` changes nothing in `cost`"),
        ({"arms": ("electronics",), "data": "a.csv"}, "`data` a.csv and its options change"),
        ({"arms": ("electronics",), "k_core": 5}, "`data` synthetic and its options change"),
    ):
        with pytest.raises(ValueError, match=message):
            cost.study(replace(options, **change), tmp_path, Console())


def test_a_large_catalogue_is_generated_with_its_edges(monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 2)
    size = cost.Size(num_users=3000, num_items=2000)
    values, row_splits = cost.sequences(size)
    assert len(row_splits) == 3001 and values.min() >= 0 and values.max() < 2000
    counts = np.sort(np.bincount(values, minlength=2000))[::-1]
    assert counts[:200].sum() > 2 * counts[200:400].sum()  # a long tail
    config = Config(dim=4, num_blocks=1, max_length=10, smooth_every=2)
    configs = [replace(config, optimizer="adamw", smooth_every=1), config]
    edges, num_steps, milliseconds = cost.steps(size, configs, users=512)
    assert num_steps == 1
    prefixes = [replace(one, windows="prefixes", batch_size=256) for one in configs[:1]]
    assert cost.steps(size, prefixes, users=128)[1] == 128 * (cost.LENGTH - 3) // 256 + 1
    rows = values.reshape(3000, cost.LENGTH)
    pairs = {(a, b) for row in rows for a, b in itertools.pairwise(row)}
    assert edges == len(pairs | {(b, a) for a, b in pairs}) and min(milliseconds) > 0


def test_a_study_is_kept_and_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(theory, "MAX_STEPS", 100)
    monkeypatch.setattr(theory, "LAYERS", range(2))
    out = tmp_path / "runs" / "theory"
    command = ["ablate", "theory", "--seeds", "0", "1", "--out", str(out)]
    cli.main(command)
    (out / "theory.png").write_bytes(b"\x89PNG")
    assert "direction-aware" in capsys.readouterr().out
    kept = json.loads((out / study.FILE).read_text())
    assert study.command_of(kept) == "python -m experiments ablate theory --seeds 0 1"
    assert all(len(row) == len(f["head"]) for f in kept["findings"] for row in f["rows"])
    for wrong in (command, ["ablate", "theory", "--dim", "4", "--out", str(tmp_path / "new")]):
        with pytest.raises(SystemExit):
            cli.main(wrong)
    assert (
        "holds a study" in (errors := capsys.readouterr().err)
        and "`seeds` and `out` alone" in errors
    )
    # Found out before the work.
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made, since .*file is a file"):
        study.run(Ablate(name="theory", out=tmp_path / "file" / "x"), Console())
    keep([tmp_path / "runs"], tmp_path / "kept")
    page = tmp_path / "RESULTS.md"
    assert write_report([tmp_path / "kept"], page) == 1
    text = page.read_text()
    assert (
        "### theory\n" in text and "`python -m experiments ablate theory --seeds 0 1`" in text
    )
    for row in kept["findings"][0]["rows"]:
        assert "| " + " | ".join(row) + " |" in text
    write_page([tmp_path / "kept"], page.with_suffix(".html"))
    html = page.with_suffix(".html").read_text()
    assert 'id="theory"' in html and "data:image/png;base64,iVBORw==" in html


def test_a_study_names_what_it_was_given(tmp_path):
    options = ["--model", "mf", "--epochs", "1", "--dim", "4", "--beta", "0.5"]
    data = tmp_path / "log.csv"
    rng = np.random.default_rng(0)
    lines = [f"u{u},i{i},{t}" for u in range(30) for t, i in enumerate(rng.permutation(12)[:5])]
    data.write_text("\n".join(["user,item,timestamp", *lines]))
    out = tmp_path / "out"
    cli.main(["ablate", "smoothness", "--data", str(data), "--out", str(out), *options])
    kept = json.loads((out / study.FILE).read_text())
    assert study.title_of(kept) == "smoothness, beta 0.5, dim 4, epochs 1: mf on log"
    assert [row[:2] for row in kept["findings"][0]["rows"]] == [["0.5", "1"]]
    assert (out / "smoothness.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        gradient = ["--placement", "gradient", "--out", str(tmp_path / "other")]
        cli.main(["ablate", "smoothness", "--data", str(data), *gradient, *options])
