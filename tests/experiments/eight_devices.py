"""Tests that need eight devices; `test_mesh.py` runs them in a process that has as many."""

import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.config import Config
from experiments.dataset import leave_one_out
from experiments.mesh import make_mesh
from experiments.ranking import collect, ranking_data
from experiments.run import fit, make_trainer, start
from experiments.synthetic import synthetic
from experiments.training import round_up

# 101 rows of the table, or 100 for mf: filled up to 104, but on four devices mf needs no more.
SPLIT = leave_one_out(synthetic(num_users=60, num_items=100, num_communities=2))
# Batches of 30 windows in 8 streams; the last stream of a batch is the shortest.
SASREC = Config(dim=8, max_length=8, num_blocks=1, batch_size=30, streams=8)
MF = Config(
    model="mf",
    windows="users",
    loss="bpr",
    dim=8,
    batch_size=300,
    learning_rate=0.01,
    streams=8,
    epochs=1,
    eval_every=1,
)
SEEDS = (3, 5)
# The rest of what trains on a mesh; most of a test's time is compilation.
OTHERS = {
    "bert4rec": replace(SASREC, model="bert4rec", windows="items", loss="cross_entropy"),
    "stosa": replace(SASREC, model="stosa", pvn_weight=0.005),
    "gru4rec": replace(SASREC, model="gru4rec", windows="prefixes"),
    "bsarec": replace(SASREC, model="bsarec", attention_dropout_rate=0.5, smooth_start=0.9),
    "lightgcn": replace(MF, model="lightgcn"),
    "users and items": replace(MF, graph="users_items", beta=0.9),
    "cross entropy": replace(SASREC, loss="cross_entropy", cosine_scale=20.0),
    "sampled soft-max": replace(
        SASREC, loss="sampled_softmax", num_negatives=16, smooth_every=2
    ),
    "attributes": replace(SASREC, graph="attributes", residual_decay=0.9),
}


def trained(config: Config, mesh: Any) -> tuple[Any, np.ndarray, Any]:
    """The state after two epochs, their losses `[2, S]`, and ranks."""
    trainer = make_trainer(config, SPLIT, mesh=mesh)
    state, losses = start(trainer, SEEDS), []
    for number in (1, 2):
        state, loss = trainer.epoch(state, number)
        losses.append(np.asarray(loss))
    part = SPLIT.evaluation("valid")
    (data,), num_slots = ranking_data([part], max_length=8, chunk_size=32)
    counts = trainer.rank(state.params, data, num_slots)
    state = trainer.keep_best(state, np.array([True, False]))
    return state, np.array(losses), collect(counts, len(part.targets))


def test_training_and_ranking_equal_one_device():
    """With dropout, negatives, moments and free rows; only sums are taken in another order."""
    state, losses, ranks = trained(SASREC, make_mesh(8))
    expected, expected_losses, expected_ranks = trained(SASREC, None)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(ranks.above, expected_ranks.above)
    trees = [(state.params, state.opt_state), (expected.params, expected.opt_state)]
    leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
    split = 0
    for (path, a), (_, b) in zip(*leaves, strict=True):
        actual = np.array(a)
        if b.shape[1:2] == (101,):
            split += 1
            assert a.addressable_shards[0].data.shape == (2, 13, 8)
            assert not actual[:, 101:].any()
            actual = actual[:, :101]
        elif "key_value" in str(path) and "bias" in str(path):
            # The soft-max cancels the bias of the keys: its gradient is rounding error, which
            # Adam scales up to steps like any other's.
            actual, b = actual[..., 8:], b[..., 8:]
        np.testing.assert_allclose(actual, np.asarray(b), rtol=0, atol=1e-5, err_msg=str(path))
    assert split == 3  # the table and both moments
    table = state.best_params["item_embedding"]["embedding"]
    assert table.addressable_shards[0].data.shape == (2, 13, 8)
    np.testing.assert_array_equal(table[0], state.params["item_embedding"]["embedding"][0])


def _slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name",
    [
        *("bert4rec", "users and items"),
        *_slow("stosa", "gru4rec", "bsarec", "lightgcn"),
        *_slow("cross entropy", "sampled soft-max", "attributes"),
    ],
)
def test_other_settings_equal_one_device(name):
    """Two tables, other windows, a graph beside the parameters, all items, shared negatives."""
    _, losses, ranks = trained(OTHERS[name], make_mesh(8))
    _, expected_losses, expected_ranks = trained(OTHERS[name], None)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(ranks.above, expected_ranks.above)


@pytest.mark.parametrize(
    "config, devices, message",
    [
        (SASREC, 9, "`mesh` must be from 1 to the 8 devices, got 9"),
        (SASREC, 0, "`mesh` must be from 1 to the 8 devices, got 0"),
        (SASREC, 5, "`streams` must be a multiple of the 5 devices of the mesh, got 8"),
    ],
)
def test_bad_input(config, devices, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(config, SPLIT, mesh=make_mesh(devices))


@pytest.mark.skipif("FOLDER" not in os.environ, reason="run by test_mesh.py")
def test_a_run_goes_on_on_four_devices():
    """`test_mesh.py` goes on on one, and compares."""
    folder = Path(os.environ["FOLDER"])
    fit(MF, SPLIT, SEEDS, folder / "eight", mesh=make_mesh(8))
    shutil.copytree(folder / "eight", folder / "four")
    shutil.copytree(folder / "eight", folder / "one")
    go_on(folder / "four", make_mesh(4))


def go_on(folder: Path, mesh: Any = None) -> None:
    """One epoch more."""
    fit(replace(MF, epochs=2), SPLIT, SEEDS, folder, mesh=mesh, resume=True)


def test_lightgcn_sends_tables_not_edges():
    """No collective of a training step is larger than users and items together."""
    trainer: Any = make_trainer(OTHERS["lightgcn"], SPLIT, mesh=make_mesh(8))
    lowered = trainer.lower_epoch(round_up(trainer.usual_slots, 128))
    shapes = re.findall(
        r"= \(?\w+\[([\d,]*)\]\S* (?:all-to-all|all-gather|all-reduce|reduce-scatter)",
        lowered.compile().as_text() or "",
    )
    sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
    assert sizes and max(sizes) <= (60 + 104) * 8 < SPLIT.num_train * 8
