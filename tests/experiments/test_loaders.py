"""Every format: a good file, and bad ones that must name their file and line."""

import datetime
import decimal
import gzip
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest

from experiments.loaders import FORMATS, instants, load
from tests.data_path import data_folder


class Case(NamedTuple):
    """How one format writes rows of (user, item, rating, timestamp)."""

    file: str
    format: str
    row: str  # with {user}, {item}, {rating}, {time}
    head: str = ""
    user: str = "{}"  # how an id is spelt
    item: str = "{}"

    def text(self, rows=((2, 5, 4, 30), (1, 6, 5, 20), (2, 6, 1, 10), (1, 5, 3, 25))) -> str:
        lines = [self.head] if self.head else []
        for user, item, rating, time in rows:
            fields = dict(rating=rating, time=time)
            fields |= dict(user=self.user.format(user), item=self.item.format(item))
            lines.append(self.row.format(**fields))
        return "".join(line + "\n" for line in lines)

    @property
    def first_line(self) -> int:
        return 2 if self.head else 1


_PLAIN_HEAD = "user,item,rating,timestamp"
_COMMAS = "{user},{item},{rating},{time}"
_JSON = '{{"reviewerID": "{user}", "helpful": [0, 1], "asin": "{item}", '
_JSON += '"overall": {rating}.0, "unixReviewTime": {time}}}'
_RECBOLE = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
_TABS = "{user}\t{item}\t{rating}\t{time}"
CASES = {
    "interactions": Case(
        "interactions.csv", "interactions", "{user},{item},{time},{rating}",
        "user,item,position,rating",
    ),
    "csv": Case("log.csv", "csv", _COMMAS, _PLAIN_HEAD, "u{}", "i{}"),
    "tsv": Case("log.tsv", "tsv", _TABS, _PLAIN_HEAD.replace(",", "\t")),
    "movielens": Case("ratings.dat", "movielens", "{user}::{item}::{rating}::{time}"),
    "movielens-tab": Case("u.data", "movielens-tab", _TABS),
    "amazon-ratings": Case("ratings_Beauty.csv", "amazon-ratings", _COMMAS, "", "A{}", "B0{}"),
    "amazon-ratings-2018": Case(
        "Beauty.csv", "amazon-ratings-2018", "{item},{user},{rating},{time}", "", "A{}", "B0{}"
    ),
    "amazon-reviews": Case("reviews_5.json", "amazon-reviews", _JSON, "", "A{}", "B0{}"),
    "recbole": Case("ml.inter", "recbole", _TABS, _RECBOLE),
}  # fmt: skip
every_format = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
delimited = pytest.mark.parametrize(
    "case",
    [case for key, case in CASES.items() if "reviews" not in key],
    ids=lambda c: c.format,
)


def write(folder: Path, case: Case, content: str | bytes | None = None, end: str = "") -> Path:
    path = folder / (case.file + end)
    content = case.text() if content is None else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, case: Case, **options):
    by_name = "2018" in case.format
    return load(path, **{"format": case.format if by_name else None, **options})


def fails(path: Path, case: Case, line: int | None, problem: str, **options) -> None:
    """Loading raises, and names the file, the line and the problem."""
    place = f"{path}: " if line is None else f"{path}, line {line}: "
    with pytest.raises(ValueError) as error:
        read(path, case, **options)
    assert str(error.value).startswith(place)
    assert problem in str(error.value)


def test_every_format_has_a_case():
    assert set(CASES) | {"parquet", "id-lines"} == set(FORMATS)


@every_format
@pytest.mark.parametrize(
    "variant", ["plain", "gzip", "crlf", "no last newline", "byte order mark"]
)
def test_good_file(tmp_path, case, variant):
    text, end = case.text(), ""
    if variant == "gzip":
        text, end = gzip.compress(text[:20].encode()) + gzip.compress(text[20:].encode()), ".gz"
    elif variant == "crlf":
        text = text.replace("\n", "\r\n")
    elif variant == "no last newline":
        text = text.rstrip("\n")
    elif variant == "byte order mark":
        text = "\ufeff" + text
    dataset = read(write(tmp_path, case, text, end), case)
    assert dataset.values.tolist() == [1, 0, 1, 0]  # by time in each user
    assert dataset.row_splits.tolist() == [0, 2, 4]
    assert [str(user) for user in dataset.user_ids] == [case.user.format(u) for u in (1, 2)]
    assert [str(item) for item in dataset.item_ids] == [case.item.format(i) for i in (5, 6)]
    if case.format != "interactions":
        assert dataset.timestamps is not None
        assert dataset.timestamps.tolist() == [20, 25, 10, 30]
    assert dataset.name == case.file.split(".")[0] and not dataset.drops


@every_format
def test_options(tmp_path, case):
    rows = [(1, 5, 1, 1), (1, 5, 4, 2), (1, 6, 4, 3), (2, 5, 4, 4), (2, 6, 4, 5), (3, 6, 4, 6)]
    path = write(tmp_path, case, case.text(rows))
    dataset = read(path, case, min_rating=3.5, k_core=2, name="mine")
    assert dataset.values.tolist() == [0, 1, 0, 1]
    assert dataset.drops == {"min_rating": 1, "k_core": 1} and dataset.name == "mine"
    assert read(path, case, repeats="last", k_core=2).drops == {"repeats": 1, "k_core": 1}
    fails(path, case, None, "`min_rating` leaves no interaction", min_rating=6)


@every_format
def test_duplicate_rows_are_dropped_and_counted(tmp_path, case):
    rows = [(1, 5, 1, 1), (1, 6, 1, 2), (1, 5, 1, 1), (1, 5, 1, 1), (1, 5, 1, 3)]
    dataset = read(write(tmp_path, case, case.text(rows)), case)
    assert dataset.values.tolist() == [0, 1, 0]  # the item's second time is no duplicate
    assert dataset.drops == {"duplicate_rows": 2}


@every_format
def test_empty(tmp_path, case):
    fails(write(tmp_path, case, ""), case, None, "the file is empty")
    fails(write(tmp_path, case, "\n\n"), case, None, "the file is empty")
    fails(write(tmp_path, case, gzip.compress(b""), ".gz"), case, None, "the file is empty")
    fails(write(tmp_path, case, b"", ".gz"), case, None, "the file is empty")
    if case.head:
        fails(write(tmp_path, case, case.head + "\n"), case, None, "no rows after the header")


@every_format
def test_truncated(tmp_path, case):
    text = case.text()
    cut = write(tmp_path, case, text[: text.rstrip("\n").rindex("\n") + 3])  # in the last line
    problem = "not JSON" if "reviews" in case.format else "expected 4 fields"
    fails(cut, case, case.first_line + 3, problem)
    for place in (-9, 20, 5):
        path = write(tmp_path, case, gzip.compress(text.encode())[:place], ".gz")
        with pytest.raises(ValueError, match=r"\.gz, line \d+: the gzip file is truncated"):
            read(path, case)
    packed = bytearray(gzip.compress(text.encode()))
    packed[-6] ^= 255  # the checksum
    fails(write(tmp_path, case, bytes(packed), ".gz"), case, None, "not a sound gzip file")
    fails(write(tmp_path, case, text, ".gz"), case, None, "not a sound gzip file")


@every_format
def test_another_encoding(tmp_path, case):
    lines = case.text().splitlines()
    lines[-2] += "é"
    latin = write(tmp_path, case, "\n".join(lines).encode("latin-1"))
    fails(latin, case, case.first_line + 2, "byte 0xe9 is not utf-8; pass `encoding`")
    fails(write(tmp_path, case, case.text().encode("utf-16")), case, 1, "is not utf-8")
    fails(write(tmp_path, case, case.text().encode("utf-16-le")), case, 1, "UTF-16")
    path = write(tmp_path, case, case.text().encode("utf-16"))
    assert read(path, case, encoding="utf-16").num_interactions == 4
    with pytest.raises(ValueError, match="`encoding` 'utf-99' is unknown"):
        read(path, case, encoding="utf-99")


@every_format
@pytest.mark.parametrize("value", ["soon", "nan", "inf", "1e999"])
def test_non_numeric_time(tmp_path, case, value):
    text = case.text([(1, 5, 1, 1), (1, 6, 1, 987654), (1, 7, 1, 3)])
    value = f'"{value}"' if "reviews" in case.format else value
    path = write(tmp_path, case, text.replace("987654", value))
    fails(path, case, case.first_line + 1, "expected a number")


@every_format
def test_non_numeric_rating(tmp_path, case):
    text = case.text([(1, 5, 1, 1), (1, 6, 987654, 2)])
    value = '"good' if "reviews" in case.format else "good"
    text = text.replace("987654.0", value + '"').replace("987654", value)
    fails(write(tmp_path, case, text), case, case.first_line + 1, "rating: expected a number")


@every_format
@pytest.mark.parametrize("value", ["x7", "1.5", "007", "", "9" * 30])
def test_ids_that_are_no_integers(tmp_path, case, value):
    text = case.text([(1, 5, 1, 1), (1, 987654, 1, 2)])
    path = write(tmp_path, case, text.replace(case.item.format(987654), value))
    if value == "":
        fails(path, case, case.first_line + 1, "item: expected a value")
    elif FORMATS[case.format].integer_ids:
        fails(path, case, case.first_line + 1, f"item: expected an integer id, found '{value}'")
    else:  # then all ids are strings
        assert set(read(path, case).item_ids) == {case.item.format(5), value}


@delimited
def test_wrong_number_of_fields(tmp_path, case):
    separator = FORMATS[case.format].separator
    for line in range(case.first_line, case.first_line + 4):
        lines = case.text().splitlines()
        for bad, found in (
            (lines[line - 1].rpartition(separator)[0], 3),
            (lines[line - 1] + separator + "1", 5),
            ("", 0),
        ):
            text = "\n".join([*lines[: line - 1], bad, *lines[line:]])
            if text.endswith("\n"):
                continue  # an empty line at the end is no row
            if found == 0 and line == 1:
                text = "\n" + text.lstrip("\n")
            fails(write(tmp_path, case, text), case, line, f"4 fields, found {found}")


@pytest.mark.parametrize("key", ["interactions", "csv", "tsv", "recbole", "amazon-reviews"])
def test_missing_and_renamed_columns(tmp_path, key):
    case = CASES[key]
    name = FORMATS[case.format].columns["item"]
    path = write(tmp_path, case, case.text().replace(name, "thing"))
    fails(path, case, 1, f"no column '{name}' for the item")
    assert read(path, case, columns={"item": "thing"}).num_items == 2
    path = write(tmp_path, case)
    fails(path, case, 1, "no column 'stars' for the rating", columns={"rating": "stars"})
    with pytest.raises(ValueError, match="`columns` must name some of user, item"):
        read(path, case, columns={"product": "item"})


@pytest.mark.parametrize(
    "header",
    [
        "user_id,item_id,rating,timestamp",
        "userId,movieId,rating,timestamp",
        "User,Product_ID,RATING,time",
    ],
)
@pytest.mark.parametrize("separator", ",\t")
def test_usual_names_of_columns(tmp_path, header, separator):
    text = CASES["csv"].text().replace(_PLAIN_HEAD, header).replace(",", separator)
    path = tmp_path / ("log.csv" if separator == "," else "log.tsv")
    path.write_text(text)
    dataset = load(path, min_rating=2)
    assert dataset.num_interactions == 3
    assert dataset.timestamps is not None and dataset.timestamps.tolist() == [20, 25, 30]


def test_two_columns_that_could_be_the_item(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user,movieId,item_id\n1,2,3\n1,3,4\n")
    with pytest.raises(ValueError, match=r"no column 'item' .*\(--columns item \.\.\.\)"):
        load(path)
    assert load(path, columns={"item": "movieId"}).item_ids.tolist() == [2, 3]


@pytest.mark.parametrize(
    "times",
    [
        ("1970-01-01T00:00:20Z", "1970-01-01T01:00:10+01:00"),
        ("1970-01-01 00:00:20", "1970-01-01 00:00:10.0"),
        ("1970-01-02", "1970-01-01"),
    ],
)
def test_dates(tmp_path, times):
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,timestamp\n1,5,{times[0]}\n1,6,{times[1]}\n")
    dataset = load(path)
    assert dataset.item_ids[dataset.values].tolist() == [6, 5]
    assert dataset.timestamps is not None
    assert dataset.timestamps.tolist() in ([10, 20], [0, 86_400])
    path.write_text(f"user,item,timestamp\n1,5,{times[0]}\n1,6,soon\n")
    with pytest.raises(ValueError, match="line 3: timestamp: .* a date .*, found 'soon'"):
        load(path)
    # What splits by time reads dates in the same way.
    assert sorted(instants(times)) == dataset.timestamps.tolist()


def test_instants():
    assert instants(("600", "800.5")) == instants((600, 800.5)) == [600, 800.5]
    for bad in (("1970-01-01", "800"), ("soon", "later"), ("nan", "1"), ("", "1")):
        with pytest.raises(ValueError, match="must be numbers, or dates such as 2014-03-31"):
            instants(bad)


def test_optional_columns(tmp_path):
    path = write(tmp_path, CASES["csv"], "item,user,city\nb,1,x\na,1,\nb,1,x\n")
    dataset = load(path)
    assert dataset.values.tolist() == [1, 0, 1]  # without a time the same row may come twice
    assert dataset.timestamps is None
    fails(path, CASES["csv"], None, "`min_rating` needs a rating column", min_rating=3)
    with pytest.raises(TypeError, match="`min_rating` must be a number, got '3'"):
        load(path, min_rating="3")  # type: ignore


def test_column_named_twice(tmp_path):
    path = write(tmp_path, CASES["csv"], "user,item,item\n1,2,3\n")
    fails(path, CASES["csv"], 1, "column 'item' occurs 2 times")


def test_lines_are_counted_through_quoted_newlines(tmp_path):
    text = 'user,item,timestamp,note\n1,2,3,"two\nlines"\n1,3,4,"a ""b"", c"\n1,4,late,\n'
    case = CASES["csv"]
    fails(
        write(tmp_path, case, text),
        case,
        5,
        "timestamp: expected a number or a date (all in one form), found 'late'",
    )
    assert load(write(tmp_path, case, text.replace("late", "5"))).num_interactions == 3
    cut = write(tmp_path, case, text[: text.index("lines")])
    fails(cut, case, 2, "unexpected end of data")


def test_quotes_between_tabs(tmp_path):
    """R quotes names and texts; without quoted names, a quote is part of its text.

    But around an id it is from a program that quotes where it must, and doubles those inside.
    """
    case = CASES["tsv"]
    text = '"user"\t"item"\t"timestamp"\n"u1"\t"b"\t2\n"u1"\t"a ""x"""\t1\n'
    assert load(write(tmp_path, case, text)).item_ids.tolist() == ['a "x"', "b"]
    head = 'user\titem\ttitle\nu1\tb"x\t"Cats" (1998)\n'
    plain = write(tmp_path, case, head + 'u1\ta\t5"\n')
    assert load(plain).item_ids.tolist() == ["a", 'b"x']
    bad = write(tmp_path, case, head + 'u1\t"a ""x"""\t5"\n')
    fails(bad, case, 3, "item: expected an id without blanks or quotes around it")


@pytest.mark.parametrize("line", ["u1, b,2", "u1 ,b,2", "u1,b\t,2"])
def test_blanks_around_ids(tmp_path, line):
    """They would make other ids of the same ones."""
    case = CASES["csv"]
    path = write(tmp_path, case, f"user,item,timestamp\nu1,a,1\n{line}\n")
    fails(path, case, 3, "expected an id without blanks or quotes around it")


def test_long_names_are_cut(tmp_path):
    """Read in another encoding, a whole file may be one name."""
    case = CASES["csv"]
    path = write(tmp_path, case, _PLAIN_HEAD + ",more" * 50 + "\n" + "1,2,3,4" + ",5" * 50)
    with pytest.raises(ValueError, match="no column 'user' for the user") as error:
        load(path, encoding="utf-16")
    assert len(str(error.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("user;item\n1;2\n", "',' must separate the fields, not ';'"),
        ("user\titem\n1\t2\n", r"',' must separate the fields, not '\\t'"),
        ("196,242,3,881250949\n", "the first line must name the columns"),
        ("u1,i1,5.0\n", "the first line must name the columns"),
        ("who,item\n1,2\n", "name it with `columns=.'user': ...}`"),
    ],
)
def test_what_a_header_without_the_names_may_be(tmp_path, text, hint):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=hint):
        load(path)


@pytest.mark.parametrize("head", [_PLAIN_HEAD, '"userId","movieId","rating","timestamp"\r'])
def test_ratings_with_a_header(tmp_path, head):
    """As Kaggle's ratings_small.csv."""
    case = CASES["amazon-ratings"]
    path = write(tmp_path, case, head + "\n" + case.text())
    dataset = load(path)
    assert dataset.num_interactions == 4 and dataset.order == "timestamp"
    path = write(tmp_path, case, f"who,what,rating,timestamp\n{case.text()}")
    fails(path, case, 1, "no column 'user' for the user, only who, what")
    assert load(path, columns={"user": "who", "item": "what"}).num_interactions == 4
    problem = "rating: expected a number, found 'rating'"
    fails(path, case, 1, problem, format="amazon-ratings")
    fails(write(tmp_path, case, "A1,B1,good,5\n"), case, 1, "rating: expected a number")


def test_interactions_with_other_columns(tmp_path):
    """A table of the name that the README gives to any table."""
    case = CASES["interactions"]
    path = write(tmp_path, case, "user_id,item_id,timestamp\nu1,a,2\nu1,b,1\n")
    dataset = load(path)
    assert dataset.item_ids[dataset.values].tolist() == ["b", "a"]
    write(tmp_path, case)
    assert load(tmp_path).item_ids[load(tmp_path).values].tolist() == [6, 5, 6, 5]
    write(tmp_path, case, "user_id,item_id\nu1,b\nu1,a\n")
    assert load(tmp_path).item_ids.tolist() == ["a", "b"]
    fails(path, case, 1, "no column 'user'", format="interactions")
    # The strict form is told by its columns, whatever the caller says that they are called.
    write(tmp_path, case, "user,asin,position\n1,x7,0\n")
    fails(path, case, 2, "item: expected an integer id", columns={"item": "asin"})


@pytest.mark.parametrize(
    "name",
    ["date", "Datetime", "unix_timestamp", "unixReviewTime", "review time", "created_at", "ts"],
)
@pytest.mark.parametrize("head", ["user_id,item_id", "user_id:token,item_id:token"])
def test_usual_names_of_the_time(tmp_path, name, head):
    recbole = ":" in head
    path = tmp_path / ("log.inter" if recbole else "log.csv")
    text = f"{head},{name}\n1,5,20\n1,6,10\n"
    path.write_text(text.replace(",", "\t") if recbole else text)
    dataset = load(path)
    assert dataset.timestamps is not None and dataset.timestamps.tolist() == [10, 20]
    assert dataset.order == "timestamp"


@pytest.mark.parametrize("name", ["watch_time", "release_date", "updates", "runtime"])
def test_what_is_no_time_of_the_interaction(tmp_path, name):
    path = tmp_path / "log.csv"
    path.write_text(f"user,item,{name}\n1,6,20\n1,5,10\n")
    dataset = load(path)
    assert dataset.timestamps is None and dataset.order == "file"


def test_two_columns_that_could_be_the_time(tmp_path):
    case = CASES["csv"]
    path = write(tmp_path, case, "user,item,time,time_stamp\n1,5,2,1\n1,6,1,2\n")
    problem = "no column 'timestamp' for the timestamp, but several that could be it: time, "
    fails(path, case, 1, problem + "time_stamp; name it with")
    fails(path, case, 1, "(--columns timestamp ...)")
    for name, order in (("time", [1, 0]), ("time_stamp", [0, 1])):
        assert load(path, columns={"timestamp": name}).values.tolist() == order
    # What has another role by the caller's word is free for no other.
    dataset = load(path, columns={"position": "time", "rating": "time_stamp"})
    assert dataset.order == "position" and dataset.timestamps is None
    # A column of the format's own name leaves no doubt.
    write(tmp_path, case, "user,item,date,timestamp\n1,5,1,2\n1,6,2,1\n")
    assert load(path).values.tolist() == [1, 0]


def test_the_order_is_told(tmp_path):
    """And kept by the filters."""
    for columns, order in ((3, "file"), (4, "timestamp"), (5, "position")):
        lines = ("user,item,rating,timestamp,position", "1,5,1,1,1", "1,5,1,2,2", "1,6,1,3,3")
        text = "\n".join(",".join(line.split(",")[:columns]) for line in lines)
        path = write(tmp_path, CASES["csv"], text)
        assert load(path).order == load(path, repeats="last", k_core=1).order == order


def test_positions(tmp_path):
    case, head = CASES["interactions"], "user,item,position,timestamp\n"
    twice = write(tmp_path, case, head + "0,1,0,5\n0,2,1,6\n0,3,1,7\n")
    fails(twice, case, 4, "this user has the same position already")
    backwards = write(tmp_path, case, head + "0,1,0,5\n0,2,1,3\n")
    fails(
        backwards,
        case,
        None,
        "`timestamps` of user 0 (id 0) decrease by position; leave out one",
    )


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("1 2 3\n2\n", 2, "a user and at least one item"),
        ("1 2 3\n\n2 3\n", 2, "a user and at least one item"),
        ("1 2 3\n2 3\n1 4\n", 3, "this user has a line already"),
        ("1 2 3\n2 3 x\n", 2, "item: expected an integer id, found 'x'"),
        ("1 2 3\nu2 3 4\n", 2, "user: expected an integer id, found 'u2'"),
        ("1 2\n2 3 é\n".encode("latin-1"), 2, "byte 0xe9 is not utf-8"),
        ("", None, "the file is empty"),
    ],
)
def test_bad_id_lines(tmp_path, text, line, problem):
    case = Case("log.txt", "id-lines", "")
    fails(write(tmp_path, case, text), case, line, problem)


def test_good_id_lines(tmp_path):
    case = Case("log.txt", "id-lines", "")
    for text in ("7 3 1 3\n5 1\n", "7\t3  1 3\r\n5 1"):
        dataset = load(write(tmp_path, case, text))
        assert dataset.values.tolist() == [0, 1, 0, 1]
        assert dataset.row_splits.tolist() == [0, 1, 4]
        assert dataset.user_ids.tolist() == [5, 7] and dataset.item_ids.tolist() == [1, 3]
    with pytest.raises(ValueError, match="in a format with a header"):
        load(write(tmp_path, case, text), columns={"user": "id"})
    path = write(tmp_path, case, gzip.compress(b"1 2 3\n2 3 4\n")[:-10], ".gz")
    with pytest.raises(ValueError, match="truncated"):
        load(path)


def test_keys_of_json_lines_that_are_there_are_named(tmp_path):
    path = tmp_path / "reviews.json"
    path.write_text('{"user_id": "a", "parent_asin": "b"}\n')
    with pytest.raises(
        ValueError, match="'reviewerID' for the user, only user_id, parent_asin"
    ):
        load(path, format="amazon-reviews")


def parquet(folder: Path, **columns) -> Path:
    path = folder / "log.parquet"
    pl.DataFrame(columns).write_parquet(path)
    return path


def test_parquet(tmp_path):
    days = [datetime.date(2020, 1, 2), datetime.date(2020, 1, 1)]
    path = parquet(tmp_path, who=[3, 3], item=["b", "a"], timestamp=days)
    dataset = load(path, columns={"user": "who"})
    assert dataset.values.tolist() == [0, 1]
    assert dataset.timestamps is not None
    assert np.diff(dataset.timestamps) == 24 * 3600
    with pytest.raises(ValueError, match="no column 'user' for the user, only who, item"):
        load(path)


def test_parquet_of_decimals(tmp_path):
    """As databases export ratings."""
    ratings = [decimal.Decimal(text) for text in ("3.5", "4.5", "5.0")]
    path = parquet(tmp_path, user=[1, 1, 1], item=[1, 2, 3], rating=ratings, timestamp=[1] * 3)
    assert load(path, min_rating=4).item_ids.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (
            dict(user=[1.5, 2.0], item=[1, 2]),
            "user: ids are integers or text, not Float64; cast them",
        ),
        (dict(user=[1, None], item=[1, 2]), "row 2: user: expected a value, found nothing"),
        (dict(user=[1, 2], item=[[1], [2]]), "item: expected plain values, found List"),
        (dict(user=[1], item=[1], timestamp=["x"]), "row 1: timestamp: expected a number"),
        (dict(user=[1], item=[1], timestamp=[np.nan]), "row 1: timestamp: expected a number"),
        (dict(user=[], item=[]), "no rows"),
        (dict(user=[b"\xff"], item=[1]), "user: a column of Binary cannot be read"),
        (
            dict(user=[1], item=[1], timestamp=[datetime.timedelta(1)]),
            "timestamp: a column of Duration.* cannot be read",
        ),
        (
            dict(user=[1], item=[1], timestamp=[datetime.time(1)]),
            "timestamp: a column of Time cannot be read",
        ),
    ],
)
def test_bad_parquet(tmp_path, columns, problem):
    with pytest.raises(ValueError, match=f"log.parquet.*{problem}"):
        load(parquet(tmp_path, **columns))


def test_damaged_parquet(tmp_path):
    buffer = io.BytesIO()
    pl.DataFrame(dict(user=[1, 2], item=[1, 2])).write_parquet(buffer)
    for content in (buffer.getvalue()[:-5], b"user,item\n1,2\n"):
        (tmp_path / "log.parquet").write_bytes(content)
        with pytest.raises(ValueError, match="log.parquet: not a sound Parquet file"):
            load(tmp_path / "log.parquet")


def test_python_dictionaries_are_no_json(tmp_path):
    case = CASES["amazon-reviews"]
    for text, line in (
        (case.text().replace('"', "'"), 1),
        (case.text() + "[1, 2]\n", 5),
        (case.text() + case.text()[:-1].replace("\n", " "), 5),
    ):
        with pytest.raises(ValueError, match=f"reviews_5.json, line {line}: .*JSON"):
            load(write(tmp_path, case, text))


def test_a_review_without_its_time(tmp_path):
    case = CASES["amazon-reviews"]
    text = "\n" + case.text().replace('"unixReviewTime": 10', '"time": 10')
    fails(write(tmp_path, case, text), case, 4, "timestamp: expected a value, found nothing")


def test_folders_and_names(tmp_path):
    with pytest.raises(ValueError, match="holds none of interactions.csv.gz"):
        load(tmp_path)
    write(tmp_path, CASES["movielens"])
    assert load(tmp_path).name == tmp_path.name
    (tmp_path / "log.xyz").write_text("1 2\n")
    with pytest.raises(ValueError, match="unknown kind of file; pass `format` .* one of"):
        load(tmp_path / "log.xyz")
    assert load(tmp_path / "log.xyz", format="id-lines").num_users == 1
    with pytest.raises(ValueError, match=r"`format` \(--data-format\) must be one of .*'xyz'"):
        load(tmp_path / "log.xyz", format="xyz")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    ("name", "raw"), [("amazon_beauty", "raw/Beauty.txt"), ("movielens_100k", "raw/u.data")]
)
def test_folder_and_raw_file_agree(name, raw):
    folder = data_folder(name)
    prepared, original = load(folder), load(folder / raw)
    np.testing.assert_array_equal(prepared.values, original.values)
    np.testing.assert_array_equal(prepared.row_splits, original.row_splits)
    np.testing.assert_array_equal(prepared.item_ids + 1, original.item_ids)
    np.testing.assert_array_equal(prepared.user_ids + 1, original.user_ids)
    if original.timestamps is not None:
        np.testing.assert_array_equal(prepared.timestamps, original.timestamps)


def test_movielens_1m_before_and_after_the_core(tmp_path):
    """The filter gives the published counts, and the prepared order, from all the rows."""
    folder = data_folder("movielens_1m")
    columns = dict(user="user_id", item="movie_id")
    dataset = load(folder / "full_interactions.csv.gz", format="csv", columns=columns, k_core=5)
    prepared = load(folder)
    assert dataset.drops == {"k_core": 1_000_209 - 999_611}
    np.testing.assert_array_equal(dataset.values, prepared.values)
    np.testing.assert_array_equal(dataset.row_splits, prepared.row_splits)
