"""Generated logs whose item graphs have the degrees of real catalogues."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr

from experiments.dataset import Dataset, Split, leave_one_out
from experiments.loaders import load
from sevo_jax import item_graph

LENGTH = 8  # of every generated sequence, about the mean of Amazon's
# An item's popularity is that of a fifth uniform, the rest log-normal. Relative to the mean its
# quantiles .1, .5, .9 and .99 are then .28, .59, 2.0 and 6.6; Amazon Beauty, Toys, Tools and
# Home have .24-.30, .54-.61, 1.9-2.1 and 5.7-7.6. The largest degree grows with the catalogue
# there too; generated at Beauty's size it is 45 times the mean, as in Home, and Beauty's 25.
UNIFORM, SIGMA = 0.2, 1.2


class Size(NamedTuple):
    """Of a catalogue, and of the log that its item graph is made of."""

    num_items: int
    num_users: int  # of LENGTH interactions each: 14 directed edges, less what repeats


SIZES = {
    "tiny": Size(2_000, 1_500),  # to try a command out
    "small": Size(3_416, 25_000),  # about MovieLens-1M: 0.3 million directed edges
    "beauty": Size(12_101, 15_900),  # the real one with `--data`
    "electronics": Size(159_729, 722_000),  # 10 million directed edges
    "clothing": Size(376_378, 1_154_000),  # 16 million
    "1m": Size(1_000_000, 2_900_000),  # 40 million
}


class Log(NamedTuple):
    """A log as a training split, and its item graph with a row for padding."""

    split: Split
    graph: Any  # a jraph.GraphsTuple of num_items + 1 nodes
    real: bool


def blocks(size: Size, block_users: int = 1 << 19) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A log in blocks `(values, row_splits)`, one at a time; item ids tell no popularity."""
    rng = np.random.default_rng(0)
    label = rng.permutation(size.num_items).astype(np.int32)
    for first in range(0, size.num_users, block_users):
        number = LENGTH * min(block_users, size.num_users - first)
        # Drawing in proportion to a log-normal popularity shifts the normal by sigma.
        place = ndtr(rng.normal(SIGMA, 1, number))
        uniform = rng.random(number) < UNIFORM
        place[uniform] = rng.random(int(uniform.sum()))
        item = np.minimum((place * size.num_items).astype(np.int64), size.num_items - 1)
        yield label[item], np.arange(0, number + 1, LENGTH)


def log_of(name: str, data: Path | None, max_users: int | None = None) -> Log:
    """The log of a size of the table `SIZES`.

    Args:
      name: of the size.
      data: Amazon Beauty's folder, for the size of that name.
      max_users: of a generated log in the split; its graph is always of all.
    """
    if name == "beauty" and data is not None:
        split = leave_one_out(load(data))
        values, splits = split.train
        num_nodes = split.dataset.num_items + 1
        return Log(split, item_graph((values + 1, splits), num_nodes), True)
    size = SIZES[name]
    shifted = ((values + 1, splits) for values, splits in blocks(size))
    graph = item_graph(shifted, size.num_items + 1)
    users = min(size.num_users, max_users or size.num_users)
    ((values, splits),) = blocks(Size(size.num_items, users), users)
    return Log(
        leave_one_out(Dataset("generated", values, splits, size.num_items)), graph, False
    )
