"""The clustering of a table against loops over pairs, and the study from end to end."""

import builtins
import json
from typing import Any

import numpy as np
import pytest

from experiments import cli, embeddings, study
from experiments.dataset import Attributes, leave_one_out
from experiments.page import write_page
from experiments.presets import preset
from experiments.report import write_report
from experiments.run import make_trainer, start
from experiments.synthetic import synthetic

SMALL: dict[str, Any] = {"dim": 4, "batch_size": 64, "epochs": 2}


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    labels = np.array([0] * 12 + [1] * 7 + [2] * 5 + [3])  # a group of one
    table = rng.normal(size=(25, 3)) + 2 * rng.normal(size=(4, 3))[labels]
    table[3] = 0  # no direction: at the distance 1 from all
    return table, labels


def distances(table):
    """One minus the cosine of all pairs, by loops."""
    norms = [np.sqrt(row @ row) or 1.0 for row in table]
    return np.array(
        [[1 - a @ b / (n * m) for b, m in zip(table, norms, strict=True)]
         for a, n in zip(table, norms, strict=True)]
    )  # fmt: skip


def test_silhouettes_equal_the_definition(case):
    table, labels = case
    pairs, expected = distances(table), []
    for i, label in enumerate(labels):
        own = [pairs[i, j] for j in range(25) if labels[j] == label and j != i]
        other = min(pairs[i, labels == g].mean() for g in set(labels) - {label})
        if own:
            expected.append((other - np.mean(own)) / max(other, np.mean(own)))
        else:
            expected.append(0)
    np.testing.assert_allclose(embeddings.silhouettes(table, labels), expected, atol=1e-12)
    apart = np.repeat(np.eye(3), 4, axis=0)
    np.testing.assert_allclose(embeddings.silhouettes(apart, np.repeat(range(3), 4)), 1)
    assert abs(embeddings.shuffled(apart, np.repeat(range(3), 4))) < 0.5


def test_same_neighbours_equal_a_sort(case):
    table, labels = case
    pairs, expected = distances(np.delete(table, 3, 0)), []  # without the one that ties
    labels = np.delete(labels, 3)
    for i, label in enumerate(labels):
        near = [j for j in np.argsort(pairs[i]) if j != i][: embeddings.NEIGHBOURS]
        expected.append(np.mean(labels[near] == label))
    found = embeddings.same_neighbours(np.delete(table, 3, 0), labels)
    np.testing.assert_allclose(found, expected)


def test_principal_components(case):
    table, _ = case
    points = embeddings.principal_components(table)
    units = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    values, vectors = np.linalg.eigh(np.cov(units.T))
    np.testing.assert_allclose(points.var(axis=0, ddof=1), values[[2, 1]])
    expected = (units - units.mean(axis=0)) @ vectors[:, [2, 1]]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-12)
    np.testing.assert_allclose(points, embeddings.principal_components(table.copy()))


def test_groups():
    names = ("Action", "Comedy", "Crime", "Western", "unknown")
    # Two of one group; one of two groups; none; only a genre without a group; and others.
    lists = [[0, 2], [0, 1], [], [4], *[[1]] * 6, *[[2]] * 5]
    splits = np.cumsum([0, *map(len, lists)])
    found = embeddings.groups_of(Attributes(names, np.concatenate(lists).astype(int), splits))
    assert found.names == tuple("/".join(embeddings.GENRES[i]) for i in (0, 3))
    assert found.items.tolist() == [0, *range(4, 15)]
    assert found.labels.tolist() == [0] + [1] * 6 + [0] * 5
    communities = synthetic(30, 60, 3).known_attributes()
    assert embeddings.groups_of(communities).names == ("c000", "c001", "c002")
    with pytest.raises(ValueError, match="needs more than 10 items"):
        embeddings.groups_of(Attributes(("a", "b"), np.array([0, 1]), np.arange(3)))


def test_smoothing_brings_communities_together():
    split = leave_one_out(synthetic(num_users=300, num_items=100, num_communities=5))
    config = preset("bert4rec", "synthetic", "sevo_adamw", **SMALL, num_blocks=1, num_heads=1)
    found = dict(embeddings.trained(config, split, (0.0, 0.99), (0, 1)))
    assert list(found) == [0, 1, 2]  # with the last, which is not among `EPOCHS`
    assert {tables.shape for tables in found.values()} == {(2, 2, 100, 4)}
    np.testing.assert_array_equal(*found[0])  # both betas start alike
    assert np.abs(found[2][0] - found[2][1]).max() > 1e-3
    assert np.abs(found[2][:, 0] - found[2][:, 1]).max() > 1e-3


def test_tables_of_stosa_are_the_means():
    split = leave_one_out(synthetic(num_users=80, num_items=60, num_communities=3))
    small = SMALL | {"epochs": 0, "num_heads": 1}
    config = preset("stosa", "synthetic", "sevo_adamw", **small)
    ((_, first),) = embeddings.trained(config, split, (0.9,), (0,))
    params = start(make_trainer(config, split), [0]).params
    np.testing.assert_array_equal(first[0], params["item_mean"]["embedding"][:, 1:])


def test_users_and_items_in_one_graph():
    split = leave_one_out(synthetic(num_users=80, num_items=60, num_communities=3))
    config = preset("mf", "synthetic", "sevo_adamw", **SMALL, graph="users_items")
    found = dict(embeddings.trained(config, split, (0.9,), (0,)))
    assert {tables.shape for tables in found.values()} == {(1, 1, 60, 4)}


def command(out, *more):
    given = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    common = ["ablate", "embeddings", "--model", "mf", "--out", str(out)]
    return [*common, *given, *more]


def test_the_study(tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without_umap(name, *args, **kwargs):
        if name == "umap":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_umap)
    small = synthetic(num_users=300, num_items=120, num_communities=5)
    monkeypatch.setattr("experiments.data.synthetic", lambda: small)
    out = tmp_path / "runs" / "embeddings"
    cli.main(command(out, "--beta", "0.9"))
    assert 'pip install -e ".[umap]"' in capsys.readouterr().out
    assert [path.name for path in out.glob("*.png")] == ["pca.png"]
    kept = json.loads((out / study.FILE).read_text())
    along, by_group = kept["findings"]
    assert [row[:2] for row in along["rows"]] == [["0.9", "0"], ["0.9", "1"], ["0.9", "2"]]
    assert "120 items of one group each (of 120)" in along["title"]
    assert f"by chance {23 / 119:.4f}" in along["title"]
    assert [row[:2] for row in by_group["rows"]] == [[f"c00{i}", "24"] for i in range(5)]
    mean = np.mean([float(row[3]) for row in by_group["rows"]])
    assert mean == pytest.approx(float(along["rows"][-1][2]), abs=1e-3)
    page = tmp_path / "RESULTS.md"
    write_report([tmp_path / "runs"], page)
    assert "| " + " | ".join(along["rows"][0]) + " |" in page.read_text()
    write_page([tmp_path / "runs"], page.with_suffix(".html"))
    assert "data:image/png;base64,iVBOR" in page.with_suffix(".html").read_text()


def test_umap():
    pytest.importorskip("umap", reason="needs umap-learn: pip install -e '.[umap]'")
    method, project = embeddings.projection()
    rng = np.random.default_rng(0)
    table = np.repeat(np.eye(3), 20, axis=0) + 0.05 * rng.normal(size=(60, 3))
    points = project(table)
    assert method == "UMAP" and points.shape == (60, 2)
    assert (
        embeddings.silhouettes(points - points.mean(axis=0), np.repeat(range(3), 20)).mean()
        > 0.5
    )
    np.testing.assert_array_equal(points, project(table))
