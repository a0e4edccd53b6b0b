"""What is recommended, of runs over a file of interactions."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, recommend
from experiments.backbones import prepare, user_item_graph
from experiments.config import Config
from experiments.dataset import leave_one_out
from experiments.loaders import load
from experiments.objectives import MaskedItem
from experiments.presets import preset
from experiments.recommend import Recommender, top_items
from experiments.run import fit
from experiments.run_folder import load_run
from experiments.synthetic import synthetic


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    dataset = synthetic(num_users=120, num_items=100, num_communities=2)
    path = tmp_path_factory.mktemp("data") / "small.csv"
    rows = zip(dataset.users, dataset.values, range(dataset.num_interactions), strict=True)
    path.write_text("user,item,timestamp\n" + "".join(f"u{u},i{i},{t}\n" for u, i, t in rows))
    return path


@pytest.fixture(scope="module")
def dataset(data):
    return load(data, k_core=3)


@pytest.fixture(scope="module")
def runs(data, dataset, tmp_path_factory) -> Path:
    """A run of each model below one folder."""
    out = tmp_path_factory.mktemp("runs")
    small: dict[str, Any] = {"dim": 8, "epochs": 1, "batch_size": 64}
    for model in ("sasrec", "bert4rec", "mf", "lightgcn"):
        config = replace(preset(model, dataset.name, "adamw"), **small)
        if config.windows != "users":
            config = replace(config, max_length=10)
        where: Any = {"source": str(data), "data_options": "--k-core 3"}
        fit(config, leave_one_out(dataset), (3, 5), out / model, **where)
    return out


@pytest.fixture(scope="module")
def sasrec(runs) -> Path:
    return runs / "sasrec"


def names(dataset, items) -> list[str]:
    return [str(dataset.item_ids[item]) for item in items]


def assert_ranked(found, dataset, scores: np.ndarray, history) -> None:
    """All items but those of the history, with these scores, best first."""
    expected = {str(name): score for name, score in zip(dataset.item_ids, scores, strict=True)}
    assert {item for item, _ in found} == set(expected) - set(history)
    for item, score in found:
        assert score == pytest.approx(expected[item], abs=1e-5)
    assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)


@pytest.mark.parametrize("model", ["sasrec", "bert4rec"])
def test_scores_of_a_history_are_those_of_the_padded_model(runs, dataset, model):
    """Of the newest items, with room for the query at the end that BERT4Rec needs."""
    folder = runs / model
    module, _, config = load_run(folder, 3)
    items = np.random.default_rng(0).permutation(dataset.num_items)[:14]
    query = [MaskedItem.MASK] if model == "bert4rec" else []
    room = config.max_length - len(query)
    row = [*(items[-room:] + module.num_special), *query]
    states = module(jnp.array([row]))[:, -1]
    scores = np.asarray(module.score_all(states, module.items()))[0]
    history = names(dataset, items)
    assert_ranked(top_items(folder, history, 1000, 3), dataset, scores, history)
    assert len(top_items(folder, history, top=7)) == 7


@pytest.mark.parametrize("model", ["mf", "lightgcn"])
def test_scores_of_a_user_are_those_of_its_row(runs, dataset, model):
    folder = runs / model
    module, _, _ = load_run(folder, 5)
    row = 17
    if model == "mf":
        users, items = module.users(jnp.arange(dataset.num_users)), module.items()
    else:
        users, items = module.propagate(prepare(user_item_graph(leave_one_out(dataset))))
    scores = np.asarray(users[row] @ items.T)
    history = names(dataset, dataset.sequence(row))
    found = top_items(folder, top=1000, seed=5, user=str(dataset.user_ids[row]))
    assert_ranked(found, dataset, scores, history)
    with pytest.raises(ValueError, match=f"holds {model}, which knows no sequences; give a `u"):
        top_items(folder, history)


def test_a_user_of_the_data_stands_for_its_history(sasrec, dataset):
    history = names(dataset, dataset.sequence(4))
    user = str(dataset.user_ids[4])
    assert top_items(sasrec, user=user) == top_items(sasrec, history)


@pytest.mark.parametrize("model", ["sasrec", "bert4rec", "mf", "lightgcn"])
def test_many_have_what_each_has_alone(runs, dataset, model, monkeypatch):
    """Over several chunks, the last of which is not full."""
    monkeypatch.setattr(recommend, "_CHUNK", 50)
    recommender = Recommender(runs / model, 3)
    found = recommender.for_users(top=4)
    assert list(found) == [str(user) for user in dataset.user_ids]
    for row in (0, 49, 50, dataset.num_users - 1):
        user = str(dataset.user_ids[row])
        alone = recommender.for_users([user], top=4)[user]
        assert [item for item, _ in found[user]] == [item for item, _ in alone]
        many, one = ([score for _, score in best] for best in (found[user], alone))
        np.testing.assert_allclose(many, one, rtol=1e-4)


def test_excluded_items_are_nobodys(sasrec, dataset):
    recommender = Recommender(sasrec)
    histories = [names(dataset, dataset.sequence(row)) for row in (3, 4)]
    before = recommender.for_histories(histories, top=5)
    exclude = [before[0][0][0], before[1][1][0]]
    after = recommender.for_histories(histories, top=100, exclude=exclude)
    for left, all_of_them in zip(after, before, strict=True):
        kept = [item for item, _ in all_of_them if item not in exclude]
        assert [item for item, _ in left][: len(kept)] == kept
        assert not set(exclude) & {item for item, _ in left}
    with pytest.raises(ValueError, match="does not know the item nothing"):
        recommender.for_histories(histories, exclude=["nothing"])
    with pytest.raises(ValueError, match="at least one item"):
        recommender.for_histories([histories[0], []])
    with pytest.raises(TypeError, match="got the string 'i1'"):
        recommender.for_histories(["i1"])


def test_the_command_writes_a_file(sasrec, dataset, tmp_path, capsys):
    path = tmp_path / "new" / "best.csv"
    asked = ["recommend", "--run", str(sasrec), "--top", "3", "--out", str(path)]
    cli.main([*asked, "--all-users"])
    lines = path.read_text().splitlines()
    assert lines[0] == "user,rank,item,score" and len(lines) == 1 + 3 * dataset.num_users
    user = str(dataset.user_ids[5])
    best = top_items(sasrec, user=user, top=3)
    mine = [line.split(",") for line in lines if line.startswith(f"{user},")]
    assert [(int(rank), item) for _, rank, item, _ in mine] == [
        (rank, item) for rank, (item, _) in enumerate(best, start=1)
    ]
    for options in ([], ["--all-users", "--user", user]):
        with pytest.raises(SystemExit):
            cli.main([*asked, *options])
        assert "give one of `history`, `user` and `all_users`" in capsys.readouterr().err


def test_the_data_must_be_there_and_the_same(sasrec, dataset, data, tmp_path):
    user = str(dataset.user_ids[0])
    moved = tmp_path / "small.csv"
    held = (sasrec / "run.json").read_text()
    run = shutil.copytree(sasrec, tmp_path / "run")

    def write(old: str, new: str) -> None:
        assert old in held
        (run / "run.json").write_text(held.replace(old, new))

    write(str(data), str(moved))
    with pytest.raises(
        ValueError, match=r"small\.csv, which .*run was trained on, is not there"
    ):
        top_items(run, user=user)
    moved.write_text(data.read_text() + "u1,i1,9999\n")
    with pytest.raises(ValueError, match=r"small\.csv is no longer what .*run was trained on"):
        top_items(run, user=user)
    moved.write_text(data.read_text())
    assert top_items(run, user=user) == top_items(sasrec, user=user)
    write("--k-core 3", "--gone 3")
    with pytest.raises(ValueError, match="has other options of data than this version"):
        top_items(run, user=user)
    write(str(data), "")  # as `fit` keeps it without a `source`
    with pytest.raises(ValueError, match="does not say what its data are"):
        top_items(run, user=user)


def test_a_run_of_few_users_knows_all_of_them(dataset, data, tmp_path):
    config = Config(dim=8, epochs=0, optimizer="adamw", train_users=0.5)
    where: Any = {"source": str(data), "data_options": "--k-core 3"}
    fit(config, leave_one_out(dataset), (0,), tmp_path / "run", **where)
    for user in dataset.user_ids[:4]:
        assert len(top_items(tmp_path / "run", user=str(user))) == 10


def test_a_history_is_no_string(sasrec):
    with pytest.raises(TypeError, match="`history` must be a sequence of ids, got the string"):
        top_items(sasrec, "11")
    with pytest.raises(ValueError, match="`top` must be a positive integer, got 2.5"):
        top_items(sasrec, np.array(["i1"]), top=2.5)  # type: ignore


@pytest.mark.parametrize("by", ["history", "user"])
def test_the_command_prints_what_is_recommended(sasrec, dataset, capsys, by):
    history, user = names(dataset, dataset.sequence(0)), str(dataset.user_ids[0])
    asked = ["--history", *history] if by == "history" else ["--user", user]
    cli.main(["recommend", "--run", str(sasrec), "--top", "2", *asked])
    printed = capsys.readouterr().out
    for rank, (item, score) in enumerate(top_items(sasrec, history, top=2), start=1):
        assert re.search(rf"{rank}\W+{re.escape(item)}\W+{score:.4f}", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": []}, "a `history` of at least one item or a `user`, and not both"),
        ({"user": "u1"}, "a `history` of at least one item or a `user`, and not both"),
        ({"history": ["i1", "x"]}, r"know the item x\. Its \d+ items are named like i"),
        ({"history": [], "user": "x"}, r"know the user x\. Its \d+ users are named like u"),
        ({"top": 0}, "`top` must be a positive integer, got 0"),
        ({"seed": 9}, r"`seed` must be one of the run's \[3, 5\], got 9"),
    ],
)
def test_what_is_wrong_is_said(sasrec, arguments, message):
    with pytest.raises(ValueError, match=message):
        top_items(sasrec, **({"history": ["i1"]} | arguments))


def test_a_run_is_needed(sasrec, tmp_path):
    with pytest.raises(ValueError, match=r"holds no run: there is no run\.json in it\.$"):
        top_items(tmp_path, ["1"])
    with pytest.raises(ValueError, match=f"Runs are in .*{re.escape(str(sasrec))}"):
        top_items(sasrec.parent, ["1"])
