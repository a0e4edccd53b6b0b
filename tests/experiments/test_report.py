"""Tables are functions of records: by hand for one small run."""

import functools
import itertools
import json
import shlex
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from experiments import cli
from experiments.presets import preset
from experiments.published import official_curve, published
from experiments.report import BEGIN, END, keep, write_report
from experiments.tables import name_of, sort_key
from experiments.tuning import Setting, chances, tuned_table

CONFIG = preset("sasrec", "amazon_beauty", "sevo_adamw", beta=0.5)


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one run: an epoch, a validation and the tests."""
    folder = tmp_path / "runs" / "beauty-sasrec" / "sevo_adamw"
    folder.mkdir(parents=True)
    settings = {
        "config": asdict(CONFIG),
        "data": {"name": "amazon_beauty", "source": "/home/someone/amazon_beauty"},
        "device": "1 cpu (cpu)",
        "cores": 2,
        "num_seeds": 2,
        "versions": {"jax": "0.10.2"},
    }
    records = []
    for seed, (loss, score) in enumerate([(1.0, 0.03), (3.0, 0.05)]):
        metrics = dict.fromkeys(("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR@10"), score)
        for epoch in (1, 2):
            records.append(
                {"kind": "epoch", "seed": seed, "epoch": epoch, "loss": loss}
                | {"seconds": 60 if epoch == 1 else 4}  # the first with the compilation
            )
        records.append(
            {"kind": "valid", "seed": seed, "epoch": 1, "seconds": 5} | metrics | settings
        )
        for kind in ("test", "last_test"):
            records.append(
                {"kind": kind, "seed": seed, "epoch": 2, "seconds": 9} | metrics | settings
            )
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "records.jsonl").write_text(lines)
    return tmp_path / "runs"


def change(path, edit):
    """Rewrites a file of records; `edit` changes each in place."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        edit(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tables_hold_mean_and_spread(runs, tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert write_report([runs], page) == 1
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(line for line in text.splitlines() if "| sevo_adamw, beta 0.5 | 2 |" in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[4:9] == ["0.0400 ± 0.0141"] * 5
    assert cells[9:] == ["2 2", "2.00", "1 cpu (cpu), 2 core(s)"]
    assert "| 1 | 2.0000 ± 1.4142 |" in text
    assert "published" not in text  # these are not the published settings
    assert "`python -m experiments train --data amazon_beauty --model sasrec " in text
    assert "--optimizers sevo_adamw --seeds 0 1 --beta 0.5`" in text


def test_gains_are_told_with_their_p_values(runs, tmp_path):
    """By hand: differences of .01 and .02 make t 3 with one degree of freedom."""
    path = runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl"
    plain = runs / "beauty-sasrec" / "adamw"
    shutil.copytree(path.parent, plain)

    def edit(record):
        if "config" in record:
            record["config"] = asdict(preset("sasrec", "amazon_beauty", "adamw"))
            record["NDCG@10"] = {0: 0.02, 1: 0.03}[record["seed"]]

    change(plain / "records.jsonl", edit)
    page = tmp_path / "RESULTS.md"
    write_report([runs], page)
    row = (
        "| amazon_beauty | sasrec | sevo_adamw, beta 0.5 | adamw | same optimizer | 2 | 0.0400 "
    )
    row += "| 0.0250 | +60.0 % | 2.12 | 0.2 | 1 cpu (cpu), 2 core(s) |"
    assert row in page.read_text()


def test_the_best_of_each_arm_is_chosen_by_validation():
    """Out of how many, too."""
    make = functools.partial(preset, "sasrec", "amazon_beauty")
    start = {"placement": "gradient", "beta": 0.0, "smooth_start": 0.9}
    arm = {"ablation": {"name": "beta", "arm": "beta=0.5", "arms": [], "given": {}}}
    found = [  # settings, (validation, test) of each seed, and what else records say
        (make("adamw"), [(0.3, 0.2), (0.5, 0.4)], {}),
        (make("adamw", weight_decay=0.3), [(0.6, 0.1), (0.4, 0.2)], {}),
        # On another device, and validated more often: its seed is in the next one.
        (make("sevo_adamw", eval_every=1), [(0.9, 0.7)], {}),
        (make("sevo_adamw"), [(0.8, 0.9), (0.6, 0.3)], {}),
        (make("sevo_adamw", beta=0.5), [(0.2, 0.9)], arm),
        # In no budget of those that are as long as the best.
        (make("sevo_adamw", epochs=10), [(0.1, 0.1)], {}),
        (make("sevo_adamw", epochs=900), [(0.1, 0.1)], {}),
        (make("sevo_adamw", **start), [(0.5, 0.9)], {}),  # is not AdamW's
        # Each alone with its kind.
        (make("sevo_adamw", loss="bpr"), [(0.9, 0.9)], {}),
        (make("sevo_adamw", loss="gbce"), [(0.9, 0.9)], {}),
        (make("adamw", loss="gbce"), [(0.9, 0.9)], {}),
        # With two rows more: of one seed, and of two.
        (make("adamw", loss="sampled_softmax"), [(0.9, 0.5)], {}),
        (make("adamw", loss="sampled_softmax", dim=8), [(0.8, 0.5)], {}),
        (make("sevo_adamw", loss="sampled_softmax"), [(0.9, 0.6), (0.9, 0.6)], {}),
        (make("adamw", loss="cross_entropy"), [(0.9, 0.5), (0.9, 0.5)], {}),
        (make("adamw", loss="cross_entropy", dim=8), [(0.8, 0.5)], {}),
        (make("sevo_adamw", loss="cross_entropy"), [(0.9, 0.6), (0.9, 0.61)], {}),
        # They are not asked the same.
        (make("sevo_adamw", train_users=0.5), [(0.9, 0.9)], {}),
        (make("sevo_adamw", graph="attributes"), [(0.9, 0.9)], {}),
        (make("sevo_adamw", graph="teacher"), [(0.9, 0.9)], {}),
    ]
    runs = []
    for config, seeds, more in found:
        more |= {"config": asdict(config), "data": {"name": "amazon_beauty"}}
        runs.append(
            [
                {"kind": kind, "seed": seed, "epoch": epoch, "NDCG@10": value} | more
                for seed, (valid, test) in enumerate(seeds)
                for kind, epoch, value in [
                    ("valid", 1, valid),
                    ("valid", 2, 0.1),
                    ("test", 1, test),
                ]
            ]
        )
    table = tuned_table(runs)
    assert {len(row) for row in table.rows} == {len(table.head)}
    row, strong, drawn = table.rows
    assert row[:4] == ["amazon_beauty", "sasrec", "bce", "adamw"]
    assert row[4:8] == ["2", "adamw, weight_decay 0.3", "0.5000 ± 0.1414", "0.1500 ± 0.0707"]
    assert row[8:12] == ["5", "sevo_adamw", "0.7000 ± 0.1414", "0.6000 ± 0.4243"]
    # Of SEvo's three long ones two are the best twice and the second once, which has .9 with
    # seed 0 alone, where AdamW has .1: (2 * .6 + .9) / (2 * .15 + .1).
    assert row[12:14] == ["2 of 2 and 3", "+425.0 %"]
    # Differences of .8 and .1, paired by seed: t is 1.29 with one degree of freedom; the other
    # test has .0303, twice that by Holm's rule.
    assert row[14:] == ["+300.0 %", "2", "0.91", "0.42"]
    assert strong[2] == "cross_entropy" and strong[14:] == ["+21.0 %", "2", "14.85", "0.061"]
    assert drawn[2] == "sampled_softmax" and drawn[14:] == ["+20.0 %", "1", "", ""]


def test_chances_are_those_of_all_choices():
    rng = np.random.default_rng(0)
    settings = [Setting(str(i), 1, {0: v}, {}) for i, v in enumerate(rng.random(6))]
    for budget in range(1, 7):
        choices = list(itertools.combinations(settings, budget))
        best = Counter(max(chosen, key=lambda one: one.valid[0]).name for chosen in choices)
        for setting, chance in chances(settings, budget):
            assert chance == pytest.approx(best[setting.name] / len(choices))
    for budget in (0, 7):
        with pytest.raises(ValueError, match="`budget` must be from 1 to 6"):
            chances(settings, budget)


@pytest.mark.parametrize(
    ("kept", "chosen"),
    [
        ([(0, 0.1), (20, 0.4), (30, 0.5), (40, 0.6)], ["0.5000"]),  # at the test's epoch
        ([(0, 0.1), (20, 0.4), (40, 0.3)], ["0.4000"]),  # the best of what is left
        ([(0, 0.1)], []),  # says nothing of what was trained
    ],
)
def test_settings_are_chosen_by_the_validations_that_are_kept(kept, chosen):
    make = functools.partial(preset, "sasrec", "amazon_beauty")
    runs = []
    for config in (make("adamw"), make("adamw", weight_decay=0.3), make("sevo_adamw")):
        lines = [("valid", epoch, value) for epoch, value in kept] + [("test", 30, 0.7)]
        more = {"config": asdict(config), "data": {"name": "amazon_beauty"}, "seed": 0}
        runs.append([{"kind": k, "epoch": e, "NDCG@10": v} | more for k, e, v in lines])
    assert [row[6] for row in tuned_table(runs).rows] == chosen


def test_data_of_one_name_that_differs_is_told_apart(runs, tmp_path):
    other = runs / "other" / "sevo_adamw"
    shutil.copytree(runs / "beauty-sasrec" / "sevo_adamw", other)
    for folder, users in ((runs / "beauty-sasrec" / "sevo_adamw", 1200), (other, 90)):
        change(
            folder / "records.jsonl",
            lambda line, users=users: line.get("data", {}).update(users=users),
        )
    write_report([runs], tmp_path / "page.md")
    for users in ("1,200", "90"):  # of the tests, and of the curves at epoch 1
        row = f"| amazon_beauty of {users} users | sasrec | sevo_adamw, beta 0.5 |"
        assert (tmp_path / "page.md").read_text().count(row) == 2


def test_measured_stands_beside_published(runs, tmp_path):
    """.0400 is .00113 below the published .04113, whose deviation is .00133."""

    def edit(line):
        if "config" in line:
            line["config"]["beta"] = 0.99
            line["data"] |= {"items": 12_101, "train": 153_776}

    change(runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl", edit)
    write_report([runs], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    row = "| amazon_beauty | sasrec | sevo_adamw | 2 | 0.0400 ± 0.0141 | 0.0411 ± 0.0013 |"
    assert f"{row} -2.7 % | -0.8 | 1 cpu (cpu), 2 core(s) |" in text


@pytest.mark.parametrize(("items", "expected"), [(12_101, True), (12_100, False)])
def test_fetched_data_is_the_published(items, expected):
    """As its publisher calls it, where the sizes say that it is the same."""
    data = {"name": "reviews_Beauty_5", "items": items, "train": 153_776}
    config = preset("sasrec", "amazon_beauty", "sevo_adamw")
    assert bool(published(config, data)) == expected == bool(official_curve(config, data))


def test_kept_records_give_the_same_table(runs, tmp_path):
    keep([runs], tmp_path / "results")
    kept = (tmp_path / "results" / "beauty-sasrec" / "sevo_adamw.jsonl").read_text()
    assert '"source": "amazon_beauty"' in kept and "someone" not in kept
    pages = [tmp_path / "a.md", tmp_path / "b.md"]
    write_report([runs], pages[0])
    write_report([tmp_path / "results"], pages[1])
    assert pages[0].read_text() == pages[1].read_text()


@pytest.mark.parametrize(("last", "kept"), [(30, list(range(31))), (31, [0, 1, 2, 5, 10, 20])])
def test_long_curves_are_thinned(last, kept, runs, tmp_path):
    path = runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl"
    with path.open("a") as file:
        for epoch in range(last + 1):
            line = {"kind": "valid", "seed": 1, "epoch": epoch, "seconds": 5, "NDCG@10": 0.1}
            file.write(json.dumps(line) + "\n")
    keep([runs], tmp_path / "results")
    (file,) = (tmp_path / "results").rglob("*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["epoch"] for r in found if r["kind"] == "valid" and r["seed"] == 1][1:] == kept


def test_seeds_that_were_trained_apart_are_kept_together(runs, tmp_path):
    path = runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    more = tmp_path / "more" / "beauty-sasrec" / "sevo_adamw"
    more.mkdir(parents=True)

    def write(change):
        changed = [line | change(line) for line in lines]
        (more / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in changed))

    write(lambda line: {"seed": line["seed"] + 2})
    keep([runs, tmp_path / "more"], tmp_path / "results")
    (kept,) = (tmp_path / "results").rglob("*.jsonl")
    seeds = [json.loads(line)["seed"] for line in kept.read_text().splitlines()]
    assert set(seeds) == {0, 1, 2, 3}
    write(lambda line: {"seed": line["seed"] + 2, "seconds": 30})
    keep([tmp_path / "more"], tmp_path / "results")
    write_report([tmp_path / "results"], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "--beta 0.5` (39 s;" in text  # 9 of two seeds together, 30 of the others
    before = kept.read_bytes()
    keep([tmp_path / "results"], tmp_path / "results")  # what is kept stays
    assert [*(tmp_path / "results").rglob("*.jsonl")] == [kept] and kept.read_bytes() == before
    keep([tmp_path / "more"], tmp_path / "results")  # nor do other seeds go
    assert sorted(kept.read_text().splitlines()) == sorted(before.decode().splitlines())
    before = kept.read_bytes()
    for change in (
        lambda line: {},  # the same seeds
        lambda line: {"seed": line["seed"] + 2, "config": asdict(replace(CONFIG, dim=8))},
        lambda line: {"seed": line["seed"] + 2, "data": {"name": "another", "source": "a"}},
    ):
        write(change)
        with pytest.raises(ValueError, match="would both be kept as .* Rename"):
            keep([runs, tmp_path / "more"], tmp_path / "results")
    with pytest.raises(ValueError, match="keeps other settings or data than"):
        keep([tmp_path / "more"], tmp_path / "results")
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    "text", ['{"text": "of another program"}\nno JSON\n', "[1, 2]\n", "", "\xff\n"]
)
def test_files_that_are_no_records_are_left_out(runs, tmp_path, text):
    (runs / "other.jsonl").write_bytes(text.encode("latin-1"))
    assert write_report([runs], tmp_path / "new" / "page.md") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"kind": "te', "not a record"),
        (b"\xff", "not a record"),
        (b"[1, 2]", "not a record"),
        (b'{"kind": "test", "epoch": 1}', "no record without {'seed'}"),
    ],
)
def test_records_that_are_broken_are_not(line, message, runs, tmp_path):
    path = runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match=f"records.jsonl, line 11: {message}"):
        write_report([runs], tmp_path / "page.md")


def test_a_page_is_whole_or_as_before(runs, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"prose\n{BEGIN}\nold\n{END}\n")

    def stop(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_report([runs], page)
    assert page.read_text() == f"prose\n{BEGIN}\nold\n{END}\n"


def test_the_tables_and_the_page_are_two_files(runs, tmp_path, capsys):
    page = str(tmp_path / "x.html")
    with pytest.raises(SystemExit):
        cli.main(["report", "--runs", str(runs), "--page", page])
    assert "`page` and `html` must be two files" in capsys.readouterr().err


def test_records_are_kept_from_inside_their_folder(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs / "beauty-sasrec" / "sevo_adamw")
    keep([Path()], tmp_path / "results")
    (kept,) = (tmp_path / "results").rglob("*.jsonl")
    assert kept.relative_to(tmp_path / "results") == Path("beauty-sasrec/sevo_adamw.jsonl")


def test_kept_records_name_no_folder(runs, tmp_path):
    def edit(line):
        if "data" in line:
            line["data"]["options"] = "--items '/home/some one/items.csv' --k-core 5"

    change(runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl", edit)
    for _ in range(2):  # what is kept has the same data as what is not
        keep([runs], tmp_path / "results")
    (kept,) = (tmp_path / "results").rglob("*.jsonl")
    assert '"--items items.csv --k-core 5"' in kept.read_text()
    assert "/home" not in kept.read_text()


def _study(folder, **changes):
    kept = {"study": "theory", "model": "sasrec", "data": None, "seeds": [0], "arms": []}
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(kept | {"settings": {}} | changes))
    return folder


def test_studies_are_kept_and_none_hides_another(tmp_path):
    results, first = tmp_path / "results", _study(tmp_path / "a" / "theory")
    (first / "rate.png").write_bytes(b"picture")
    keep([tmp_path / "a"], results)
    assert (results / "theory" / "rate.png").read_bytes() == b"picture"
    keep([tmp_path / "a", results], results)  # what is kept stays
    _study(tmp_path / "b" / "theory", seeds=[1])
    with pytest.raises(ValueError, match="would both be kept as .*theory. Rename"):
        keep([tmp_path / "a", tmp_path / "b"], results)
    with pytest.raises(ValueError, match="keeps another study than .*--seeds 0`; rename"):
        keep([tmp_path / "b"], results)
    assert json.loads((results / "theory" / "study.json").read_text())["seeds"] == [0]


def test_commands_name_the_options_that_chose_the_data(runs, tmp_path):
    def edit(line):
        if "data" in line:
            line["data"]["options"] = "--k-core 5 --split-times 600.0 800.0"

    change(runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl", edit)
    write_report([runs], tmp_path / "page.md")
    command = "train --data amazon_beauty --k-core 5 --split-times 600.0 800.0 --model sasrec"
    assert command in (tmp_path / "page.md").read_text()


def test_a_run_that_went_on_for_more_epochs_is_told_by_its_newest_settings(runs, tmp_path):
    def edit(line):
        if line["kind"] == "valid":  # of the command before
            line["config"]["epochs"] = 1

    change(runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl", edit)
    write_report([runs], tmp_path / "page.md")
    assert "epochs 1" not in (tmp_path / "page.md").read_text()


def test_commands_can_be_typed(runs, tmp_path):
    """With the preset that was asked for, the file's own name, and no idle setting."""
    source = "somewhere/my log.csv"
    idle = {"optimizer": "adamw", "beta": 0.5, "model": "mf", "windows": "users"}
    asked = preset("mf", "movielens_1m", "adamw", weight_decay=0.1, dim=8)

    def edit(line):
        if "config" in line:
            line["config"] = asdict(replace(asked, **idle))
            line["data"] |= {"name": "my log", "source": source}
            line["data"]["options"] = "--preset movielens_1m"

    change(runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl", edit)
    write_report([runs], tmp_path / "page.md")
    command = next(c for c in (tmp_path / "page.md").read_text().split("`") if "train" in c)
    options = cli.parse(shlex.split(command)[3:])
    assert options.data == "my log.csv"
    assert options.given() == {"weight_decay": 0.1, "dim": 8}
    config = options.config("adamw", "my log")
    options.check_given([config])
    assert config == asked


def test_folders_may_overlap_and_hold_other_files(runs, tmp_path):
    (runs / "list.jsonl").write_text("[1, 2]\n")
    assert write_report([runs, runs / "beauty-sasrec"], tmp_path / "page.md") == 1


def test_what_is_missing_is_said(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="hold no tested run"):
        write_report([tmp_path / "empty"], tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()
    page = tmp_path / "unmarked.md"
    page.write_text("mine")
    with pytest.raises(ValueError, match="must hold the lines"):
        write_report([runs], page)
    assert page.read_text() == "mine"


def test_report_command(runs, tmp_path, capsys, monkeypatch):
    whole = (runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl").read_text().splitlines()
    begun = runs / "begun" / "sevo_adamw" / "records.jsonl"
    begun.parent.mkdir(parents=True)
    begun.write_text(whole[0] + "\n")
    cli.main(["report", "--runs", str(runs), "--page", str(tmp_path / "R.md")])
    said = capsys.readouterr().out
    assert "tables of 1 runs" in said and f"{begun}: left out, as it holds no test" in said
    assert said.count("left out") == 1
    # Only the records that the repository keeps go to its RESULTS.md unasked.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cli.main(["report", "--runs", str(runs)])
    assert not list(Path().iterdir())
    assert "sevo_adamw" in (runs / "RESULTS.md").read_text()
    assert (runs / "RESULTS.html").exists()
    shutil.copytree(runs, "results")
    cli.main(["report"])
    assert Path("RESULTS.md").exists() and Path("RESULTS.html").exists()


def test_arms_of_an_ablation_have_a_table_of_their_own(runs, tmp_path):
    path = runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    # In the order of the ablation, not of the names.
    for order, (arm, factor) in enumerate({"wide": 1.0, "narrow": 1.5}.items()):
        given = {"epochs": 2, "smooth_start": 0.9}  # which only one of the arms knows
        note = {"name": "graph", "arm": arm, "order": order, "given": given}
        note["arms"] = ["wide", "narrow", "not run"]
        folder = runs / "beauty-sasrec-graph" / "program_0" / arm
        folder.mkdir(parents=True)
        with (folder / "records.jsonl").open("w") as file:
            for record in records:
                if "config" in record:
                    score = {"NDCG@10": factor * record["NDCG@10"]}
                    config = record["config"] | {"epochs": 2}
                    config["smooth_start"] = 0.9 if arm == "narrow" else 0.0
                    record = record | score | {"ablation": note, "config": config}
                file.write(json.dumps(record) + "\n")
    pages = [tmp_path / "a.md", tmp_path / "b.md"]
    assert write_report([runs], pages[0]) == 3
    main, _, ablation = pages[0].read_text().partition("### graph, epochs 2: ")
    assert "| sevo_adamw, beta 0.5 | 2 |" in main and "wide" not in main
    rows = [line.split("|")[1:-1] for line in ablation.splitlines() if line.startswith("|")]
    first, second = ([cell.strip() for cell in row] for row in rows[2:])
    assert first[6:11] == ["0.0400 ± 0.0141", "", "", "", ""]
    assert first[0] == "wide"
    assert second[0] == "narrow (smooth_start 0.9)"
    assert second[6:9] == ["0.0600 ± 0.0212", "+50.0 %", "wide"]
    # Of two seeds the differences are .015 and .025: d_z is .02 over .0071, t = 4.
    assert second[9:11] == ["2.83", "0.16"]
    command = "python -m experiments ablate graph --data amazon_beauty --model sasrec"
    command += " --seeds 0 1 --epochs 2 --smooth-start 0.9 --arms wide narrow 'not run'"
    assert ablation.count(f"`{command}`") == 1
    keep([runs], tmp_path / "results")
    assert (tmp_path / "results" / "beauty-sasrec-graph" / "narrow.jsonl").exists()
    write_report([tmp_path / "results"], pages[1])
    assert pages[0].read_text() == pages[1].read_text()


@pytest.mark.parametrize("options", ["", "--preset amazon_tools"])
def test_published_arms_stand_below_measured_ones(options, runs, tmp_path):
    """Of the paper's Table 5, but not where another dataset's settings were asked for."""
    data = {"name": "amazon_beauty", "items": 12_101, "train": 153_776, "users": 22_363}
    data |= {"source": "amazon_beauty", "options": options}
    note = {"name": "distillation", "order": 0, "given": {}, "arms": []}

    def edit(record):
        record |= {"data": data, "ablation": note | {"arm": "student"}}

    path = runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl"
    change(path, edit)
    page = tmp_path / "RESULTS.md"
    write_report([runs], page)
    text = page.read_text()
    theirs = "| *published student* | 5 | 0.0094 | 0.0327 | 0.0526 | 0.0210 | 0.0275 |  |  |"
    assert (theirs in text) == (not options)
    title = "distillation, preset amazon_tools" if options else "distillation"
    assert f"### {title}: sasrec on amazon_beauty" in text


def test_arms_of_several_commands_stand_in_the_order_of_their_numbers(runs):
    path = runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl"
    run = [json.loads(line) for line in path.read_text().splitlines()]

    def arm(name):
        note = {"name": "every", "arm": name, "order": 0, "given": {}, "arms": [name]}
        return [record | {"ablation": note} for record in run]

    arms = [arm(name) for name in ("every 16", "adamw", "every 4", "every 1024")]
    ordered = [name_of(one) for one in sorted(arms, key=sort_key)]
    assert ordered == ["adamw", "every 4", "every 16", "every 1024"]


def test_who_gains(runs, tmp_path):
    """A row for each run: by popularity of the target and by length of the history."""
    path = runs / "beauty-sasrec" / "sevo_adamw" / "records.jsonl"
    data = json.loads(path.read_text().splitlines()[-1])["data"]
    with path.open("a") as file:
        for seed, score in ((0, 0.2), (1, 0.4)):
            bucket = {"kind": "bucket", "seed": seed, "epoch": 2, "seconds": 9, "data": data}
            for by, low, high in (
                ("popularity", 0, 0),
                ("popularity", 1, 7),
                ("history", 3, 5),
            ):
                span = {"by": by, "low": low, "high": high, "targets": 1000 + high}
                file.write(json.dumps(bucket | span | {"NDCG@10": score + high / 10}) + "\n")
    page = tmp_path / "RESULTS.md"
    write_report([runs], page)
    text = page.read_text()
    assert "Test NDCG@10 by length of the user's history, sasrec on amazon_beauty:" in text
    assert "| run (and targets) | 0 (1,000) | 1 to 7 (1,007) |" in text
    assert "| sevo_adamw, beta 0.5 | 0.3000 ± 0.1414 | 1.0000 ± 0.1414 |" in text
    assert "| run (and targets) | 3 to 5 (1,005) |" in text
    assert "| sevo_adamw, beta 0.5 | 0.8000 ± 0.1414 |" in text
    keep([runs], tmp_path / "kept")
    again = tmp_path / "AGAIN.md"
    write_report([tmp_path / "kept"], again)
    assert again.read_text() == text
    # On another device one of the seeds was run as well: in the table it is one seed still.
    other = tmp_path / "another" / "beauty-sasrec" / "sevo_adamw"
    other.mkdir(parents=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = [line | {"NDCG@10": 0.9} for line in lines if line["seed"] == 0]
    (other / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in first))
    third = tmp_path / "third" / "beauty-sasrec" / "sevo_adamw"
    third.mkdir(parents=True)
    (third / "records.jsonl").write_bytes((other / "records.jsonl").read_bytes())
    for folders in ([runs, other, third], [other, third, runs], [other, runs, third]):
        write_report(folders, page)
        assert (
            "| sevo_adamw, beta 0.5 | 0.3000 ± 0.1414 | 1.0000 ± 0.1414 |" in page.read_text()
        )
