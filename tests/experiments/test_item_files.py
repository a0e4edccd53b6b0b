"""Attributes of items: every format of their files, bad ones, and what becomes of them."""

import gzip
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from experiments.dataset import Attributes, k_core
from experiments.item_files import items_file, read_attributes
from experiments.loaders import load
from tests.data_path import data_folder

FLAGS = ["0"] * 19
ACTION, COMEDY = FLAGS.copy(), FLAGS.copy()
ACTION[1] = COMEDY[5] = "1"
BOTH = [max(pair) for pair in zip(ACTION, COMEDY, strict=True)]
# Item 3 has nothing, 4 is not listed, and nobody chose 9.
FILES = {
    "items.csv": "item,title,genres\n2,x,Comedy|Action\n1,y,Action\n3,z,\n9,w,Other\n",
    "movies.dat": "2::É::Comedy|Action\n1::y::Action\n3::z::\n9::w::Other\n",
    "u.item": "".join(
        f"{item}|É|01-Jan-1995||http://x|{'|'.join(flags)}\n"
        for item, flags in ((2, BOTH), (1, ACTION), (3, FLAGS), (9, FLAGS))
    ),
    "ml.item": "item_id:token\ttitle:token_seq\tgenre:token_seq\n"
    "2\tx\tComedy Action\n1\ty\tAction\n3\tz\t\n9\tw\tOther\n",
}
PARTNERS = {
    "items.csv": "interactions.csv",
    "movies.dat": "ratings.dat",
    "u.item": "u.data",
    "ml.item": "ml.inter",
}


def of_each(attributes):
    """The names of the attributes of each item, as lists."""
    names = np.array(attributes.names)
    return [names[a].tolist() for a in np.split(attributes.values, attributes.row_splits[1:-1])]


def write(folder, name, text=None, compress=False):
    path = folder / (name + (".gz" if compress else ""))
    raw = (FILES[name] if text is None else text).encode("latin-1")
    path.write_bytes(gzip.compress(raw) if compress else raw)
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_format(tmp_path, name, compress):
    path = write(tmp_path, name, compress=compress)
    assert items_file(tmp_path / PARTNERS[name]) == path
    assert items_file(tmp_path / "log.csv") is None
    for ids in (np.array([1, 2, 3, 4]), np.array(["1", "2", "3", "4"])):
        found = read_attributes(path, ids)
        assert found is not None and found.names == ("Action", "Comedy")
        assert of_each(found) == [["Action"], ["Action", "Comedy"], [], []]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("items.csv", "item,genres\n1,a\n2,b\n1,c\n", ", line 4: this item has a line already"),
        ("items.csv", "item,genres\n1,a\n,b\n", ", line 3: item: expected a value"),
        ("items.csv", "item,genres\n1,a\n2\n", ", line 3: expected 2 fields, found 1"),
        ("items.csv", "id,genres\n1,a\n", "no column 'item' for the item"),
        ("items.csv", "item,genres\n7,a\n8,b\n", "lists none of the items"),
        ("movies.dat", "1::x::a\n2::y\n", ", line 2: expected 3 fields, found 2"),
        ("u.item", FILES["u.item"].replace("|0|", "|2|", 1), ", line 1: unknown: expected 0"),
        ("ml.item", "", "the file is empty"),
    ],
)
def test_bad_files(tmp_path, name, text, problem):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=problem) as error:
        read_attributes(path, np.arange(1, 4))
    assert str(error.value).startswith(str(path))


TABLE = {"item_id": [2, 1, 3, 9], "genres": ["Comedy|Action", "Action", "", "Other"]}
LISTS = TABLE | {"genres": [["Comedy", "Action"], ["Action"], None, ["Other"]]}


@pytest.mark.parametrize("table", [TABLE, LISTS, LISTS | {"item_id": ["2", "1", "3", "9"]}])
def test_parquet_and_tsv(tmp_path, table):
    frame = pl.DataFrame(table)
    paths = [tmp_path / "items.parquet", tmp_path / "items.tsv"]
    frame.write_parquet(paths[0])
    rows = [tuple(TABLE), *zip(*TABLE.values(), strict=True)]
    paths[1].write_text("".join(f"{item}\t{genres}\n" for item, genres in rows))
    for path in paths:
        found = read_attributes(path, np.array([1, 2, 3, 4]))
        assert found is not None and found.names == ("Action", "Comedy")
        assert of_each(found) == [["Action"], ["Action", "Comedy"], [], []]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"item": [[1]], "genres": ["a"]}, r"item: expected plain values, found List\(Int64\)"),
        ({"item": [1], "genres": [{"a": 1}]}, "names or lists of them, found Struct"),
        ({"item": [1, 1], "genres": ["a", "b"]}, "row 2: this item has a line already"),
    ],
)
def test_bad_parquet(tmp_path, table, problem):
    path = tmp_path / "items.parquet"
    pl.DataFrame(table).write_parquet(path)
    with pytest.raises(ValueError, match=problem):
        read_attributes(path, np.array([1]))


def test_columns(tmp_path):
    path = write(tmp_path, "items.csv", "asin,brand\n1,a|b\n")
    columns = {"item": "asin", "attributes": "brand"}
    found = read_attributes(path, np.array([1]), columns=columns)
    assert found is not None and of_each(found) == [["a", "b"]]
    assert read_attributes(path, np.array([1]), columns={"item": "asin"}) is None
    with pytest.raises(ValueError, match="no column 'color' for the attributes"):
        read_attributes(path, np.array([1]), columns={"item": "asin", "attributes": "color"})
    with pytest.raises(ValueError, match=r"movies\.dat has no header"):
        read_attributes(
            write(tmp_path, "movies.dat"), np.array([1]), columns={"attributes": "x"}
        )
    with pytest.raises(ValueError, match="`items` must be a file such as movies.dat"):
        read_attributes(tmp_path / "items.xls", np.array([1]))


def test_a_dataset_carries_them(tmp_path):
    log = tmp_path / "interactions.csv"
    rows = [(user, item) for user in (0, 1) for item in (1, 2, 3)] + [(1, 4)]
    lines = [f"{user},{item},{place}" for place, (user, item) in enumerate(rows)]
    log.write_text("\n".join(["user,item,position", *lines]))
    with pytest.raises(ValueError, match="there is no items' file; pass `items`"):
        load(log, columns={"attributes": "genres"})
    bare = load(log)
    assert bare.attributes is None
    with pytest.raises(ValueError, match="the items of 'interactions' have no attributes"):
        bare.known_attributes()
    nothing = Attributes((), np.zeros(0, np.int32), np.zeros(bare.num_items + 1, np.int64))
    with pytest.raises(ValueError, match="have no attributes, .* or all are empty"):
        replace(bare, attributes=nothing).known_attributes()
    write(tmp_path, "items.csv")
    expected = [["Action"], ["Action", "Comedy"], [], []]
    assert of_each(load(tmp_path).known_attributes()) == expected
    core = k_core(load(log), 2)
    assert core.item_ids.tolist() == [1, 2, 3]
    assert of_each(core.known_attributes()) == expected[:3]
    other = tmp_path / "other.csv"
    other.write_text("item,kind\n3,Drama\n")
    found = load(log, items=other, columns={"attributes": "kind"}).known_attributes()
    assert of_each(found) == [[], [], ["Drama"], []]


@pytest.mark.parametrize(
    ("interactions", "items", "item"),
    [
        ("user_id,item_id,rating,timestamp", "item_id,genres", None),
        ("userId,movieId,rating,timestamp", "movieId,genres", None),
        ("user,article,rating,timestamp", "item,genres", "article"),
        ("user,article,rating,timestamp", "movie_id,genres", "article"),
        ("user,article,rating,timestamp", "article,genres", "article"),
    ],
)
def test_names_of_the_item_in_both_files(tmp_path, interactions, items, item):
    log = tmp_path / "interactions.csv"
    log.write_text(f"{interactions}\n1,3,5,0\n1,4,5,1\n")
    write(tmp_path, "items.csv", f"{items}\n4,Drama\n3,Comedy|Drama\n")
    found = load(log, columns={"item": item} if item else None).known_attributes()
    assert of_each(found) == [["Comedy", "Drama"], ["Drama"]]


def test_a_name_of_the_item_that_no_file_has(tmp_path):
    path = write(tmp_path, "items.csv", "sku,genres\n1,a\n")
    problem = "no column 'asin' for the item, only sku, genres; it must be called 'item', or as"
    with pytest.raises(ValueError, match=problem):
        read_attributes(path, np.array([1]), columns={"item": "asin"})
    write(tmp_path, "interactions.csv", "user,item\n1,1\n")
    with pytest.raises(FileNotFoundError, match=r"nope\.csv: no such file of items"):
        load(tmp_path, items=tmp_path / "nope.csv")


@pytest.mark.parametrize(
    ("names", "values", "row_splits", "problem"),
    [
        (("a", "a"), [0], [0, 1], "must be distinct"),
        (("a",), [0], [0, 2], "must run from 0 to the 1 values"),
        (("a",), [1], [0, 1], "must be places in the 1 `names`, got 1 to 1"),
        (("a", "b"), [1, 0], [0, 2], "must ascend"),
        (("a",), [0, 0], [0, 2], "must ascend"),
        (("a", "b"), [0, 1], [0, 2, 1, 2], "must ascend"),
    ],
)
def test_bad_attributes(names, values, row_splits, problem):
    with pytest.raises(ValueError, match=problem):
        Attributes(names, np.array(values), np.array(row_splits))


def test_attributes_of_some_items():
    attributes = Attributes(("a", "b"), np.array([0, 1, 0]), np.array([0, 2, 2, 3]))
    assert of_each(attributes.of_items(np.array([2, 0]))) == [["a"], ["a", "b"]]


def test_movielens():
    """The prepared folders and the files of the publisher say the same."""
    small = data_folder("movielens_100k")
    prepared, raw = (
        load(path).known_attributes() for path in (small, small / "raw" / "u.data")
    )
    assert of_each(prepared) == of_each(raw) and len(raw.names) == 19
    large = data_folder("movielens_1m")
    dataset = load(large)
    found = of_each(dataset.known_attributes())
    assert found[0] == ["Animation", "Children's", "Comedy"]
    counts = np.bincount(dataset.known_attributes().values)
    assert dict(zip(dataset.known_attributes().names, counts, strict=True))["Drama"] == 1338
    movies = read_attributes(large / "raw" / "movies.dat", np.array([1, 2]))
    assert movies is not None and of_each(movies) == found[:2]
