"""Every raw format is read as written, and bad input is named by file, line and column."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchrec_pt.config import DataConfig
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.readers import RawData, read_raw

TIMED = {"timestamp": "timestamp", "rating": "rating"}
HEADER = "user_id,item_id,rating,timestamp\n"


def read(path: Path, format: str, **data: Any) -> RawData:
    return read_raw(DataConfig.model_validate({"format": format, "path": path, **data}))


def pairs(raw: RawData) -> list[tuple[Any, Any]]:
    frame = raw.interactions.collect()
    assert frame["row"].to_list() == list(range(frame.height))
    return frame.select("user", "item").rows()


def complaint(path: Path, format: str, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, format, **data)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- ids survive --------------------------------------------------------------------------------

# Surrogates cannot be written as UTF-8. Line breaks are tested below: plain line formats have none.
characters = st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"))
texts = st.text(characters, min_size=1, max_size=8)
integers = st.integers(-(2**63), 2**63 - 1)
huge_integers = st.integers(2**63, 2**90)
ids = st.one_of(
    st.lists(st.tuples(integers, integers), min_size=1, max_size=12),
    st.lists(st.tuples(texts, texts), min_size=1, max_size=12),
    st.lists(st.tuples(huge_integers, integers | huge_integers), min_size=1, max_size=12),
)
examples = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def same_ids(found: list[tuple[Any, Any]], written: list[tuple[Any, Any]]) -> bool:
    """Compared as text: whether a column becomes Int64 depends on all its values."""
    return [(str(u), str(i)) for u, i in found] == [(str(u), str(i)) for u, i in written]


@examples
@given(rows=ids, separator=st.sampled_from([",", "\t"]))
def test_delimited_ids_survive(tmp_path: Path, rows: list[Any], separator: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    writer.writerows([("user_id", "item_id"), *rows])
    path = tmp_path / "log"
    path.write_text(text.getvalue(), encoding="utf-8")
    assert same_ids(pairs(read(path, "csv" if separator == "," else "tsv")), rows)


@examples
@given(rows=ids)
def test_parquet_ids_survive(tmp_path: Path, rows: list[Any]) -> None:
    path = tmp_path / "log.parquet"
    as_text = any(abs(value) >= 2**63 for row in rows for value in row if isinstance(value, int))
    cells = [[str(value) if as_text else value for value in row] for row in rows]
    pl.DataFrame(cells, schema=["user_id", "item_id"], orient="row").write_parquet(path)
    assert same_ids(pairs(read(path, "parquet")), rows)


@examples
@given(rows=ids)
def test_recbole_ids_survive(tmp_path: Path, rows: list[Any]) -> None:
    path = tmp_path / "log.inter"
    lines = ["user_id:token\titem_id:token", *(f"{user}\t{item}" for user, item in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert same_ids(pairs(read(path, "recbole")), rows)


@examples
@given(
    lines=st.dictionaries(
        st.one_of(integers, st.text("aé漢-_9", min_size=1)),
        st.lists(huge_integers | st.text("bü9", min_size=1), min_size=1, max_size=5),
        min_size=1,
        max_size=5,
    )
)
def test_sequence_ids_survive(tmp_path: Path, lines: dict[Any, list[Any]]) -> None:
    lines = {str(user): items for user, items in lines.items()}
    path = tmp_path / "log.txt"
    text = "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in lines.items())
    path.write_text(text, encoding="utf-8")
    raw = read(path, "sequence")
    expected = [(user, item) for user, items in lines.items() for item in items]
    assert same_ids(pairs(raw), expected)
    positions = [float(p) for items in lines.values() for p in range(len(items))]
    assert raw.interactions.collect()["timestamp"].to_list() == positions


def test_ids_are_integers_only_where_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\n007,7\n7,9223372036854775807\n")
    assert pairs(read(path, "csv")) == [("007", 7), ("7", 2**63 - 1)]
    path.write_text("user_id,item_id\n9223372036854775808,1\n")
    assert pairs(read(path, "csv")) == [("9223372036854775808", 1)]


def test_quoted_cells_may_hold_separators_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text('user_id,item_id\r\n"a, b","x\r\ny"\r\n\r\n"say ""hi""",z\r\n', newline="")
    assert pairs(read(path, "csv")) == [("a, b", "x\r\ny"), ('say "hi"', "z")]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("csv", "user_id,item_id\n7,8\n"),
        ("tsv", "user_id\titem_id\n7\t8\n"),
        ("recbole", "user_id:token\titem_id:token\n7\t8\n"),
        ("movielens", "7\t8\t3\t4\n"),
        ("sequence", "7 8\n"),
    ],
)
def test_a_byte_order_mark_and_dos_line_ends_are_no_part_of_an_id(
    tmp_path: Path, format: str, text: str
) -> None:
    path = tmp_path / "log"
    path.write_text(text, encoding="utf-8-sig", newline="\r\n")
    assert pairs(read(path, format)) == [(7, 8)]


# --- formats ------------------------------------------------------------------------------------


def test_folder_and_glob_read_all_files_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("user_id,item_id\n3,4\n")
    (tmp_path / "a.csv").write_text("item_id,user_id\n2,1\n")
    (tmp_path / "notes.md").write_text("no data")
    for path in (tmp_path, tmp_path / "*.csv"):
        raw = read(path, "csv")
        assert pairs(raw) == [(1, 2), (3, 4)]
        assert raw.sources == (tmp_path / "a.csv", tmp_path / "b.csv")


def test_parquet_files_of_different_id_types_become_strings(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": [1], "item_id": [2]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"user_id": ["x"], "item_id": ["3"]}).write_parquet(tmp_path / "b.parquet")
    assert pairs(read(tmp_path, "parquet")) == [("1", 2), ("x", 3)]


def test_parquet_datetimes_become_unix_seconds(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    times = pl.Series(["1970-01-02T00:00:00.5"]).str.to_datetime()
    pl.DataFrame({"user_id": [1], "item_id": [2], "timestamp": times}).write_parquet(path)
    raw = read(path, "parquet", columns={"timestamp": "timestamp"})
    assert raw.interactions.collect()["timestamp"].to_list() == [86400.5]


MOVIELENS_FEATURES = [
    {"column": "age", "of": "user", "kind": "numeric"},
    {"column": "zip_code", "of": "user", "kind": "categorical"},
    {"column": "title", "of": "item", "kind": "text"},
    {"column": "release_year", "of": "item", "kind": "categorical"},
    {"column": "genres", "of": "item", "kind": "categorical"},
]


def write_movielens_tab(folder: Path) -> None:
    (folder / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t4\t891717742\n")
    (folder / "u.user").write_text("186|39|F|executive|00000\n196|49|M|writer|55105\n")
    flags = ["0"] * 19
    flags[5] = flags[14] = "1"
    tail = "|".join(flags)
    items = f"242|Amélie (1997)|24-Jan-1997||url|{tail}\n302|B (1996)|||url|{'|'.join('0' * 19)}\n"
    (folder / "u.item").write_text(items, encoding="latin-1")


def write_movielens_colons(folder: Path) -> None:
    (folder / "ratings.dat").write_text("196::242::3::881250949\n186::302::4::891717742\n")
    (folder / "users.dat").write_text("186::F::39::1::00000\n196::M::49::2::55105\n")
    items = "242::Amélie (1997)::Comedy|Romance\n302::B (1996)::Drama\n"
    (folder / "movies.dat").write_text(items, encoding="latin-1")


@pytest.mark.parametrize("write", [write_movielens_tab, write_movielens_colons])
def test_both_forms_of_movielens_give_the_same_columns(tmp_path: Path, write: Any) -> None:
    write(tmp_path)
    raw = read(tmp_path, "movielens", columns=TIMED, features=MOVIELENS_FEATURES)
    assert raw.users is not None
    assert raw.items is not None
    assert raw.interactions.collect().rows() == [
        (0, 196, 242, 881250949.0, 3.0),
        (1, 186, 302, 891717742.0, 4.0),
    ]
    assert raw.users.collect().rows() == [(186, 39.0, "00000"), (196, 49.0, "55105")]
    first = raw.items.collect().row(0, named=True)
    assert first["genres"] == ["Comedy", "Romance"]
    assert (first["title"], first["release_year"]) == ("Amélie (1997)", "1997")
    assert len(raw.sources) == 3


def test_recbole_side_files_give_lists_for_sequences(tmp_path: Path) -> None:
    (tmp_path / "d.inter").write_text("user_id:token\titem_id:token\nu\t1\n")
    (tmp_path / "d.item").write_text("item_id:token\tclass:token_seq\n1\tA B\n2\t\n")
    features = [{"column": "class", "of": "item", "kind": "categorical"}]
    raw = read(tmp_path, "recbole", features=features)
    assert raw.items is not None
    assert raw.items.collect().rows() == [(1, ["A", "B"]), (2, None)]


def test_features_in_the_interaction_file_stand_beside_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,price,hour\nu,1,2.5,7\n\nv,1,9,8\nv,2,,9\n")
    features = [
        {"column": "price", "of": "item", "kind": "numeric"},
        {"column": "hour", "of": "interaction", "kind": "categorical"},
    ]
    raw = read(path, "csv", features=features)
    assert raw.users is None
    assert raw.items is not None
    assert raw.items.collect().rows() == [(0, 2.5), (1, 9.0), (2, None)]
    assert raw.interactions.collect()["hour"].to_list() == ["7", "8", "9"]


# --- bad input ----------------------------------------------------------------------------------

DELIMITED_COMPLAINTS = {
    "short line": ("1,2,3,4\n1,2,3\n", "line 3: must have 4 fields, has 3"),
    "long line": ("1,2,3,4\n1,2,3,4,5\n", "line 3: must have 4 fields, has 5"),
    "short line after a quoted break": ('1,"2\n",3,4\n1,2\n', "line 4: must have 4 fields, has 2"),
    "lone quote": ('1,12" tape,3,4\n1,2,3,4\n', "line 2: quotes must come in pairs, found 1"),
    "lone quote far on": ('1,"a",3,4\n1,b",3,4\n', "line 3: quotes must come in pairs"),
    "open quote": ('1,2,3,"4\n1,2,3,4\n', "quotes"),
    "rating": ("1,2,3,4\n\n1,2,good,4\n", 'line 4, column "rating": .* found "good"'),
    "rating after a quoted break": ('1,"2\n2",3,4\n1,2,x,4\n', 'line 4, column "rating": .*"x"'),
    "rating with a line break": ('1,2,"a\nb",4\n', r'line 2, column "rating": .* found "a\\nb"'),
    "long rating": (f"1,2,{'9' * 400}x,4\n", f'line 2, column "rating": .* found "{"9" * 60}…";'),
    "rating too large for float32": ("1,2,1e300,4\n", 'line 2, column "rating": .* found "1e300"'),
    "infinite rating": ("1,2,inf,4\n", 'line 2, column "rating": .* found "inf"'),
    "timestamp": ("1,2,3,2020-01-01\n", 'line 2, column "timestamp": .* found "2020-01-01"'),
    "empty timestamp": ("1,2,3,\n", 'line 2, column "timestamp": .* is empty'),
    "empty user": (",2,3,4\n", 'line 2, column "user_id": must be an id, is empty'),
    "empty quoted item": ('1,"",3,4\n', 'line 2, column "item_id": must be an id, is empty'),
    "no rows": ("", "must hold interactions"),
}


@pytest.mark.parametrize("case", DELIMITED_COMPLAINTS)
def test_bad_csv_is_named_by_line(tmp_path: Path, case: str) -> None:
    body, expected = DELIMITED_COMPLAINTS[case]
    path = tmp_path / "log.csv"
    path.write_text(HEADER + body)
    with pytest.raises(DataError, match=expected):
        read(path, "csv", columns=TIMED)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"user_id,item_id\n1,2\n1,\xe9\n")
    assert "line 3: must be UTF-8" in complaint(path, "csv")


@pytest.mark.parametrize("format", ["csv", "movielens", "sequence"])
def test_compressed_text_is_refused(tmp_path: Path, format: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(gzip.compress(b"user_id,item_id\n1,2\n"))
    assert complaint(path, format) == f"{path}: must be plain text, is compressed; unpack it"


def test_missing_column_names_the_present_and_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("userid,item_id\n1,2\n")
    text = complaint(path, "csv")
    assert text == (
        f'{path}: no column "user_id", which data.columns.user names; it has userid, item_id; '
        'did you mean "userid"?'
    )


def test_column_twice_in_the_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,user_id\n1,2,3\n")
    assert '"user_id" appears twice' in complaint(path, "csv")


def test_missing_files_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in complaint(tmp_path / "no.csv", "csv")
    assert "matches no file" in complaint(tmp_path / "*.csv", "csv")
    assert "holds no .csv file" in complaint(tmp_path, "csv")
    assert "holds no u.data or ratings.dat file" in complaint(tmp_path, "movielens")


FORMATS = ["csv", "tsv", "parquet", "movielens", "recbole", "sequence"]


@pytest.mark.parametrize("format", FORMATS)
def test_an_empty_file_is_refused(tmp_path: Path, format: str) -> None:
    path = tmp_path / "log"
    path.touch()
    expected = f"{path}: must hold interactions, is empty; remove or replace it"
    assert complaint(path, format) == expected


@pytest.mark.parametrize("format", ["movielens", "sequence"])
def test_a_file_of_blank_lines_is_refused(tmp_path: Path, format: str) -> None:
    path = tmp_path / "log"
    path.write_text("\n\n")
    assert complaint(path, format) == f"{path}: must hold interactions, has none; check data.path"


@pytest.mark.parametrize("format", ["csv", "tsv", "recbole"])
def test_a_file_without_header_is_refused(tmp_path: Path, format: str) -> None:
    path = tmp_path / "log"
    path.write_text("\n\n")
    assert complaint(path, format).startswith(f"{path}: cannot be read, empty CSV")


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame(schema={"user_id": pl.Int64, "item_id": pl.Int64}).write_parquet(path)
    assert "must hold interactions, has none" in complaint(path, "parquet")


@pytest.mark.parametrize("damage", ["truncated", "no parquet"])
def test_corrupt_parquet_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": range(9999), "item_id": range(9999)}).write_parquet(path)
    content = path.read_bytes()
    damaged = {"truncated": content[: len(content) // 2], "no parquet": b"user_id,item_id\n1,2\n"}
    path.write_bytes(damaged[damage])
    text = complaint(path, "parquet")
    assert text.startswith(f"{path}: cannot be read, ")
    assert text.endswith("; is the file whole, its quoting closed?")


def test_a_damaged_footer_is_not_taken_for_text(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": ["u"], "item_id": ["i"]}).write_parquet(path)
    # The schema names a column in bytes that are no UTF-8.
    path.write_bytes(path.read_bytes().replace(b"user_id", b"user\xff\xffd"))
    assert complaint(path, "parquet").startswith(f"{path}: cannot be read, ")


def test_a_rating_that_is_no_number_is_named_in_every_format(tmp_path: Path) -> None:
    path = tmp_path / "log"
    rule = 'must be a finite number, found "abc"; mend or remove it'
    path.write_text(HEADER + "1,2,3,4\n1,2,abc,4\n")
    expected = f'{path}, line 3, column "rating": {rule}'
    assert complaint(path, "csv", columns=TIMED) == expected
    path.write_text(HEADER.replace(",", "\t") + "1\t2\t3\t4\n1\t2\tabc\t4\n")
    assert complaint(path, "tsv", columns=TIMED) == expected
    path.write_text("user_id:token\titem_id:token\trating:float\n1\t2\t3\n1\t2\tabc\n")
    assert complaint(path, "recbole", columns={"rating": "rating"}) == expected
    path.write_text("1::2::3::4\n\n1::2::abc::4\n")
    assert complaint(path, "movielens", columns=TIMED) == expected
    cells = {"user_id": [1, 1], "item_id": [2, 2], "rating": ["3", "abc"]}
    pl.DataFrame(cells).write_parquet(path)
    expected = expected.replace("line 3", "row 2")
    assert complaint(path, "parquet", columns={"rating": "rating"}) == expected


def test_parquet_float_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": [1.0], "item_id": [2]}).write_parquet(path)
    assert "ids must be integers or strings, found Float64" in complaint(path, "parquet")


def test_parquet_null_id_is_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": [1, None], "item_id": [2, 3]}).write_parquet(path)
    assert 'row 2, column "user_id": must be an id, is empty' in complaint(path, "parquet")


def test_bad_line_formats_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("a 1 2\nb\n")
    assert "line 2: must name an item" in complaint(path, "sequence")
    path.write_text("a 1 2\na 3\n")
    assert "line 2: must be its user's only line" in complaint(path, "sequence")
    path.write_text("1::2::3::4\n1::2::3\n")
    assert "line 2: must have 4 fields, has 3" in complaint(path, "movielens")
    path.write_text("user_id:token\titem_id\n1\t2\n")
    assert 'found "item_id"' in complaint(path, "recbole")


def test_entity_on_two_lines_of_a_side_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.inter").write_text("user_id:token\titem_id:token\nu\t1\n")
    (tmp_path / "d.user").write_text("user_id:token\tage:float\nu\t1\nu\t2\n")
    features = [{"column": "age", "of": "user", "kind": "numeric"}]
    assert '"u" stands on several' in complaint(tmp_path, "recbole", features=features)


def test_feature_named_like_a_column_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,row\n1,2,3\n")
    features = [{"column": "row", "of": "interaction", "kind": "numeric"}]
    assert '"row"' in complaint(path, "csv", features=features)
