"""CSV and Parquet files of a user's, sound and broken."""

import gzip
import re

import numpy as np
import pytest

pytest.importorskip("polars")
import polars as pl

from crossent.cli.errors import InputError
from crossent.cli.tables import feature_matrix, read_table


@pytest.fixture
def write(tmp_path):
    def write(content, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separator_is_found(write, separator):
    path = write("b,a\n1,2.5\n3,-4e2\n".replace(",", separator))
    table = read_table(path)
    assert feature_matrix(table, ["a", "b"], path).tolist() == [[2.5, 1], [-400, 3]]


def test_header_is_read_as_csv_and_blank_last_lines_are_no_rows(write):
    table = read_table(write('\ufeff"a ""1""","b, c"\r\n1,2\r\n\r\n\r\n'))
    assert table.columns == ['a "1"', "b, c"]
    assert table.height == 1


def test_types_become_numbers(tmp_path):
    frame = pl.DataFrame({"i": [1, 2], "flag": [True, False], "t": ["3", "1e-3"]})
    frame.write_parquet(tmp_path / "t.parquet")
    path = tmp_path / "t.parquet"
    matrix = feature_matrix(read_table(path), frame.columns, path)
    assert matrix.dtype == np.float64
    assert matrix.tolist() == [[1, 1, 3], [2, 0, 0.001]]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "is empty; expected a header line and rows"),
        ("\n\n", "is empty; expected a header line and rows"),
        ("a,b\n", "has no rows, only the columns a, b"),
        ("a,b\n1,2,3\n", "is ragged: a row has more fields than the header line"),
        ("a,a\n1,2\n", "has two columns named 'a'; rename one"),
        (b"a,b\n1,\xe9\n", "is not UTF-8 text; save it as CSV in UTF-8"),
        (b"\xe9,b\n1,2\n", "cannot be read"),
        ("a,b\n1,2\n".encode("utf-16"), "is not UTF-8 text"),
        (gzip.compress(b"a,b\n1,2\n"), "is gzip-compressed; unpack it first"),
        ('a,b\n"1,2\n', "cannot be read as CSV"),
        ("a" * 200_000 + ",b\n1,2\n", "its header line cannot be read"),
    ],
)
def test_broken_csv(write, content, text):
    with pytest.raises(InputError, match=text):
        read_table(write(content))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a,b\n1,2\n,3\n4,\n,5\n", "t.csv: column 'a' has no value in row 2 and 1 more"),
        ("a,b\n1,2\n3,\n", "t.csv: column 'b' has no value in row 2"),
        ("a,b\n1,2\n3\n", "t.csv: column 'b' has no value in row 2"),
        ("a,b\n1,nan\n", "t.csv: column 'b' has no value in row 1"),
        ("a,b\n1,\n", "t.csv: column 'b' has no value in row 1"),
        ("a,b\n1,2\n3,-inf\n", "t.csv: column 'b' is infinite in row 2"),
        ("a,b\n1,2\n3,red\n", "t.csv: column 'b' holds text ('red' in row 2), and a feature must"),
        ("a\n1\n", "t.csv lacks 1 of the model's 2 feature columns: b; it has a"),
    ],
)
def test_columns_that_are_no_features(write, content, text):
    path = write(content)
    with pytest.raises(InputError, match=re.escape(text)):
        feature_matrix(read_table(path), ["a", "b"], path)


def test_a_damaged_parquet_file_is_one_error_and_no_noise(tmp_path, capfd):
    """Polars panics on some of these, which would print a backtrace."""
    path = tmp_path / "t.parquet"
    pl.DataFrame({"a": [1.0, 2, 3] * 50, "b": ["x", "y", "z"] * 50}).write_parquet(path)
    sound = path.read_bytes()
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(300):
        damaged = bytearray(sound)
        for place in rng.integers(0, len(sound), 6):
            damaged[place] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            read_table(path)
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 200
    assert capfd.readouterr().err == ""


def test_other_kinds_of_file(tmp_path, write):
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="is a folder"):
        read_table(tmp_path)
    with pytest.raises(InputError, match=r"unknown kind of file '.xlsx'"):
        read_table(write("a", "t.xlsx"))
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read_table(write("PAR1 and then nothing", "t.parquet"))
