"""SASRec + SEvo-AdamW on Amazon Beauty against the official code's curves.

AdamW leads until about epoch 20, so no test here asserts a gain.
"""

import jax
import jax.numpy as jnp
import pytest

from experiments.dataset import leave_one_out
from experiments.loaders import load
from experiments.presets import preset
from experiments.published import CURVES
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
