"""Every mean with a spread on the pages is that of records, or published."""

import re
import statistics
from pathlib import Path

import pytest

from experiments import published, records, report, tables

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "results"
MODELS = {"SASRec": "sasrec", "GRU4Rec": "gru4rec", "BERT4Rec": "bert4rec"}
MODELS |= {"STOSA": "stosa", "MF-BPR": "mf"}
DATA = {"Beauty": "amazon_beauty", "Toys": "amazon_toys", "Tools": "amazon_tools"}
DATA |= {"MovieLens-1M": "movielens_1m"}
# Seeds of the same settings that were trained apart, one of them as an ablation's arm.
APART = [
    ("amazon_beauty-sasrec-loss-sampled/sampled_softmax_adamw", "beauty-sasrec-sampled/adamw"),
    (
        "amazon_beauty-sasrec-loss-sampled/sampled_softmax_update",
        "beauty-sasrec-sampled/sevo_adamw",
    ),
    (
        "amazon_beauty-sasrec-loss-sampled/sampled_softmax_gradient",
        "beauty-sasrec-sampled/sevo_adamw-gradient",
    ),
]


def written(mean: float, spread: float) -> str:
    return f"{mean:.4f} ± {spread:.4f}".replace("0.", ".")


def ndcg_of(run: tables.Records) -> list[float]:
    return [record["NDCG@10"] for record in run if record["kind"] == "test"]


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Mean and spread of the tests of all runs that are kept, and of the published ones."""
    if not KEPT.is_dir() or not any(KEPT.rglob("*.jsonl")):
        pytest.skip("the records behind the pages are not here (a source distribution)")
    values = [ndcg_of(run) for _, run in report.tested([KEPT])]
    for names in APART:
        values.append([x for n in names for x in ndcg_of(records.read(KEPT / f"{n}.jsonl"))])
    found = {written(statistics.mean(x), statistics.stdev(x)) for x in values if len(x) > 1}
    for means, spreads in published._SEVO.values():
        found.add(written(means[-1], spreads[-1]))
    return found


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_every_mean_is_of_a_record(name, known):
    prose, _, _ = (ROOT / name).read_text(encoding="utf-8").partition(report.BEGIN)
    said = re.findall(r"\.\d{4} ± \.\d{4}", re.sub(r"\s+", " ", prose))
    assert len(said) > 20
    assert not [value for value in said if value not in known]


def rows_of(text: str) -> list[list[str]]:
    rows = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def test_gains_over_adamw_are_those_of_the_tables():
    prose, _, generated = (ROOT / "RESULTS.md").read_text("utf-8").partition(report.BEGIN)
    gains = {
        (row[0], row[1]): float(row[8].split()[0])
        for row in rows_of(generated)
        if row[2:5] == ["sevo_adamw", "adamw", "same optimizer"]
    }
    # On the page by dataset and model, in the README a row for each.
    head, _, *rows = rows_of(prose.partition("## What SEvo gains")[2].partition("\n## ")[0])
    said = {
        (row[0], model): cell
        for row in rows
        for model, cell in zip(head[1:], row[1:], strict=False)
        if row[0] in DATA
    }
    readme = rows_of((ROOT / "README.md").read_text("utf-8"))
    cells = [((row[0], row[1]), row[-1]) for row in readme if row[0] in DATA and len(row) == 5]
    cells = [(place, cell) for place, cell in cells if place[1] in MODELS]
    assert len(said) > 10 and len(cells) > 10
    for (data, model), cell in [*said.items(), *cells]:
        gain = gains.get((DATA[data], MODELS[model]))
        assert bool(cell) == (gain is not None), (data, model)
        # The tables are rounded, too, to tenths.
        assert gain is None or abs(float(cell.split()[0]) - gain) < 0.56, (data, model)
