"""Readers: from the bytes of one file to a table of columns by role.

A reader checks the shape of its file, that is, encoding, header and number of fields;
`loaders` then checks the values. Polars does the work; only when it has found something
wrong does a slow second pass look for the line to name.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

import polars as pl

ROLES = ("user", "item", "position", "timestamp", "rating")
# Names of columns that tell when something was chosen, as `_role_of` spells them. A duration or
# a date of the item must not be among them: it would order the sequences, and nobody would see.
_TIMES = re.compile(
    r"(unix|utc|event|interaction|order|purchase|rating|review|transaction)*"
    r"(ts|time|timestamp|date|datetime)|(created|ordered|purchased|rated|reviewed)at"
)


class Table(NamedTuple):
    """What a reader hands on: columns named by role, and where its rows came from."""

    frame: pl.DataFrame  # columns among ROLES, of any type
    line: Callable[[int], str]  # row number -> "line 7", for messages


class Source(NamedTuple):
    """One file to read, and how."""

    path: Path
    raw: bytes  # decompressed
    format: Format
    columns: Mapping[str, str]  # role -> name in the file
    chosen: frozenset[str]  # roles that the caller named, hence required
    encoding: str

    def fail(self, problem: str, where: str = "") -> NoReturn:
        raise ValueError(f"{self.path}{', ' if where else ''}{where}: {problem}")

    def text(self) -> str:
        try:
            text = self.raw.decode(self.encoding).removeprefix("\ufeff").rstrip("\r\n")
        except LookupError:
            raise ValueError(f"`encoding` {self.encoding!r} is unknown.") from None
        except UnicodeDecodeError as error:
            line = self.raw.count(b"\n", 0, error.start) + 1
            byte = f"byte 0x{self.raw[error.start]:02x}"
            self.fail(f"{byte} is not {self.encoding}; pass `encoding`.", f"line {line}")
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            self.fail("NUL character; is this UTF-16, or not text at all?", f"line {line}")
        return text


@dataclass(frozen=True)
class Format:
    """A row of the table of formats."""

    pattern: str  # file name in lower case, without .gz
    read: Callable[[Source], Table]
    columns: Mapping[str, str]  # role -> name in the file, in file order where no header
    separator: str = ","
    header: bool = True
    required: frozenset[str] = frozenset({"user", "item"})
    integer_ids: bool = False
    any_names: bool = False  # for columns that the header lacks, take what `_role_of` knows
    may_be_plain: bool = False  # many give this name to a table with a header of their own


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed if it is gzip."""
    raw = path.read_bytes()
    if path.suffix == ".gz" or raw.startswith(b"\x1f\x8b"):
        parts = []
        while raw:  # a gzip file is one or more members
            member = zlib.decompressobj(wbits=31)
            try:
                parts.append(member.decompress(raw))
            except zlib.error as error:
                raise ValueError(f"{path}: not a sound gzip file ({error}).") from None
            if not member.eof:
                line = b"".join(parts).count(b"\n") + 1
                raise ValueError(f"{path}, line {line}: the gzip file is truncated there.")
            raw = member.unused_data
        raw = b"".join(parts)
    if not raw.strip():
        raise ValueError(f"{path}: the file is empty.")
    return raw


def read_delimited(source: Source) -> Table:
    """Lines of fields between separators, with a header or without."""
    format, text, separator = source.format, source.text(), source.format.separator
    if len(separator) > 1:  # polars takes one byte
        if "\t" in text:
            line = text.count("\n", 0, text.index("\t")) + 1
            source.fail(f"a tab in a file separated by {separator!r}.", f"line {line}")
        text, separator = text.replace(separator, "\t"), "\t"
    # Texts between tabs may begin with a quote that is their own; R quotes the names as well.
    first = text.split("\n", 1)[0].rstrip("\r").split("\t")
    all_quoted = all(re.fullmatch('"[^"]*"', name) for name in first)
    quoted = format.header and (separator == "," or all_quoted)

    def records() -> Iterator[tuple[int, list[str]]]:
        """Line and fields of each record: slow, so only for the header and for messages."""
        quoting, line = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, 1
        stream = io.StringIO(text)  # strict, so that a quote left open is an error
        reader = csv.reader(stream, delimiter=separator, quoting=quoting, strict=True)
        try:
            for fields in reader:
                yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            source.fail(f"{error}.", f"line {line}")

    names = next(records())[1] if format.header else format.columns
    header = [name.split(":")[0] for name in names]

    def check_fields() -> None:
        for line, fields in records():
            if len(fields) != len(header):
                problem = f"expected {len(header)} fields, found {len(fields)}."
                source.fail(problem, f"line {line}")

    try:
        frame = pl.read_csv(
            text.encode(),
            has_header=False,
            skip_rows=int(format.header),
            schema={str(place): pl.String for place in range(len(header))},
            separator=separator,
            quote_char='"' if quoted else None,
        )
    except pl.exceptions.PolarsError as error:
        check_fields()
        source.fail(str(error).splitlines()[0])
    # Polars fills short rows with nulls in silence; the last column gives them away.
    if frame.to_series(-1).null_count():
        check_fields()

    def line_of(row: int) -> str:
        return f"line {next(islice(records(), row + format.header, None))[0]}"

    return Table(_by_role(source, frame, header), line_of)


def read_json_lines(source: Source) -> Table:
    """One JSON object in each line, as in the Amazon reviews."""
    lines = source.text().split("\n")
    filled = [number for number, line in enumerate(lines, 1) if line.strip()]
    names = list(source.columns.values())

    def check_lines() -> None:
        for number in filled:
            try:
                found = json.loads(lines[number - 1])
            except ValueError as problem:
                source.fail(f"not JSON: {problem}.", f"line {number}")
            if not isinstance(found, dict):
                source.fail("expected a JSON object.", f"line {number}")

    try:
        schema = dict.fromkeys(names, pl.String)
        frame = pl.read_ndjson("\n".join(lines).encode(), schema=schema)
    except pl.exceptions.PolarsError as error:
        check_lines()
        source.fail(str(error).splitlines()[0])
    if frame.height != len(filled):  # two objects in one line
        check_lines()
    # A key that is nowhere is a column that the file does not have.
    present = [name for name in names if frame[name].null_count() < frame.height]
    first = list(json.loads(lines[filled[0] - 1])) if filled else present
    frame = _by_role(source, frame.select(present), present, first)
    return Table(frame, lambda row: f"line {filled[row]}")


def read_parquet(source: Source) -> Table:
    try:
        frame = pl.read_parquet(io.BytesIO(source.raw))
    except pl.exceptions.PolarsError as error:
        source.fail(f"not a sound Parquet file ({str(error).splitlines()[0]}).")
    return Table(_by_role(source, frame, frame.columns), lambda row: f"row {row + 1}")


def read_id_lines(source: Source) -> Table:
    """One user in each line, then the items, oldest first."""
    lines = pl.DataFrame({"ids": source.text().split("\n")}).with_row_index("line", 1)
    lines = lines.with_columns(pl.col("ids").str.extract_all(r"\S+"))
    lines = lines.with_columns(user=pl.col("ids").list.first())
    for bad, problem in (
        (pl.col("ids").list.len() < 2, "expected a user and at least one item."),
        (~pl.col("user").is_first_distinct(), "this user has a line already."),
    ):
        if len(found := lines.filter(bad)):
            source.fail(problem, f"line {found['line'][0]}")
    items = pl.col("ids").list.tail(pl.col("ids").list.len() - 1).alias("item")
    frame = lines.select("line", "user", items).explode("item")
    return Table(frame.drop("line"), lambda row: f"line {frame['line'][row]}")


def _role_of(name: str) -> str:
    """The role that a column's name speaks of: `user_id` and `userId` of the user."""
    name = "".join(filter(str.isalnum, name.lower())).removesuffix("id")
    if _TIMES.fullmatch(name):
        return "timestamp"
    return {"movie": "item", "product": "item"}.get(name, name)


def _by_role(
    source: Source, frame: pl.DataFrame, header: list[str], named: list[str] | None = None
) -> pl.DataFrame:
    """Picks the columns of `frame`, named in the file as `header` says, by role.

    `named` are all names in the file, for messages, where `header` is a part of them.
    """
    series, taken = {}, {source.columns[role] for role in source.chosen}
    for role, name in source.columns.items():
        how = f"name it with `columns={{{role!r}: ...}}` (--columns {role} ...)"
        if role == "item" and "attributes" in source.columns:  # `columns` names both files' one
            how = f"it must be called 'item', or as in the interactions (--columns {role} ...)"
        if source.format.any_names and role not in source.chosen and name not in header:
            free = [other for other in dict.fromkeys(header) if other not in taken]
            likely = [other for other in free if _role_of(other) == role]
            if len(likely) > 1:
                problem = f"no column {name!r} for the {role}, but several that could be it"
                source.fail(f"{problem}: {', '.join(likely)}; {how}.", "line 1")
            name = likely[0] if likely else name
        if header.count(name) > 1:
            source.fail(f"column {name!r} occurs {header.count(name)} times.", "line 1")
        if name in header:
            series[role] = frame.to_series(header.index(name)).alias(role)
        elif role in source.format.required | source.chosen:
            # In another encoding a whole file may be one name.
            there = (
                other if len(other) <= 40 else other[:40] + "..." for other in named or header
            )
            problem = f"no column {name!r} for the {role}, only {', '.join(there)}"
            source.fail(f"{problem}; {_hint(source.format, header) or how}.", "line 1")
    frame = pl.DataFrame(series)
    return frame if frame.height else source.fail("no rows after the header.")


def _hint(format: Format, header: list[str]) -> str:
    """What a header without the names looked for may be instead; empty where it is one."""
    others = [mark for mark in ",;\t|" if mark in "".join(header) and mark != format.separator]
    if len(header) == 1 and others:
        return f"{format.separator!r} must separate the fields, not {others[0]!r}"
    if any(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in header):
        return "the first line must name the columns, but looks like one of values"
    return ""
