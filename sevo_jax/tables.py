"""Which leaves of a parameter tree are the embedding tables of a graph."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard, cast

import jax
import numpy as np
import optax

Tables: TypeAlias = None | str | tuple[str, ...] | Callable[[Any], Any] | Any


def is_stack(tables: Tables) -> TypeGuard[tuple[str, ...]]:
    """Whether `tables` names several that are smoothed as one."""
    return (
        isinstance(tables, tuple) and bool(tables) and all(isinstance(t, str) for t in tables)
    )


def table_groups(params: Any, tables: Tables, num_nodes: int) -> list[list[int]]:
    """Positions, among the leaves of `params`, of the tables to smooth.

    Each group is smoothed as one table of `num_nodes` rows: a group of several is stacked in
    its order. A tree without leaves has no groups, since Optax calls `init` with such
    placeholders; any other tree without a table is an error.
    """
    names, leaves = leaf_paths(params)
    paths = ["/".join(name) for name in names]
    if not leaves:
        return []
    if tables is None:
        shapes = [np.shape(leaf) for leaf in leaves]
        groups = [[i] for i, s in enumerate(shapes) if len(s) == 2 and s[0] == num_nodes]
        if len(groups) != 1:
            raise ValueError(
                f"`tables=None` takes the one parameter of shape [{num_nodes}, d], but "
                f"{len(groups)} match. Name the tables, as in `tables='item_embedding'`. "
                f"Parameters:\n{_listing(paths, leaves)}"
            )
    elif isinstance(tables, str):
        groups = [[i] for i in _matching(tables, paths)]
    elif is_stack(tables):
        groups = [[_only(pattern, paths, leaves) for pattern in tables]]
        if len(set(groups[0])) < len(groups[0]):
            named = ", ".join(paths[i] for i in groups[0])
            raise ValueError(f"`tables` = {tables!r} names a parameter twice: {named}.")
    else:
        # As in Optax: a tree of bools may be of a class that can be called.
        parts = jax.tree.leaves(tables)
        chooses = bool(parts) and all(map(callable, parts))
        mask = cast(Callable, tables)(params) if chooses else tables
        groups = [[i] for i, chosen in enumerate(_broadcast(mask, params)) if chosen]
    if not groups:
        raise ValueError(
            f"`tables` = {tables!r} selects no parameter. Parameters:\n"
            f"{_listing(paths, leaves)}"
        )
    for group in groups:
        _check_shapes(
            [np.shape(leaves[i]) for i in group], [paths[i] for i in group], num_nodes
        )
    return groups


def table_mask(params: Any, tables: Tables, num_nodes: int) -> Any:
    """The same selection as a tree of bools in the structure of `params`."""
    chosen = {i for group in table_groups(params, tables, num_nodes) for i in group}
    treedef = jax.tree.structure(params)
    return treedef.unflatten([i in chosen for i in range(treedef.num_leaves)])


def leaf_paths(params: Any) -> tuple[list[tuple[str, ...]], list[Any]]:
    """The leaves, and paths like `("item_embedding", "embedding")` to them, the same for NNX,
    Linen and plain dicts."""
    # What Optax has masked out, and None, count as attributes but are no leaves.
    left_out = lambda node: node is None or isinstance(node, optax.MaskedNode)  # noqa: E731
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=left_out)[0]
    names = [tuple(str(_name(entry)) for entry in path) for path, _ in flat]
    below = Counter(path[:i] for path in names for i in range(len(path)))
    for i, (path, _) in enumerate(flat):
        # The leaves of an NNX state are the `value` of its variables, which is no key. That of
        # a class of the user's has other attributes beside it.
        boxed = names[i][1:] and isinstance(path[-1], jax.tree_util.GetAttrKey)
        if boxed and names[i][-1] == "value" and below[names[i][:-1]] == 1:
            names[i] = names[i][:-1]
    there = [i for i, (_, leaf) in enumerate(flat) if not left_out(leaf)]
    return [names[i] for i in there], [flat[i][1] for i in there]


def _name(entry: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def _matching(pattern: str, paths: list[str]) -> list[int]:
    try:
        return [i for i, path in enumerate(paths) if re.search(pattern, path)]
    except re.error as error:
        raise ValueError(
            f"`tables` takes regular expressions, and {pattern!r} is none: {error}."
        ) from None


def _only(pattern: str, paths: list[str], leaves: list[Any]) -> int:
    found = _matching(pattern, paths)
    if len(found) != 1:
        raise ValueError(
            f"Each of a tuple of `tables` names one parameter, but {len(found)} match "
            f"{pattern!r}. Parameters:\n{_listing(paths, leaves)}"
        )
    return found[0]


def _broadcast(mask: Any, params: Any) -> list[bool]:
    """One bool per leaf of `params` from a mask of its structure or a prefix of it."""
    flags, treedef = jax.tree.flatten(mask)
    if not flags or not all(isinstance(flag, bool | np.bool_) for flag in flags):
        raise TypeError(
            "`tables` takes a path pattern, a tuple of patterns, a tree of bools or a function "
            f"of the parameters that returns one, but got {mask!r}."
        )
    try:
        subtrees = treedef.flatten_up_to(params)
    except ValueError as error:
        # JAX's message prints the parameters.
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"`tables` is no prefix of the parameter tree: {reason}") from None
    return [
        bool(flag)
        for flag, subtree in zip(flags, subtrees, strict=True)
        for _ in jax.tree.leaves(subtree)
    ]


def _check_shapes(shapes: list[tuple[int, ...]], paths: list[str], num_nodes: int) -> None:
    named = ", ".join(f"{path} {shape}" for path, shape in zip(paths, shapes, strict=True))
    if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        raise ValueError(f"Tables have shape [rows, d] with one d, but selected: {named}.")
    if sum(shape[0] for shape in shapes) != num_nodes:
        hint = "" if len(paths) > 1 else " Stacked tables are named by a tuple of patterns."
        raise ValueError(
            f"The graph has {num_nodes} nodes, but its rows differ: {named}. Build the graph "
            f"with `num_nodes` equal to the rows of the table, padding included.{hint}"
        )


def _listing(paths: list[str], leaves: list[Any]) -> str:
    rows = [
        f"  {p or '(root)'}: {np.shape(leaf)}" for p, leaf in zip(paths, leaves, strict=True)
    ]
    return "\n".join(rows)
