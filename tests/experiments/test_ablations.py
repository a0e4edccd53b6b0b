"""Sweeps against runs one by one, the declared ablations, and the command."""

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli
from experiments.ablations import ABLATIONS, ablate, arms_of, programs
from experiments.backbones import BACKBONES, SWEPT, fixed, make_graph, make_optimizer, prepare
from experiments.config import Config, Loss
from experiments.dataset import Attributes, leave_one_out
from experiments.options import Ablate
from experiments.presets import preset
from experiments.records import FILE, read
from experiments.run import fit, fit_sweep, make_trainer
from experiments.run_folder import load_run
from experiments.synthetic import synthetic
from experiments.tables import ablation_of, bases, command_of, name_of
from sevo_jax import item_graph, smooth
from sevo_jax.layouts import Dense
from tests.experiments.test_run import final_state
from tests.helpers import dense, reference_normalized, reference_smooth
from tests.models.toys import assert_same_tree

TINY = Config(dim=4, num_blocks=1, max_length=10, batch_size=64, epochs=2, eval_every=1)


@pytest.fixture(scope="module")
def split():
    return leave_one_out(synthetic(num_users=120, num_items=60, num_communities=3))


@pytest.fixture(scope="module")
def arms():
    usual = replace(TINY, residual_decay=0.5)
    return {
        "usual": usual,
        "beta": replace(usual, beta=0.5, learning_rate=0.01, num_layers=1),
        "plain": replace(
            usual,
            correct_moments=False,
            rescale=False,
            weight_decay=0.0,
            residual_decay=0.9,
            num_layers=5,
        ),
    }


@pytest.fixture(scope="module")
def sweep(split, arms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, fit_sweep(arms, split, [3, 4], folder)


def final_tables(folder, params="params"):
    """The item table of every run in a folder's newest checkpoint, `[runs, rows * dim]`."""
    held = final_state(folder)[f"['{params}']['item_embedding']['embedding']"]
    return np.frombuffer(held, np.float32).reshape(-1, 61 * TINY.dim)


@pytest.mark.parametrize("label", ["beta", "plain"])
def test_a_sweep_equals_runs_one_by_one(label, split, arms, sweep, tmp_path):
    folder, results = sweep
    alone = fit(arms[label], split, [4], tmp_path / "alone")
    together = results[list(arms).index(label)]
    for name, values in alone.test.items():
        np.testing.assert_allclose(values, together.test[name][1:], rtol=0, atol=0.02)
    (table,), tables = (final_tables(path) for path in (tmp_path / "alone", folder))
    place = 2 * list(arms).index(label) + 1  # two seeds for each
    np.testing.assert_allclose(table, tables[place], rtol=0, atol=1e-6)
    module, _, config = load_run(folder / label, 4)
    assert config == arms[label]
    best = final_tables(folder, "best_params")[place]
    np.testing.assert_array_equal(module.item_embedding.embedding[...].ravel(), best)
    # Far below what the settings make of the same seed.
    others = [np.abs(tables[i] - tables[place]).max() for i in (1, 3, 5) if i != place]
    assert min(others) > 1e-4
    losses = [
        [
            r["loss"]
            for r in read(path / "records.jsonl")
            if r["kind"] == "epoch" and r["seed"] == 4
        ]
        for path in (tmp_path / "alone", folder / label)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_sweep_resumes(split, arms, sweep):
    folder, results = sweep
    again = fit_sweep(arms, split, [3, 4], folder, resume=True)
    for first, second in zip(results, again, strict=True):
        np.testing.assert_array_equal(first.test["NDCG@10"], second.test["NDCG@10"])
    with pytest.raises(ValueError, match="holds a run"):
        fit_sweep(arms, split, [3, 4], folder)


def test_a_sweep_never_goes_on_from_other_settings(split, arms, sweep):
    """Neither for arms that its checkpoint lacks, nor for fewer than it holds."""
    folder, _ = sweep
    new = {"new": replace(TINY, beta=0.1, residual_decay=0.5)}
    for other in (new, arms | new):
        for resume in (False, True):
            with pytest.raises(ValueError, match="holds checkpoints of other settings"):
                fit_sweep(other, split, [3, 4], folder, resume=resume)
    with pytest.raises(ValueError, match="holds a run with other settings: .*together"):
        fit_sweep({"usual": arms["usual"]}, split, [3, 4], folder, resume=True)
    assert not (folder / "new").exists()


def test_a_sweep_varies_traced_settings_alone(split, arms, tmp_path):
    with pytest.raises(ValueError, match="'wide' does not fit"):
        fit_sweep({"paper": TINY, "wide": replace(TINY, dim=8)}, split, [0], tmp_path)
    with pytest.raises(ValueError, match="all or none .* 'paper' does not fit"):
        fit_sweep(arms | {"paper": TINY}, split, [0], tmp_path)
    for alike in ({"smooth_start": 0.9}, {"method": "exact"}, {"placement": "switch"}):
        one = replace(TINY, **alike)
        with pytest.raises(ValueError, match="`num_layers` is the same .* 'other' does not"):
            fit_sweep({"": one, "other": replace(one, num_layers=1)}, split, [0], tmp_path)
    with pytest.raises(ValueError, match="swept"):
        make_optimizer(TINY, None, {"dim": [8]})


def test_few_users_train_as_many_steps(split, tmp_path):
    def make(optimizer, **settings):
        return replace(TINY, optimizer=optimizer, **settings)

    arms = ABLATIONS["users"](make)
    few = arms["50% sevo_adamw"]
    assert (few.epochs, few.eval_every) == (4, 2)
    result = fit(few, split, [0], tmp_path)
    (test,) = (r for r in read(tmp_path / FILE) if r["kind"] == "test")
    assert test["data"]["train"] == split.with_train_users(0.5).num_train < split.num_train
    half = make_trainer(TINY, split.with_train_users(0.5)).data
    assert make_trainer(few, split).data.num_windows == half.num_windows < len(split.test)
    ranks = np.load(tmp_path / "ranks.npz")
    assert len(ranks["users"]) == len(split.test) and result.test["HR@10"].shape == (1,)
    with pytest.raises(ValueError, match="`train_users` must be in"):
        make("adamw", train_users=1.5)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_are_valid_and_share_programs(name):
    def make(optimizer, **settings):
        return preset("sasrec", "amazon_beauty", optimizer, **settings)

    arms = ABLATIONS[name](make)
    assert len(arms) > 1 and len(set(arms.values())) == len(arms)
    groups = programs(arms)
    assert sorted(label for group in groups for label in group) == sorted(arms)
    for group in groups:
        shared = [fixed(config) for config in group.values()]
        assert all(one == shared[0] for one in shared)
        assert not shared[0].keys() & set(SWEPT)
    if name in ("rescale", "correction"):
        assert len(groups) == 1
    if name == "approximation":
        assert len(groups) == 2  # one for each method, over all beta
    if name == "layers":
        assert [list(group) for group in groups] == [[f"L={n}" for n in range(6)], ["exact"]]
    if name == "residual":
        assert len(groups) == 3  # without SEvo, without a residual, and over all decays


@pytest.mark.parametrize("model", ["sasrec", "gru4rec", "stosa", "bsarec"])
def test_every_model_that_predicts_the_next_item_takes_every_loss(model):
    """STOSA's term for pairs is in its preset and has no place in three of the losses."""
    arms, *_ = arms_of(Ablate(name="loss", model=model))
    objectives: list[Any] = [BACKBONES[model].objective(9, config) for config in arms.values()]
    assert {objective.kind for objective in objectives} == set(get_args(Loss))


@pytest.mark.parametrize(("model", "kind"), [("bert4rec", "cross_entropy"), ("mf", "bpr")])
def test_models_with_a_loss_of_their_own_are_compared_in_that(model, kind):
    arms, *_ = arms_of(Ablate(name="loss", model=model))
    assert list(arms) == [f"{kind} adamw", f"{kind} update", f"{kind} gradient"]
    assert {config.loss for config in arms.values()} == {kind}


@pytest.mark.parametrize("model", ["sasrec", "stosa"])
def test_arms_are_what_their_names_say_and_keep_their_places(model):
    asked = ("H=2 count", "last K=50", "last K=5")
    arms, places, *_ = arms_of(Ablate(name="graph", model=model, arms=asked))
    assert list(arms) == ["last K=5", "last K=50", "H=2 count"]
    assert [places[arm] for arm in arms] == [0, 2, 5]
    assert arms["last K=50"].graph_window == 50  # STOSA's preset has 100
    assert arms["last K=5"].graph_window == 5


def test_a_teacher_comes_along_and_the_student_stays_first():
    arms, *_ = arms_of(Ablate(name="distillation", arms=("KD", "student")))
    assert list(arms) == ["student", "teacher", "KD"]


@pytest.mark.parametrize("model", ["sasrec", "bert4rec"])
def test_the_graph_of_attributes(split, model):
    """Special rows are isolated, and the weight is the number of shared attributes."""
    lists = [[i % 3] if i % 2 else [i % 3, 3] for i in range(60)]
    values, splits = np.concatenate(lists), np.cumsum([0, *map(len, lists)])
    attributes = Attributes(("a", "b", "c", "d"), values, splits)
    other = replace(split, dataset=replace(split.dataset, attributes=attributes))
    config = preset(model, "synthetic", "sevo_adamw", graph="attributes", graph_max_items=29)
    for largest, known in ((30, range(4)), (29, range(3))):  # "d" is that of 30 items
        expected = [
            [len(set(a) & set(b) & set(known)) * (i != j) for i, a in enumerate(lists)]
            for j, b in enumerate(lists)
        ]
        found = make_graph(replace(config, graph_max_items=largest), other)
        special = int(found.n_node[0]) - 60
        np.testing.assert_array_equal(dense(found)[special:, special:], expected)
        assert dense(found)[:special].sum() == 0 < special
    assert isinstance(prepare(found), Dense)  # a third of all pairs
    sparse = prepare(item_graph([[0, 1]], 60))
    assert not isinstance(sparse, Dense) and prepare(sparse) is sparse
    reference = reference_smooth(
        reference_normalized(dense(found)), np.eye(60 + special), 0.9, 3, "neumann"
    )
    smoothed = smooth(prepare(found), jnp.eye(60 + special), beta=0.9)
    np.testing.assert_allclose(smoothed, reference, atol=1e-6)


def test_genres(split, tmp_path, monkeypatch):
    def make(optimizer, **settings):
        return replace(TINY, epochs=1, optimizer=optimizer, **settings)

    arms = ABLATIONS["genres"](make)
    sizes = [len(group) for group in programs(arms)]
    assert sizes == [1, 7, 6]  # AdamW; interactions with beta 0; genres
    chosen = {label: arms[label] for label in ("genres beta=0.5", "genres beta=0.99")}
    fit_sweep(chosen, split, [0], tmp_path)
    tables = final_tables(tmp_path)
    assert np.abs(tables[0] - tables[1]).max() > 1e-4
    bare = replace(split, dataset=replace(split.dataset, attributes=None))
    monkeypatch.setattr("experiments.ablations.split_of", lambda _: (bare.dataset, bare))
    with pytest.raises(ValueError, match="the items of 'synthetic' have no attributes"):
        ablate(Ablate(name="genres", out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "iterative"},
        {"beta_ramp": True, "rescale": False},
        {"placement": "both", "isolated": "identity"},
        {"placement": "gradient"},
        {"smooth_every": 2},
        {"optimizer": "sevo_adam", "residual_decay": 0.5},
        {"optimizer": "sevo_sgd"},
    ],
)
def test_sweeping_the_number_of_layers(settings):
    """One program for all, in which psi of each run is that of its own number."""
    graph = item_graph([[0, 1, 2, 3]], 5)
    config = replace(TINY, dim=2, beta=0.9, **settings)
    layers = {"num_layers": [0, 3, 1]}
    swept: Any = make_optimizer(config, graph, layers)
    tree = {"item_embedding": jnp.ones((5, 2))}
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 2)), jnp.float32)

    def steps(solver, state):
        moves = []
        for gradient in gradients:
            updates, state = solver.update({"item_embedding": gradient}, state, tree)
            moves.append(updates["item_embedding"])
        return jnp.stack(moves)

    @jax.jit
    @jax.vmap
    def sweep(hyperparams):
        return steps(swept, swept.init(tree)._replace(hyperparams=hyperparams))

    together: Any = sweep({"num_layers": jnp.array(layers["num_layers"], float)})
    for num, found in zip(layers["num_layers"], together, strict=True):
        solver = make_optimizer(replace(config, num_layers=num), graph)
        expected = jax.jit(partial(steps, solver))(solver.init(tree))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert np.abs(together[0] - together[1]).max() > 1e-4


def test_switching_placement():
    """Two steps on smoothed gradients, then two with a smoothed direction; one Adam for all."""
    graph = item_graph([[0, 1, 2, 3]], 4)
    params = {"item_embedding": {"embedding": jnp.ones((4, 2))}}
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.normal(size=(4, 4, 2)), jnp.float32)

    def tree(table):
        return {"item_embedding": {"embedding": table}}

    settings = replace(TINY, beta=0.9, epochs=2)
    switched = make_optimizer(
        replace(settings, placement="switch", switch_at=0.5), graph, steps_per_epoch=2
    )
    # At beta 0 nothing is smoothed; the states of both are alike.
    plain, smoothed = (make_optimizer(replace(settings, beta=b), graph) for b in (0.0, 0.9))
    state, expected_state = switched.init(params), plain.init(params)
    for step, gradient in enumerate(gradients):
        updates, state = switched.update(tree(gradient), state, params)
        if step < 2:
            gradient = smooth(graph, gradient, beta=0.9)
        reference = plain if step < 2 else smoothed
        expected, expected_state = reference.update(tree(gradient), expected_state, params)
        assert_same_tree(updates, expected, 1e-8)


def test_smoothing_both_gradient_and_update_by_column():
    graph = item_graph([[0, 1, 2, 3]], 4)
    tree = {"item_embedding": jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))}
    config = replace(TINY, dim=2, beta=0.9, beta_ramp=True)  # the first column as it is
    both, update = (
        make_optimizer(replace(config, placement=placement), graph)
        for placement in ("both", "update")
    )
    smoothed = smooth(graph, tree["item_embedding"], beta=jnp.array([0, 0.9]))
    actual, _ = both.update(tree, both.init(tree), tree)
    expected, _ = update.update({"item_embedding": smoothed}, update.init(tree), tree)
    assert_same_tree(actual, expected, 1e-8)
    single = smooth(graph, jnp.sign(smoothed), beta=jnp.array([0, 0.9]))  # Adam's first step
    decayed = single + config.weight_decay * tree["item_embedding"]
    assert_same_tree(actual, {"item_embedding": -config.learning_rate * decayed}, 1e-8)


@pytest.mark.parametrize("optimizer", ["sevo_adamw", "sevo_adam", "sevo_sgd"])
def test_smoothing_every_second_step(optimizer):
    """The first step is that of beta 0, and both together those of two smoothed ones."""
    graph = item_graph([[0, 1, 2, 3]], 4)
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 2)), jnp.float32)
    tree = {"item_embedding": jnp.zeros((4, 2))}
    config = replace(TINY, optimizer=optimizer, beta=0.9, weight_decay=0.0)

    def steps(**settings):
        solver = make_optimizer(replace(config, **settings), graph)
        state, moves = solver.init(tree), []
        for gradient in gradients:
            updates, state = solver.update({"item_embedding": gradient}, state, tree)
            moves += jax.tree.leaves(updates)
        return np.array(moves)

    every, plain, smoothed = steps(smooth_every=2), steps(beta=0.0), steps()
    np.testing.assert_allclose(every[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(every.sum(axis=0), smoothed.sum(axis=0), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("optimizer", {"sevo_sgd": "sgd", "sevo_adam": "adam", "sevo_adamw": "adamw"}),
        ("users", {"10% sevo_adamw": "10% adamw", "100% sevo_adamw": "100% adamw"}),
        ("loss", {"bpr update": "bpr adamw", "bpr adamw": "bce adamw"}),
        ("layers", {"L=3": "L=0", "exact": "L=0"}),
        ("distillation", {"SEvo": "student", "SEvo + DKD": "DKD", "DKD": "student"}),
    ],
)
def test_arms_are_compared_with_the_same_without_sevo(name, over):
    arms = ABLATIONS[name](partial(preset, "sasrec", "amazon_beauty"))
    found = dict(zip(arms, bases(list(arms.values())), strict=True))
    assert {arm: list(arms)[found[arm]] for arm in over} == over


def test_the_command(tmp_path, capsys):
    found = synthetic(num_users=80, num_items=60, num_communities=3)
    users = np.repeat(np.arange(found.num_users), np.diff(found.row_splits))
    path = tmp_path / "log.csv"
    times = np.arange(len(users))
    rows = np.stack([users, found.values, times], axis=1)
    np.savetxt(path, rows, "%d", ",", header="user,item,timestamp", comments="")
    common = ["--data", str(path), "--dim", "4", "--num-blocks", "1", "--epochs", "1"]
    out = ["--out", str(tmp_path / "out")]
    cli.main(["ablate", "beta", *common, *out, "--arms", "adamw", "beta=0.5", "beta=0.9"])
    printed = capsys.readouterr().out
    assert "beta=0.9" in printed and "gain" in printed and "over" in printed
    folders = {p.parent.relative_to(tmp_path / "out") for p in tmp_path.rglob("run.json")}
    assert {str(f) for f in folders} == {
        "program_0/adamw",
        "program_1/beta=0.5",
        "program_1/beta=0.9",
    }
    run = read(tmp_path / "out" / "program_1" / "beta=0.9" / FILE)
    assert ablation_of(run) == "beta, dim 4, epochs 1, num_blocks 1"
    assert name_of(run) == "beta=0.9"
    asked = "--dim 4 --epochs 1 --num-blocks 1 --arms adamw beta=0.5 beta=0.9"
    assert command_of(run).startswith("python -m experiments ablate beta --data log.csv ")
    assert command_of(run).endswith(asked)
    for arguments, message in (
        (["ablate", "bets", *common], "`name` must be one of"),
        (["ablate", "beta", *common, "--arms", "beta=2"], "`arms` must be of"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
