"""The compiled epoch against a padded step, seeds against each other, and its determinism."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import training
from experiments.backbones import make_graph, prepare
from experiments.batching import training_data
from experiments.config import Config, Windows
from experiments.dataset import Evaluation, leave_one_out
from experiments.objectives import NextItem
from experiments.ranking import collect, ranking_data
from experiments.run import make_trainer
from experiments.synthetic import synthetic
from experiments.training import Trainer, TrainState, over_seeds
from models import GRU4Rec, SASRec
from sevo_jax import item_graph, normalized_adjacency, sevo_adamw
from tests.helpers import dense, of_tables, reference_normalized, reference_smooth
from tests.models.toys import assert_same_tree, padded, random_params


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Halves the time, nearly all of which is compilation; whole runs compile as users do."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
    return Trainer(build, optimizer, NextItem(loss, NUM_ITEMS), None, data, batch_size)


def start(trainer: Trainer) -> tuple[TrainState, dict]:
    """A state of one seed, and its parameters: not those of the initialisation, whose zeros
    and ones would hide mistakes."""
    params = random_params(nnx.eval_shape(lambda: trainer.build(nnx.Rngs(0))))
    seeded = jax.tree.map(lambda p: jnp.asarray(p)[None], params)
    opt_state = jax.vmap(trainer.optimizer.init)(seeded)
    return TrainState(seeded, opt_state, jax.random.key(0)[None], seeded), params


def losses_of(trainer: Trainer, state: TrainState, number: int) -> np.ndarray:
    """Those of an epoch from a state that is kept."""
    trained = jax.tree.map(jnp.copy, (state.params, state.opt_state))
    state = state._replace(params=trained[0], opt_state=trained[1])
    return np.asarray(trainer.epoch(state, number)[1])


def padded_loss(trainer: Trainer, kind: str, windows: Windows, sequences):
    """The loss of all windows as a function of the parameters, through the padded model."""
    side = "left" if windows == "last" else "right"
    rows = []  # inputs, targets, negatives and weights of each window
    for items, negative in zip(sequences, NEGATIVES, strict=False):
        stretches = [(items[-MAX_LENGTH - 1 :], 0)]
        if windows == "prefixes":
            ends = range(2, len(items) + 1)
            cut = [items[max(0, end - MAX_LENGTH - 1) : end] for end in ends]
            stretches = [(stretch, len(stretch) - 2) for stretch in cut]
        elif windows == "whole":
            stretches = [(items[: MAX_LENGTH + 1], 0)]
            for begin in range(
                MAX_LENGTH // 2, len(items) - 1 - MAX_LENGTH // 2, MAX_LENGTH // 2
            ):
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
    [(sasrec, "bce", "last"), (gru4rec, "bpr", "prefixes"), (gru4rec, "bpr", "whole")],
    ids=["sasrec", "gru4rec", "gru4rec in one pass"],
)
def test_an_epoch_of_one_step_equals_a_padded_step(build, loss, windows):
    """Loss and gradients in single precision: everything from the windows to the update.

    One batch holds all windows, and at rate 1 gradient descent takes off the gradient.
    """
    trainer = toy_trainer(build, loss, windows, SEQUENCES, optax.sgd(1.0), 64)
    state, params = start(trainer)
    new, losses = trainer.epoch(state, 1)
    reference = jax.jit(jax.value_and_grad(padded_loss(trainer, loss, windows, SEQUENCES)))
    value, expected = reference(params)
    np.testing.assert_allclose(losses, [value], rtol=0, atol=1e-6)
    gradients = jax.tree.map(lambda old, new: old - new[0], params, new.params)
    assert_same_tree(gradients, expected, 1e-6)
    assert not gradients["item_embedding"]["embedding"][0].any()  # the padding row


def test_the_mean_loss_and_how_it_falls():
    """The last batch, of one window after one of two, counts for the one that it holds."""
    sequences = [sequence[:5] for sequence in SEQUENCES[:3]]  # of equal length
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
    trainer = toy_trainer(gru4rec, "bpr", "whole", sequences, optimizer, 2)
    state, params = start(trainer)
    expected = jax.jit(padded_loss(trainer, "bpr", "whole", sequences))(params)
    for number in range(3):  # in another order each
        losses = losses_of(trainer, state, number)
        np.testing.assert_allclose(losses, [expected], rtol=0, atol=1e-6)
    opt_state: Any = state.opt_state
    opt_state.hyperparams["learning_rate"] += 0.5
    for number in range(20):
        state, losses = trainer.epoch(state, number)
    assert losses[0] < 0.5 * expected


@pytest.fixture(scope="module")
def split():
    return leave_one_out(synthetic(num_users=30, num_items=20, num_communities=2))


CONFIG = Config(dim=4, max_length=8, num_blocks=1, batch_size=16, learning_rate=0.01)
SEEDS = (3, 8)


def initial(trainer: Trainer) -> TrainState:
    return trainer.init(jax.vmap(jax.random.key)(jnp.asarray(SEEDS)))


def train(trainer: Trainer, epochs: int = 2, state: TrainState | None = None):
    """The state after some epochs, and the losses `[epochs, S]`."""
    state, losses = state or initial(trainer), []
    for number in range(1, epochs + 1):
        state, loss = trainer.epoch(state, number)
        losses.append(np.asarray(loss))
    return state, np.array(losses)


@pytest.fixture(scope="module")
def trainer(split) -> Trainer:
    return make_trainer(CONFIG, split)


def test_the_same_seed_gives_the_same_bits(trainer):
    (first, losses), (again, _) = train(trainer), train(trainer)
    jax.tree.map(np.testing.assert_array_equal, first._replace(key=0), again._replace(key=0))
    assert losses[0, 0] != losses[0, 1]  # the other seed is another run


@pytest.mark.parametrize(
    ("backend", "num_seeds", "skips"),
    [("cpu", 1, True), ("cpu", 2, True), ("gpu", 1, True), ("gpu", 2, False)],
)
def test_what_a_branch_skips_is_skipped(backend, num_seeds, skips, monkeypatch):
    """But where seeds are a batch: all of them would have to skip it together."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def maybe(seed):
        return jax.lax.cond(seed > 1, jnp.sin, jnp.cos, seed)

    program = jax.make_jaxpr(over_seeds()(maybe))(jnp.ones(num_seeds))
    assert (" cond[" in str(program)) == skips
    np.testing.assert_allclose(over_seeds()(maybe)(jnp.arange(3.0)), [1, np.cos(1), np.sin(2)])


@pytest.mark.parametrize("model", ["sasrec", "bert4rec", "mf"])
def test_smooth_start(model, split):
    """All tables are smoothed, each with its own spread; what is no table stays."""
    windows = {"bert4rec": "items", "mf": "users"}.get(model, "last")
    loss = {"bert4rec": "cross_entropy", "mf": "bpr"}.get(model, "bce")
    config = replace(CONFIG, model=model, windows=windows, loss=loss)
    if model == "mf":
        config = replace(config, graph="users_items")
    plain = initial(make_trainer(config, split))
    start = initial(make_trainer(replace(config, smooth_start=0.9, num_layers=2), split))
    adjacency = reference_normalized(dense(make_graph(config, split)))
    tables = {
        "sasrec": ["item_embedding"],
        "bert4rec": ["item_embedding", "output_embedding"],
        "mf": ["user_embedding", "item_embedding"],
    }[model]
    for seed in range(len(SEEDS)):
        drawn = [np.array(plain.params[name]["embedding"][seed], float) for name in tables]
        if model == "mf":  # one graph for both
            smoothed = reference_smooth(adjacency, np.concatenate(drawn), 0.9, 2, "neumann")
            expected = np.split(smoothed, [len(drawn[0])])
        else:
            expected = [reference_smooth(adjacency, x, 0.9, 2, "neumann") for x in drawn]
        for name, old, new in zip(tables, drawn, expected, strict=True):
            actual = start.params[name]["embedding"][seed]
            np.testing.assert_allclose(actual, new * old.std() / new.std(), atol=2e-6)
            np.testing.assert_allclose(np.std(actual), old.std(), rtol=1e-5)
    for state in (plain, start):
        for name in tables:
            del state.params[name]
    jax.tree.map(np.testing.assert_array_equal, start.params, plain.params)


def test_epochs_differ_by_their_number_alone(trainer):
    """So that an epoch that was interrupted can be run again."""
    state = initial(trainer)
    losses = [losses_of(trainer, state, number) for number in (1, 2, 1)]
    np.testing.assert_array_equal(losses[0], losses[2])
    assert np.all(losses[0] != losses[1])


def test_a_new_state_takes_the_memory_of_the_old_one(trainer):
    state = initial(trainer)
    trainer.epoch(state, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.best_params))


def test_the_loss_falls(trainer):
    _, losses = train(trainer, epochs=40)
    assert np.all(losses[-1] < 0.9 * losses[0])


def test_seeds_together_equal_each_alone(trainer, split, monkeypatch):
    """As a batch and one after the other, up to rounding, with dropout and moments."""
    ways = [jax.vmap, lambda function: lambda seeded: jax.lax.map(function, seeded)]
    other = ways[jax.default_backend() != "cpu"]  # `trainer` goes the backend's own
    monkeypatch.setattr(training, "over_seeds", lambda: other)
    runs = [train(trainer), train(make_trainer(CONFIG, split))]
    for number in range(len(SEEDS)):
        first = jax.tree.map(lambda x, n=number: x[n : n + 1], initial(trainer))
        alone, loss = train(trainer, state=first)
        for state, losses in runs:
            np.testing.assert_allclose(losses[:, number], loss[:, 0], rtol=0, atol=1e-5)
            mine, its = (
                jax.tree.map(lambda p, row=row: np.array(p[row]), params)
                for params, row in ((state.params, number), (alone.params, 0))
            )
            # The soft-max cancels the bias of the keys: its gradient is rounding error, which
            # Adam scales up to steps like any other's.
            for params in (mine, its):
                params["blocks"][0]["key_value"]["bias"][: CONFIG.dim] = 0
            assert_same_tree(mine, its, 1e-5)


def test_the_graph_is_data(trainer, split):
    """A second epoch, and another graph of the same capacity, run the same program."""
    state, losses = train(trainer)
    programs = trainer._epoch_jit._cache_size()
    values, row_splits = split.train
    num_items = split.dataset.num_items
    other = item_graph((num_items - values, row_splits), num_items + 1)  # relabelled
    old = trainer.graph
    trainer.graph = prepare(other)
    try:
        changed, _ = train(trainer)
    finally:
        trainer.graph = old
    assert trainer._epoch_jit._cache_size() == programs
    table, other_table = (s.params["item_embedding"]["embedding"] for s in (state, changed))
    assert np.abs(table - other_table).max() > 1e-4


@pytest.mark.parametrize("touched", [False, True])
def test_touched_rows_are_those_of_the_batch(touched):
    """The soft-max over all items gives every row a gradient; in the batch are items 0 to 2."""
    sequences = [[0, 1, 2], [2, 1, 0, 1]]
    values = np.concatenate(sequences).astype(np.int32)
    data = training_data(
        (values, np.array([0, 3, 7])), NUM_ITEMS, max_length=MAX_LENGTH, windows="last"
    )
    graph = normalized_adjacency(item_graph([[1, 2, 3]], NUM_ITEMS + 1))
    trainer = Trainer(
        sasrec,
        sevo_adamw(1e-3, graph, tables="item_embedding"),
        NextItem("cross_entropy", NUM_ITEMS),
        graph,
        data,
        2,
        touched=touched,
    )
    state, _ = trainer.epoch(start(trainer)[0], 1)
    kept: Any = state.opt_state
    (moments,) = jax.tree.leaves(of_tables(kept, "nu_hat"))
    moved = np.any(np.asarray(moments[0]), axis=1)
    assert moved[1:4].all()  # row 0 stands in the free slots
    assert moved[4:].all() == moved[4:].any() == (not touched)


def test_a_batch_is_never_cut(trainer, monkeypatch):
    """What the compiled epoch cannot report: its stream has room for the longest batch."""
    asked = []

    def epoch(trained, keys, data, graph, context, num_slots):
        asked.append(num_slots)
        return *trained, None

    monkeypatch.setattr(trainer, "_epoch_jit", epoch)
    state = initial(trainer)
    for slots in range(1, 1500, 7):
        monkeypatch.setattr(
            trainer, "_most_slots", lambda *_, slots=slots: jnp.array([1, slots])
        )
        trainer.epoch(state, 1)
        assert slots <= asked[-1] < max(slots, trainer.usual_slots) + 128
    assert len(set(asked)) < 15  # few programs


def test_keep_best(trainer):
    state, _ = train(trainer, epochs=1)
    kept = trainer.keep_best(state, np.array([False, True]))
    for best, new, old in zip(
        *map(jax.tree.leaves, (kept.best_params, state.params, state.best_params)), strict=True
    ):
        np.testing.assert_array_equal(best[0], old[0])
        np.testing.assert_array_equal(best[1], new[1])
    assert np.any(state.params["norm"]["bias"] != state.best_params["norm"]["bias"])


def test_ranks_equal_those_of_padded_scores():
    """From histories shorter and longer than the input to counts, for each of two seeds."""
    users = [([0, 3], 5), ([5, 1, 2, 0, 3, 1, 5, 0], 4), ([4], 2)]
    trainer = toy_trainer(sasrec, "bce", "last", SEQUENCES, optax.sgd(1.0), 8)
    _, first = start(trainer)
    both = [first, jax.tree.map(lambda p: -p, first)]
    histories = [history for history, _ in users]
    part = Evaluation(
        np.arange(3, dtype=np.int32),
        np.array([target for _, target in users], np.int32),
        np.concatenate(histories).astype(np.int32),
        np.cumsum([0, *map(len, histories)]),
    )
    (data,), num_slots = ranking_data([part], max_length=MAX_LENGTH, chunk_size=2)
    ranks = collect(
        trainer.rank(jax.tree.map(lambda *p: jnp.stack(p), *both), data, num_slots), 3
    )

    batch, _ = padded([[i + 1 for i in h[-MAX_LENGTH:]] for h in histories], MAX_LENGTH)
    states_of = jax.jit(lambda params: nnx.merge(trainer.graphdef, params)(jnp.asarray(batch)))
    for params, above in zip(both, ranks.above, strict=True):
        scores = (
            np.asarray(states_of(params))[:, -1] @ params["item_embedding"]["embedding"][1:].T
        )
        for (history, target), row, count in zip(users, scores, above, strict=True):
            better = [i for i in range(NUM_ITEMS) if i not in history and row[i] > row[target]]
            assert count == len(better)
    assert not ranks.ties.any() and len(np.unique(ranks.above)) > 1


class _Keys:
    """An objective whose loss tells whether dropout has the batch's key."""

    num_queries = 0

    def check(self, data):
        pass

    def order(self, key, data, batch_size):
        return jnp.zeros((2, batch_size), jnp.int32)

    def sample(self, key, data, windows, num_slots):
        return jax.random.key_data(key)

    def loss(self, module, batch, dropout_key, context):
        return (batch == jax.random.key_data(dropout_key)).all().astype(jnp.float32)


def test_a_batch_and_its_dropout_have_different_keys():
    values = np.concatenate(SEQUENCES), np.cumsum([0, *map(len, SEQUENCES)])
    data = training_data(values, NUM_ITEMS, max_length=MAX_LENGTH)
    objective: Any = _Keys()
    trainer = Trainer(sasrec, optax.sgd(0.1), objective, None, data, 2)
    assert trainer.epoch(trainer.init(jax.random.key(0)[None]), 1)[1] == 0
