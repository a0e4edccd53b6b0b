"""Runs as a whole: records, checkpoints, resumption after a kill, the commands."""

import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from rich.console import Console

from experiments import cli, main_job, records, run
from experiments.backbones import BACKBONES
from experiments.config import ARGUMENTS, Config, Model
from experiments.data import load_data
from experiments.dataset import Dataset, leave_one_out
from experiments.objectives import NextItem
from experiments.presets import PRESETS, preset
from experiments.published import official_curve, published
from experiments.ranking import METRICS, collect, metrics, rank_targets, ranking_data
from experiments.run import fit, make_trainer
from experiments.run_folder import Progress, claim, load_run, locked
from experiments.synthetic import synthetic

ROOT = Path(__file__).parents[2]
BEAUTY = {"name": "amazon_beauty", "items": 12_101, "train": 153_776}
TINY = Config(dim=8, max_length=10, batch_size=32, epochs=3, eval_every=2)


@pytest.fixture(scope="module")
def split():
    return leave_one_out(synthetic(num_users=120, num_items=100, num_communities=2))


@pytest.fixture(scope="module")
def finished(split, tmp_path_factory):
    """A finished run of two seeds, and its folder."""
    folder = tmp_path_factory.mktemp("run") / "sevo_adamw"
    return fit(TINY, split, (3, 5), folder, source="here"), folder


def without_times(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in r.items() if k != "seconds"}
        for r in records.read(folder / records.FILE)
    ]


def test_the_kept_module_gives_the_recorded_metrics(split, tmp_path):
    """At the best epoch by validation, which by this learning rate is not the last one."""
    config = replace(TINY, epochs=5, eval_every=1, learning_rate=0.3, average_decay=0.9)
    result = fit(config, split, (2, 3, 5), tmp_path / "run")
    assert set(result.best_epoch) != {config.epochs}
    found = records.read(tmp_path / "run" / records.FILE)
    for seed, best in zip(result.seeds, result.best_epoch, strict=True):
        module, _, config = load_run(tmp_path / "run", seed)
        for part in ("valid", "test"):
            held_out = split.evaluation(part)
            (data,), num_slots = ranking_data([held_out], max_length=config.max_length)
            scorer = NextItem("bce", split.dataset.num_items).scorer(module, num_slots)
            ranks = collect(rank_targets(scorer, data), len(held_out.targets))
            (record,) = (
                r for r in found if (r["kind"], r["seed"], r["epoch"]) == (part, seed, best)
            )
            for name, value in metrics(ranks).items():
                assert record[name] == pytest.approx(value)


def test_each_setting_of_a_sweep_has_its_own_records(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
    log = records.SweepLog(tmp_path, (3, 5), {"a": {"of": "a"}, "b": {"of": "b"}})
    assert log.runs == [("a", 3), ("a", 5), ("b", 3), ("b", 5)]
    log.add("epoch", 1, {"loss": np.arange(4)}, 1.0)
    lengths = log.flush()
    log.add("test", np.array([1, 2, 3, 4]), {"HR@1": np.arange(4) / 4}, 2.0)
    log.flush()
    for place, label in enumerate("ab"):
        losses = [2 * place, 2 * place + 1]
        epochs, tests = np.split(np.array(records.read(tmp_path / label / records.FILE)), 2)
        assert [(r["seed"], r["loss"]) for r in epochs] == list(
            zip((3, 5), losses, strict=True)
        )
        assert [r["of"] for r in tests] == [label] * 2
        assert [r["HR@1"] for r in tests] == [loss / 4 for loss in losses]
        assert [r["epoch"] for r in tests] == [loss + 1 for loss in losses]
    log.truncate(lengths)
    kinds = [r["kind"] for label in "ab" for r in records.read(tmp_path / label / records.FILE)]
    assert kinds == ["epoch"] * 4


def test_records_hold_every_evaluation(finished, split):
    result, folder = finished
    found = records.read(folder / records.FILE)
    kinds = [(r["kind"], r["epoch"], r["seed"]) for r in found]
    expected = []
    for epoch in range(4):
        expected += [("epoch", epoch, seed) for seed in (3, 5) if epoch > 0]
        expected += [("valid", epoch, seed) for seed in (3, 5) if epoch in (0, 2, 3)]
    assert kinds[: len(expected)] == expected
    last = [kind for kind, *_ in kinds[len(expected) :]]
    assert last[:4] == ["test"] * 2 + ["last_test"] * 2 and set(last[4:]) == {"bucket"}
    # Buckets of either kind hold every target once, and so have the test's mean.
    test = next(r for r in found if r["kind"] == "test" and r["seed"] == 5)
    for by in ("popularity", "history"):
        parts = [r for r in found if r.get("by") == by and r["seed"] == 5]
        targets = [r["targets"] for r in parts]
        assert len(parts) > 1 and sum(targets) == test["data"]["users"]
        mean = np.average([r["NDCG@10"] for r in parts], weights=targets)
        assert mean == pytest.approx(test["NDCG@10"])
    for record in found:
        if record["kind"] != "epoch":
            assert Config(**record["config"]) == TINY
            assert record["data"]["train"] == split.num_train
            assert {"jax", "python", "sevo_jax"} <= set(record["versions"])
            assert set(METRICS) <= set(record)
    tests = [r["NDCG@10"] for r in found if r["kind"] == "test"]
    np.testing.assert_array_equal(tests, result.test["NDCG@10"])


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_version_names_the_commit_of_a_clone_alone(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        settings = ("user.name=a", "user.email=a@b.c", "commit.gpgsign=false")
        options = [word for one in (*settings, "tag.gpgsign=false") for word in ("-c", one)]
        command = ["git", "-C", str(tmp_path), *options, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # within a hook they name the project's own repository
    file, number = tmp_path / "records.py", records.__version__
    file.write_text("first")
    monkeypatch.setattr(records, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    version = records._own_version.__wrapped__
    assert version() == number  # no repository at all
    git("init")
    git("commit", "--allow-empty", "-m", "a")
    git("tag", "-a", "v9", "-m", "v9")  # says nothing of the version
    assert version() == number  # somebody else's, in which this lies untracked
    git("add", "records.py")
    git("commit", "-m", "b")
    commit = git("rev-parse", "--short=9", "HEAD").strip()
    (tmp_path / "notes.md").write_text("no code")
    assert version() == f"{number}+g{commit}"
    file.write_text("second")
    assert version() == f"{number}+g{commit}.dirty"


def test_the_best_epoch_is_the_one_with_the_highest_validation(finished):
    result, folder = finished
    valid = [r for r in records.read(folder / records.FILE) if r["kind"] == "valid"]
    for seed, best in zip(result.seeds, result.best_epoch, strict=True):
        curve = {r["epoch"]: r["NDCG@10"] for r in valid if r["seed"] == seed}
        assert curve[best] == max(curve.values())
        assert all(curve[e] < curve[best] for e in curve if e < best)  # the earliest of equals


def test_seeds_do_not_depend_on_their_company(finished, split, tmp_path):
    result, _ = finished
    alone = fit(TINY, split, (5,), tmp_path / "alone")
    for name in METRICS:
        np.testing.assert_array_equal(alone.test[name], result.test[name][1:])


def test_per_user_ranks_give_the_reported_metric(finished):
    result, folder = finished
    kept = np.load(folder / "ranks.npz")
    assert kept["above"].shape == (2, len(kept["users"]))
    exact = kept["ties"] == 0
    place = kept["above"] + 1
    hits = np.where(exact, place <= 10, np.nan)
    assert exact.all()
    np.testing.assert_allclose(hits.mean(axis=1), result.test["HR@10"])


def test_a_folder_that_holds_a_run_is_not_overwritten(finished, split):
    _, folder = finished
    before = (folder / records.FILE).read_bytes()
    with pytest.raises(
        ValueError, match="`folder` .* holds a run: resume it .* or choose another"
    ):
        fit(TINY, split, (3, 5), folder)
    with pytest.raises(
        ValueError, match=r"settings: learning_rate 0.\d+ there, 0.5 asked for\.$"
    ):
        fit(replace(TINY, learning_rate=0.5), split, (3, 5), folder, source="here", resume=True)
    with pytest.raises(ValueError, match="other settings.*seeds"):
        fit(TINY, split, (3,), folder, source="here", resume=True)
    # As many users and items, but other targets.
    ends = split.train_end - 1
    earlier = replace(split, train_end=ends, valid=split.valid - 1, test=split.test - 1)
    with pytest.raises(ValueError, match="other settings.*fingerprint"):
        fit(TINY, earlier, (3, 5), folder, source="here", resume=True)
    with pytest.raises(ValueError, match="`epochs` is 2, but the run .* come to epoch 3"):
        fit(replace(TINY, epochs=2), split, (3, 5), folder, source="here", resume=True)
    assert (folder / records.FILE).read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(finished, split):
    _, folder = finished
    before = without_times(folder)
    fit(TINY, split, (3, 5), folder, source="here", resume=True)
    assert without_times(folder) == before


@pytest.mark.parametrize(("share", "newest"), [(1e-9, 0), (1e9, 2)])
def test_a_run_goes_on_from_what_it_saved(
    share, newest, finished, split, tmp_path, monkeypatch
):
    """Saving may take next to no time, so that only the first state is kept, or all of it."""
    monkeypatch.setattr(run, "SAVING", share)

    def stop(progress: Progress) -> None:
        if progress.epoch == 2:
            with pytest.raises(ValueError, match="that another process trains in right now"):
                with locked(folder):
                    pass
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(TINY, split, (3, 5), folder, source="here", report=stop)
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        assert manager.latest_step() == newest
    fit(TINY, split, (3, 5), folder, source="here", resume=True)
    assert without_times(folder) == without_times(finished[1])
    assert final_state(folder) == final_state(finished[1])


def test_a_run_that_goes_on_for_more_epochs_says_so(finished, split, tmp_path):
    shutil.copytree(finished[1], folder := tmp_path / "run")
    more = TINY.epochs + 1
    fit(replace(TINY, epochs=more), split, (3, 5), folder, source="here", resume=True)
    assert load_run(folder)[2].epochs == more
    assert json.loads((folder / "run.json").read_text())["seeds"] == [3, 5]


@pytest.mark.parametrize("model", ["sasrec", "bert4rec", "mf"])
def test_loader_workers_reach_every_objective(model, split):
    """Four make four partial batches; the published figures are theirs as well."""
    settings: Any = {"dim": 8, "max_length": 10, "batch_size": 28}
    steps = []
    for workers in (1, 4):
        config = preset(model, "amazon_beauty", "adamw", **settings, loader_workers=workers)
        trainer = make_trainer(config, split)
        steps.append(len(trainer.objective.order(jax.random.key(0), trainer.data, 28)))
    drawn = split.num_train if model == "mf" else 120
    assert steps == [-(-drawn // 28), sum(-(-len(range(w, drawn, 4)) // 28) for w in range(4))]
    assert steps[0] < steps[1]


def test_a_run_of_an_earlier_version_may_be_resumed(finished, split, tmp_path):
    """Its run.json holds no fingerprint of the data."""
    _, folder = finished
    shutil.copytree(folder, tmp_path / "old")
    held = json.loads((tmp_path / "old" / "run.json").read_text())
    del held["data"]["fingerprint"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(held))
    fit(TINY, split, (3, 5), tmp_path / "old", source="here", resume=True)


def test_what_a_run_that_goes_on_may_differ_in(split, tmp_path):
    """In settings that nothing looks at; not in the attributes that its graph is made of."""

    def asked(name, resume=True, split=split, **settings):
        config = replace(TINY, **settings)
        claim(tmp_path / name, {"": config}, split, (0,), {"name": "x", "source": ""}, resume)

    asked("plain", resume=False, optimizer="adamw", beta=0.9)
    asked("plain", optimizer="adamw", beta=0.5)
    with pytest.raises(ValueError, match="other settings: learning_rate .* there, 0.2 asked"):
        asked("plain", optimizer="adamw", learning_rate=0.2)
    sevo: Any = {"optimizer": "sevo_adamw", "graph": "attributes"}
    asked("sevo", resume=False, **sevo)
    asked("sevo", **sevo)
    with pytest.raises(ValueError, match="other settings: beta 0.99 there, 0.5 asked for.$"):
        asked("sevo", beta=0.5, **sevo)
    known = split.dataset.known_attributes()
    other = replace(known, values=(known.values + 1) % len(known.names))
    changed = replace(split, dataset=replace(split.dataset, attributes=other))
    with pytest.raises(ValueError, match="other settings: attributes '[0-9a-f]+' there, "):
        asked("sevo", split=changed, **sevo)
    asked("plain", split=changed, optimizer="adamw")


def test_a_run_does_not_go_on_over_lost_records(finished, split, tmp_path):
    """It would wherever its data lies now: that is not what stops it."""
    _, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    log = tmp_path / "run" / records.FILE
    log.write_bytes(lost := log.read_bytes()[:100])
    with pytest.raises(ValueError, match="has 100 bytes, but had .* Put the lost records back"):
        fit(TINY, split, (3, 5), tmp_path / "run", source="elsewhere", resume=True)
    assert log.read_bytes() == lost


def test_every_setting_has_an_effect_somewhere():
    """`without_effect` names no setting of a model and optimizer that use it."""
    used: Any = (
        preset("sasrec", "amazon_beauty", "sevo_adamw"),
        preset("sasrec", "amazon_beauty", "sevo_sgd", placement="switch", loss="gbce"),
        preset("sasrec", "amazon_beauty", "adam", loss="cross_entropy", distil="kd"),
        preset("bert4rec", "amazon_beauty", "adamw"),
        preset("bsarec", "amazon_beauty", "adamw"),
        preset("stosa", "amazon_beauty", "sevo_adamw", graph="attributes"),
        preset("lightgcn", "amazon_beauty", "adam"),
    )
    assert not set.intersection(*(config.without_effect() for config in used))
    assert "dim" not in set.union(*(config.without_effect() for config in used))


@pytest.mark.parametrize("change", [{"schedule": "cosine"}, {"placement": "switch"}])
def test_what_depends_on_the_number_of_epochs_cannot_go_on_for_more(change, split, tmp_path):
    config = replace(TINY, epochs=1, **change)
    fit(config, split, (0,), tmp_path / "run")
    with pytest.raises(ValueError, match="other settings: epochs 1 there, 2 asked"):
        fit(replace(config, epochs=2), split, (0,), tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(split, tmp_path):
    wild = replace(TINY, optimizer="sgd", learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="the loss of seed 0 is not finite in epoch 1"):
        fit(wild, split, (0,), tmp_path / "wild")


def test_data_that_cannot_be_ranked_leave_no_folder(tmp_path):
    """Users with three interactions go wholly to training, so nothing is held out."""
    short = leave_one_out(Dataset("short", np.arange(6), np.array([0, 3, 6]), num_items=9))
    with pytest.raises(ValueError, match="there is no held-out target to rank"):
        fit(TINY, short, (0,), tmp_path / "short")
    assert not (tmp_path / "short").exists()


def test_swapped_arguments_are_named(split, tmp_path):
    with pytest.raises(TypeError, match="`split` must be of type Split, got Config"):
        fit(split, TINY, (0,), tmp_path / "none")  # type: ignore
    with pytest.raises(TypeError, match="`config` must be of type Config, got dict"):
        fit({"epochs": 1}, split, (0,), tmp_path / "none")  # type: ignore
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,), (5_000_000_000,)])
def test_seeds_are_checked(split, tmp_path, seeds):
    with pytest.raises(ValueError, match="`seeds` must be (distinct and at least one|from 0)"):
        fit(TINY, split, seeds, tmp_path / "none")
    assert not (tmp_path / "none").exists()


COMMAND = [sys.executable, "-m", "experiments", "train"]
OPTIONS = "--optimizers sevo_adamw --seeds 0 1 --epochs 12 --eval-every 3 --dim 8"


def command(data: Path, out: Path, *more: str) -> list[str]:
    options = f"{OPTIONS} --data {data} --out {out} --max-length 10 --batch-size 16"
    return [*COMMAND, *options.split(), *more]


def final_state(folder: Path):
    """Every array of the newest checkpoint, as bytes."""
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        restored = manager.restore(
            manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore())
        )
    leaves = jax.tree_util.tree_leaves_with_path(restored["state"])
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        ).tobytes()
        for path, leaf in leaves
    }


@pytest.fixture(scope="module")
def csv(split, tmp_path_factory) -> Path:
    dataset = split.dataset
    path = tmp_path_factory.mktemp("data") / "small.csv"
    rows = zip(dataset.users, dataset.values, range(dataset.num_interactions), strict=True)
    path.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    return path


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        arguments, env=environment, cwd=folder, stdout=subprocess.DEVNULL, text=True
    )


@pytest.fixture(scope="module")
def uninterrupted(csv, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert start(command(csv, out), out).wait(timeout=500) == 0
    return out / "sevo_adamw"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_bits(csv, uninterrupted, tmp_path, how):
    """The process is stopped in the middle of training; nothing but time may differ."""
    process = start(command(csv, tmp_path), tmp_path)
    folder = tmp_path / "sevo_adamw"
    log = folder / records.FILE
    deadline = time.monotonic() + 500
    while not (log.exists() and log.read_text().count('"kind": "epoch"') >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait(timeout=100) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    done = max(r["epoch"] for r in records.read(log) if r["kind"] == "epoch")
    assert 2 <= done < 12
    assert start(command(csv, tmp_path, "--resume"), tmp_path).wait(timeout=500) == 0
    assert without_times(folder) == without_times(uninterrupted)
    assert final_state(folder) == final_state(uninterrupted)


def test_a_file_is_no_place_for_runs(tmp_path):
    path = tmp_path / "plain.csv"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"plain\.csv is a file; choose another \(--out\)"):
        main_job.train(cli.parse(["train", "--out", str(path)]), Console(quiet=True))


def test_the_speed_is_shown_without_compilation():
    """An epoch takes 1 s, the compilation of training 50 and that of ranking 100."""
    config, console = replace(TINY, epochs=20, eval_every=4), Console(file=io.StringIO())
    report = main_job.show(console, "resumed", config)
    for epoch in range(5, 17):
        progress = Progress.start(1)
        progress.epoch, progress.seconds = epoch, 50.0 + epoch + 100 * (epoch >= 8)
        report(progress)
    lines = console.file.getvalue().splitlines()  # type: ignore
    assert ["1.00 s/epoch" in line for line in lines] == [False, True, True]


def test_train_command_compares_and_draws(csv, tmp_path, capsys):
    """The table names both optimizers and the gain; the files that it promises are there."""
    out = tmp_path / "out"
    options = f"train --data {csv} --out {out} --epochs 1 --dim 8 --max-length 10 --seeds 0 1"
    cli.main(options.split())
    printed = capsys.readouterr().out
    kept = (out / "adamw").rename(out / "kept")
    with pytest.raises(SystemExit):  # before it trains the other
        cli.main(options.split())
    assert "sevo_adamw holds a run" in capsys.readouterr().err and not (out / "adamw").exists()
    orders = "sequences: by timestamp"
    for text in ("120 users", orders, "sevo_adamw", "gain over adamw", "NDCG@10", "±"):
        assert text in printed
    for folder in (kept, out / "sevo_adamw"):
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / records.FILE).exists() and any((folder / "checkpoints").iterdir())


def test_gradient_placement_and_gru4rec_run(csv, tmp_path, capsys):
    out = tmp_path / "out"
    options = (
        f"train --model gru4rec --data {csv} --out {out} --epochs 1 --dim 8 --max-length 10"
    )
    cli.main(
        [*options.split(), "--optimizers", "sevo_adamw", "sevo_sgd", "--placement", "gradient"]
    )
    assert "sevo_sgd-gradient" in capsys.readouterr().out
    assert (out / "sevo_adamw-gradient" / "ranks.npz").exists()


def test_data_options_reach_the_loader(tmp_path, split):
    """Own column names, a rating threshold, repeats and a split by time."""
    dataset = split.dataset
    rows = zip(dataset.users, dataset.values, range(dataset.num_interactions), strict=True)
    lines = "".join(f"{u},{i},{t},{1 + t % 5},\n" for u, i, t in rows)
    path = tmp_path / "named.csv"
    path.write_bytes("who,what,when,stars,gén\n".encode("latin-1") + lines.encode())
    options = ["train", "--data", str(path), "--min-rating", "2", "--repeats", "first"]
    options += ["--encoding", "latin-1"]
    columns = "user who item what timestamp when rating stars"
    options += ["--columns", *columns.split(), "--split-times", "600", "800"]
    parsed = cli.parse(options)
    loaded = load_data(parsed)
    assert parsed.split_times == ("600", "800")
    stars = 1 + np.arange(dataset.num_interactions) % 5
    assert loaded.num_interactions + sum(loaded.drops.values()) == dataset.num_interactions
    assert max(loaded.drops.values()) == (stars < 2).sum()
    assert loaded.timestamps is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("train --data no_such_folder", "no_such_folder: no such file or folder"),
        ("train --preset amazon_bauty", "must be one of ['amazon_beauty', 'amazon_tools', "),
        ("train --model bsarec --preset amazon_tools", "`preset` for bsarec must be one of"),
        ("train --optimizers adamw adamw", "`optimizers` must be at least one, each once"),
        ("train --k-core 5 --min-rating 3", "takes no --min-rating 3.0 --k-core 5"),
        ("train --num-negatives 2 --loss cross_entropy", "`num_negatives` changes nothing"),
        ("train --optimizers adamw --beta 0.5", "`beta` changes nothing"),
        ("train --optimizers sevo_adamw --model mf --dropout-rate 0.1", "`dropout_rate` chan"),
        ("train --graph users_items", '`graph` "users_items" is for mf alone'),
        ("train --graph attributes --data log.csv", "log.csv: no such file"),
        ("train --mask-prob 1.5 --model bert4rec", "`mask_prob` must be in (0, 1], got 1.5"),
        ("ablate beta --beta 0.5", "`beta` is 0.0 in the arm 'beta=0.0' of beta, but 0.5"),
        ("ablate optimizer --learning-rate 0.01", "`learning_rate` is 1.0 in the arm 'sgd'"),
        ("ablate layers --gbce-t 0.5", "`gbce_t` changes nothing"),
        ("ablate theory --seeds 0 0", "`seeds` must be distinct"),
        ("ablate theory --resume", "`resume` is for runs"),
        ("ablate smoothness --schedule cosine", "`smoothness` knows no `schedule`"),
        ("ablate smoothness --arms a", "`smoothness` has no `arms`, got ('a',)"),
        ("ablate smoothness --momentum 0.3", "`momentum` changes nothing"),
        ("ablate smoothness --beta 1.5", "`beta` must be in [0, 1), got 1.5"),
        ("ablate embeddings --beta -1", "`beta` must be in [0, 1), got -1.0"),
        ("ablate cost --preset amazon_bauty", "`preset` for sasrec must be one of"),
        ("ablate cost --arms bsarec --preset movielens_1m", "`preset` for bsarec must be"),
        ("ablate embeddings --eval-every 3", "`eval_every` changes nothing in `embeddings`"),
        ("ablate embeddings --arms a", "`embeddings` has no `arms`, got ('a',)"),
        ("ablate users --model mf", "`train_users` of mf must be 1, got 0.1"),
        ("train --optimizers adamw --residual-decay 0.9", "`residual_decay` changes nothing"),
        ("train --optimizers sevo_adamw --residual-decay 1.0", "`residual_decay` must be in"),
        (
            "train --optimizers sevo_adamw --residual-decay 0.9 --smooth-every 2",
            "`residual_decay` needs an optimizer with SEvo",
        ),
        ("report --runs", "`runs` must name at least one folder"),
        ("train --beta 1.5", "`beta` must be in"),
        ("train --epochs -1", "`epochs` must be at least 0"),
        ("train --learning-rate nan", "`learning_rate` must be positive and finite, got nan"),
        ("train --weight-decay inf", "`weight_decay` must be at least 0 and finite, got inf"),
        ("train --model mf --max-length 9", "`max_length` changes nothing"),
        ("train --model bert4rec --max-length 1", "`max_length` of bert4rec must be at least"),
        ("train --graph-window 1", "`graph_window` must be at least 2"),
        ("ablate theory --model mf", "`theory` takes `seeds` and `out` alone"),
        ("recommend --run . --history 1", "holds no run"),
        ("train --graph teacher", "`graph` 'teacher' needs a `teacher`"),
    ],
)
def test_bad_input_ends_with_a_message(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(options.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "resumes"),
    [("train", True), ("ablate beta", True), ("ablate theory", False), ("report", False)],
)
def test_an_interruption_says_what_can_go_on(options, resumes, monkeypatch, capsys):
    def interrupt(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    with pytest.raises(SystemExit) as stopped:
        cli.main(options.split())
    assert stopped.value.code == 130
    assert ("--resume" in capsys.readouterr().err) == resumes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "run.json is no JSON object"),
        ("[]", r"run.json is no JSON object \(a list\)"),
        ('{"config": {"from_tomorrow": 1}}', r"this version lacks: \['from_tomorrow'\]"),
    ],
)
def test_a_run_file_that_cannot_be_read_is_named(text, message, tmp_path, split):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(TINY, split, (3, 5), tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


def test_resuming_what_is_not_there_says_so(tmp_path, csv, capsys):
    options = f"train --data {csv} --out {tmp_path / 'typo'} --resume --epochs 0 --dim 8"
    cli.main([*options.split(), "--optimizers", "adamw", "--max-length", "10"])
    assert "typo: nothing to go on from" in capsys.readouterr().out.replace("\n", "")


def test_a_record_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"kind": "epoch"}\nnot json\n')
    with pytest.raises(ValueError, match="records.jsonl, line 2"):
        records.read(path)


def test_every_backbone_is_known_everywhere():
    models = set(get_args(Model))
    assert models == set(ARGUMENTS) == set(BACKBONES) == {model for model, _ in PRESETS}


@pytest.mark.parametrize("name", BACKBONES)
def test_defaults_of_a_model_are_its_preset_on_beauty(name):
    backbone, known = BACKBONES[name], preset(name, "amazon_beauty", "adamw")
    arguments = inspect.signature(backbone.module.__init__).parameters
    for argument, field in ARGUMENTS[name].items():
        assert arguments[argument].default == getattr(known, field), argument


def test_presets_are_valid_and_published_numbers_need_them():
    for model, dataset in PRESETS:
        for optimizer in ("adamw", "sevo_adamw", "adam", "sevo_adam", "sgd", "sevo_sgd"):
            config = preset(model, dataset, optimizer)
            if not optimizer.endswith("adamw"):
                assert config.weight_decay == (1e-6 if model == "mf" else 0)
    beauty = preset("sasrec", "amazon_beauty", "sevo_adamw")
    known = published(beauty, BEAUTY)
    assert known is not None and known["NDCG@10"] == (0.04113, 0.00133)
    assert published(replace(beauty, streams=2, loader_workers=4), BEAUTY) == known
    assert published(replace(beauty, beta=0.5), BEAUTY) is None
    for other in ({"name": "synthetic"}, {"items": 500}, {"train": 1000}):  # another split, say
        assert published(beauty, BEAUTY | other) is None
    pairs = preset("mf", "amazon_beauty", "sevo_adamw", graph="users_items", beta=0.99)
    known = published(pairs, BEAUTY)
    assert known is not None and known["NDCG@10"] == (0.02326, 0.00011)
    assert published(replace(pairs, beta=0.9), BEAUTY) is None
    assert published(replace(pairs, optimizer="adamw"), BEAUTY) is None
    items = preset("mf", "amazon_beauty", "sevo_adamw")
    losses = [official_curve(config, BEAUTY)[5][0] for config in (pairs, items)]
    assert losses == [0.2474, 0.5232]
    assert official_curve(replace(items, optimizer="adam"), BEAUTY) == {}
    assert official_curve(replace(items, beta=0.5), BEAUTY) == {}


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("amazon_toys", "amazon_toys"),
        ("ml-1m", "movielens_1m"),
        ("reviews_Tools_and_Home_Improvement_5", "amazon_tools"),
        ("mine", "amazon_beauty"),
    ],
)
def test_whose_preset_a_dataset_gets(dataset, name):
    assert cli.parse(["train"]).preset_name(dataset) == name
    config = cli.parse(["train"]).config("adamw", dataset)
    assert config == preset("sasrec", name, "adamw", streams=1)
    asked = cli.parse(["train", "--preset", "movielens_1m"]).config("adamw", dataset)
    assert asked == preset("sasrec", "movielens_1m", "adamw", streams=1)


def test_results_table_shows_published_numbers(finished):
    result, _ = finished
    beauty = replace(result, config=preset("sasrec", "amazon_beauty", "sevo_adamw"))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(main_job.results_table([beauty], BEAUTY))
    assert "0.0411 ± 0.0013" in console.export_text()


def test_gains_are_over_the_same_optimizer(finished):
    result, _ = finished
    names: Any = ("adam", "adamw", "sevo_adam", "sevo_adamw")
    results = [replace(result, config=replace(result.config, optimizer=name)) for name in names]
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(main_job.results_table(results, {"name": "mine"}))
    text = console.export_text()
    assert "gain over adam " in text and "gain over adamw " in text


def test_config_rejects_what_it_does_not_know():
    with pytest.raises(ValueError, match="`optimizer` must be one of"):
        Config(optimizer="adamax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='`placement` "gradient" needs an optimizer with SEvo'):
        Config(optimizer="adamw", placement="gradient")
    with pytest.raises(
        ValueError, match="`smooth_start` needs an optimizer with SEvo, got 'ad"
    ):
        Config(optimizer="adam", smooth_start=0.5)
    with pytest.raises(ValueError, match="`smooth_every` needs .* got 'adamw' and 'update'"):
        Config(optimizer="adamw", smooth_every=4)
    with pytest.raises(ValueError, match="`smooth_every` needs .* and 'gradient'"):
        Config(placement="gradient", smooth_every=4)
    with pytest.raises(ValueError, match=r"`smooth_start` must be in \[0, 1\), got 1"):
        Config(smooth_start=1.0)
    with pytest.raises(ValueError, match='`touched` "batch" is for the corrected moments'):
        Config(touched="batch", placement="gradient")
    for optimizer in ("sevo_sgd", "sevo_adam"):
        with pytest.raises(ValueError, match=f"got it for '{optimizer}'"):
            Config(touched="batch", optimizer=optimizer)
    with pytest.raises(ValueError, match="`correct_moments` False"):
        Config(touched="batch", correct_moments=False)
    assert Config(gbce_t=1.0).gbce_t == 1.0  # the calibrated loss
    with pytest.raises(ValueError, match=r"`gbce_t` must be in \[0, 1\], got 1.1"):
        Config(gbce_t=1.1)
    with pytest.raises(ValueError, match="`loss` of bert4rec must be 'cross_entropy'"):
        preset("bert4rec", "amazon_beauty", "adam", loss="bce")
    with pytest.raises(ValueError, match="`windows` of mf must be 'users'"):
        preset("mf", "amazon_beauty", "adam", windows="last")
    with pytest.raises(ValueError, match="`windows` of sasrec must be last, prefixes"):
        Config(windows="users")
    with pytest.raises(ValueError, match="`pvn_weight` is for stosa alone"):
        Config(pvn_weight=0.1)
    with pytest.raises(ValueError, match="`pair_l2` is for mf and lightgcn, got it for sasrec"):
        Config(pair_l2=0.1)
    with pytest.raises(ValueError, match="`cosine_scale` is for sasrec, gru4rec and bsarec"):
        preset("stosa", "amazon_beauty", "adam", cosine_scale=20)
    with pytest.raises(ValueError, match="`batch_size` must be positive"):
        Config(batch_size=0)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("dim", 64.5, "a whole number"),
        ("epochs", "7", "a whole number"),
        ("num_heads", True, "a whole number"),
        ("beta", None, "a number"),
        ("learning_rate", "0.1", "a number"),
        ("rescale", 1, "True or False"),
    ],
)
def test_config_rejects_values_of_another_type(name, value, kind):
    with pytest.raises(TypeError, match=f"`{name}` must be {kind}, got {value!r}"):
        Config(**{name: value})


@pytest.mark.parametrize("model", ["sasrec", "gru4rec", "bsarec"])
def test_cosine_scale_reaches_the_model(model):
    config = preset(model, "amazon_beauty", "adam", cosine_scale=20, dim=8)
    module = nnx.eval_shape(lambda: BACKBONES[model].build(0, 39, config, nnx.Rngs(0)))
    assert module.cosine_scale == 20


def test_the_filter_of_bsarec_is_a_setting():
    config = preset("bsarec", "amazon_beauty", "adam", filter_weight=0, filter_cutoff=1, dim=8)
    module = nnx.eval_shape(lambda: BACKBONES["bsarec"].build(0, 39, config, nnx.Rngs(0)))
    assert module.blocks[0].filter_weight == 0
    np.testing.assert_allclose(module.blocks[0].kernel, 1 / 50)  # their mean passes alone


def test_run_file_is_complete(finished):
    _, folder = finished
    held = json.loads((folder / "run.json").read_text())
    assert Config(**held["config"]) == TINY and held["seeds"] == [3, 5]
