"""Every mean with a spread on the pages is that of records, or published."""

import re
import statistics
from pathlib import Path

import pytest

from experiments import published, records, report, tables

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "results"
# Seeds of the same settings that were trained apart, one of them as an ablation's arm.
APART = [
    ("amazon_beauty-sasrec-loss-sampled/sampled_softmax_adamw", "beauty-sasrec-sampled/adamw"),
    (
        "amazon_beauty-sasrec-loss-sampled/sampled_softmax_update",
        "beauty-sasrec-sampled/sevo_adamw",
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
