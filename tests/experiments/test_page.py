"""The HTML page: from small made-up records, read as text and opened in a real browser."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest

from experiments import cli, records, report
from experiments.comparisons import compare, compare_each, gather, missing
from experiments.figures import curves
from experiments.page import write_page
from experiments.presets import preset
from experiments.ranking import METRICS
from experiments.tables import bucket_tables, by_place, name_of, sort_key

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None
)
NASTY = "<script>window.bad=1</script>&\"'"
USERS = 40


def write_run(folder, config, scores, data="amazon_beauty", *, ranks=False, note=None):
    """Records of one run; `scores` holds the test metric of each seed."""
    folder.mkdir(parents=True)
    lines = []
    for seed, score in scores.items():
        values = dict.fromkeys(METRICS, score)
        common = {"seed": seed, "epoch": 10, "seconds": 2.0}
        described = {
            "config": asdict(config),
            "data": {"name": data, "users": USERS, "items": 12_101, "train": 153_776},
            "device": "1 cpu (cpu)",
            "cores": 2,
            "num_seeds": len(scores),
            "versions": {"jax": "0.10.2"},
        } | (note or {})
        lines += [
            {"kind": "epoch", "seed": seed, "epoch": epoch, "seconds": 1.0, "loss": 1 / epoch}
            for epoch in (1, 5, 10)
        ]
        for kind in ("valid", "test", "last_test"):
            lines.append({"kind": kind} | common | values | described)
        span = {"by": "history", "low": 3, "high": 5, "targets": USERS}
        lines.append({"kind": "bucket"} | common | span | values | described)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "records.jsonl").write_text(text)
    if ranks:
        above = np.random.default_rng(len(folder.name)).integers(0, 20, (len(scores), USERS))
        np.savez(
            folder / "ranks.npz",
            seeds=list(scores),
            users=np.arange(USERS),
            above=above,
            ties=np.zeros_like(above),
        )


def test_lines_without_sevo_are_dashed_whatever_their_names(tmp_path):
    named = []
    for name, optimizer in (("L=3", "sevo_adamw"), ("sevo_like", "adamw")):
        write_run(tmp_path / name, preset("sasrec", "amazon_beauty", optimizer), {0: 0.1})
        named.append((name, records.read(tmp_path / name / "records.jsonl")))
    dashed = [
        "stroke-dasharray" in curves([run], "epoch", "loss", "loss", "title") for run in named
    ]
    assert dashed == [False, True]


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for optimizer, scores in {
        "adam": {0: 0.20, 1: 0.22, 2: 0.21},
        "adamw": {0: 0.30, 1: 0.31, 2: 0.35},
        "sevo_adamw": {0: 0.40, 1: 0.42, 2: 0.41, 3: 0.9, 4: 0.9},
    }.items():
        config = preset("sasrec", "amazon_beauty", optimizer)
        write_run(folder / "beauty" / optimizer, config, scores, ranks=optimizer != "adam")
    deeper = preset("sasrec", "amazon_beauty", "sevo_adamw", dropout_rate=0.5)
    write_run(folder / "beauty" / "dropout", deeper, {0: 0.1})
    config = preset("gru4rec", NASTY, "adamw")
    write_run(folder / "nasty" / "adamw", config, {0: 0.1}, NASTY)
    return folder


@pytest.fixture
def page(runs, tmp_path):
    path = tmp_path / "page.html"
    write_page([runs], path)
    return path


def test_pairs_differ_in_the_optimizer_alone(runs):
    held = [run for run in gather(report.tested([runs])) if run.config.model == "sasrec"]
    pairs = compare(held, samples=200)
    found = {(p.first.name, p.second.name): p for p in pairs}
    assert set(found) == {("adamw", "adam"), ("sevo_adamw", "adam"), ("sevo_adamw", "adamw")}
    pair = found["sevo_adamw", "adamw"]
    assert pair.baseline == "same optimizer"
    assert found["sevo_adamw", "adam"].baseline == "adam"
    assert found["adamw", "adam"].baseline == "other"
    assert pair.seeds == [0, 1, 2]  # those that both have
    np.testing.assert_allclose(pair.means, (0.41, 0.32))
    assert pair.over_seeds is not None and pair.over_seeds.p_exact == 0.25
    assert pair.over_users is not None and found["adamw", "adam"].over_users is None
    assert pair.users_holm == pair.over_users.p  # the only one
    p = sorted(q.over_seeds.p for q in pairs if q.over_seeds)
    assert sorted(q.holm or 0 for q in pairs)[0] == pytest.approx(3 * p[0])


@pytest.mark.parametrize(
    "setting",
    [
        {"smooth_every": 4},
        {"smooth_start": 0.5},
        {"touched": "batch"},
        {"beta_ramp": True},
        {"graph": "attributes", "graph_max_items": 9},
    ],
)
def test_settings_of_sevo_alone_do_not_part_it_from_the_plain_optimizer(setting, tmp_path):
    for optimizer, own in (("adamw", {}), ("sevo_adamw", setting)):
        config = preset("sasrec", "amazon_beauty", optimizer, **own)
        write_run(tmp_path / optimizer, config, {0: 0.3, 1: 0.4})
    (pair,) = compare(gather(report.tested([tmp_path])), samples=10)
    assert pair.baseline == "same optimizer"


def test_an_arm_that_does_not_smooth_is_a_baseline(tmp_path):
    """An ablation's arm of AdamW is one, as is psi of strength 0 on the gradient, which leaves
    AdamW from a smoothed start; arms that smooth are the ablation's own."""
    own = {"loss": "cross_entropy", "placement": "gradient", "smooth_start": 0.9}

    def write(optimizer, score, arm="", **settings):
        config = preset("sasrec", "amazon_beauty", optimizer, **settings)
        note = {"name": "loss", "given": {}, "arms": [], "arm": arm, "order": 0}
        folder = tmp_path / f"{optimizer} {score}"
        seeds = {0: score, 1: score + 0.01}
        write_run(folder, config, seeds, note={"ablation": note} if arm else None)

    write("adamw", 0.2, "cross_entropy adamw", loss="cross_entropy")
    write("sevo_adamw", 0.4, "cross_entropy update", loss="cross_entropy")
    write("sevo_adamw", 0.5, **own)
    write("sevo_adamw", 0.3, **own, beta=0.0)
    pairs = compare(gather(report.tested([tmp_path])), samples=10)
    found = {tuple(round(1000 * mean) for mean in p.means): p.baseline for p in pairs}
    same = dict.fromkeys([(505, 205), (505, 305)], "same optimizer")
    assert found == same | {(305, 205): "other"}


def test_files_of_one_configuration_are_joined(runs):
    config = preset("sasrec", "amazon_beauty", "adamw")
    write_run(runs / "more" / "adamw", config, {2: 0.0, 3: 0.5}, ranks=True)
    (run,) = (run for run in gather(report.tested([runs])) if run.config == config)
    assert {seed: test["HR@1"] for seed, test in run.tests.items()} == {
        0: 0.30, 1: 0.31, 2: 0.35, 3: 0.5
    }  # fmt: skip
    assert run.ranks is not None and run.ranks.seeds.tolist() == [0, 1, 2, 3]


def test_other_data_of_the_same_name_is_not_compared(runs):
    held = [run for run in gather(report.tested([runs])) if run.config.model == "sasrec"]
    held[0] = held[0]._replace(place=held[0].place._replace(sizes=(("users", 1),)))
    assert len(compare(held, samples=10)) == 1


def test_ranks_are_those_of_the_tests(tmp_path):
    """A seed that was trained again elsewhere brings neither its test nor its ranks."""
    for folder, scores in (("again", {0: 0.9}), ("first", {0: 0.3, 1: 0.4})):
        for optimizer in ("adamw", "sevo_adamw"):
            config = preset("sasrec", "amazon_beauty", optimizer)
            write_run(tmp_path / folder / optimizer, config, scores, ranks=folder == "again")
    (pair,) = compare(gather(report.tested([tmp_path])), samples=10)
    assert pair.seeds == [0, 1] and pair.first.tests[0]["HR@1"] == 0.3
    assert pair.over_users is None and pair.user_seeds == []
    shutil.copy(tmp_path / "again" / "adamw" / "ranks.npz", tmp_path / "first" / "adamw")
    config = preset("sasrec", "amazon_beauty", "sevo_adamw")
    write_run(tmp_path / "new" / "sevo_adamw", config, {1: 0.5, 2: 0.5, 3: 0.1}, ranks=True)
    (pair,) = compare(gather(report.tested([tmp_path])), samples=10)
    assert pair.seeds == [0, 1] and pair.user_seeds == []  # of seed 0 one has, of 1 the other


@pytest.mark.parametrize(
    ("optimizer", "own", "compared"),
    [
        ("adam", {}, True),
        ("adam", {"learning_rate": 0.1}, False),
        ("adam", {"weight_decay": 0.1}, False),
        ("adamw", {"learning_rate": 0.1}, False),
        ("sgd", {}, True),
    ],
)
def test_a_baseline_has_the_rates_of_its_preset_or_the_same(optimizer, own, compared, tmp_path):
    config = preset("sasrec", "amazon_beauty", optimizer, **own)
    write_run(tmp_path / "plain", config, {0: 0.3, 1: 0.4})
    write_run(
        tmp_path / "sevo", preset("sasrec", "amazon_beauty", "sevo_adamw"), {0: 0.3, 1: 0.4}
    )
    assert len(compare(gather(report.tested([tmp_path])), samples=10)) == compared


def test_other_devices_are_named(tmp_path):
    gpu = {"device": "1 gpu (NVIDIA H200)", "cores": 16}
    for optimizer, note in (("adamw", {}), ("sevo_adamw", gpu)):
        config = preset("sasrec", "amazon_beauty", optimizer)
        write_run(tmp_path / "runs" / optimizer, config, {0: 0.3, 1: 0.4}, note=note)
    write_page([tmp_path / "runs"], tmp_path / "page.html")
    both = "1 gpu (NVIDIA H200), 16 core(s) against 1 cpu (cpu), 2 core(s)"
    assert (tmp_path / "page.html").read_text().count(both) == 2  # gains and comparisons


def test_data_of_one_name_that_differs_has_sections_of_its_own(tmp_path):
    config = preset("sasrec", "amazon_beauty", "adamw")
    for folder, options, users in (
        ("whole", "", 40),
        ("core", "--k-core 10", 30),
        ("other", "", 20),
        ("preset", "--preset amazon_tools", 40),
    ):
        data = {"name": "mine", "users": users, "items": 100, "options": options}
        write_run(tmp_path / folder, config, {0: 0.3}, note={"data": data})
    write_page([tmp_path], tmp_path / "page.html")
    heads = re.findall("<h2>(sasrec.*)</h2>", (tmp_path / "page.html").read_text())
    assert heads == [
        "sasrec on mine of 20 users",
        "sasrec on mine of 40 users",
        "sasrec on mine --k-core 10",
    ]
    (both,) = (
        group
        for title, group in by_place(
            sorted((run for _, run in report.tested([tmp_path])), key=sort_key)
        )
        if "40 users" in title
    )
    assert {name_of(run).split(",")[0] for run in both} == {"adamw"}
    (_, table) = next(bucket_tables(both))
    assert len({row[0] for row in table.rows}) == 2


def test_what_is_missing(runs):
    rows = {
        (row.config.model, row.data, row.config.label): row
        for row in missing(gather(report.tested([runs])))
    }
    assert ("sasrec", "amazon_beauty", "sevo_adamw") not in rows
    row = rows["sasrec", "amazon_beauty", "adamw"]
    assert (row.done, row.seeds) == (3, [3, 4])
    row = rows["gru4rec", "amazon_beauty", "adam"]
    assert (row.done, row.seeds) == (0, [0, 1, 2, 3, 4])
    # Neither of data that no run has, nor of what nobody would run.
    assert {data for _, data, _ in rows} == {"amazon_beauty"}
    assert ("lightgcn", "amazon_beauty", "sevo_adamw") not in rows


@pytest.mark.parametrize(
    ("change", "counts"),
    [({"name": "reviews_Beauty_5"}, True), ({"items": 500}, False)],
)
def test_what_counts_as_done(runs, change, counts):
    """The published data by its publisher's name does, other data of the name does not."""
    held = [run for run in gather(report.tested([runs])) if run.data["name"] == "amazon_beauty"]
    assert held
    lacking = {
        (row.config.model, row.config.label)
        for row in missing(run._replace(data=run.data | change) for run in held)
        if row.data == "amazon_beauty"
    }
    assert (("sasrec", "sevo_adamw") not in lacking) == counts


class Outline(HTMLParser):
    """Checks that tags close in order, and collects what the tests look at."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_sound_html_of_its_own(page):
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    assert len(outline.ids) == len(set(outline.ids))
    assert not re.search(r"""https?:|(src|href)=["'](?!#|data:,)|url\((?!#)|@import""", text)
    assert "<script>window" not in text and "&lt;script&gt;window.bad=1" in text
    assert all(a.get("scope") in ("col", "row") for tag, a in outline.tags if tag == "th")
    count = [sum(tag == name for tag, _ in outline.tags) for name in ("table", "caption")]
    assert count[0] == count[1] > 6
    labels = [a.get("aria-label") for tag, a in outline.tags if tag == "svg"]
    assert all(label and label.endswith("over epochs") for label in labels)
    assert len(set(labels)) == len(labels) > 1


def test_page_says_what_the_records_say(page):
    text = page.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "<td>same optimizer" in line)
    assert re.findall(r">([^<]+)</t", row)[2:9] == [
        "sevo_adamw", "adamw", "same optimizer", "3", "0.4100", "0.3200", "+28.1 %"
    ]  # fmt: skip
    assert "sevo_adamw, dropout_rate 0.5" in text
    assert "<em>" not in text and 'class="published"' in text
    assert "--optimizers adamw --seeds 3 4</td>" in text
    assert "Test NDCG@10 by length of the user&#x27;s history" in text
    assert "There is no comparison over users here" not in text


def test_thinned_records_have_no_users(runs, tmp_path):
    for path in runs.rglob("ranks.npz"):
        path.unlink()
    write_page([runs], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "it needs the ranks of every user" in text and "Paired over users" not in text


def test_an_ablation_has_a_section_and_no_part_in_the_others(page, runs, tmp_path):
    before = page.read_text()
    for order, (arm, score) in enumerate({"beta=0.5": 0.2, "beta=0.1": 0.3}.items()):
        note = {"name": "beta", "given": {}, "arms": [], "arm": arm, "order": order}
        config = preset("sasrec", "amazon_beauty", "sevo_adamw", beta=float(arm[5:]))
        folder = runs / "ablation" / "program_0" / arm
        write_run(folder, config, {0: score}, ranks=True, note={"ablation": note})
    write_page([runs], tmp_path / "with.html")
    text = (tmp_path / "with.html").read_text()
    (anchor,) = re.findall(r'href="#([^"]+)">beta: sasrec on amazon_beauty<', text)
    start = text.index(f'<section id="{anchor}">')
    section = text[start : text.index("</section>", start)]
    head = section.index("beta=0.5")
    assert head < section.index("beta=0.1")  # in the ablation's order
    assert "+50.0 %" in section and "python -m experiments ablate beta" in section
    assert "Test NDCG@10 of all arms" in section
    labels = re.findall(r">(beta=[.0-9]+)</text>", section)
    assert labels[:2] == ["beta=0.5", "beta=0.1"]  # the rows of the first figure
    assert "beta=0.1" not in text.replace(section, "")
    gains = r'<section id="gains">.*?</section>'
    (with_ablation,), (without,) = (re.findall(gains, t, re.S) for t in (text, before))
    assert with_ablation == without.replace("page.html", "with.html")


def test_many_runs_have_the_curves_of_the_presets_and_some_others(tmp_path):
    for rate in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        config = preset("sasrec", "amazon_beauty", "adamw", dropout_rate=rate)
        write_run(tmp_path / "runs" / str(rate), config, {0: rate})
    write_page([tmp_path / "runs"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("range of the seeds; 8 of 9 runs.") == 2  # of the loss and of validation
    drawn = text[text.index("<svg") : text.index("</svg>")]
    assert ">adamw<" in drawn and "dropout_rate 0.9" not in drawn


def test_same_records_same_page(runs, page):
    before = page.read_bytes()
    write_page([runs], page)
    assert page.read_bytes() == before


def test_command_writes_both_pages(runs, tmp_path, capsys):
    cli.main(["report", "--runs", str(runs), "--page", str(tmp_path / "R.md")])
    assert "R.html" in capsys.readouterr().out
    assert "Paired over seeds" in (tmp_path / "R.html").read_text(encoding="utf-8")


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="hold no tested run"):
        write_page([tmp_path], tmp_path / "page.html")


# Runs after the page's own script; what it finds is read from the title of the page.
PROBE = """<script>
const found = {errors, wide: document.documentElement.scrollWidth > innerWidth};
const table = [...document.querySelectorAll("#sasrec-on-amazon_beauty table")]
  .find(t => t.caption.textContent === "Test metrics");
const column = name => [...table.tHead.rows[0].cells]
  .findIndex(h => h.textContent.startsWith(name));
const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
const press = name => {
  const head = table.tHead.rows[0].cells[column(name)];
  head.querySelector("button").click();
  return [names(), head.getAttribute("aria-sort")];
};
found.before = names();
found.up = press("NDCG@10");
found.down = press("NDCG@10");
found.text = press("optimizer");
found.blanks = press("device");
found.marked = table.querySelectorAll("[aria-sort]").length;
const height = svg => svg.getBoundingClientRect().height;
found.figures = [...document.querySelectorAll("svg")].map(height);
found.requests = performance.getEntriesByType("resource").map(entry => entry.name);
found.bad = "bad" in window;
document.title = JSON.stringify(found);
</script></body>"""
CATCH = """<head><script>
const errors = [];
addEventListener("error", event => errors.push(event.message), true);
addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_click_sorts_in_a_browser(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    text = text.replace("<head>", CATCH, 1).replace("</body>", PROBE, 1)
    probed.write_text(text, encoding="utf-8")
    switches = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync dump-dom "
        "disable-background-networking disable-component-update enable-logging=stderr "
        f"window-size=500,900 user-data-dir={tmp_path / 'profile'}"
    )
    command = [str(BROWSER), *(f"--{switch}" for switch in switches.split()), probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    found = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["errors"] == found["requests"] == [] and not found["bad"]
    assert "CONSOLE" not in done.stderr
    assert not found["wide"]  # tables scroll on their own, the page does not
    names = [
        "adam",
        "published adam",
        "adamw",
        "sevo_adamw",
        "published sevo_adamw",
        "sevo_adamw, dropout_rate 0.5",
    ]
    assert found["before"] == names
    ascending = [names[i] for i in (1, 4, 5, 0, 2, 3)]  # .0336 .0411 .1 .21 .32 .606
    published = {names[1], names[4]}
    assert found["up"] == [ascending, "ascending"]
    assert found["down"] == [ascending[::-1], "descending"]
    # The browser's own order of letters; published rows among the others.
    assert found["text"][0][:2] == ["adam", "adamw"] and found["text"][1] == "ascending"
    assert set(found["blanks"][0][-2:]) == published  # no device there
    assert found["marked"] == 1
    assert found["figures"] and min(found["figures"]) > 100


def test_each_dataset_and_model_is_a_family_of_its_own(tmp_path):
    scores = {"adamw": {0: 0.3, 1: 0.31}, "sevo_adamw": {0: 0.4, 1: 0.42}}
    for model in ("sasrec", "gru4rec"):
        for optimizer, tests in scores.items():
            config = preset(model, "amazon_beauty", optimizer)
            write_run(tmp_path / model / optimizer, config, tests)
    families = compare_each(gather(report.tested([tmp_path])))
    assert len(families) == 2
    for (pair,) in families.values():
        assert pair.over_seeds is not None and pair.holm == pair.fdr == pair.over_seeds.p


def test_ranks_of_a_seed_that_another_file_tested_are_left_out(tmp_path):
    config = preset("sasrec", "amazon_beauty", "adamw")
    write_run(tmp_path / "first", config, {0: 0.3, 1: 0.4, 2: 0.4})
    write_run(tmp_path / "again", config, {0: 0.9, 3: 0.5}, ranks=True)
    (run,) = gather(report.tested([tmp_path]))
    assert run.tests[0]["HR@1"] == 0.3 and run.ranks is not None
    assert run.ranks.seeds.tolist() == [3]
