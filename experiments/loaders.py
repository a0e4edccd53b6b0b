"""Readers for the interaction files that recommender research passes around.

`load` picks the format by the name of the file or folder. A file is read wholly or not at
all. An unreadable one (truncated gzip, another encoding, a missing column, a row with too few
or too many fields, an empty or non-numeric value, a user listed twice) raises `ValueError`
with the file and line. Only plain text cut inside its very last field cannot be told from a
whole file. What is left out on purpose is counted in `Dataset.drops`:

- `duplicate_rows`: rows equal to an earlier one in every column read, where a time or a
  position is among these; without one, an equal row may be a true repetition and is kept.
- `min_rating`, `repeats`, `k_core`: what these options left out.

Beside the interactions may stand a file of the items, from which `Dataset.attributes` come;
see `experiments.item_files`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path

import polars as pl

from experiments import dataset as data
from experiments.dataset import Dataset, Repeats
from experiments.item_files import items_file, read_attributes
from experiments.readers import (
    ROLES,
    Format,
    Source,
    Table,
    read_bytes,
    read_delimited,
    read_id_lines,
    read_json_lines,
    read_parquet,
)

_FOLDER_FILES = ("interactions.csv.gz", "interactions.csv", "ratings.dat", "u.data", "*.inter")


def load(
    path: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
    min_rating: float | None = None,
    repeats: Repeats = "keep",
    k_core: int | None = None,
    name: str | None = None,
    items: str | Path | None = None,
) -> Dataset:
    """Reads a file, or a folder that holds one, into a `Dataset`.

    Args:
      path: a file, plain or gzip-compressed, or a folder with `interactions.csv.gz`,
        `ratings.dat`, `u.data` or a RecBole `.inter` file in it.
      format: a key of `FORMATS`; by default the first whose pattern fits the file name, but
        `"csv"` for an `interactions.csv` without the columns of that format and for a
        `ratings_*.csv` with a header.
      columns: names in the file's header by role (`user`, `item`, `position`, `timestamp`,
        `rating`) where they differ from the format's; those named here must be there. Of CSV,
        TSV, Parquet and RecBole files, names such as `user_id`, `movieId`, `date` and
        `created_at` are known, if no two are for one role. Also `attributes`, a column of the
        items' file, where `item` may have the name given or one of those known.
      encoding: of text files.
      min_rating: leaves out interactions rated lower.
      repeats: which of a user's interactions with one item to keep; see `drop_repeats`.
      k_core: leaves out users and items with fewer interactions, repeatedly.
      name: of the dataset; by default that of the folder or file.
      items: the items' file, if not the one that `item_files.items_file` finds.

    Order: a user's interactions are sorted by `position` if there is one, else by
    `timestamp`, else kept as in the file; equal keys keep the order of the file.
    `Dataset.order` tells which of the three it was. The options apply in the order
    `min_rating`, `repeats`, `k_core`.
    """
    path = Path(path).resolve()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    if items and not Path(items).exists():
        raise FileNotFoundError(f"{items}: no such file of items.")
    name = name or path.name.split(".")[0]
    if path.is_dir():
        path = _file_in(path)
    columns = dict(columns or {})
    of_items = {key: columns[key] for key in ("item", "attributes") if key in columns}
    columns.pop("attributes", None)
    by_name = format is None
    format = format or _format_of(path)
    if format not in FORMATS:
        raise ValueError(
            f"`format` (--data-format) must be one of {', '.join(FORMATS)}, got {format!r}."
        )
    if min_rating is not None and (
        isinstance(min_rating, bool) or not isinstance(min_rating, Real)
    ):
        raise TypeError(f"`min_rating` must be a number, got {min_rating!r}.")

    def opened(format: str) -> Source:
        names = {**FORMATS[format].columns, **columns}
        return Source(path, raw, FORMATS[format], names, frozenset(columns), encoding)

    raw = read_bytes(path)
    if by_name and FORMATS[format].may_be_plain and _is_plain(opened(format)):
        format = "csv"
    source, chosen = opened(format), FORMATS[format]
    if (columns and not chosen.header) or not columns.keys() <= set(ROLES):
        raise ValueError(
            f"`columns` must name some of {', '.join(ROLES)} in a format with a header, "
            f"got {columns} with format {format!r}."
        )
    frame, drops = _clean(source, chosen.read(source), min_rating)
    try:
        dataset = Dataset.from_interactions(
            frame["user"],
            frame["item"],
            timestamps=frame["timestamp"].to_numpy() if "timestamp" in frame else None,
            positions=frame["position"].to_numpy() if "position" in frame else None,
            name=name,
            drops=drops,
        )
    except ValueError as error:
        if not {"position", "timestamp"} <= set(frame.columns):
            raise
        reason = str(error).split(";")[0]
        source.fail(f"{reason} by position; leave out one of the two columns.")
    known = Path(items) if items else items_file(path)
    if known:
        attributes = read_attributes(known, dataset.item_ids, columns=of_items)
        dataset = replace(dataset, attributes=attributes)
    elif "attributes" in of_items:
        source.fail("`columns` names attributes, but there is no items' file; pass `items`.")
    dataset = data.drop_repeats(dataset, repeats)
    return dataset if k_core is None else data.k_core(dataset, k_core)


def _file_in(folder: Path) -> Path:
    for pattern in _FOLDER_FILES:
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise ValueError(f"{folder}: holds none of {', '.join(_FOLDER_FILES)}.")


def _format_of(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    for key, format in FORMATS.items():
        if fnmatchcase(name, format.pattern):
            return key
    raise ValueError(
        f"{path}: unknown kind of file; pass `format` (--data-format), one of "
        f"{', '.join(FORMATS)}."
    )


def _is_plain(source: Source) -> bool:
    """Whether the first line is a header, and not one that the format asks for."""
    first = source.text().split("\n", 1)[0].rstrip("\r")
    fields = [field.strip('"').split(":")[0] for field in first.split(",")]
    if source.format.header:
        return not {source.columns[role] for role in source.format.required} <= set(fields)
    numbers = pl.Series(fields).cast(pl.Float64, strict=False)
    return first != "" and numbers.null_count() == len(fields)


def _clean(
    source: Source, table: Table, min_rating: float | None
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Types every column, drops and counts what the module's docstring says."""
    frame = table.frame

    def check(good: pl.Series, role: str, expected: str) -> None:
        if not good.all():
            row = int(good.arg_min() or 0)
            value = table.frame[role][row]
            found = "nothing" if value is None else repr(value)
            source.fail(f"{role}: expected {expected}, found {found}.", table.line(row))

    def typed(role: str) -> pl.Series:
        column = frame[role]
        if column.dtype.is_nested():
            source.fail(f"{role}: expected plain values, found {column.dtype}.")
        check(column.is_not_null() & (column.cast(pl.String) != ""), role, "a value")
        if role in ("user", "item"):
            if column.dtype.is_float():  # which a table makes of integers, some of them missing
                source.fail(f"{role}: ids are integers or text, not {column.dtype}; cast them.")
            column = _ids(column)
            if column.dtype == pl.String and not source.format.integer_ids:
                # Of tab-separated files some quote the values that need it and no name.
                marred = column.str.contains(r'(?s)^\s|\s$|^".*"$')
                check(~marred, role, "an id without blanks or quotes around it")
            if source.format.integer_ids:
                digits = column.cast(pl.String).str.contains(r"^(0|-?[1-9]\d{0,17})$")
                check(digits, role, "an integer id")
        else:
            column = _times(column) if role == "timestamp" else _numbers(column)
            good = column.is_not_null() & column.is_finite().fill_null(False)
            check(
                good, role, "a number" + " or a date (all in one form)" * (role == "timestamp")
            )
        return column.alias(role)

    for role in frame.columns:
        try:
            frame = frame.with_columns(typed(role))
        except pl.exceptions.PolarsError as error:
            # Parquet has types that are neither text nor numbers.
            problem = f"a column of {frame[role].dtype} cannot be read"
            source.fail(f"{role}: {problem} ({str(error).splitlines()[0]}).")

    drops = {}

    def keep(kept: pl.Expr, reason: str) -> None:
        nonlocal frame
        before, frame = frame.height, frame.filter(kept)
        if frame.height == 0:
            source.fail(f"`{reason}` leaves no interaction.")
        if frame.height < before:
            drops[reason] = before - frame.height

    frame = frame.with_row_index("row")
    if {"position", "timestamp"} & set(frame.columns):
        keep(pl.struct(table.frame.columns).is_first_distinct(), "duplicate_rows")
    if "position" in frame.columns:
        again = ~frame.select(pl.struct("user", "position").is_first_distinct()).to_series()
        if again.any():
            row = frame["row"].filter(again)[0]
            source.fail("this user has the same position already.", table.line(row))
    if min_rating is not None:
        if "rating" not in frame.columns:
            source.fail("`min_rating` needs a rating column; name it with `columns`.")
        keep(pl.col("rating") >= min_rating, "min_rating")
    return frame, drops


def _ids(column: pl.Series) -> pl.Series:
    """Integers where every id is one, written without leading zeros or signs; else strings."""
    if column.dtype.is_integer():
        return column
    text = column.cast(pl.String)
    numbers = text.cast(pl.Int64, strict=False)
    return numbers if (numbers.cast(pl.String) == text).fill_null(False).all() else text


def _numbers(column: pl.Series) -> pl.Series:
    """Int64 if every text is an integer, else Float64, null where neither; dates in seconds."""
    if column.dtype.is_temporal():
        return column.cast(pl.Datetime("us")).dt.epoch("us") / 1_000_000
    if column.dtype.is_decimal():  # polars cannot ask whether these are finite
        return column.cast(pl.Float64)
    if column.dtype.is_numeric():
        return column
    text = column.cast(pl.String)
    integers, numbers = text.cast(pl.Int64, strict=False), text.cast(pl.Float64, strict=False)
    return numbers if integers.null_count() else integers


def _times(column: pl.Series) -> pl.Series:
    """Numbers, or seconds since 1970 where all are dates as in ISO 8601; null where neither."""
    numbers = _numbers(column)
    if column.dtype != pl.String or numbers.null_count() < len(numbers):
        return numbers
    text = column.str.replace(" ", "T").str
    forms = ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d")
    dates = (text.to_datetime(form, time_unit="us", strict=False) for form in forms)
    return _numbers(min(dates, key=pl.Series.null_count))


def instants(times: Iterable[str | float]) -> list[float]:
    """Times as `load` has them: numbers, or dates in seconds since 1970.

    Raises:
      ValueError: one is neither, or they are in several forms.
    """
    texts = list(map(str, times))
    numbers = _times(pl.Series(texts))
    if numbers.null_count() or not numbers.is_finite().all():
        raise ValueError(
            "`times` must be numbers, or dates such as 2014-03-31 (all in one form), got "
            f"{', '.join(texts)}."
        )
    return numbers.to_list()


_PLAIN = {role: role for role in ROLES}
_RATED = {role: role for role in ("user", "item", "rating", "timestamp")}
_RATED_2018 = {role: role for role in ("item", "user", "rating", "timestamp")}
_RECBOLE = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "rating": "rating"}
_REVIEWS = {
    "user": "reviewerID",
    "item": "asin",
    "timestamp": "unixReviewTime",
    "rating": "overall",
}
_TIMED = frozenset({"user", "item", "timestamp"})

# In the order in which `load` compares the patterns with a file's name.
FORMATS: Mapping[str, Format] = {
    "interactions": Format(
        "interactions.csv",
        read_delimited,
        _PLAIN,
        required=frozenset({"user", "item", "position"}),
        integer_ids=True,
        may_be_plain=True,
    ),
    "amazon-ratings": Format(
        "ratings_*.csv", read_delimited, _RATED, header=False, may_be_plain=True
    ),
    # The 2018 release puts the item first; its names tell nothing, so it has no pattern.
    "amazon-ratings-2018": Format("", read_delimited, _RATED_2018, header=False),
    "amazon-reviews": Format("*.json*", read_json_lines, _REVIEWS, required=_TIMED),
    "movielens": Format("*.dat", read_delimited, _RATED, "::", False, integer_ids=True),
    "movielens-tab": Format("*.data", read_delimited, _RATED, "\t", False, integer_ids=True),
    "recbole": Format("*.inter", read_delimited, _RECBOLE, "\t", any_names=True),
    "csv": Format("*.csv", read_delimited, _PLAIN, any_names=True),
    "tsv": Format("*.tsv", read_delimited, _PLAIN, "\t", any_names=True),
    "parquet": Format("*.parquet", read_parquet, _PLAIN, any_names=True),
    "id-lines": Format("*.txt", read_id_lines, _PLAIN, header=False, integer_ids=True),
}
