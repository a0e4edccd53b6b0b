"""Fig. 6: do items of a kind come together in the table? A picture, and numbers beside it.

The numbers are of the table itself, not of the picture's plane, by the cosine between rows. An
item counts if all its attributes lie in one group, so that there is no doubt about its kind.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console

from experiments.backbones import BACKBONES
from experiments.config import Config
from experiments.data import split_of
from experiments.dataset import Attributes, Split
from experiments.options import Ablate
from experiments.presets import preset
from experiments.run import make_trainer, start
from experiments.statistics import spread
from experiments.study import Finding

NEEDS_DATA = True
BETAS = (0.0, 0.5, 0.99)
EPOCHS = (0, 1, 10, 50, 100)
NEIGHBOURS = 10
SHUFFLES = 10
# The paper's groups of MovieLens genres. Other attributes are a group each.
GENRES = (
    ("Thriller", "Crime", "Action", "Adventure"),
    ("Horror", "Mystery", "Film-Noir"),
    ("War", "Drama", "Romance"),
    ("Comedy", "Musical", "Children's", "Animation"),
    ("Fantasy", "Sci-Fi"),
    ("Western", "Documentary"),
)


class Groups(NamedTuple):
    """The items of one group alone, and which."""

    names: tuple[str, ...]
    items: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n], places in `names`


def study(options: Ablate, out: Path, console: Console) -> list[Finding]:
    """How well the rows of the table cluster by group, for each beta along training.

    All betas and seeds train in one compiled program, for 100 epochs unless told otherwise;
    `--beta` asks for one alone. `out` gets the picture of the first seed: by UMAP if
    umap-learn is installed, else by principal components.
    """
    dataset, split = split_of(options)
    settings = {"epochs": EPOCHS[-1]} | options.given()
    config = preset(options.model, options.preset_name(dataset.name), "sevo_adamw", **settings)
    betas = (config.beta,) if "beta" in settings else BETAS
    options.check_given([config])
    if options.eval_every is not None:
        raise ValueError("`eval_every` changes nothing in `embeddings`; leave it out.")
    if options.arms:
        raise ValueError(f"`embeddings` has no `arms`, got {options.arms}; see `beta`.")
    groups = groups_of(dataset.known_attributes())
    method, project = projection()
    if method != "UMAP":
        console.print(
            "umap-learn is not installed, so the picture shows principal components (PCA). "
            'For UMAP: pip install -e ".[umap]"',
            markup=False,
        )
    points: dict[tuple[float, int], np.ndarray] = {}
    rows, last = [], {}
    for epoch, tables in trained(config, split, betas, options.seeds):
        console.print(f"epoch {epoch}/{config.epochs}")
        for beta, of_seeds in zip(betas, tables[:, :, groups.items], strict=True):
            same = [same_neighbours(table, groups.labels) for table in of_seeds]
            found = [silhouettes(table, groups.labels) for table in of_seeds]
            by_chance = [shuffled(table, groups.labels) for table in of_seeds]
            cells = [spread(float(np.mean(one)) for one in values) for values in (same, found)]
            rows.append([f"{beta}", f"{epoch}", *cells, f"{np.mean(by_chance):.4f}"])
            points[beta, epoch] = project(of_seeds[0])
            last[beta] = np.mean(same, axis=0)
    _draw(points, groups, method, out / f"{method.lower()}.png")
    rows.sort(key=lambda row: float(row[0]))
    sizes = np.bincount(groups.labels)
    chance = (sizes - 1) / (len(groups.items) - 1)
    overall = np.average(chance, weights=sizes)
    what = f"{NEIGHBOURS} nearest of the same group"
    head = ["beta", "epoch", what, "silhouette", "silhouette of shuffled groups"]
    title = (
        f"Clustering of {len(groups.items):,} items of one group each (of "
        f"{dataset.num_items:,}), by cosine in the table; by chance {overall:.4f} of the "
        "nearest are of the same group, and silhouettes are those of shuffled groups"
    )
    findings = [Finding(title, head, rows)]
    if len(groups.names) <= 20:
        table = [
            [name, f"{sizes[i]:,}", f"{chance[i]:.4f}"]
            + [f"{last[beta][groups.labels == i].mean():.4f}" for beta in betas]
            for i, name in enumerate(groups.names)
        ]
        head = ["group", "items", "by chance", *(f"beta {beta}" for beta in betas)]
        findings.append(Finding(f"{what}, after epoch {config.epochs}", head, table))
    return findings


def groups_of(attributes: Attributes) -> Groups:
    """The paper's six groups if all attributes are MovieLens genres, else one for each."""
    of_genre = {genre: i for i, genres in enumerate(GENRES) for genre in genres}
    known = [name for name in attributes.names if name != "unknown"]  # as MovieLens-100K has
    if of_genre.keys() >= set(known):
        names = tuple("/".join(genres) for genres in GENRES)
    else:
        names, of_genre = tuple(known), {name: i for i, name in enumerate(known)}
    group = np.array([of_genre.get(name, -1) for name in attributes.names])
    items = np.repeat(np.arange(attributes.num_items), np.diff(attributes.row_splits))
    labels = group[attributes.values]
    low, high = np.full((2, attributes.num_items), -1)
    low[items] = len(names)
    np.minimum.at(low, items, labels)
    np.maximum.at(high, items, labels)
    alone = np.flatnonzero((low == high) & (low >= 0))
    if len(set(low[alone])) < 2 or len(alone) <= NEIGHBOURS:
        raise ValueError(
            f"`embeddings` needs more than {NEIGHBOURS} items that belong to one group alone, "
            f"and two groups, got {len(alone)} items of {len(set(low[alone]))}."
        )
    # Groups without such an item are left out, as nothing can be said of them.
    kept, labels = np.unique(low[alone], return_inverse=True)
    return Groups(tuple(names[i] for i in kept), alone, labels)


def trained(
    config: Config, split: Split, betas: Sequence[float], seeds: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Trains every beta and seed together; yields the item tables at `EPOCHS` and at the end.

    Yields:
      The epoch, and the rows of the items `[len(betas), len(seeds), num_items, dim]`; of
      STOSA's two tables, the means.
    """
    swept = {"beta": [beta for beta in betas for _ in seeds]}
    trainer = make_trainer(config, split, swept)
    state = start(trainer, [*seeds] * len(betas), swept)
    name = BACKBONES[config.model].vectors

    for epoch in range(config.epochs + 1):
        if epoch:
            state, loss = trainer.epoch(state, epoch)
            if not np.isfinite(loss).all():
                raise FloatingPointError(f"the loss is not finite in epoch {epoch}.")
        if epoch in EPOCHS or epoch == config.epochs:
            table = np.asarray(state.evaluated[name]["embedding"], np.float64)
            shape = len(betas), len(seeds), -1, table.shape[-1]
            rows = table[:, table.shape[1] - split.dataset.num_items :]
            yield epoch, rows.reshape(shape)


def same_neighbours(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each row, how many of its nearest by cosine have its label, as a share `[n]`.

    Args:
      table: `[n, d]`, with n above `NEIGHBOURS`.
      labels: integers `[n]`.
    """
    units, shares = _units(table), []
    for begin in range(0, len(units), 1024):
        cosine = units[begin : begin + 1024] @ units.T
        row = np.arange(len(cosine))
        cosine[row, begin + row] = -np.inf  # not itself
        near = np.argpartition(-cosine, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
        shares.append((labels[near] == labels[begin + row, None]).mean(axis=1))
    return np.concatenate(shares)


def silhouettes(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each row `[n]`, (b - a) / max(a, b): a is the mean distance to the others of its
    group, b that to the nearest other group. 0 for a group of one.

    The distance is one minus the cosine, so that the mean over a group is one minus the
    product with the group's mean, and no distances of pairs are needed.

    References:
      Rousseeuw, Silhouettes, J. Comput. Appl. Math. 20 (1987)
    """
    units, sizes = _units(table), np.bincount(labels)
    sums = np.zeros((len(sizes), units.shape[1]))
    np.add.at(sums, labels, units)
    distance = 1 - units @ (sums / sizes[:, None]).T
    row = np.arange(len(units))
    own = sizes[labels]
    # A row is part of its group's mean, at the distance 1 - |unit|^2 = 0, or 1 for a zero row.
    itself = 1 - (units**2).sum(axis=1)
    inside = (own * distance[row, labels] - itself) / np.maximum(own - 1, 1)
    distance[row, labels] = np.inf
    outside = distance.min(axis=1)
    scale = np.maximum(inside, outside)
    value = np.divide(outside - inside, scale, out=np.zeros(len(units)), where=scale > 1e-12)
    return np.where(own > 1, value, 0.0)


def shuffled(table: np.ndarray, labels: np.ndarray) -> float:
    """The mean silhouette if groups of these sizes are drawn at random."""
    rng = np.random.default_rng(0)
    found = [silhouettes(table, rng.permutation(labels)).mean() for _ in range(SHUFFLES)]
    return float(np.mean(found))


def projection():
    """The name of the method that draws, and a function from `[n, d]` to points `[n, 2]`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own imports warn
            import umap  # type: ignore
    except ImportError:
        return "PCA", principal_components

    def project(table: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(table)

    return "UMAP", project


def principal_components(table: np.ndarray) -> np.ndarray:
    """The two directions of the unit rows that vary most, `[n, 2]`; of fixed sign."""
    units = _units(table)
    left, scale, right = np.linalg.svd(units - units.mean(axis=0), full_matrices=False)
    largest = np.abs(right[:2]).argmax(axis=1)
    return left[:, :2] * scale[:2] * np.sign(right[[0, 1], largest])


def _units(table: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(table, axis=1, keepdims=True)
    return np.divide(table, norm, out=np.zeros_like(table), where=norm > 0)


def _draw(
    points: dict[tuple[float, int], np.ndarray], groups: Groups, method: str, to: Path
) -> None:
    """A row of panels for each beta, a column for each epoch; a colour for each group."""
    betas = sorted({beta for beta, _ in points})
    epochs = sorted({epoch for _, epoch in points})
    shape = len(betas), len(epochs)
    size = 2.4 * shape[1], 2.4 * shape[0] + 0.6
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    few = len(groups.names) <= 10
    colors = matplotlib.colormaps["tab10" if few else "gist_rainbow"](
        np.arange(10) if few else np.linspace(0, 1, len(groups.names))
    )
    for i, beta in enumerate(betas):
        for j, epoch in enumerate(epochs):
            axis, at = axes[i, j], points[beta, epoch]
            axis.scatter(*at.T, s=1.5, c=colors[groups.labels], linewidths=0)
            axis.set(xticks=[], yticks=[], title=f"beta {beta}, epoch {epoch}")
    if few:
        used = colors[: len(groups.names)]
        marks = [Line2D([], [], marker="o", ls="", color=color) for color in used]
        columns = max(1, 2 * shape[1] // 3)  # as many names as fit
        legend = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        figure.legend(marks, groups.names, **legend)
    figure.suptitle(f"{method} of the items' embeddings")
    figure.savefig(to, dpi=110)
