"""Data sets: labels, images, splits and scaling."""

import gzip
import re
import struct

import numpy as np
import pytest

pytest.importorskip("polars")
pytest.importorskip("sklearn")
import polars as pl
from sklearn.datasets import load_digits

from crossent.cli import data
from crossent.cli.errors import InputError
from crossent.cli.labels import encode_labels
from crossent.cli.scaling import KINDS, fit_scaling

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("values", "classes", "codes"),
    [
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        ([7, -2, 7], [-2, 7], [1, 0, 1]),
        ([True, False, True], [False, True], [1, 0, 1]),
        ([3.0, 1.0, 3.0], [1, 3], [1, 0, 1]),
    ],
)
def test_labels(values, classes, codes):
    found, encoded = encode_labels(pl.Series(values), "y")
    assert [(type(label), label) for label in found] == [(type(label), label) for label in classes]
    assert encoded.tolist() == codes


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (["a", "a"], "y holds only the class 'a'; a classifier needs at least two classes"),
        ([], "y holds no rows"),
        (["a", None, "b", None], "y has no class in row 2 and 1 more"),
        ([1.0, float("nan")], "y has no class in row 2"),
        ([1.0, 2.5, 3.25], r"y holds numbers that are not whole \(2.5, 3 distinct\).*regression"),
        ([1.0, float("inf")], "not whole"),
        ([1.0, 1e300], "not whole"),
        ([[1], [2]], "y has the type List"),
        ([2**70, 1], "y has the type Int128"),
    ],
)
def test_columns_that_are_no_labels(values, text):
    with pytest.raises(InputError, match=text):
        encode_labels(pl.Series(values), "y")


def test_digits_are_scikit_learns():
    digits, bunch = data.load("digits"), load_digits()
    np.testing.assert_array_equal(digits.features, bunch.data)
    np.testing.assert_array_equal(digits.labels, bunch.target)
    assert (digits.classes, digits.image_shape) == (list(range(10)), (8, 8))
    assert digits.default_scale == "pixel"
    assert digits.features.max() == digits.pixel_max


def idx_file(path, array):
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx_folder(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for stem, rows in (("train", 30), ("t10k", 10)):
        images = RNG.integers(0, 256, (rows, 2, 3), dtype=np.uint8)
        idx_file(folder / f"{stem}-images-idx3-ubyte.gz", images)
        labels = (np.arange(rows) % 10).astype(np.uint8)
        idx_file(folder / f"{stem}-labels-idx1-ubyte.gz", labels)
    return folder


def test_fashion_mnist_keeps_its_own_test_set(idx_folder):
    named = data.load("fashion-mnist", data_dir=idx_folder)
    assert (named.name, named.classes[9]) == ("fashion-mnist", "Ankle boot")
    assert (named.features.shape, named.image_shape, named.pixel_max) == ((40, 6), (2, 3), 255)
    assert named.labels.tolist() == list(range(10)) * 4
    train, test = data.split(named, None, seed=5)
    assert (train.tolist(), test.tolist()) == (list(range(30)), list(range(30, 40)))
    with pytest.raises(InputError, match="its own test set of 10 rows; leave --test-size out"):
        data.split(named, 0.2, seed=0)


def test_a_folder_without_a_known_name_has_numbered_classes(idx_folder):
    folder = data.load(str(idx_folder))
    assert (folder.name, folder.classes) == ("tiny", list(range(10)))


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda content: content[:-20], "cannot be read as gzip IDX"),
        (lambda content: b"plain", "cannot be read as gzip IDX"),
        (lambda content: gzip.compress(b"abc"), "cannot be read as gzip IDX"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-1]), "does not hold the 180"),
        (lambda content: gzip.compress(gzip.decompress(content) + b"1"), "does not hold the 180"),
        (
            lambda content: gzip.compress(struct.pack(">4I", 0x803, *[2**32 - 1] * 3)),
            "is no IDX file of 3 dimensions",
        ),
        (lambda content: gzip.compress(struct.pack(">4I", 0x801, 1, 1, 1)), "is no IDX file"),
    ],
)
def test_broken_idx(idx_folder, break_it, text):
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(break_it(path.read_bytes()))
    with pytest.raises(InputError, match=text):
        data.load(str(idx_folder))


def test_idx_files_that_do_not_fit_together(idx_folder):
    idx_file(idx_folder / "t10k-labels-idx1-ubyte.gz", np.zeros(3, np.uint8))
    with pytest.raises(InputError, match=r"has 10 images and .* has 3 labels"):
        data.load(str(idx_folder))
    idx_file(idx_folder / "t10k-labels-idx1-ubyte.gz", np.full(10, 10, np.uint8))
    with pytest.raises(InputError, match="expected training labels 0 to 9"):
        data.load("fashion-mnist", data_dir=idx_folder)
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"no such file: .*t10k-labels.*dataset-fashion-mnist"):
        data.load("fashion-mnist", data_dir=idx_folder)


@pytest.mark.parametrize(
    ("shape", "image_shape", "pixel_max"),
    [((6, 4), None, None), ((6, 2, 2), (2, 2), 255), ((6, 2, 2, 3), (2, 2, 3), 255)],
)
def test_npz_images(tmp_path, shape, image_shape, pixel_max):
    x = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "t.npz", X=x, y=np.array([b"a", b"b"] * 3), z=np.arange(6) % 2 == 0)
    loaded = data.load(str(tmp_path / "t.npz"))
    np.testing.assert_array_equal(loaded.features, x.reshape(6, -1))
    assert (loaded.image_shape, loaded.pixel_max) == (image_shape, pixel_max)
    assert loaded.classes == ["a", "b"]
    assert data.load(str(tmp_path / "t.npz"), target="z").classes == [False, True]


@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        (np.zeros(4), np.zeros(4), "X has the shape (4,); expected rows (N, D), images"),
        (np.zeros((4, 0)), np.zeros(4), "and not empty"),
        (np.zeros((4, 2, 2, 2)), np.zeros(4), "X has the shape (4, 2, 2, 2)"),
        (np.array([["a"], ["b"]]), np.arange(2), "X has the type <U1; expected numbers"),
        (np.zeros((2, 3)), np.zeros((2, 1)), "y has the shape (2, 1); X has the shape (2, 3), so"),
        (np.zeros((2, 3)), np.zeros(3), "expected one class a row, (2,)"),
        (np.array([[1.0], [np.nan]]), np.arange(2), "X is nan in row 2, feature 1"),
    ],
)
def test_npz_arrays_that_do_not_fit(tmp_path, x, y, text):
    np.savez(tmp_path / "t.npz", X=x, y=y)
    with pytest.raises(InputError, match=re.escape(text)):
        data.load(str(tmp_path / "t.npz"))


def test_table(tmp_path):
    frame = pl.DataFrame({"id": ["u", "v"], "a": [1, 2], "kind": ["x", "y"], "b": [0.5, 1.5]})
    frame.write_csv(tmp_path / "t.csv")
    loaded = data.load(str(tmp_path / "t.csv"), target="kind", drop=("id",))
    assert (loaded.name, loaded.feature_names, loaded.classes) == ("t", ["a", "b"], ["x", "y"])
    assert loaded.features.tolist() == [[1, 0.5], [2, 1.5]]
    for options, text in (
        ({}, "name the column of classes with --target; the columns are id, a, kind, b"),
        ({"target": "nope"}, "has no column 'nope'; it has id, a, kind, b"),
        ({"target": "kind", "drop": ("no",)}, "has no column 'no'"),
        ({"target": "kind", "drop": ("a", "b", "id")}, "no feature columns beside the target"),
        ({"target": "kind"}, "column 'id' holds text ('u' in row 1 and 1 more)"),
    ):
        with pytest.raises(InputError, match=re.escape(text)):
            data.load(str(tmp_path / "t.csv"), **options)


@pytest.mark.parametrize(
    ("source", "options", "text"),
    [
        ("digit", {}, "no such data set or file: digit; use digits, fashion-mnist, or a .csv"),
        ("digits", {"target": "y"}, "--target names a column of a file of yours"),
        ("digits", {"drop": ("y",)}, "--drop names columns of a CSV or Parquet file"),
        ("digits", {"data_dir": "."}, "--data-dir is the folder of fashion-mnist"),
        (__file__, {}, "unknown kind of file; use .csv, .parquet or .npz"),
    ],
)
def test_sources_that_are_none(source, options, text):
    with pytest.raises(InputError, match=re.escape(text)):
        data.load(source, **options)


def small(labels):
    classes = [f"c{code}" for code in range(max(labels) + 1)]
    return data.Dataset("small", np.zeros((len(labels), 1)), np.array(labels), classes, ["a"])


def test_split_is_stratified_and_follows_the_seed():
    digits = data.load("digits")
    train, test = data.split(digits, None, seed=0)
    assert sorted([*train, *test]) == list(range(1797))
    assert len(test) == 360
    shares = np.bincount(digits.labels[test]) / np.bincount(digits.labels)
    assert np.abs(shares - 0.2).max() < 1 / np.bincount(digits.labels).min()
    np.testing.assert_array_equal(data.split(digits, 0.2, seed=0)[1], test)
    assert not np.array_equal(data.split(digits, 0.2, seed=1)[1], test)


@pytest.mark.parametrize(
    ("labels", "test_size", "text"),
    [
        ([0, 0, 1], 0.5, "class 'c1' has a single row, and a split needs two"),
        (list(range(9)), 0.5, "9 classes in 9 rows: is the target a quantity or an id?"),
        ([0, 1] * 10, 0.05, "--test-size 0.05 of 20 rows is 1, but training and testing need at"),
        ([0, 1] * 10, 0.96, "--test-size 0.96 of 20 rows is 20"),
        ([0, 1] * 10, 0.0, "--test-size is 0; give the share of rows, between 0 and 1"),
        ([0, 1] * 10, float("nan"), "--test-size is nan"),
        ([0] * 98 + [1] * 2, 0.95, "class 'c1' is left without a training row"),
    ],
)
def test_splits_that_cannot_be(labels, test_size, text):
    with pytest.raises(InputError, match=re.escape(text)):
        data.split(small(labels), test_size, seed=0)


def test_scaling():
    x = RNG.normal(3, 5, (50, 3))
    x[:, 1] = 7
    standard = fit_scaling("standard", x, None)(x)
    np.testing.assert_allclose(standard.mean(axis=0), 0, atol=1e-13)
    np.testing.assert_allclose(standard.std(axis=0), [1, 0, 1], rtol=1e-13)
    minmax = fit_scaling("minmax", x, None)(x)
    np.testing.assert_allclose(minmax.min(axis=0), [0, 0, 0], atol=1e-15)
    np.testing.assert_allclose(minmax.max(axis=0), [1, 0, 1], rtol=1e-13)
    np.testing.assert_array_equal(fit_scaling("pixel", x, 16.0)(x), x / 16)
    np.testing.assert_array_equal(fit_scaling("none", x, None)(x), x)
    for kind in KINDS:
        assert fit_scaling(kind, x, 255.0).offset.shape == (3,)


def test_scaling_refuses_what_it_cannot_hold():
    with pytest.raises(InputError, match="--scale pixel needs images of bytes"):
        fit_scaling("pixel", np.zeros((2, 1)), None)
    wide = np.array([[0, -1e308], [1, 1e308]])
    with pytest.raises(InputError, match="feature column 2 spans too wide a range"):
        fit_scaling("minmax", wide, None)
    with pytest.raises(InputError, match="feature 2 of row 1 is -1e\\+308"):
        fit_scaling("standard", wide, None)(wide)
    scaling = fit_scaling("none", wide, None)
    with pytest.raises(InputError, match=r"feature 2 of row 2 is 1e\+101, more than 1e\+100"):
        scaling(np.array([[0, 1], [0, 1e101]]))
