"""The options of the commands; their docstrings are the help texts."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from experiments.config import Config, Model, Optimizer, Placement, preset


@dataclass
class Train:
    """Train backbones and rank all items for every user.

    Without options: SASRec on the generated data, AdamW against SEvo-AdamW. An option that is
    not given comes from the preset of the model and the dataset, which holds the paper's
    settings where the paper has any.
    """

    data: str = "synthetic"
    """A folder or file to load, or `synthetic` for the generated data."""
    model: Model = "sasrec"
    optimizers: tuple[Optimizer, ...] = ("adamw", "sevo_adamw")
    """Each is trained in turn on the same data and seeds."""
    seeds: tuple[int, ...] = (0,)
    """Trained together in one compiled program."""
    out: Path | None = None
    """Where runs are kept, a folder for each optimizer; by default runs/DATA-MODEL."""
    resume: bool = False
    """Go on from the newest checkpoints in `out`."""
    preset: str | None = None
    """The dataset whose preset to take, if not that of `data`."""
    data_format: str | None = None
    """The format of the file, if its name does not tell."""
    columns: dict[str, str] | None = None
    """Which column of a table is which, such as `user uid item asin timestamp when`."""
    min_rating: float | None = None
    """Leave out interactions rated lower."""
    repeats: Literal["keep", "first", "last"] = "keep"
    """Which of a user's interactions with the same item to keep."""
    k_core: int | None = None
    """Leave out users and items with fewer interactions."""
    split_times: tuple[float, float] | None = None
    """Validate from the first timestamp on and test from the second, instead of each user's
    last two interactions."""
    placement: Placement | None = None
    """Smooth Adam's `update` (the paper) or the `gradient`; for optimizers with SEvo."""
    learning_rate: float | None = None
    weight_decay: float | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    beta: float | None = None
    """Strength of the smoothing, in [0, 1)."""
    num_layers: int | None = None
    """How many hops the smoothing reaches, the paper's L."""
    method: Literal["neumann", "iterative"] | None = None
    rescale: bool | None = None
    correct_moments: bool | None = None
    graph_window: int | None = None
    graph_distance: int | None = None
    loss: Literal["bce", "bpr"] | None = None
    windows: Literal["last", "prefixes", "whole"] | None = None
    """How sequences are cut for training: each user's last items, every prefix on its own, or
    all prefixes in one pass."""
    batch_size: int | None = None
    max_length: int | None = None
    dim: int | None = None
    num_blocks: int | None = None
    num_heads: int | None = None
    dropout_rate: float | None = None
    epochs: int | None = None
    eval_every: int | None = None

    def config(self, optimizer: Optimizer, dataset: str) -> Config:
        names = {field.name for field in fields(Config)} & {
            field.name for field in fields(self)
        }
        given = {name: getattr(self, name) for name in names - {"model"}}
        given = {name: value for name, value in given.items() if value is not None}
        if not optimizer.startswith("sevo_"):
            given.pop("placement", None)
        return preset(self.model, self.preset or dataset, optimizer, **given)


@dataclass
class Recommend:
    """Print the best next items for a history, from a run's checkpoint."""

    run: Path
    """The folder of a run, such as runs/synthetic-sasrec/sevo_adamw."""
    history: tuple[str, ...]
    """External item ids, oldest first."""
    top: int = 10
    """How many items to print."""
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
    """Write the tables of RESULTS.md from the records of runs."""

    runs: tuple[Path, ...] = (Path("results"),)
    """Folders to search for records."""
    page: Path = Path("RESULTS.md")
    """The page whose generated part is replaced."""
    keep: Path | None = None
    """First copy the records of the runs here, thinned."""
