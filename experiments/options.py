"""The options of the commands; their docstrings are the help texts."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from experiments.config import (
    SEVO_NEEDED,
    Config,
    Graph,
    Loss,
    Model,
    Optimizer,
    Placement,
    Schedule,
    Touched,
    Windows,
)
from experiments.presets import preset, preset_name


@dataclass(kw_only=True)
class Job:
    """What all commands that train take: the data, and settings that replace the preset's."""

    data: str = "synthetic"
    """A folder or file to load, or `synthetic` for the generated data."""
    model: Model = "sasrec"
    seeds: tuple[int, ...] = (0,)
    """Trained together in one compiled program."""
    out: Path | None = None
    """Where runs are kept; by default below runs/."""
    resume: bool = False
    """Go on from the newest checkpoints in `out`."""
    preset: str | None = None
    """The dataset whose preset to take, if not that of `data`."""
    data_format: str | None = None
    """The format of the file, if its name does not tell."""
    encoding: str | None = None
    """Of text files, such as `latin-1`; UTF-8 by default."""
    columns: dict[str, str] | None = None
    """Which column of a table is which, such as `user uid item asin timestamp when`; and of
    the items' table, such as `attributes category`."""
    items: str | None = None
    """The file of the items and their attributes, if it is not beside the data."""
    min_rating: float | None = None
    """Leave out interactions rated lower."""
    repeats: Literal["keep", "first", "last"] = "keep"
    """Which of a user's interactions with the same item to keep."""
    k_core: int | None = None
    """Leave out users and items with fewer interactions."""
    split_times: tuple[str, str] | None = None
    """Validate from the first timestamp on and test from the second, instead of each user's
    last two interactions; numbers as in the data, or dates such as 2014-03-31."""
    placement: Placement | None = None
    """Smooth Adam's `update` (the paper), the `gradient`, first that and then this (`switch`),
    or `both`; for optimizers with SEvo."""
    switch_at: float | None = None
    learning_rate: float | None = None
    schedule: Schedule | None = None
    """`cosine` brings the learning rate to 0 over all epochs."""
    average_decay: float | None = None
    """Validate and test a running mean of the parameters; close to 1, such as 0.99."""
    weight_decay: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    beta: float | None = None
    """Strength of the smoothing, in [0, 1)."""
    beta_ramp: bool | None = None
    """Let the strength rise over the table's columns, from 0 to `beta`."""
    num_layers: int | None = None
    """How many hops the smoothing reaches, the paper's L."""
    smooth_every: int | None = None
    """Smooth in every so many steps only, the sum of their updates."""
    residual_decay: float | None = None
    """Let gradients see for a while what the smoothing takes from updates: the share of it
    that stays from step to step, such as 0.998; validation and test are without it."""
    smooth_start: float | None = None
    """Also smooth the tables that training begins with, by this strength in [0, 1); for
    optimizers with SEvo."""
    method: Literal["neumann", "iterative", "exact"] | None = None
    rescale: bool | None = None
    correct_moments: bool | None = None
    touched: Touched | None = None
    """Which rows' moments move: those with a `gradient`, or the items of the `batch`."""
    isolated: Literal["scale", "identity"] | None = None
    graph_window: int | None = None
    graph_distance: int | None = None
    graph_weighting: Literal["inverse_distance", "count"] | None = None
    graph_keep: Literal["last", "first"] | None = None
    graph: Graph | None = None
    """What SEvo smooths over: `items` that follow each other in sequences, items that share
    `attributes` such as genres, `users_items` together (mf only), or neighbours in the table
    of a `teacher` (only in `ablate distillation`)."""
    graph_max_items: int | None = None
    """Attributes of more items make no edges."""
    distil_weight: float | None = None
    """Of the teacher's part in the loss; for `ablate distillation`."""
    distil_slots: float | None = None
    """The share of slots, drawn for each batch, at which all items' scores are compared."""
    loss: Loss | None = None
    num_negatives: int | None = None
    label_smoothing: float | None = None
    cosine_scale: float | None = None
    """Scores are this times the cosine of state and item, or with 0 their dot product."""
    gbce_t: float | None = None
    pvn_weight: float | None = None
    pair_l2: float | None = None
    """L2 of the rows of a step's pairs, in the loss; for mf and lightgcn."""
    mask_prob: float | None = None
    windows: Windows | None = None
    """How sequences are cut for training: each user's last items, every prefix on its own, or
    all prefixes in one pass. The others belong to bert4rec and mf."""
    train_users: float | None = None
    """Train on this share of the users, drawn at random; test on all."""
    batch_size: int | None = None
    loader_workers: int | None = None
    """4 draws an epoch's batches as the official code's loader does, whose four workers shuffle
    and batch on their own; by default an epoch takes every window once."""
    max_length: int | None = None
    dim: int | None = None
    num_blocks: int | None = None
    num_heads: int | None = None
    dropout_rate: float | None = None
    attention_dropout_rate: float | None = None
    filter_weight: float | None = None
    """The share of BSARec's low-pass filter, beside attention."""
    filter_cutoff: int | None = None
    """How many frequencies BSARec's filter lets pass, positive and negative ones."""
    fixed: bool | None = None
    """STOSA without the published code's mistake."""
    epochs: int | None = None
    eval_every: int | None = None

    def preset_name(self, dataset: str) -> str:
        """Whose settings those are that were not given."""
        return preset_name(self.model, dataset, self.preset)

    def data_options(self) -> str:
        """The options beside `--data` that chose the data and the preset, as they are typed."""
        names = ("preset", "data_format", "encoding", "columns", "items", "min_rating")
        parts = []
        for name in (*names, "repeats", "k_core", "split_times"):
            value = getattr(self, name)
            if value == getattr(Job(), name):
                continue
            if isinstance(value, dict):
                value = tuple(part for pair in value.items() for part in pair)
            words = value if isinstance(value, tuple) else (value,)
            parts += [f"--{name.replace('_', '-')}", *map(str, words)]
        return shlex.join(parts)

    def check_given(self, configs: Iterable[Config]) -> None:
        """Refuses a setting that was given and changes nothing in any of `configs`."""
        idle = set.intersection(*(config.without_effect() for config in configs))
        if idle := sorted(idle & self.given().keys()):
            raise ValueError(
                f"`{idle[0]}` changes nothing with the other settings (model {self.model}); "
                "leave it out."
            )

    def given(self) -> dict[str, Any]:
        """The settings that were given."""
        names = {one.name for one in fields(Config)} & {one.name for one in fields(self)}
        found = {name: getattr(self, name) for name in sorted(names - {"model"})}
        return {name: value for name, value in found.items() if value is not None}

    def given_to(self, optimizer: str) -> dict[str, Any]:
        """The settings that were given, but for what only SEvo has where there is none."""
        known = self.given()
        if not optimizer.startswith("sevo_"):
            for name in SEVO_NEEDED:
                known.pop(name, None)
        return known


@dataclass(kw_only=True)
class Train(Job):
    """Train backbones and rank all items for every user.

    Without options: SASRec on the generated data, AdamW against SEvo-AdamW. An option that is
    not given comes from the preset of the model and the dataset, which holds the paper's
    settings where the paper has any.
    """

    optimizers: tuple[Optimizer, ...] = ("adamw", "sevo_adamw")
    """Each is trained in turn on the same data and seeds."""
    mesh: int | None = None
    """Train on so many devices: the batch split by streams, tables and moments by rows."""
    streams: int | None = None
    """Pack a batch into so many streams, a multiple of the devices; by default one for each.
    A run resumed on other devices needs as many as before."""
    coordinator: str | None = None
    """Train in several processes: HOST:PORT of process 0, or `auto` where a cluster tells.
    Each runs the same command, but for its `process-id`, and sees the same folders."""
    num_processes: int | None = None
    process_id: int | None = None

    def config(self, optimizer: Optimizer, dataset: str) -> Config:
        given = {"streams": self.mesh or 1} | self.given_to(optimizer)
        return preset(self.model, self.preset_name(dataset), optimizer, **given)


@dataclass(kw_only=True)
class Ablate(Job):
    """Compare settings: an ablation of the paper, or what it left open.

    Settings that differ in the optimizer's numbers alone, and all seeds, train in one compiled
    program.
    """

    name: Positional[str]
    """An ablation: optimizer, approximation, rescale, correction, layers, graph, genres,
    placement, loss, beta, every, residual, users, distillation; or a study: smoothness,
    theory, cost, embeddings."""
    arms: tuple[str, ...] = ()
    """Only these of the settings, by their names; all by default."""


@dataclass
class Recommend:
    """Print or write the best next items for a history or users, from a run's checkpoint."""

    run: Path
    """The folder of a run, such as runs/synthetic-sasrec/sevo_adamw."""
    history: tuple[str, ...] = ()
    """External item ids, oldest first."""
    user: tuple[str, ...] = ()
    """In place of a history, external ids of users of the run's data."""
    all_users: bool = False
    """In place of these, all users of the run's data."""
    exclude: tuple[str, ...] = ()
    """External ids of items that nobody shall get."""
    top: int = 10
    """How many items for each."""
    out: Path | None = None
    """A CSV file to write, with the columns user, rank, item and score, instead of printing."""
    seed: int | None = None
    """Which of the run's seeds; the first by default."""


@dataclass
class Fetch:
    """Download a public dataset and check it."""

    name: str
    """One of ml-100k, ml-1m, amazon-beauty, amazon-toys, amazon-tools, amazon-home."""
    folder: Path = Path("data")
    """Where it goes."""
    sha256: str | None = None
    """The checksum that the file must have, where its publisher states none."""


@dataclass
class Report:
    """Write the tables of RESULTS.md, and an HTML page, from the records of runs."""

    runs: tuple[Path, ...] = (Path("results"),)
    """Folders to search for records."""
    page: Path | None = None
    """The page whose generated part is replaced; by default RESULTS.md for the records in
    `results`, and RESULTS.md in the first folder for other runs."""
    html: Path | None = None
    """Where the page with figures and comparisons goes; by default beside `page`."""
    keep: Path | None = None
    """First copy the records of the runs here, thinned."""
