"""Generated data with planted communities: what the main job runs on with nothing downloaded.

Its shape is that of Amazon Beauty (short sequences, about a dozen interactions an item, a
long tail), and neighbours in a sequence are alike, as the item graph assumes:

- Items fall into communities of equal size. In each, popularity follows Zipf's law, and the
  items stand on a ring in random order, which has nothing to do with popularity.
- A user has a home community and a second one. Each step either walks to one of the few items
  on both sides along the ring, or jumps to a popular item of the home, or of the second
  community, or of any. No user takes the same item twice.

Jumps to any community are noise, as real sequences are full of. They make the task hard enough
for an embedding to profit from its neighbours: with fewer of them, or more interactions an
item, plain AdamW finds nearly all there is to find.
"""

from __future__ import annotations

import numpy as np

from experiments.dataset import Attributes, Dataset

MIN_LENGTH, MAX_LENGTH = 5, 50
# The length less five: floor of a log-normal, fitted to the quantiles of Amazon Beauty.
LENGTH_MEDIAN, LENGTH_SIGMA = 1.6, 1.4
# How a step moves. Walking needs an item to walk on from, so a sequence starts with a jump.
WALK, JUMP_HOME, JUMP_SECOND, JUMP_ANYWHERE = range(4)
MOVES = (0.3, 0.15, 0.2, 0.35)
RING_REACH = 5  # a walk goes to one of this many items on either side
TRIES = 8  # proposals for a step; the first item that the user has not had is taken


def synthetic(
    num_users: int = 4000, num_items: int = 3000, num_communities: int = 150, *, seed: int = 0
) -> Dataset:
    """Generates a dataset; equal arguments give equal bytes.

    An item's external id, such as `"c007-0012"`, tells its community and its popularity rank
    in there. The community is also its one attribute. Items that nobody took stay in the
    dataset, as isolated nodes of the graph.

    Args:
      num_users: each has 5 to 50 interactions, about 8.5 on average.
      num_items: at least ten for each community.
      num_communities: groups of items that are consumed together.
      seed: of the random generator.
    """
    if num_users < 1 or num_communities < 1 or num_items < 2 * MIN_LENGTH * num_communities:
        raise ValueError(
            "`synthetic` needs a user, a community and ten items for each community, got "
            f"num_users={num_users}, num_items={num_items}, num_communities={num_communities}."
        )
    rng = np.random.default_rng(seed)
    rank, community = np.divmod(np.arange(num_items), num_communities)
    zipf = np.cumsum(1 / np.arange(1, num_items // num_communities + 2))
    sizes = np.bincount(community)  # [num_communities], equal or one apart
    neighbours, walk = _ring(rng, community, rank, sizes)

    length = np.exp(rng.normal(np.log(LENGTH_MEDIAN), LENGTH_SIGMA, num_users)).astype(int)
    length = np.minimum(MIN_LENGTH + length, min(MAX_LENGTH, num_items // 2))
    favourites = rng.integers(num_communities, size=(num_users, 2))  # home, second

    taken = np.zeros((num_users, num_items), bool)
    steps = np.full((num_users, length.max()), -1)
    for step in range(length.max()):
        user = np.flatnonzero(length > step)
        shape = (len(user), TRIES)
        move = rng.choice(len(MOVES), size=shape, p=MOVES)
        target = np.where(move == JUMP_SECOND, favourites[user, 1:], favourites[user, :1])
        anywhere = rng.integers(num_communities, size=shape)
        target = np.where(move == JUMP_ANYWHERE, anywhere, target)
        drawn = np.searchsorted(zipf, rng.random(shape) * zipf[sizes[target] - 1])
        proposal = drawn * num_communities + target
        if step:
            here = steps[user, step - 1]
            place = (rng.random(shape)[..., None] > walk[here, None]).sum(-1)
            proposal = np.where(move == WALK, neighbours[here[:, None], place], proposal)
        fresh = ~taken[user[:, None], proposal]
        chosen = proposal[np.arange(len(user)), fresh.argmax(1)]
        stuck = ~fresh.any(1)  # every proposal is taken: the most popular item that is not
        chosen[stuck] = taken[user[stuck]].argmin(1)
        steps[user, step] = chosen
        taken[user, chosen] = True

    label = rng.permutation(num_items)  # so that ids tell nothing to a model
    item_ids = np.empty(num_items, "<U16")
    names = [f"c{c:03d}" for c in range(num_communities)]
    item_ids[label] = [f"{names[c]}-{r:04d}" for c, r in zip(community, rank, strict=True)]
    attributes = Attributes(
        tuple(names), community[np.argsort(label)], np.arange(num_items + 1)
    )
    return Dataset(
        name="synthetic",
        values=label[steps[steps >= 0]],
        row_splits=np.concatenate([[0], np.cumsum(length)]),
        num_items=num_items,
        item_ids=item_ids,
        attributes=attributes,
    )


def _ring(
    rng: np.random.Generator, community: np.ndarray, rank: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours on each community's ring, `[num_items, 2 reach]`, and their chances.

    The chances are cumulative, without the last, which is 1. A walk prefers popular items, so
    that it keeps the long tail.
    """
    order = np.lexsort((rng.random(len(community)), community))
    starts = np.cumsum(sizes) - sizes
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - starts[community[order]]
    reach = np.arange(1, RING_REACH + 1)
    ahead = place[:, None] + np.concatenate([reach, -reach])
    neighbours = order[starts[community, None] + ahead % sizes[community, None]]
    chance = np.cumsum(1 / np.sqrt(1 + rank[neighbours]), axis=1)
    return neighbours, chance[:, :-1] / chance[:, -1:]
