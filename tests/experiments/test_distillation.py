"""The ablation of Table 5 on little data: every arm trains, resumes and is reported."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import cli, report
from experiments.batching import training_data
from experiments.config import Config
from experiments.dataset import leave_one_out
from experiments.distillation import TEACHER, Distilled, distillation, distilled, teacher_graph
from experiments.objectives import NextItem
from experiments.presets import preset
from experiments.published import published_arm
from experiments.run import make_trainer
from experiments.run_folder import load_run
from experiments.synthetic import synthetic
from models import SASRec
from models import distillation as losses
from models.distillation import Entities, Groups, Scored
from tests.helpers import dense

BEAUTY = {"name": "amazon_beauty", "items": 12_101, "train": 153_776}


def little():
    return synthetic(num_users=60, num_items=40, num_communities=2)


def write_log(path):
    found = little()
    users = np.repeat(np.arange(found.num_users), np.diff(found.row_splits))
    rows = np.stack([users, found.values, np.arange(len(users))], axis=1)
    np.savetxt(path, rows, "%d", ",", header="user,item,timestamp", comments="")


def test_the_command(tmp_path, capsys):
    path, out, page = tmp_path / "amazon_beauty.csv", tmp_path / "out", tmp_path / "R.md"
    write_log(path)
    command = ["ablate", "distillation", "--data", str(path), "--out", str(out)]
    command += ["--num-blocks", "1", "--epochs", "1", "--distil-slots", "0.5"]
    command += ["--arms", "HTD", "SEvo + DKD"]
    jax.config.update("jax_disable_most_optimizations", True)  # nearly all time is compilation
    try:
        cli.main(command)
        first = {p.parent.name: p.read_bytes() for p in out.rglob("ranks.npz")}
        teacher = next(out.rglob("teacher/run.json"))
        kept = (teacher.stat().st_mtime_ns, len(json.loads(teacher.read_text())))
        cli.main([*command, "--resume"])
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    again = {p.parent.name: p.read_bytes() for p in out.rglob("ranks.npz")}
    assert set(first) == {TEACHER, "HTD", "SEvo_+_DKD"} and first == again
    assert (teacher.stat().st_mtime_ns, len(json.loads(teacher.read_text()))) == kept
    for name, dim in ((TEACHER, 200), ("HTD", 20)):  # with its experts beside it
        module, _, config = load_run(next(out.rglob(f"{name}/run.json")).parent)
        assert module.item_embedding.embedding.shape == (41, dim) and config.dim == dim
    assert len(list(report.tested([out]))) == 3
    report.write_report([out], page)
    text = page.read_text()
    assert "published" not in text  # of other data, and with other settings
    assert "ablate distillation --data amazon_beauty" in text
    capsys.readouterr()


def test_arms():
    def make(optimizer, **settings):
        return preset("sasrec", "amazon_beauty", optimizer, **settings)

    arms = distillation(make)
    for arm, config in arms.items():
        assert published_arm("distillation", "sasrec", BEAUTY, arm, {})
        assert config.dim == (200 if arm == TEACHER else 20)
        assert config.has_teacher == (arm not in ("student", TEACHER))
    for data in (BEAUTY | {"name": "amazon_toys"}, BEAUTY | {"train": 1000}):
        assert published_arm("distillation", "sasrec", data, TEACHER, {}) is None
    assert published_arm("distillation", "sasrec", BEAUTY, TEACHER, {"epochs": 15}) is None
    with pytest.raises(ValueError, match="needs a `teacher`"):
        make_trainer(arms["KD"], leave_one_out(little()))
    wrong: Any = (
        ({"model": "stosa", "distil": "kd"}, "is for sasrec and gru4rec"),
        ({"distil": "rkd", "loss": "cross_entropy"}, "needs a `loss` with negatives"),
    )
    for settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            Config(**settings)


def test_some_slots_stand_for_all():
    """Drawn among those that count, each as likely as the others; the whole share is all."""
    weights = jnp.array([1.0, 0, 1, 1, 0, 1, 1, 1])
    for share, num in ((0.25, 2), (1.0, 8)):
        objective = Distilled("bce", 5, share=share)
        keys = jax.random.split(jax.random.key(0), 600)
        drawn = np.asarray(jax.vmap(lambda key, o=objective: o.slots(key, weights))(keys))
        assert drawn.shape == (600, num) and all(len(set(row)) == num for row in drawn)
        if share < 1:
            counts = np.bincount(drawn.ravel(), minlength=8)
            assert not counts[[1, 4]].any() and counts[weights > 0].min() > 150


@pytest.mark.parametrize("distil", ["kd", "dkd", "rkd", "htd"])
def test_the_term_of_each_kind_in_the_loss(distil: Any):
    """Weighted, of a teacher without dropout, and for htd of each item once."""
    num_items, weight = 9, 2.5
    student: Any = SASRec(num_items, dim=4, num_blocks=1, dropout_rate=0.0, rngs=nnx.Rngs(0))
    teacher = SASRec(num_items, dim=6, num_blocks=1, dropout_rate=0.5, rngs=nnx.Rngs(1))
    student.groups = Groups(4, 6, num_groups=2, rngs=nnx.Rngs(2))
    train = np.array([0, 1, 2, 3, 4, 2, 1, 4, 5, 0]), np.array([0, 5, 10])
    plain = NextItem("bce", num_items, num_negatives=2)
    data = training_data(train, num_items, max_length=5)
    batch = plain.sample(jax.random.key(3), data, jnp.arange(3), 16)
    made, context = distilled(plain, Config(distil=distil, distil_weight=weight), teacher)
    key = jax.random.key(4)
    found = made.loss(student, batch, key, context)

    states, items = plain.forward(student, batch, None)
    teachers, their_items = plain.forward(teacher, batch, None)
    used = np.flatnonzero(batch.weights)
    weights = jnp.ones(len(used))
    sides: Any = [Scored(m.score_all, s[used], m.items()) for m, s in
             ((student, states), (teacher, teachers))]  # fmt: skip
    if distil == "kd":
        term = losses.kd(sides[0], sides[1], weights)
    elif distil == "dkd":
        term = losses.dkd(sides[0], sides[1], batch.targets[used] - 1, weights)
    elif distil == "rkd":
        own, wanted = (states[used], items[:, used]), (teachers[used], their_items[:, used])
        term = losses.rkd(own, wanted, weights)
    else:
        last = np.asarray(batch.stream.last)
        drawn = [batch.targets[last], batch.negatives[last].ravel()]
        once: Any = np.unique(np.concatenate(drawn))
        assert len(once) < 3 * len(last)  # some come twice
        rows: Any = np.zeros(3 * len(last), int)
        rows[: len(once)] = once
        term = losses.htd(
            student.groups,
            Entities(states[last], student.items(rows)),
            Entities(teachers[last], teacher.items(rows)),
            Entities(batch.stream.lengths > 0, jnp.asarray(rows > 0)),
            jax.random.split(key)[1],
        )
    expected = plain.against(student, batch, states, items) + weight * term
    assert term > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_teachers_graph_joins_items_alone():
    teacher = SASRec(30, dim=8, num_blocks=1, rngs=nnx.Rngs(0))
    table = np.array(teacher.item_embedding.embedding[...])
    table[0] = table[1]  # padding, as near as can be
    teacher.item_embedding.embedding[...] = jnp.asarray(table)
    weights = dense(teacher_graph(teacher))
    assert not weights[0].any() and not weights[:, 0].any()
    unit = table[1:] / np.linalg.norm(table[1:], axis=1, keepdims=True)
    similarity = unit @ unit.T - 2 * np.eye(30)
    for i, row in enumerate(similarity):
        nearest = [j for j in np.argsort(-row)[:10] if row[j] > 0]
        np.testing.assert_allclose(
            weights[i + 1, np.array(nearest) + 1], row[nearest], rtol=1e-5
        )
