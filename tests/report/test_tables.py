"""Tables on disk: what is written comes back, and damage is told with the file, the row and the column."""

import math

import pytest

from ldm.report.tables import check_numbers, read_comments, read_csv, write_csv

ROWS = [{"class": 1, "name": "a, b", "mi": 0.1 + 0.2}, {"class": 2, "name": "007", "mi": None}]


def test_a_table_comes_back_with_its_comments(tmp_path):
    file = tmp_path / "t.csv"
    write_csv(file, ROWS, ["nats", "seed 3"])
    assert read_csv(file, ("class", "mi")) == ROWS and read_comments(file) == ["nats", "seed 3"]


DAMAGED = {
    "empty": b"",
    "only comments": b"# a\n# b\n",
    "no rows": b"class,mi\n",
    "no column": b"class,other\n1,2\n",
    "a row cut off": b"class,mi\n1,2\n3\n",
    "a row too long": b"class,mi\n1,2,3\n",
    "one name twice": b"class,mi,mi\n1,2,3\n",
    "an open quote": b'class,mi\n1,"2\n',
    "no text": b"class,mi\n1,\xff\xfe\n",
    "a page": b"<!DOCTYPE html><html></html>",
    "zeros": b"\0" * 64,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_named(content, tmp_path):
    file = tmp_path / "t.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.csv is damaged, or is not a table") as caught:
        read_csv(file, ("class", "mi"))
    assert "\n" not in str(caught.value) and "make it again" in str(caught.value)


def test_a_table_that_may_be_empty_is(tmp_path):
    (tmp_path / "t.csv").write_text("")
    assert read_csv(tmp_path / "t.csv") == []


@pytest.mark.parametrize("value", ["abc", None, True, math.nan])
def test_what_is_no_number_is_named_by_row_and_column(value):
    check_numbers("t.csv", ROWS, ["class"])
    with pytest.raises(ValueError, match=r"t\.csv, row 2: mi should be a number"):
        check_numbers("t.csv", [{"mi": 1.5}, {"mi": value}], ["mi"])
