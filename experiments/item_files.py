"""Attributes of items, such as genres, from the file that stands beside the interactions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import polars as pl

from experiments.dataset import Attributes
from experiments.readers import (
    Format,
    Source,
    Table,
    read_bytes,
    read_delimited,
    read_parquet,
)

# In the order of their columns in `u.item`, as MovieLens-100K's README lists them.
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
    "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance",
    "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_PARTNERS = {"interactions.csv": "items.csv", "ratings.dat": "movies.dat", "u.data": "u.item"}
_REQUIRED = frozenset({"item"})
_PLAIN = {"item": "item", "attributes": "genres"}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


@dataclass(frozen=True)
class ItemFormat:
    """A row of the table of formats: a column `item`, and `attributes` or a flag for each."""

    format: Format
    between: str = "|"  # the attributes of an item
    flags: tuple[str, ...] = ()  # columns that are 1 where the item has the attribute, else 0
    encoding: str = "utf-8"


FORMATS = (
    ItemFormat(
        Format(
            "movies.dat",
            read_delimited,
            _same("item", "title", "attributes"),
            "::",
            header=False,
            required=_REQUIRED,
        ),
        encoding="latin-1",
    ),
    ItemFormat(
        Format(
            "u.item",
            read_delimited,
            _same("item", "title", "date", "video", "link", *_GENRES),
            "|",
            header=False,
            required=_REQUIRED,
        ),
        flags=_GENRES,
        encoding="latin-1",
    ),
    # RecBole.
    ItemFormat(
        Format(
            "*.item",
            read_delimited,
            {"item": "item_id", "attributes": "genre"},
            "\t",
            required=_REQUIRED,
            any_names=True,
        ),
        between=" ",
    ),
    ItemFormat(Format("*.csv", read_delimited, _PLAIN, required=_REQUIRED, any_names=True)),
    ItemFormat(
        Format("*.tsv", read_delimited, _PLAIN, "\t", required=_REQUIRED, any_names=True)
    ),
    # Here an item's attributes may also be a list.
    ItemFormat(Format("*.parquet", read_parquet, _PLAIN, required=_REQUIRED, any_names=True)),
)


def items_file(interactions: Path) -> Path | None:
    """The items' file that goes with a file of interactions, if it is there.

    `items.csv` goes with `interactions.csv`, `movies.dat` with `ratings.dat`, `u.item` with
    `u.data`, and RecBole's `NAME.item` with `NAME.inter`, each of them compressed or not.
    """
    name = interactions.name.removesuffix(".gz")
    partner = _PARTNERS.get(name)
    if name.endswith(".inter"):
        partner = name.removesuffix("inter") + "item"
    for end in ("", ".gz"):
        if partner and (found := interactions.with_name(partner + end)).exists():
            return found
    return None


def read_attributes(
    path: Path, item_ids: np.ndarray, *, columns: Mapping[str, str] | None = None
) -> Attributes | None:
    """The attributes of the items with these external ids.

    Items that the file does not list, or lists with nothing, have no attributes; those that it
    lists besides are passed over.

    Args:
      path: of a file that `FORMATS` knows, plain or compressed.
      item_ids: integers or strings `[num_items]`.
      columns: the names of the columns `item` and `attributes`, where they differ from the
        format's; `attributes` named here must be there. `item` is what the interactions call
        it: without a column of that name, one such as `item` or `movieId` is taken.

    Returns:
      The attributes, their names in order; `None` if the file has no column of that name.

    Raises:
      ValueError: the file is damaged, lists an item twice, or has none of these items.
    """
    path, columns = Path(path), dict(columns or {})
    name = path.name.lower().removesuffix(".gz")
    known = next((one for one in FORMATS if fnmatchcase(name, one.format.pattern)), None)
    if known is None:
        patterns = ", ".join(one.format.pattern for one in FORMATS)
        raise ValueError(f"`items` must be a file such as {patterns}, got {path}.")
    if columns.get("attributes") and not known.format.header:
        raise ValueError(f"`columns` names attributes, but {path.name} has no header.")
    names = {**known.format.columns, **(columns if known.format.header else {})}
    source = Source(
        path,
        read_bytes(path),
        known.format,
        names,
        frozenset(columns) - {"item"},
        known.encoding,
    )
    table = known.format.read(source)
    ids = _checked_ids(source, table)
    if known.flags:
        lists = _flagged(source, table, known.flags)
    elif "attributes" in table.frame:
        lists = _lists(source, table.frame["attributes"], known.between)
    else:
        return None
    wanted = pl.DataFrame({"item": item_ids.astype(str)}).with_row_index("row")
    if not wanted["item"].is_in(ids.implode()).any():
        raise ValueError(
            f"{path}: lists none of the items of the interactions, which have ids such as "
            f"{item_ids[0]}, but items such as {ids[0]}."
        )
    pairs = pl.DataFrame({"item": ids, "name": lists}).explode("name")
    pairs = pairs.with_columns(pl.col("name").str.strip_chars()).filter(pl.col("name") != "")
    pairs = wanted.join(pairs, on="item").select("row", "name").unique().sort("row", "name")
    found = sorted(set(pairs["name"]))
    rows = pairs["row"].to_numpy()
    return Attributes(
        tuple(found),
        np.searchsorted(np.array(found), pairs["name"].to_numpy()),
        np.searchsorted(rows, np.arange(len(item_ids) + 1)),
    )


def _checked_ids(source: Source, table: Table) -> pl.Series:
    column = table.frame["item"]
    if column.dtype.is_nested():
        source.fail(f"item: expected plain values, found {column.dtype}.")
    ids = column.cast(pl.String)
    for good, problem in (
        (ids.is_not_null() & (ids != ""), "item: expected a value."),
        (ids.is_first_distinct(), "this item has a line already."),
    ):
        if not good.all():
            source.fail(problem, table.line(int(good.arg_min() or 0)))
    return ids


def _lists(source: Source, attributes: pl.Series, between: str) -> pl.Series:
    """The attributes of each row as a list of names; null where there are none."""
    kind = attributes.dtype
    if isinstance(kind, pl.List | pl.Array) and not kind.inner.is_nested():
        return attributes.cast(pl.List(pl.String))
    if kind.is_nested():
        source.fail(f"attributes: expected names or lists of them, found {kind}.")
    return attributes.cast(pl.String).str.split(between)


def _flagged(source: Source, table: Table, flags: tuple[str, ...]) -> pl.Series:
    """The names of the columns that are 1, a list for each row."""
    frame = table.frame.select(flags)
    for name in flags:
        good = frame[name].is_in(["0", "1"]).fill_null(False)
        if not good.all():
            row = int(good.arg_min() or 0)
            problem = f"{name}: expected 0 or 1, found {frame[name][row]!r}."
            source.fail(problem, table.line(row))
    named = (pl.when(pl.col(name) == "1").then(pl.lit(name)) for name in flags)
    return frame.select(pl.concat_list(*named).list.drop_nulls()).to_series()
