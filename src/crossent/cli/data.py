"""The data sets that `crossent train` knows, and how their rows are split."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crossent.cli import idx, npz, tables
from crossent.cli.errors import InputError, shortened
from crossent.cli.labels import Codes, Label, class_name, encode_labels

if TYPE_CHECKING:
    import polars as pl

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
# A weaker penalty takes many more iterations for about half a point of test accuracy.
FASHION_MNIST_C = 0.01
DEFAULT_TEST_SIZE = 0.2


@dataclass(frozen=True)
class Dataset:
    """Labelled rows before any scaling.

    Parameters
    ----------
    name : str
        Short name; names the output folder.
    features : ndarray, shape (N, D)
        Finite numbers.
    labels : ndarray of int64, shape (N,)
        Positions in `classes`.
    classes : list of str, int or bool, length V
    feature_names : list of str, length D
    image_shape : tuple of int, optional
        (height, width) or (height, width, channels) where a row is an image.
    pixel_max : float, optional
        Value of a white pixel.
    default_c : float
        Inverse penalty strength where the user gives none.
    own_test_rows : int
        Number of last rows that the data set's publishers set apart for testing; 0 if none.
    """

    name: str
    features: NDArray[np.generic]
    labels: Codes
    classes: list[Label]
    feature_names: list[str]
    image_shape: tuple[int, ...] | None = None
    pixel_max: float | None = None
    default_c: float = 1.0
    own_test_rows: int = 0

    @property
    def default_scale(self) -> str:
        """Pixels are divided by the white level, anything else is standardised."""
        return "standard" if self.pixel_max is None else "pixel"

    @property
    def dtype(self) -> "type[np.float32] | type[np.float64]":
        """What a fit computes in: float32 is plenty for bytes and takes half the time."""
        return np.float32 if self.features.dtype == np.uint8 else np.float64

    @property
    def default_tol(self) -> float:
        """Bound on the gradient's entries; float32 gets Fashion-MNIST's to 7.5e-6 and no lower."""
        return 1e-5 if self.dtype is np.float32 else 1e-6


def load(
    source: str,
    target: str | None = None,
    data_dir: Path | None = None,
    drop: tuple[str, ...] = (),
) -> Dataset:
    """Return the data set that a name, a file or a folder stands for.

    Parameters
    ----------
    source : str
        "digits", "fashion-mnist", a .csv, .parquet or .npz file, or a folder of four IDX files.
    target : str, optional
        The column (table) or array (NPZ) of classes; required for a table, "y" for NPZ.
    data_dir : Path, optional
        Folder of the four files of fashion-mnist.
    drop : tuple of str
        Columns of a table that are no features.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if data_dir is not None and source != "fashion-mnist":
        raise InputError("--data-dir is the folder of fashion-mnist; it does not go with a file")
    if suffix in {".csv", ".parquet"}:
        return _from_table(path, target, drop)
    if drop:
        raise InputError("--drop names columns of a CSV or Parquet file; leave it out here")
    if suffix == ".npz":
        return _from_npz(path, target or "y")
    if target is not None:
        raise InputError(f"--target names a column of a file of yours; {source} needs none")
    if source == "digits":
        return _digits()
    if source == "fashion-mnist":
        return _from_idx(source, data_dir or FASHION_MNIST_FOLDER, FASHION_MNIST_CLASSES)
    if path.is_dir():
        return _from_idx(path.resolve().name, path, None)
    if path.exists():
        raise InputError(f"{source}: unknown kind of file; use .csv, .parquet or .npz")
    raise InputError(
        f"no such data set or file: {source}; "
        "use digits, fashion-mnist, or a .csv, .parquet or .npz file"
    )


def split(
    data: Dataset, test_size: float | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the row numbers of the training rows and of the test rows.

    A data set with a test set of its own keeps it; any other is split at random, each class in
    proportion (stratified).

    Parameters
    ----------
    data : Dataset
    test_size : float, optional
        Share of the rows to test on, between 0 and 1; 0.2 if not given.
    seed : int
        Of the random split.
    """
    rows = np.arange(len(data.labels))
    if data.own_test_rows:
        if test_size is not None:
            raise InputError(
                f"{data.name} has its own test set of {data.own_test_rows} rows; "
                "leave --test-size out"
            )
        return rows[: -data.own_test_rows], rows[-data.own_test_rows :]
    test_size = DEFAULT_TEST_SIZE if test_size is None else test_size
    if not 0 < test_size < 1:
        raise InputError(f"--test-size is {test_size:g}; give the share of rows, between 0 and 1")
    _require_splittable(data, test_size)
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        rows, test_size=test_size, random_state=seed, stratify=data.labels
    )
    train.sort()
    test.sort()
    missing = np.setdiff1d(data.labels, data.labels[train])
    if len(missing):
        name = class_name(data.classes[missing[0]])
        raise InputError(f"class {name!r} is left without a training row; lower --test-size")
    return train, test


def _require_splittable(data: Dataset, test_size: float) -> None:
    counts = np.bincount(data.labels, minlength=len(data.classes))
    total, classes = len(data.labels), len(data.classes)
    if counts.min() < 2:
        name = class_name(data.classes[int(counts.argmin())])
        hint = ""
        if classes > total / 3:
            hint = f" ({classes} classes in {total} rows: is the target a quantity or an id?)"
        raise InputError(
            f"class {name!r} has a single row, and a split needs two, one to train and one to "
            f"test{hint}; add rows, or remove or merge the class"
        )
    test_rows = int(np.ceil(test_size * total))
    if not classes <= test_rows <= total - classes:
        raise InputError(
            f"--test-size {test_size:g} of {total} rows is {test_rows}, but training and testing "
            f"need at least {classes} rows each, one a class; change --test-size or add rows"
        )


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Dataset(
        name="digits",
        features=digits.data,
        labels=digits.target.astype(np.int64),
        classes=list(range(10)),
        feature_names=list(digits.feature_names),
        image_shape=(8, 8),
        pixel_max=16.0,
    )


def _from_idx(name: str, folder: Path, class_names: list[str] | None) -> Dataset:
    parts = [idx.read_part(folder, part) for part in idx.FILES]
    if len({images.shape[1:] for images, _ in parts}) != 1:
        raise InputError(f"{folder}: training and test images differ in size; fetch them again")
    (train_images, train_labels), (test_images, test_labels) = parts
    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    images = np.concatenate([train_images, test_images])
    found = np.unique(train_labels)
    if len(found) < 2 or images[0].size == 0:
        raise InputError(f"{folder}: the training set needs pixels and at least two classes")
    classes: list[Label] = list(class_names) if class_names else list(range(int(found[-1]) + 1))
    if labels.max() >= len(classes) or len(found) != len(classes):
        raise InputError(
            f"{folder}: expected training labels 0 to {len(classes) - 1}, each at least once, "
            f"and no other test label; found {shortened([str(label) for label in found])}"
        )
    height, width = images.shape[1:]
    default_c = FASHION_MNIST_C if name == "fashion-mnist" else 1.0
    return Dataset(
        name=name,
        features=images.reshape(len(images), -1),
        labels=labels,
        classes=classes,
        feature_names=[f"pixel_{row}_{column}" for row in range(height) for column in range(width)],
        image_shape=(height, width),
        pixel_max=255.0,
        default_c=default_c,
        own_test_rows=len(test_labels),
    )


def _from_table(path: Path, target: str | None, drop: tuple[str, ...]) -> Dataset:
    table = tables.read_table(path)
    if target is None:
        raise InputError(
            f"{path}: name the column of classes with --target; "
            f"the columns are {shortened(table.columns)}"
        )
    unknown = [name for name in (target, *drop) if name not in table.columns]
    if unknown:
        raise InputError(f"{path} has no column {unknown[0]!r}; it has {shortened(table.columns)}")
    names = [name for name in table.columns if name != target and name not in drop]
    if not names:
        raise InputError(f"{path} has no feature columns beside the target {target!r}")
    classes, labels = encode_labels(table[target], f"{path}: target {target!r}")
    features = tables.feature_matrix(table, names, path)
    return Dataset(path.stem, features, labels, classes, names)


def _from_npz(path: Path, target: str) -> Dataset:
    x, y = npz.read_arrays(path, ["X", target])
    if y.ndim != 1 or len(y) != len(x):
        raise InputError(
            f"{path}: {target} has the shape {y.shape}; X has the shape {x.shape}, "
            f"so expected one class a row, ({len(x)},)"
        )
    features, image_shape = image_rows(x, path)
    classes, labels = encode_labels(_label_column(y), f"{path}: {target}")
    names = [f"x{position}" for position in range(features.shape[1])]
    pixel_max = 255.0 if image_shape is not None and x.dtype == np.uint8 else None
    return Dataset(path.stem, features, labels, classes, names, image_shape, pixel_max)


def image_rows(
    x: NDArray[np.generic], path: Path
) -> tuple[NDArray[np.generic], tuple[int, ...] | None]:
    """Return the array X of an NPZ file as rows `(N, D)`, and the shape of one image if it is one.

    Raises
    ------
    InputError
        If X is no matrix and no stack of images, is empty, text, or not finite.
    """
    is_image = x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3, 4))
    if not (x.ndim == 2 or is_image) or x.size == 0:
        raise InputError(
            f"{path}: X has the shape {x.shape}; expected rows (N, D), images (N, height, width) "
            "or colour images (N, height, width, 3), and not empty"
        )
    if x.dtype.kind not in "biuf":
        raise InputError(f"{path}: X has the type {x.dtype}; expected numbers")
    rows = x.reshape(len(x), -1)
    if x.dtype.kind == "f" and not np.isfinite(rows).all():
        row, column = (int(place) for place in np.argwhere(~np.isfinite(rows))[0])
        raise InputError(
            f"{path}: X is {rows[row, column]} in row {row + 1}, feature {column + 1}; "
            "fill in or remove missing and infinite values"
        )
    if x.dtype.kind == "b":
        rows = rows.astype(np.uint8)
    return rows, x.shape[1:] if is_image else None


def _label_column(y: NDArray[np.generic]) -> "pl.Series":
    import polars as pl

    if y.dtype.kind == "S":
        y = np.char.decode(y.astype(np.bytes_), "utf-8", "replace")
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
    return pl.Series(
        "y", y.tolist() if y.dtype.kind == "U" else y.astype(y.dtype.newbyteorder("="))
    )
