"""The results as one HTML page: figures, sortable tables, comparisons, what is yet to run.

Everything on it is computed from records, and from the per-user ranks where a run's folder
holds them. The page needs nothing from outside, and JavaScript only for sorting.
"""

import base64
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from experiments import study
from experiments.comparisons import (
    Comparison,
    Missing,
    compare_each,
    devices,
    gains_table,
    gather,
    missing,
    p_value,
)
from experiments.figures import curves, scores
from experiments.markup import made_by, table_html
from experiments.published import SEEDS, official_curve
from experiments.report import tested
from experiments.tables import (
    Records,
    Table,
    ablation_of,
    ablation_table,
    bucket_tables,
    by_place,
    command_of,
    config_of,
    curves_table,
    described,
    gain,
    name_of,
    overrides,
    place_of,
    reproduction_table,
    sort_key,
    tests_table,
    train_command,
)
from experiments.tuning import HOW_CHOSEN, tuned_table

METRIC = "NDCG@10"
MAX_CURVES = 8  # in one figure; more cannot be told apart
_HOW_COMPARED = """<p>Pairs of runs that differ in the optimizer alone (Adam and AdamW also in
their presets' rates and weight decay), over the seeds that both have; users over those of them
whose ranks are kept. Where two devices are named, a part of a difference may be theirs. The
interval and p (t) are Student's, d_z is the mean difference over its standard deviation. The
sign-flip test is exact and assumes no normal distribution, but with n seeds its p value cannot
be below 2 / 2<sup>n</sup> (.0625 for five). The corrections are for all rows of a table.</p>"""
_P_OF_ARMS = """Gains are over the arm that stands beside them, over the seeds that both have;
d_z is the mean difference over its standard deviation, and p Student's paired test over seeds,
by Holm's rule for all arms of the table."""
_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(folders: Sequence[str | Path], page: str | Path) -> None:
    """Writes the HTML page of all runs below `folders`.

    Args:
      folders: searched for `*.jsonl` files of records; a `ranks.npz` beside one is read too.
      page: the file, replaced if it exists.

    Raises:
      ValueError: there is no tested run.
    """
    found, studies = list(tested(folders)), list(study.read(folders))
    if not found and not studies:
        raise ValueError(f"`folders` {[str(f) for f in folders]} hold no tested run.")
    runs = shlex.join(["--runs", *map(str, folders)])
    command = f"python -m experiments report {runs} --html {shlex.quote(str(page))}"
    Path(page).parent.mkdir(parents=True, exist_ok=True)
    Path(page).write_text(render(found, command, studies), encoding="utf-8")


def render(
    found: Iterable[tuple[Path, Records]],
    command: str,
    studies: Iterable[tuple[Path, dict[str, Any]]] = (),
) -> str:
    """The page's text.

    Args:
      found: files of records with their records; ranks are looked for beside them.
      command: what made the page, to be shown on it.
      studies: their files with what they hold; pictures are looked for beside them.
    """
    found = sorted(found, key=lambda pair: sort_key(pair[1]))
    presets = [pair for pair in found if not ablation_of(pair[1])]
    runs = gather(found)
    compared = compare_each(runs, METRIC)
    contents = [("published", "Beside the published figures"), ("gains", "Gains")]
    contents.append(("tuned", "Tuned"))
    sections = []
    for title, records in by_place(records for _, records in presets):
        pairs = compared[place_of(records[0])]
        contents.append((_anchor(title), title))
        sections.append(_section(title, records, pairs, command))
    arms = (records for _, records in found if ablation_of(records))
    for title, records in by_place(arms):
        contents.append((_anchor(title), title))
        sections.append(_ablation(title, records, command))
    for path, kept in studies:
        title = study.title_of(kept)
        contents.append((_anchor(title), title))
        sections.append(_study(title, path.parent, kept))
    contents.append(("missing", "Not run yet"))
    beside = reproduction_table(records for _, records in presets)
    parts = [
        _beside(beside, command),
        _gains(itertools.chain(*compared.values()), command),
        _tuned(tuned_table(records for _, records in found), command),
        *sections,
        _missing(missing(runs), command),
    ]
    links = "".join(f'<li><a href="#{a}">{escape(t)}</a></li>' for a, t in contents)
    body = "\n".join(parts)
    template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(intro=_intro(len(found)), contents=links, body=body)


def _intro(num_runs: int) -> str:
    return f"""<p>{num_runs} measured runs. A test is taken at the epoch with the best
validation {METRIC}, ranks all items with the user's history left out, and is the mean over
users; ± is the standard deviation over seeds. Rows in italics are published figures. Click a
column's head to sort by it.</p>"""


def _beside(table: Table, command: str) -> str:
    caption = f"Test {METRIC}, measured and published"
    none = "No run has the settings and the data of a published one."
    return f"""<section id="published"><h2>Beside the published figures</h2>
<p>The last column but one counts the published standard deviations.</p>
{table_html(caption, table, [command], none)}</section>"""


def _gains(pairs: Iterable[Comparison], command: str) -> str:
    caption, none = f"Gains of SEvo in test {METRIC}", "No two runs can be compared."
    return f"""<section id="gains"><h2>Gains</h2>
<p>Each SEvo run against the same optimizer without SEvo, and against Adam, whose baselines the
paper's Table 2 reports. The p values are Holm's, within one dataset and model; the sections
below say how they are made.</p>
{table_html(caption, gains_table(pairs, METRIC), [command], none)}
</section>"""


def _tuned(table: Table, command: str) -> str:
    caption, none = (
        f"The best of each arm, {METRIC}",
        "No two arms can be compared, or none was tuned.",
    )
    return f"""<section id="tuned"><h2>Tuned</h2>
<p>{HOW_CHOSEN}.</p>
{table_html(caption, table, [command], none)}
</section>"""


def _section(title: str, records: list[Records], pairs: list[Comparison], command: str) -> str:
    train = [command_of(run) for run in records]
    tests = _without_place(tests_table(records))
    along = _without_place(curves_table(records))
    parts = [
        f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>',
        table_html("Test metrics", tests, train),
        _figures(title, records, command),
        _comparisons(pairs, command),
        _buckets(records, command),
        table_html("Training loss and validation along the way", along, train),
        "</section>",
    ]
    return "\n".join(parts)


def _ablation(title: str, records: list[Records], command: str) -> str:
    """The arms of an ablation: tests, curves, and metrics by kind of target and of user."""
    made = sorted({command_of(run) for run in records})
    named = [(name_of(run), run) for run in records]
    drawn = scores(named, METRIC, f"test {METRIC}", f"{title}: test {METRIC} of the arms")
    caption = f"Test {METRIC} of all arms: every seed, and the mean; orange is without SEvo."
    parts = [
        f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>',
        f"<p>{_P_OF_ARMS}</p>",
        table_html("Test metrics of the arms", ablation_table(records), made),
        f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>",
        _figures(title, records, command),
        _buckets(records, command),
        "</section>",
    ]
    return "\n".join(parts)


def _study(title: str, folder: Path, kept: dict[str, Any]) -> str:
    """The tables of a study, and its picture if there is one."""
    made = [study.command_of(kept)]
    parts = [f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>']
    for finding in kept["findings"]:
        parts.append(
            table_html(finding["title"], Table(finding["head"], finding["rows"]), made)
        )
    for picture in sorted(folder.glob("*.png")):
        data = base64.b64encode(picture.read_bytes()).decode()
        text = escape(f"{title}: {picture.stem}")
        parts.append(f'<figure><img alt="{text}" src="data:image/png;base64,{data}"></figure>')
    return "\n".join([*parts, "</section>"])


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title)


def _figures(title: str, runs: list[Records], command: str) -> str:
    shown = runs
    if len(runs) > MAX_CURVES:  # the presets first
        usual = [run for run in runs if not overrides(run)]
        shown = (usual + [run for run in runs if run not in usual])[:MAX_CURVES]
    known = (official_curve(config_of(run), described(run)) for run in shown)
    official = next(filter(None, known), {})
    losses = {epoch: (loss, loss) for epoch, (loss, _, _) in official.items()}
    valid = {e: (low, high) for e, (_, low, high) in official.items() if low and high}
    named = [(name_of(run), run) for run in shown]
    drawn = []
    for kind, name, label, known in (
        ("epoch", "loss", "training loss", losses),
        ("valid", METRIC, f"validation {METRIC}", valid),
    ):
        svg = curves(named, kind, name, label, f"{title}: {label} over epochs", known)
        few = f"; {len(shown)} of {len(runs)} runs" if len(shown) < len(runs) else ""
        caption = f"{label[0].upper()}{label[1:]}: mean and range of the seeds{few}."
        drawn.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")
    return f'<div class="figures">{"".join(drawn)}</div>{made_by([command])}'


def _comparisons(pairs: Sequence[Comparison], command: str) -> str:
    over_seeds, over_users = [], []
    for pair in pairs:
        names = [pair.first.name, pair.second.name]
        means = [f"{mean:.4f}" for mean in pair.means]
        row = [*names, str(len(pair.seeds)), *means, gain(*pair.means)]
        if test := pair.over_seeds:
            row += [_interval(test.difference, test.low, test.high), f"{test.effect:.2f}"]
            row += [
                p_value(test.p),
                p_value(pair.holm),
                p_value(pair.fdr),
                p_value(test.p_exact),
            ]
        over_seeds.append(row + [""] * (12 - len(row)) + [devices(pair)])
        if test := pair.over_users:
            interval = _interval(test.difference, test.low, test.high)
            tail = [
                interval,
                p_value(test.p),
                p_value(pair.users_holm),
                p_value(pair.users_fdr),
            ]
            counts = [str(len(pair.user_seeds)), f"{test.num_users:,}"]
            over_users.append([*names, *counts, *tail])
    names = ["run", "against"]
    scores = [METRIC, "of the other", "gain", "difference, 95 % interval"]
    corrected = ["Holm", "Benjamini-Hochberg"]
    head = [*names, "seeds", *scores, "d_z", "p (t)", *corrected, "p (sign flip)", "device"]
    users = [*names, "seeds", "users", "difference, 95 % interval", "p", *corrected]
    caption = f"Paired over seeds, test {METRIC}"
    none = "No two of these runs differ in the optimizer alone and share a seed."
    parts = [
        "<h3>Comparisons</h3>",
        _HOW_COMPARED,
        table_html(caption, Table(head, over_seeds), [command], none),
    ]
    if pairs:
        caption = f"Paired over users, test {METRIC}, mean over seeds"
        none = (
            "There is no comparison over users here: it needs the ranks of every user, "
            "ranks.npz, which only the folders of full runs hold, not the thinned records."
        )
        parts.append(table_html(caption, Table(users, over_users), [command], none))
    return "\n".join(parts)


def _buckets(records: Sequence[Records], command: str) -> str:
    return "\n".join(
        table_html(caption, table, [command]) for caption, table in bucket_tables(records)
    )


def _missing(found: list[Missing], command: str) -> str:
    head = ["data", "model", "optimizer", f"seeds of {SEEDS}", "command"]
    rows = [
        [
            row.data,
            row.config.model,
            row.config.label,
            str(row.done),
            train_command(row.config, row.data, row.seeds, row.config),
        ]
        for row in found
    ]
    none = "Every preset has been run."
    return f"""<section id="missing"><h2>Not run yet</h2>
<p>The presets that have been tested with fewer seeds than the {SEEDS} of the published
runs.</p>
{table_html("Presets that lack seeds", Table(head, rows), [command], none)}</section>"""


def _without_place(table: Table) -> Table:
    """Without the columns of data and model, which a section's title says."""
    return Table(table.head[2:], [row[2:] for row in table.rows])


def _interval(difference: float, low: float, high: float) -> str:
    return f"{difference:+.4f} ({low:+.4f} to {high:+.4f})"
