"""The pages for users: examples run as they stand, and what they name exists."""

import re
from pathlib import Path
from typing import get_args

import pytest

import sevo_jax
from experiments.ablations import ABLATIONS
from experiments.config import Model
from experiments.study import STUDIES

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "sevo_jax/README.md", "experiments/README.md")
RESULTS = ("RESULTS.md", "results/NOTES.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES + RESULTS}
EXAMPLES = re.findall(
    r"```python\n(.*?)```", "".join(PAGES[name] for name in NAMES), flags=re.DOTALL
)


def test_there_is_an_example_for_every_style():
    assert ["nnx." in e for e in EXAMPLES] == [True, False, False, False, False, False]
    assert ["linen" in e for e in EXAMPLES] == [False, True, False, False, False, False]


@pytest.mark.parametrize(
    "example", EXAMPLES, ids=["nnx", "linen", "plain", "start", "layers", "devices"]
)
def test_example_runs(example, capsys):
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    value = float(capsys.readouterr().out.split()[0])
    assert value > 0


def test_neighbours_move_in_the_plain_example(capsys):
    exec(compile(EXAMPLES[2], "README.md", "exec"), {"__name__": "readme"})
    rows = [float(x) for x in re.findall(r"0\.\d+", capsys.readouterr().out)]
    assert len(rows) == 4 and all(row < 1 for row in rows)
    assert rows[1] == min(rows)  # the item itself moves most


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        page = folder / path if path else ROOT / name
        assert page.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)", page.read_text("utf-8"), re.M)
            anchors = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, target


def test_the_guide_names_every_way_to_make_a_graph():
    functions = {name for name in sevo_jax.__all__ if name.endswith("_graph")}
    assert functions == set(re.findall(r"`(\w+_graph)`", PAGES["sevo_jax/README.md"]))


def test_the_experiments_are_all_named():
    page = PAGES["experiments/README.md"]
    named = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page[page.index("## Ablations") :], re.M)
    names = {name for row in named for name in re.findall(r"`(\w+)`", row)} - {"ablate"}
    assert names == {*ABLATIONS, *STUDIES}
    models = re.search(r"`--model` is (.*?)\. ", page, re.S)
    assert models and set(re.findall(r"`(\w+)`", models[1])) == set(get_args(Model))
