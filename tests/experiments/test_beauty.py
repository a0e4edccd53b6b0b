"""SASRec + SEvo-AdamW on Amazon Beauty against the official code's curves.

AdamW leads until about epoch 20, so no test here asserts a gain.
"""

import csv

import jax
import jax.numpy as jnp
import pytest

from experiments.dataset import leave_one_out
from experiments.loaders import load
from experiments.presets import preset
from experiments.published import _SEVO, _USERS_ITEMS, CURVES
from experiments.ranking import collect, metrics, ranking_data
from experiments.run import make_trainer
from tests.data_path import data_folder
from tests.processes import output, start

OFFICIAL = CURVES["sasrec", "amazon_beauty"]


def follow(epochs: int) -> None:
    """Trains one seed; compares at each epoch of the official curve."""
    split = leave_one_out(load(data_folder("amazon_beauty")))
    config = preset("sasrec", "amazon_beauty", "sevo_adamw")
    trainer = make_trainer(config, split)
    state = trainer.init(jax.vmap(jax.random.key)(jnp.arange(1)))
    valid = split.evaluation("valid")
    (data,), num_slots = ranking_data([valid], max_length=config.max_length)
    for epoch in range(1, epochs + 1):
        state, loss = trainer.epoch(state, epoch)
        if epoch not in OFFICIAL:
            continue
        expected, lowest, highest = OFFICIAL[epoch]
        assert float(loss[0]) == pytest.approx(expected, rel=0.03), f"epoch {epoch}"
        if lowest is not None and highest is not None:
            ranks = collect(trainer.rank(state.params, data, num_slots), len(valid.targets))
            score = metrics(ranks, ["NDCG@10"])["NDCG@10"][0]
            assert lowest - 0.0015 <= score <= highest + 0.0015, f"epoch {epoch}"


def test_the_first_epochs_follow_the_official_curve():
    data_folder("amazon_beauty")
    # As a user compiles it: without optimizations, as the other tests, it takes thrice as long.
    program = "from tests.experiments.test_beauty import follow; follow(5)"
    output(start("-c", program, devices=1, XLA_FLAGS=""), timeout=500)


@pytest.mark.slow
def test_forty_epochs_follow_the_official_curve():
    follow(40)


def test_published_constants_are_those_of_the_official_logs():
    path = data_folder("amazon_beauty").parents[1] / "reference" / "official_summary.csv"
    if not path.exists():
        pytest.skip("the official summary is not here")
    names = ("hr1", "hr5", "hr10", "ndcg5", "ndcg10")
    models = {"MF-BPR(I-I)": "mf", "GRU4Rec": "gru4rec", "SASRec": "sasrec"}
    models |= {"BERT4Rec": "bert4rec", "STOSA": "stosa"}
    data = {"Beauty": "amazon_beauty", "Toys": "amazon_toys", "Tools": "amazon_tools"}
    checked = 0
    for row in csv.DictReader(path.read_text().splitlines()):
        place = next((v for k, v in data.items() if k in row["dataset"]), "movielens_1m")
        if (pairs := row["backbone"] == "MF-BPR(U-I)") and ("mf", place) in _USERS_ITEMS:
            beta, *known = _USERS_ITEMS["mf", place]
            assert beta == float(row["beta3"])
        elif not pairs and (models.get(row["backbone"]), place) in _SEVO:
            known = _SEVO[models[row["backbone"]], place]
        else:
            continue
        for part, values in zip(("mean", "std"), known, strict=True):
            expected = [float(row[f"test_{name}_{part}"]) for name in names]
            assert values == pytest.approx(expected, abs=6e-6), (row["backbone"], place, part)
        checked += 1
    assert checked == len(_SEVO) + len(_USERS_ITEMS)
