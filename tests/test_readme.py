"""The README's examples run as they stand, and its commands name what exists."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_an_example_for_every_style():
    assert ["nnx." in e for e in EXAMPLES] == [True, False, False]
    assert ["linen" in e for e in EXAMPLES] == [False, True, False]


@pytest.mark.parametrize("example", EXAMPLES, ids=["nnx", "linen", "plain"])
def test_example_runs(example, capsys):
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    value = float(capsys.readouterr().out.split()[0])
    assert value > 0


def test_neighbours_move_in_the_plain_example(capsys):
    exec(compile(EXAMPLES[2], "README.md", "exec"), {"__name__": "readme"})
    rows = [float(x) for x in re.findall(r"0\.\d+", capsys.readouterr().out)]
    assert len(rows) == 4 and all(row < 1 for row in rows)
    assert rows[1] == min(rows)  # the item itself moves most
