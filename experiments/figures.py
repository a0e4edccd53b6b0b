"""Figures of the HTML page: SVG text that takes its ink from the page around it."""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.tables import Records, by_epoch, config_of

_INK = "#010203"  # stands for the page's own text colour
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
}


def curves(
    runs: Sequence[tuple[str, Records]],
    kind: str,
    name: str,
    label: str,
    title: str,
    published: Mapping[int, tuple[float, float]] | None = None,
) -> str:
    """A value along training: the mean over seeds, and the range of the seeds behind it.

    Args:
      runs: names for the legend, and records.
      kind, name: which records, and which of their values.
      label: of the vertical axis.
      title: the figure's text for who cannot see it, another for each figure of a page.
      published: by epoch, the lowest and highest published value.

    Returns:
      An `<svg>` element that refers to nothing outside of itself.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axis = figure.subplots()
        for place, (run, records) in enumerate(runs):
            epochs, low, mean, high = _spread(records, kind, name)
            color = f"C{place % 10}"
            # Settings that a run lists may be many: a legend is to leave room for its figure.
            wrapped = textwrap.fill(textwrap.shorten(run, 90, placeholder=" ..."), 48)
            line = "-" if config_of(records).has_sevo else "--"
            axis.plot(epochs, mean, line, color=color, lw=1.6, label=wrapped)
            axis.fill_between(epochs, low, high, color=color, alpha=0.2, lw=0)
        if published:
            bounds = np.array(list(published.values())).T
            middle = bounds.mean(axis=0)
            axis.errorbar(
                list(published), middle, yerr=np.abs(bounds - middle), fmt=".", ms=5,
                color=_INK, lw=1, capsize=2.5, label="published sevo_adamw",
            )  # fmt: skip
        axis.set(xlabel="epoch", ylabel=label)
        if axis.has_data():
            axis.legend()
        return _svg(figure, title)


def scores(runs: Sequence[tuple[str, Records]], name: str, label: str, title: str) -> str:
    """A metric of the tests, a row for each run: every seed, and the mean.

    Args:
      runs: names for the rows, from above, and records.
      name: of the metric.
      label, title: see `curves`.

    Returns:
      See `curves`.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 0.9 + 0.24 * len(runs)), layout="constrained")
        axis = figure.subplots()
        for row, (_, records) in enumerate(runs):
            values = [record[name] for record in records if record["kind"] == "test"]
            color = "C0" if config_of(records).has_sevo else "C1"
            axis.plot(values, [row] * len(values), "o", color=color, alpha=0.35, ms=5, mew=0)
            axis.plot(np.mean(values), row, "|", color=color, ms=11, mew=2)
        names = [textwrap.shorten(run, 60, placeholder=" ...") for run, _ in runs]
        axis.set_yticks(range(len(runs)), names)
        axis.set(xlabel=label, ylim=(len(runs) - 0.4, -0.6))
        axis.grid(axis="x", alpha=0.25)
        return _svg(figure, title)


def _svg(figure: Figure, title: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), title)


def _spread(
    records: Records, kind: str, name: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    found = by_epoch(records, kind, name)
    epochs = sorted(found)
    columns = [[float(f(found[e])) for e in epochs] for f in (min, np.mean, max)]
    return epochs, columns[0], columns[1], columns[2]


def _inline(text: str, title: str) -> str:
    """The `<svg>` of a file, without what only a file needs and with no name used twice."""
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S
    )
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    for size in ("width", "height"):  # the page decides
        text = re.sub(rf' {size}="[^"]*"', "", text, count=1)
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = text.replace(_INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).strip()
