"""The compiled epoch against a padded step, seeds against each other, and its determinism."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import training
from experiments.batching import Windows, training_data
from experiments.config import Config
from experiments.dataset import Evaluation, leave_one_out
from experiments.ranking import collect, ranking_data
from experiments.run import make_trainer
from experiments.synthetic import synthetic
from experiments.training import Trainer, TrainState
from models import GRU4Rec, SASRec
from models.losses import LOSSES
from sevo_jax import item_graph, normalized_adjacency
from tests.models.toys import assert_same_tree, padded, random_params

MAX_LENGTH, NUM_ITEMS = 6, 6
# Every user has had all items but one, so there is but one negative to draw for each.
SEQUENCES = [
    [0, 1, 2, 3, 4],
    [5, 4, 3, 2, 1, 5],
    [1, 0, 2, 4, 5, 1, 0, 2],
    [3, 5, 0, 1, 2, 2, 3, 0, 5, 1],
]
NEGATIVES = [5, 0, 3, 4]


def sasrec(rngs: nnx.Rngs) -> SASRec:
    return SASRec(
        NUM_ITEMS, dim=4, max_length=MAX_LENGTH, num_blocks=1, dropout_rate=0.0, rngs=rngs
    )


def gru4rec(rngs: nnx.Rngs) -> GRU4Rec:
    return GRU4Rec(
        NUM_ITEMS, dim=4, hidden_dim=3, max_length=MAX_LENGTH, dropout_rate=0.0, rngs=rngs
    )


def toy_trainer(build, loss, windows: Windows, sequences, optimizer, batch_size) -> Trainer:
    values = np.concatenate(sequences).astype(np.int32)
    train = values, np.cumsum([0, *map(len, sequences)])
    data = training_data(train, NUM_ITEMS, max_length=MAX_LENGTH, windows=windows)
    return Trainer(build, optimizer, LOSSES[loss], None, data, batch_size)


def start(trainer: Trainer) -> tuple[TrainState, dict]:
    """A state of one seed with parameters that are not those of the initialisation."""
    state = trainer.init(jax.random.key(0)[None])
    params = random_params(nnx.eval_shape(lambda: trainer.build(nnx.Rngs(0))))
    return state._replace(params=jax.tree.map(lambda p: jnp.asarray(p)[None], params)), params


def padded_loss(trainer: Trainer, kind: str, windows: Windows, sequences):
    """The loss of all windows as a function of the parameters, through the padded model."""
    side = "left" if windows == "last" else "right"
    rows = []  # inputs, targets, negatives and weights of each window
    for items, negative in zip(sequences, NEGATIVES, strict=False):
        stretches = [(items[-MAX_LENGTH - 1 :], 0)]
        if windows == "prefixes":
            stretches = [(items[: MAX_LENGTH + 1], 0)]
            for begin in range(MAX_LENGTH // 2, len(items) - 1 - MAX_LENGTH // 2, MAX_LENGTH // 2):
                stretches.append((items[begin : begin + MAX_LENGTH + 1], MAX_LENGTH // 2))
        for stretch, warm_up in stretches:
            num = len(stretch) - 1
            shifted = [item + 1 for item in stretch]
            weights = [int(t >= warm_up) for t in range(num)]
            rows.append((shifted[:-1], shifted[1:], [negative + 1] * num, weights))
    columns = zip(*rows, strict=True)
    inputs, targets, negatives, weights = (padded(c, MAX_LENGTH, side)[0] for c in columns)

    def loss(params):
        states = nnx.merge(trainer.graphdef, params)(jnp.asarray(inputs))
        table = params["item_embedding"]["embedding"]
        positive = (states * table[targets]).sum(-1)
        negative = (states * table[negatives]).sum(-1)
        if kind == "bce":
            losses = jnp.log(1 + jnp.exp(-positive)) + jnp.log(1 + jnp.exp(negative))
        else:
            losses = jnp.log(1 + jnp.exp(negative - positive))
        return (losses * weights).sum() / weights.sum()

    return loss


@pytest.mark.parametrize(
    ("build", "loss", "windows"),
    [(sasrec, "bce", "last"), (gru4rec, "bpr", "prefixes")],
    ids=["sasrec", "gru4rec"],
)
def test_an_epoch_of_one_step_equals_a_padded_step(build, loss, windows):
    """Loss and gradients in single precision: everything from the windows to the update.

    One batch holds all windows, and at rate 1 gradient descent takes off the gradient.
    """
    trainer = toy_trainer(build, loss, windows, SEQUENCES, optax.sgd(1.0), 8)
    state, params = start(trainer)
    new, losses = trainer.epoch(state, 1)
    reference = jax.jit(jax.value_and_grad(padded_loss(trainer, loss, windows, SEQUENCES)))
    value, expected = reference(params)
    np.testing.assert_allclose(losses, [value], rtol=0, atol=1e-6)
    gradients = jax.tree.map(lambda old, new: old - new[0], params, new.params)
    assert_same_tree(gradients, expected, 1e-6)
    assert not gradients["item_embedding"]["embedding"][0].any()  # the padding row


def test_the_mean_loss_and_how_it_falls():
    """The last batch, of one window beside two, counts for the one window that it holds."""
    sequences = SEQUENCES[2:3] * 3
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
    trainer = toy_trainer(gru4rec, "bpr", "last", sequences, optimizer, 2)
    state, params = start(trainer)
    # Make the windows differ, though all are equally long: three users, three negatives.
    reference = padded_loss(trainer, "bpr", "last", sequences)
    _, losses = trainer.epoch(state, 1)
    negatives = trainer.data
    assert negatives.num_windows == 3
    np.testing.assert_allclose(losses, [reference(params)], atol=1e-6)
    state.opt_state.hyperparams["learning_rate"] += 0.5
    for number in range(1, 9):
        state, losses = trainer.epoch(state, number)
    assert losses[0] < 0.8 * reference(params)
