"""Checks of what the graph builders are given, each named after the builder it serves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

Ragged: TypeAlias = Sequence[Any] | np.ndarray | jax.Array | tuple[np.ndarray, np.ndarray]


def ragged(
    function: str, name: str, rows: Ragged, num_nodes: int | None, hint: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Validated values `[num_values]` and row splits `[num_rows + 1]`.

    Where nothing limits the ids, they may be strings. The hint is for rows that are none.
    """
    if isinstance(rows, tuple) and len(rows) == 2:
        _check_unmasked(function, name, rows[0])
        values, splits = np.atleast_1d(rows[0]), np.asarray(rows[1])
        if (
            splits.ndim != 1
            or splits.dtype.kind not in "iu"
            or len(splits) == 0
            or splits[0] != 0
            or splits[-1] != len(values)
            or (np.diff(splits.astype(np.int64)) < 0).any()
        ):
            raise ValueError(
                f"`{function}`: the second of the tuple `{name}` must be row splits, integers "
                f"that rise from 0 to the number of values ({len(values)}). Pass a list "
                "instead of a tuple if these are two sequences."
            )
    else:
        if not isinstance(rows, Iterable):
            raise TypeError(
                f"`{function}` takes rows of integers in `{name}`, but got {rows!r}."
            )
        if isinstance(rows, Mapping) or hasattr(rows, "columns"):
            raise TypeError(
                f"`{function}` takes a list of rows of integers in `{name}`, but got a "
                f"{type(rows).__name__}, which hands out its keys or columns."
            )
        rows = list(rows)
        parts = [_row(function, name, i, row, hint) for i, row in enumerate(rows)]
        if num_nodes is None and any(part.dtype.kind in "OTU" for part in parts):
            parts = _texts(function, name, rows)
        values = np.concatenate([row for row in parts if len(row)] or [np.zeros(0, np.int32)])
        splits = np.cumsum([0, *map(len, parts)])
    if num_nodes is not None or values.dtype.kind != "U":
        check_ids(function, name, values, num_nodes, "num_nodes")
    return values, splits.astype(np.int64)


def _texts(function: str, name: str, rows: Sequence[Any]) -> list[np.ndarray]:
    """Rows of strings; NumPy would make strings of a missing value or a number beside one."""
    for i, row in enumerate(rows):
        if other := [x for x in row if not isinstance(x, str)]:
            raise TypeError(
                f"`{function}` takes integers or strings in `{name}`, not both and no missing "
                f"values, but row {i} has {other[0]!r}."
            )
    return [np.asarray(row, str) for row in rows]


def _row(function: str, name: str, index: int, row: Any, hint: str) -> np.ndarray:
    try:
        array = np.asarray(row)
        found = f"of shape {array.shape}"
    except ValueError:
        array, found = None, "of rows of unequal lengths"
    if array is None or array.ndim != 1:
        raise ValueError(
            f"`{function}` takes `{name}` as a list of flat arrays of ids, one per row, but "
            f"row {index} is {type(row).__name__} {found}.{hint}"
        )
    _check_unmasked(function, f"{name}[{index}]", row)
    if array.dtype == np.uint64 and (not len(array) or array.max() < 2**63):
        return array.astype(np.int64)  # beside int64, NumPy would make floats of both
    return array


def check_ids(
    function: str, name: str, ids: np.ndarray, stop: int | None, stop_name: str
) -> None:
    if ids.ndim != 1:
        raise ValueError(f"`{function}`: ids in `{name}` must be flat, got shape {ids.shape}.")
    if len(ids) and ids.dtype.kind not in "iu":
        raise TypeError(
            f"`{function}` takes integer ids in `{name}`, but got {ids.dtype}. Cast them with "
            "`.astype(np.int32)` if they are whole numbers."
        )
    if len(ids) and ids.min() < 0:
        raise ValueError(
            f"`{function}` takes ids from 0 in `{name}`, but the smallest is {ids.min()}. "
            "Remove padding entries before building a graph."
        )
    if stop is not None and len(ids) and ids.max() >= stop:
        raise ValueError(
            f"`{function}` takes ids below `{stop_name}` = {stop} in `{name}`, but the largest "
            f"is {ids.max()}. `{stop_name}` is the number of rows of the embedding table."
        )


def check_choice(function: str, name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"`{function}`: unknown `{name}` {value!r}, valid are {valid}.")


def _check_unmasked(function: str, name: str, values: Any) -> None:
    if np.ma.is_masked(values):  # NumPy would drop the mask
        raise ValueError(
            f"`{function}`: `{name}` has masked entries; give what is left, `.compressed()`."
        )


def as_array(function: str, name: str, values: Any) -> np.ndarray:
    _check_unmasked(function, name, values)
    try:
        return np.asarray(values)
    except ValueError:  # nested lists of unequal lengths
        raise ValueError(
            f"`{function}` takes an array in `{name}`, but its rows differ in length."
        ) from None


def real_numbers(function: str, name: str, values: Any) -> np.ndarray:
    """The values as an array; refused if they are no real numbers."""
    array = as_array(function, name, values)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"`{function}` takes real numbers in `{name}`, but got {array.dtype}.")
    return array


def bad_weight(weights: np.ndarray) -> int | None:
    """The place of the first weight that is negative or not finite, None if none is."""
    good = np.isfinite(weights) & (weights >= 0)
    return None if good.all() else int(np.argmin(good))


def check_positive(function: str, name: str, value: Any) -> None:
    if not is_integer(value) or value < 1:
        raise ValueError(f"`{function}`: `{name}` must be a positive integer, got {value!r}.")


def check_count(function: str, name: str, value: Any) -> None:
    if not is_integer(value) or not 0 <= value < 2**31:  # ids are int32
        raise ValueError(
            f"`{function}`: `{name}` must be an integer of at least 0 and below 2**31, got "
            f"{value!r}."
        )


def is_integer(value: Any) -> bool:
    """Python's or NumPy's, but no bool, which Python takes for one."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
