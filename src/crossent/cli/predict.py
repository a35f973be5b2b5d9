"""`crossent predict`: class and probabilities of every row of a file."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crossent import softmax
from crossent.cli import model_file, npz, tables
from crossent.cli.data import image_rows
from crossent.cli.errors import InputError, first_line
from crossent.cli.labels import class_name
from crossent.cli.output import new_file

if TYPE_CHECKING:
    import polars as pl


def predict(model_path: Path, file: Path, output: Path | None, force: bool) -> None:
    """Write the predictions for a file to stdout as CSV, or to a new CSV or Parquet file.

    Parameters
    ----------
    model_path : Path
        A folder that `crossent train` made, or the model.safetensors in it.
    file : Path
        .csv or .parquet with the model's feature columns in any order among others, or .npz with
        an array X.
    output : Path, optional
        New file, .csv or .parquet.
    force : bool
        Whether `output` may be replaced.
    """
    if output is not None and output.suffix.lower() not in {".csv", ".parquet"}:
        raise InputError(f"{output}: predictions are written as .csv or .parquet; name one of them")
    model = model_file.load(model_path)
    table = prediction_table(model, read_features(model, file))
    if output is None:
        remaining = memoryview(table.write_csv().encode())
        while remaining:  # under PYTHONUNBUFFERED one call may write a part
            remaining = remaining[sys.stdout.buffer.write(remaining) :]
        sys.stdout.buffer.flush()
        return
    import polars as pl

    with new_file(output, force) as staging:
        try:
            if output.suffix.lower() == ".csv":
                table.write_csv(staging)
            else:
                table.write_parquet(staging)
        except pl.exceptions.PolarsError as error:
            raise InputError(f"{output} cannot be written: {first_line(error)}") from None


def read_features(model: model_file.SavedModel, file: Path) -> NDArray[np.generic]:
    """Return the model's features in a file, unscaled, shape (N, D)."""
    if file.suffix.lower() != ".npz":
        return tables.feature_matrix(tables.read_table(file), model.feature_names, file)
    (x,) = npz.read_arrays(file, ["X"])
    rows, image_shape = image_rows(x, file)
    columns = len(model.feature_names)
    if rows.shape[1] != columns or (image_shape and image_shape != model.image_shape):
        trained_on = f"images {model.image_shape}" if model.image_shape else "rows of numbers"
        raise InputError(
            f"{file}: X has the shape {x.shape}; the model was trained on {trained_on}, "
            f"{columns} features a row"
        )
    return rows


def prediction_table(model: model_file.SavedModel, features: NDArray[np.generic]) -> "pl.DataFrame":
    """Return a column `class` and one column `p_<class>` for each class, a row a row."""
    import polars as pl

    probabilities = softmax(model.logits(features))
    columns: dict[str, object] = {
        "class": [model.classes[best] for best in probabilities.argmax(axis=1)]
    }
    columns |= {
        f"p_{class_name(label)}": probabilities[:, position]
        for position, label in enumerate(model.classes)
    }
    return pl.DataFrame(columns)
