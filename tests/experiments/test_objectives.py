"""What each kind of model draws, minimises and ranks by, against padded and dense forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.backbones import user_item_graph
from experiments.batching import training_data
from experiments.dataset import Dataset, Evaluation, leave_one_out
from experiments.objectives import MaskedItem, NextItem, UserItem
from experiments.presets import preset
from experiments.ranking import Histories, collect, ranking_data
from experiments.run import make_trainer, start
from experiments.training import Trainer
from models import MF, STOSA, BERT4Rec, LightGCN, SASRec
from tests.models.toys import padded, random_params

KEY = jax.random.key(0)
MAX_LENGTH, NUM_ITEMS, NUM_SLOTS = 6, 9, 40
SEQUENCES = [
    [0, 1, 2, 3, 4],
    [5, 4, 3, 2, 1, 5],
    [1, 0, 2, 4, 5, 1, 0, 2],
    [3, 5, 0, 1, 2, 2, 3, 0, 5, 1],
]
TRAIN = np.concatenate(SEQUENCES), np.cumsum([0, *map(len, SEQUENCES)])
HISTORIES = [[0, 3], [5, 1, 2, 0, 3, 1, 5, 0], [4]]
TARGETS = [5, 4, 2]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Halves the time, nearly all of which is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def module_of(build, **settings):
    """A module with random parameters: initial zeros and ones would hide mistakes."""
    abstract = nnx.eval_shape(lambda: build(NUM_ITEMS, **settings, rngs=nnx.Rngs(0)))
    params = jax.tree.map(jnp.asarray, random_params(abstract))
    return nnx.merge(nnx.split(abstract)[0], params)


def bert4rec() -> BERT4Rec:
    return module_of(BERT4Rec, dim=4, max_length=MAX_LENGTH, num_heads=2, dropout_rate=0.0)


def stosa() -> STOSA:
    rates = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    return module_of(STOSA, dim=4, max_length=MAX_LENGTH, num_heads=2, **rates)


def sasrec() -> SASRec:
    return module_of(SASRec, dim=4, max_length=MAX_LENGTH, num_blocks=1, dropout_rate=0.0)


def masked_batch(mask_prob=0.5):
    data = training_data(TRAIN, NUM_ITEMS, max_length=MAX_LENGTH, windows="items")
    objective = MaskedItem(mask_prob)
    return objective, objective.sample(KEY, data, jnp.array([2, 0, 3, 1, 4]), NUM_SLOTS)


def test_hidden_items_are_the_targets():
    """Every user's last items, each in its place or hidden; window 4 fills a partial batch."""
    objective, batch = masked_batch()
    rows = np.concatenate([np.add(SEQUENCES[u][-MAX_LENGTH:], 2) for u in (2, 0, 3, 1)])
    inputs = np.asarray(batch.inputs)
    hidden = inputs[: len(rows)] == MaskedItem.MASK
    np.testing.assert_array_equal(inputs[: len(rows)][~hidden], rows[~hidden])
    assert not inputs[len(rows) :].any()
    assert 0.2 < hidden.mean() < 0.8
    counts = np.asarray(batch.weights) > 0
    np.testing.assert_array_equal(np.asarray(batch.slots)[counts], np.flatnonzero(hidden))
    np.testing.assert_array_equal(np.asarray(batch.targets)[counts], rows[hidden])
    assert set(rows) <= set(np.asarray(objective.rows(batch)))


@pytest.mark.parametrize("mask_prob", [0.2, 0.7])
def test_the_share_of_hidden_items(mask_prob):
    data = training_data(TRAIN, NUM_ITEMS, max_length=MAX_LENGTH, windows="items")
    objective = MaskedItem(mask_prob)
    windows = jnp.tile(jnp.arange(4), 100)
    batch = objective.sample(KEY, data, windows, 2400)
    num_items = 100 * sum(min(len(s), MAX_LENGTH) for s in SEQUENCES)
    spread = np.sqrt(mask_prob * (1 - mask_prob) / num_items)
    assert abs(batch.weights.sum() / num_items - mask_prob) < 4 * spread


def test_masked_loss_is_the_soft_max_over_all_rows():
    objective, batch = masked_batch()
    module = bert4rec()
    loss = objective.loss(module, batch, None)  # type: ignore
    # The same batch, padded on the left.
    lengths = np.asarray(batch.stream.lengths)
    splits = np.cumsum(lengths)[:-1]
    inputs = np.split(np.asarray(batch.inputs)[: lengths.sum()], splits)
    grid, places = padded(list(map(list, inputs)), MAX_LENGTH)
    states = np.asarray(module(jnp.asarray(grid)))[places]
    weights, bias = module.all_rows()
    logits = states @ np.asarray(weights).T + np.asarray(bias)
    assert logits.shape[1] == NUM_ITEMS + 2
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    counts = np.asarray(batch.weights) > 0
    slots, targets = np.asarray(batch.slots)[counts], np.asarray(batch.targets)[counts]
    np.testing.assert_allclose(loss, -logs[slots, targets].mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "loss", "draws"),
    [
        *[("sasrec", loss, True) for loss in ("bce", "bpr", "gbce")],
        *[("sasrec", loss, False) for loss in ("sampled_softmax", "cross_entropy")],
        ("bert4rec", "cross_entropy", False),
        ("mf", "bpr", True),
    ],
)
def test_a_user_of_all_items(model, loss, draws):
    """Is refused before training, if negatives are drawn for each user, and trains if not."""
    dataset = Dataset("toy", np.tile(np.arange(4), 3)[:-1], np.array([0, 6, 11]), 4)
    sizes = {"dim": 4, "max_length": 6, "batch_size": 2, "num_blocks": 1, "streams": 2}
    config = preset(model, "synthetic", "adamw", loss=loss, **sizes)
    if draws:
        with pytest.raises(ValueError, match=r"user 0 \(.*\) has trained on all 4 items"):
            make_trainer(config, leave_one_out(dataset))
        return
    trainer = make_trainer(config, leave_one_out(dataset))
    _, losses = trainer.epoch(start(trainer, [0]), 1)
    assert np.isfinite(losses).all() and (losses > 0).all()


def ranks_above(module, objective, context=None):
    """How many items stand above each target, through the trainer."""
    part = Evaluation(
        np.arange(len(HISTORIES), dtype=np.int32),
        np.array(TARGETS, np.int32),
        np.concatenate(HISTORIES).astype(np.int32),
        np.cumsum([0, *map(len, HISTORIES)]),
    )
    graphdef, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    data = training_data(TRAIN, NUM_ITEMS, max_length=MAX_LENGTH, windows="users")
    trainer = Trainer(lambda rngs: module, optax.sgd(1.0), objective, None, data, 4, context)
    trainer.graphdef = graphdef
    (chunks,), num_slots = ranking_data(
        [part], max_length=MAX_LENGTH - objective.num_queries, chunk_size=2
    )
    seeded = jax.tree.map(lambda p: p[None], params)
    return collect(trainer.rank(seeded, chunks, num_slots), len(TARGETS)).above[0]


def better(scores: np.ndarray) -> list[int]:
    """Items above each target that are not in the history, from scores `[users, items]`."""
    return [
        sum(row[i] > row[target] for i in range(NUM_ITEMS) if i not in history)
        for row, history, target in zip(scores, HISTORIES, TARGETS, strict=True)
    ]


def test_bert4rec_ranks_by_what_a_mask_at_the_end_hides():
    module = bert4rec()
    newest = [[i + 2 for i in h[-(MAX_LENGTH - 1) :]] + [1] for h in HISTORIES]
    grid, _ = padded(newest, MAX_LENGTH)
    states = np.asarray(module(jnp.asarray(grid)))[:, -1]
    weights, bias = map(np.asarray, module.all_rows())
    scores = (states @ weights.T + bias)[:, 2:]
    np.testing.assert_array_equal(ranks_above(module, MaskedItem(0.5)), better(scores))


def test_stosa_ranks_by_distance():
    module = stosa()
    grid, _ = padded([[i + 1 for i in h[-MAX_LENGTH:]] for h in HISTORIES], MAX_LENGTH)
    states = jax.tree.map(lambda leaf: leaf[:, -1, None], module(jnp.asarray(grid)))
    rows = jax.tree.map(lambda leaf: leaf[None], module.items(jnp.arange(1, NUM_ITEMS + 1)))
    scores = np.asarray(module.score(states, rows))
    np.testing.assert_array_equal(
        ranks_above(module, NextItem("bpr", NUM_ITEMS)), better(scores)
    )


@pytest.mark.parametrize("make", [stosa, sasrec])
def test_without_a_history_nobody_elses_ranks(make):
    """A hand-made split may hold out a user's first item; the state before it is of no one."""
    module, histories = make(), [[0, 3, 5], [], [2], []]
    starts = np.cumsum([0, *map(len, histories)])[:-1]
    values, lengths, users = (
        jnp.asarray(x, jnp.int32)
        for x in (np.concatenate(histories), [len(h) for h in histories], range(4))
    )
    scores_of = NextItem("bce", NUM_ITEMS).scorer(module, 8, None)
    scores = scores_of(Histories(values, jnp.asarray(starts, jnp.int32), lengths, users))
    np.testing.assert_array_equal(scores[1], scores[3])
    assert np.abs(scores[0] - scores[1]).max() > 1e-3 < np.abs(scores[2] - scores[1]).max()


def test_shared_negatives_are_of_the_whole_catalogue():
    batch, _ = next_item_batch(NextItem("sampled_softmax", NUM_ITEMS, num_negatives=900))
    counts = np.bincount(batch.negatives, minlength=NUM_ITEMS + 1)
    assert len(counts) == NUM_ITEMS + 1 and counts[0] == 0
    assert 60 < counts[1:].min() and counts[1:].max() < 145  # 100 each, 9.4 apart


def test_label_smoothing_reaches_the_loss():
    module, smooth = sasrec(), NextItem("cross_entropy", NUM_ITEMS, label_smoothing=0.2)
    plain = NextItem("cross_entropy", NUM_ITEMS)
    batch, used = next_item_batch(smooth)
    states, items = plain.forward(module, batch, None)
    scores = np.asarray(states @ module.item_embedding.embedding[...][1:].T)[used]
    positive = scores[np.arange(len(used)), np.asarray(batch.targets)[used] - 1]
    expected = plain.against(module, batch, states, items)
    expected += 0.2 * (positive - scores.mean(axis=1)).mean()
    np.testing.assert_allclose(smooth.loss(module, batch, KEY), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NextItem("bcee", 9), "`kind` must be one of .*, got 'bcee'"),
        (lambda: NextItem("gbce", 9, pvn_weight=1.0), "`pvn_weight` is for bce and bpr, got"),
        (lambda: NextItem("bce", 9, num_negatives=0), "`num_negatives` must be a positive"),
        (lambda: NextItem("bce", 9, workers=0), "`workers` must be a positive integer"),
        (lambda: MaskedItem(1.5), r"`mask_prob` must be in \(0, 1\], got 1.5"),
        (lambda: training_data(TRAIN, NUM_ITEMS, max_length=0), "`max_length` must be a pos"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def next_item_batch(objective):
    data = training_data(TRAIN, NUM_ITEMS, max_length=MAX_LENGTH)
    batch = objective.sample(KEY, data, jnp.arange(4), NUM_SLOTS)
    used = np.flatnonzero(batch.weights)
    return batch, used


@pytest.mark.parametrize("kind", ["bce", "bpr", "gbce", "cross_entropy", "sampled_softmax"])
def test_next_item_losses(kind):
    """With three negatives, from the states of the padded model and explicit formulas."""
    module = sasrec()
    objective = NextItem(kind, NUM_ITEMS, num_negatives=3, gbce_t=0.5)
    batch, used = next_item_batch(objective)
    loss = objective.loss(module, batch, None)  # type: ignore
    grid, places = padded(
        [[i + 1 for i in s[:-1][-MAX_LENGTH:]] for s in SEQUENCES], MAX_LENGTH
    )
    states = np.asarray(module(jnp.asarray(grid)))[places]
    scores = states @ np.asarray(module.item_embedding.embedding[...])[1:].T
    slots = np.arange(len(used))
    targets = np.asarray(batch.targets)[used] - 1
    positive = scores[slots, targets]
    negatives = np.asarray(batch.negatives) - 1
    if kind in ("bce", "bpr", "gbce"):
        assert all(
            not set(row) & set(s)
            for s, rows in zip(SEQUENCES, np.split(negatives[used], [4, 9, 15]), strict=True)
            for row in rows
        )
        negative = np.take_along_axis(scores, negatives[used], axis=1)
    power = 1 - 0.5 * (1 - 3 / (NUM_ITEMS - 1)) if kind == "gbce" else 1
    if kind in ("bce", "gbce"):
        expected = power * np.log1p(np.exp(-positive)) + np.log1p(np.exp(negative)).sum(1)
    elif kind == "bpr":
        expected = np.log1p(np.exp(negative - positive[:, None])).mean(axis=1)
    elif kind == "cross_entropy":
        expected = np.log(np.exp(scores).sum(axis=1)) - positive
    else:
        assert negatives.shape == (3,)
        others = negatives[None] != targets[:, None]
        drawn = (np.exp(scores[:, negatives]) * others).sum(axis=1)
        share = (NUM_ITEMS - 1) / np.maximum(others.sum(axis=1), 1)
        expected = np.log(np.exp(positive) + share * drawn) - positive
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)


def test_stosa_keeps_positives_from_negatives():
    """The second term: a positive may not be farther from the state than from its negative."""
    module = stosa()
    plain, both = (
        NextItem("bpr", NUM_ITEMS, num_negatives=2, pvn_weight=w) for w in (0.0, 0.3)
    )
    batch, used = next_item_batch(plain)
    grid, places = padded(
        [[i + 1 for i in s[:-1][-MAX_LENGTH:]] for s in SEQUENCES], MAX_LENGTH
    )
    states = jax.tree.map(lambda leaf: leaf[places], module(jnp.asarray(grid)))
    targets = module.items(batch.targets[used])
    positive = module.score(states, targets)[:, None]
    negatives = module.items(batch.negatives[used])
    pairs = module.item_score(jax.tree.map(lambda x: x[:, None], targets), negatives)
    expected = 0.3 * jnp.maximum(pairs - positive, 0).mean()
    difference = both.loss(module, batch, None) - plain.loss(module, batch, None)  # type: ignore
    assert expected > 0
    np.testing.assert_allclose(difference, expected, rtol=1e-4)


def test_pairs_are_uniform():
    data = training_data(TRAIN, NUM_ITEMS, max_length=MAX_LENGTH, windows="users")
    objective = UserItem()
    order = np.asarray(objective.order(KEY, data, 10))
    assert order.shape == (3, 10)  # 29 interactions
    assert (order[-1, -1], order.flatten()[:29].max()) == (4, 3)
    windows = jnp.append(jnp.repeat(jnp.arange(4), 6000), 4)
    users, positives, negatives, weights = map(
        np.asarray, objective.sample(KEY, data, windows, 0)
    )
    assert weights[:-1].all() and not weights[-1]
    rows = objective.rows(objective.sample(KEY, data, windows, 0))
    touched = np.asarray(jnp.zeros(NUM_ITEMS, bool).at[rows[-1:]].set(True))
    assert not touched.any()
    np.testing.assert_array_equal(rows[:-1], positives[:-1])
    for user, sequence in enumerate(SEQUENCES):
        seen, unseen = sorted(set(sequence)), sorted(set(range(NUM_ITEMS)) - set(sequence))
        mine = users[:-1] == user
        for draws, allowed in ((positives, seen), (negatives, unseen)):
            counts = np.bincount(draws[:-1][mine], minlength=NUM_ITEMS)
            assert counts.sum() == counts[allowed].sum() == 6000
            share = 1 / len(allowed)
            spread = np.sqrt(6000 * share * (1 - share))
            assert np.abs(counts[allowed] - 6000 * share).max() < 5 * spread + 1


def test_negatives_do_not_depend_on_the_positive():
    # The first user has had the items 0 to 4 of ten: with one key for both draws, numbers of
    # as many items would be the same.
    data = training_data(TRAIN, 10, max_length=MAX_LENGTH, windows="users")
    pairs = UserItem().sample(KEY, data, jnp.zeros(6000, int), 0)
    counts = np.zeros((10, 10))
    np.add.at(counts, (np.asarray(pairs.positives), np.asarray(pairs.negatives)), 1)
    counts = counts[:5, 5:]
    assert counts.sum() == 6000 and np.abs(counts - 240).max() < 5 * np.sqrt(240)


@pytest.fixture(scope="module")
def graph():
    values, splits = TRAIN
    # `leave_one_out` takes the last two off.
    longer = np.insert(values, np.repeat(splits[1:], 2), [6, 7] * 4)
    dataset = Dataset("toy", longer, splits + 2 * np.arange(5), num_items=NUM_ITEMS)
    split = leave_one_out(dataset)
    np.testing.assert_array_equal(split.train[0], values)
    return user_item_graph(split)


@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
def test_user_item_models_rank_and_train_by_pairs(kind, graph):
    context = graph if kind == "lightgcn" else None
    build = {"mf": MF, "lightgcn": LightGCN}[kind]
    module = module_of(build, num_users=4, dim=4)
    if kind == "lightgcn":
        users, items = map(np.asarray, module.propagate(graph))
    else:
        users, items = (
            np.asarray(table.embedding[...])
            for table in (module.user_embedding, module.item_embedding)
        )
    objective = UserItem()
    above = ranks_above(module, objective, context)
    np.testing.assert_array_equal(above, better(users[:3] @ items.T))
    data = training_data(TRAIN, NUM_ITEMS, max_length=MAX_LENGTH, windows="users")
    batch = objective.sample(KEY, data, jnp.array([0, 3, 3, 4]), 0)
    np.testing.assert_array_equal(objective.rows(batch)[:3], batch.positives[:3])
    u, p, n = (np.asarray(x)[:3] for x in batch[:3])
    margin = (users[u] * (items[n] - items[p])).sum(axis=1)
    loss = objective.loss(module, batch, KEY, context)
    np.testing.assert_allclose(loss, np.log1p(np.exp(margin)).mean(), rtol=1e-5)
    # L2 is of the tables' rows, not of what is propagated; the batch's free place has no part.
    users, items = (
        np.asarray(table.embedding[...])
        for table in (module.user_embedding, module.item_embedding)
    )
    squares = (users[u] ** 2 + items[p] ** 2 + items[n] ** 2).sum(axis=1)
    regularized = UserItem(l2=0.3).loss(module, batch, KEY, context)
    np.testing.assert_allclose(regularized - loss, 0.3 / 2 * squares.mean(), rtol=1e-4)
