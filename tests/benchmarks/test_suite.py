"""The suite without PyTorch: its clock, its graphs, small runs, and the page."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cli, graphs, measure, optimizer, page, psi
from experiments.dataset import leave_one_out
from experiments.loaders import load
from sevo_jax import item_graph
from tests.data_path import data_folder

QUANTILES = (0.1, 0.5, 0.9, 0.99)


def test_turns_are_taken_and_the_first_call_does_not_count():
    now, calls = 0.0, []

    def function(name, seconds):
        def call():
            nonlocal now
            calls.append(name)
            now += next(seconds)

        return call

    # A first call, one to see how long it takes, and three turns: of one call, and of two.
    long = function("long", iter([99, 5, 4, 6, 8]))
    short = function("short", iter([99, 2, 1, 1, 3, 3, 2, 4]))
    found = measure.turns({"long": long, "short": short}, 3, clock=lambda: now, least=4, rest=0)
    assert "".join(name[0] for name in calls) == "llss" + "lss" * 3
    assert found["long"] == {"median": 6, "min": 4}
    assert found["short"] == {"median": 3, "min": 1}


def _relative(degrees: np.ndarray) -> np.ndarray:
    return np.quantile(degrees, QUANTILES) / degrees.mean()


def test_generated_logs_have_the_popularities_they_promise():
    size = graphs.Size(5_000, 60_000)
    made = list(graphs.blocks(size, block_users=7_000))
    assert [len(splits) - 1 for _, splits in made] == [7_000] * 8 + [4_000]
    values = np.concatenate([values for values, _ in made])
    assert values.min() >= 0 and values.max() < 5_000
    counts = np.bincount(values, minlength=5_000)
    np.testing.assert_allclose(_relative(counts), [0.28, 0.59, 2.02, 6.6], rtol=0.1)
    ids = np.arange(5_000)
    assert abs(np.corrcoef(ids, counts)[0, 1]) < 0.05  # ids tell no popularity


def test_generated_degrees_are_those_of_real_data():
    split = leave_one_out(load(data_folder("amazon_beauty")))
    num_items = split.dataset.num_items
    graph: Any = item_graph(split.train, num_items)
    real = np.bincount(graph.receivers, minlength=num_items)
    generated = np.bincount(graphs.log_of("beauty", None).graph.receivers)[1:]
    assert generated.sum() == pytest.approx(real.sum(), rel=0.05)
    np.testing.assert_allclose(_relative(generated), _relative(real), rtol=0.3)
    # One hub is all that stands out: 1.8 times Beauty's, relative to the mean that of Home.
    assert real.max() < generated.max() < 2 * real.max()


def test_a_straight_line_is_found():
    size = np.array([1.0, 2, 4, 8])
    assert psi.fit(size, 3 * size) == pytest.approx({"exponent": 1, "R2": 1})
    assert psi.fit(size, size**2)["exponent"] == pytest.approx(2)


def test_traffic_by_hand():
    # Three layers; an edge takes 4 + 4 + 64 x 4 bytes, a node is read and written.
    assert psi.moved(10, 100) == 3 * (100 * 264 + 10 * 2 * 256)
    assert psi.moved(10, 100, message_bytes=2) == 3 * (100 * 136 + 10 * 2 * 256)


def test_a_record_replaces_that_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["-m", "step", "--data", str(tmp_path / "beauty")])
    for size, value in (("tiny", 1), ("beauty", 2), ("tiny", 3)):
        measure.keep(tmp_path, "step", size, 2, {"value": value})
    lines = [json.loads(s) for s in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [(r["size"], r["value"]) for r in lines] == [("beauty", 2), ("tiny", 3)]
    assert lines[0]["command"] == "python -m benchmarks step --data path/to/beauty"
    assert lines[0]["cpu"] and lines[0]["versions"]["jax"] and lines[0]["cores"]
    for device in ("1 gpu (X)", "1 gpu (X)", "1 gpu (Y)"):  # another device's records stay
        made_on = {"device": device, "versions": {}, "cores": 1}
        monkeypatch.setattr(measure.records, "environment", lambda on=made_on: on)
        measure.keep(tmp_path, "step", "tiny", 2, {})
    kept = [json.loads(s) for s in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [(r["size"], r["device"][:7]) for r in kept[2:]] == [("tiny", "1 gpu (")] * 2
    assert [r["device"] for r in kept] == [lines[0]["device"]] * 2 + ["1 gpu (X)", "1 gpu (Y)"]
    for real in (True, False, True):  # a generated log is not Beauty
        measure.keep(tmp_path, "epoch", "beauty", 2, {"real": real})
    kept = [json.loads(s) for s in (tmp_path / "epoch.jsonl").read_text().splitlines()]
    assert [r["real"] for r in kept] == [False, True]
    monkeypatch.undo()
    monkeypatch.setattr(measure, "cpu_name", lambda: "another processor")
    measure.keep(tmp_path, "step", "beauty", 2, {"value": 4})
    kept = [json.loads(s) for s in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [r["value"] for r in kept if r["size"] == "beauty"] == [2, 4]


def test_processors_of_one_name_are_told_apart(tmp_path):
    info = tmp_path / "cpuinfo"
    core = "cpu family\t: 23\nmodel\t\t: {}\nmodel name\t: AMD EPYC\nflags\t: a: b\n\n"
    info.write_text(core.format(49) + core.format(50))  # the first core's
    assert measure.cpu_name(info) == "AMD EPYC (family 23, model 49)"
    info.write_text("processor\t: 0\nBogoMIPS\t: 2\n")  # as on Arm
    assert measure.cpu_name(info) == measure.cpu_name(tmp_path / "none") != ""


def test_the_page_goes_where_its_records_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RESULTS.md").write_text("of another project")
    with pytest.raises(ValueError, match="`records` must be a folder with records, got mine"):
        page.write(Path("mine"))
    made = {"interactions": 9, "items": 3, "edges": 4, "seconds": 1.0, "peak GiB": 0.1}
    measure.keep(Path("mine"), "build", "1M", 1, made)
    page.write(Path("mine"))
    assert (tmp_path / "mine" / "RESULTS.md").read_text().startswith("# Benchmarks")
    assert (tmp_path / "RESULTS.md").read_text() == "of another project"
    monkeypatch.setattr(page, "FOLDER", tmp_path / "mine")  # as the project's own records are
    page.write(Path("mine"))
    assert (tmp_path / "RESULTS.md").read_text().startswith("# Benchmarks")


def test_the_page_is_of_the_records(tmp_path):
    """The project's own, as `python -m benchmarks page` leaves it."""
    if not page.FOLDER.is_dir():
        pytest.skip("the records behind the page are not here (a source distribution)")
    page.write(page.FOLDER, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == (page.FOLDER.parent / "RESULTS.md").read_text()


def test_which_sizes_run():
    everything = cli.Options("all", sizes=("beauty", "10M"))
    assert cli.sizes_of("psi", everything) == ["beauty"]
    assert cli.sizes_of("build", everything) == ["10M"]
    full = dataclasses.replace(everything, name="build", sizes=(), full=True)
    assert cli.sizes_of("build", full) == ["1M", "10M", "100M"]
    with pytest.raises(ValueError, match="`sizes` of psi must be of .*'huge'"):
        cli.sizes_of("psi", cli.Options("psi", sizes=("huge",)))


def _record(benchmark, size, **values):
    common = {"command": "python -m x", "date": "2026-01-02", "cpu": "a processor", "cores": 2}
    common |= {"device": "cpu", "repeats": 3, "versions": {"jax": "0.10"}, "real": True}
    return {"benchmark": benchmark, "size": size} | common | values


def _arms(**seconds):
    found = {}
    for name, value in seconds.items():
        arm = {"median": value, "min": value / 2, "GB/s": 10.0, "off": 1e-7}
        found[name.replace("_", " ")] = arm
    return found


def test_targets_are_judged_by_hand():
    arms = _arms(rows=0.004, torch_CSR=0.004, PyG=0.005, compiled=0.0014)
    arms["rows"] |= {"tables": 1.0, "compile": 0.6, "layout": "Rows"}
    beauty = _record(
        "psi", "beauty", arms=arms, edges=10, items=4, peers={"PyG": "so"}, **{"copy GB/s": 40}
    )
    lines = page.targets({("psi", "beauty"): beauty})
    found = {line[0].partition(":")[0]: line[1:] for line in lines}
    assert found["1. psi at Beauty, rows / torch CSR"] == ["beauty 1", "yes"]
    assert found["1. psi at Beauty, rows / PyG"] == [
        "beauty 0.8",
        "**no**, by a factor of 1.23",
    ]
    assert found["1. psi at Beauty, compiled / torch CSR"][1] == "**no**, by a factor of 1.17"
    assert found["5. temporary memory of psi, in N d floats"] == ["beauty, rows 1", "yes"]
    assert found["5. compilation of psi, s"][1] == "**no**, by a factor of 2"
    weaker = beauty | {"peers": {"PyG": "gather, as torch_sparse is not installed"}}
    lines = page.targets({("psi", "beauty"): weaker})
    found = {line[0].partition(":")[0]: line[1:] for line in lines}
    assert found["1. psi at Beauty, rows / PyG"][1].startswith("not judged")
    assert found["1. psi at Beauty, rows / torch CSR"] == ["beauty 1", "yes"]
    assert {int(line[0].split(".")[0]) for line in lines} == {*range(1, 8), 9, 10}
    taken = {"adamw": 0.2, "psi": 1.0, "sevo_adamw": 1.2, "sevo_adamw, L = 0": 0.3}
    arms_of_update = {name: {"median": s, "min": s} for name, s in taken.items()}
    update = {("optimizer", "beauty"): _record("optimizer", "beauty", arms=arms_of_update)}
    (line,) = [line for line in page.targets(update) if line[0].startswith("10.")]
    assert line[1:] == ["beauty 1.5", "**no**, by a factor of 1.15"]
    # Its median misses the target, its shortest time does not.
    noisy = arms | {"torch CSR": {**arms["torch CSR"], "min": 0.004}}
    text = page.text([beauty | {"arms": noisy}])
    assert "at most 0.3 | beauty 0.35 | not decided; by the minima beauty 0.175 |" in text
    assert "at most 1.1 | beauty 1 | yes |" in text
    # A log that was generated at Beauty's size is not Beauty.
    text = page.text([beauty | {"real": False}])
    assert "1. psi at Beauty, rows / torch CSR: at most 1.1 | not measured |" in text
    assert "#### beauty (generated), 4 items" in text
    text = page.text([beauty])
    assert "| compiled | 1.4 (0.7) | 0.35 | 0.28 | 10.0 | 25 % |" in text
    assert text == page.text([beauty]) and "PyG: so." in text


def test_targets_of_a_gpu_are_judged_by_hand():
    psi = _record("psi", "beauty", arms=_arms(edges=5e-5, torch_CSR=4e-5), edges=10, items=4)
    psi |= {"peers": {}, "copy GB/s": 40}
    large = psi | {"size": "clothing", "arms": _arms(edges=1e-3, torch_CSR=2e-3)}
    for record in (psi, large):
        record["arms"]["edges"]["tables"] = 3.0
    step = _record("step", "beauty", torch="fused AdamW", items=4, edges=10)
    step["arms"] = _arms(adamw=1.0, torch_sevo=20.0) | {"sevo, edges": {"median": 2, "min": 2}}
    epoch = _record("epoch", "beauty", torch="no", arms=_arms(ranking=0.1, unused=1.0))
    epoch["arms"]["epoch, sevo_adamw"] = {"median": 0.12, "min": 0.1}
    seeds = _record("seeds", "beauty", number=4, arms={})
    seeds["arms"] = {f"edges, {n}": {"median": n**2 / 2, "min": 0.1} for n in (1, 4)}
    records = [r | {"device": "1 gpu (X)"} for r in (psi, large, epoch, seeds, step)]
    lines = page.gpu_targets({(r["benchmark"], r["size"]): r for r in records})
    assert [line[1:] for line in lines] == [
        ["beauty 0.8; clothing 2", "**no**, by a factor of 1.25"],
        ["clothing 25", "**no**, by a factor of 2"],
        ["beauty 50", "yes"],
        ["beauty 28.1", "yes"],
        ["beauty 10", "yes"],
        ["not measured", ""],
        ["beauty 3; clothing 3", "yes"],
        ["beauty, edges 16", "**no**, by a factor of 3.64"],
    ]
    slower = {("step", "beauty"): step | {"torch": "AdamW"}}  # a loop over the parameters
    judged = [line[1:] for line in page.gpu_targets(slower) if "at Beauty, torch" in line[0]]
    assert judged == [["beauty 10", "not judged: PyTorch without its fused AdamW"]]
    text = page.text([*records, _record("epoch", "beauty", torch="no", arms={})])
    assert text.count("## On 1 gpu (X)") == 1 and "beauty 28.1 | yes" in text
    assert len(re.findall("- epoch, beauty", text)) == 2  # neither hides the other
    assert text.count("## On a processor, 2 cores\n") == 1 == text.count("### 1 gpu (X)\n")


def test_nothing_is_measured_where_there_are_no_records():
    assert "|" not in page.text([])
    lines = page.targets({}) + page.gpu_targets({})
    assert all(line[1:] == ["not measured", ""] for line in lines) and len(lines) >= 18


@pytest.mark.parametrize("size", ["tiny"])
def test_small_runs_make_a_page(tmp_path, monkeypatch, size):
    monkeypatch.setattr(psi, "PADDED_EDGES", 0)  # takes long to compile
    monkeypatch.setattr(psi, "peers", lambda graph, x: ({}, {"torch CSR": "left out"}))
    monkeypatch.setattr(psi, "SWEEPS", {"width": (4, 8), "layers": (1, 2)})
    monkeypatch.setattr(measure, "copy_bandwidth", lambda: 1.0)
    monkeypatch.setattr(psi, "copy_bandwidth", lambda: 1.0)
    for module in (psi, optimizer):
        monkeypatch.setattr(
            module, "turns", lambda f, repeats: measure.turns(f, repeats, least=0, rest=0)
        )
    for name, values in (
        ("psi", psi.alone(size, None, 1)),
        ("seeds", psi.seeds(size, None, 1, number=2)),
        ("growth", psi.growth(1, scale=0.005)),
        ("optimizer", optimizer.updates(size, None, 1)),
    ):
        measure.keep(tmp_path, name, size, 1, values)
    (tmp_path / "out").mkdir()
    page.write(tmp_path, tmp_path / "out" / "page.md")
    text = (tmp_path / "out" / "page.md").read_text()
    assert re.search(r"\| rows \| [\d.e+]+ \([\d.e+]+\) \|", text)
    assert "| tiny | rows | single calls | 2 |" in text and "| layers | 1: " in text
    assert "| tiny (generated) | 2,000 | " in text
    for one, other in itertools.pairwise(text.split("\n")):
        if one.startswith("| ---"):
            assert one.count("|") == other.count("|")
