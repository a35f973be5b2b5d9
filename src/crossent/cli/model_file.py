"""`model.safetensors`: a fitted softmax layer with the scaling and names it was trained with.

The file holds four float64 arrays: `coef` (K, D), `intercept` (K,), `feature_offset` (D,) and
`feature_scale` (D,), where K is the number of classes V, or 1 for two classes (scikit-learn's
convention). Its metadata entry "crossent" is a JSON object with the keys of `METADATA`.
Nothing in it is executed or unpickled, and `load` checks all of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent.cli.errors import InputError, existing_file, first_line
from crossent.cli.labels import Label
from crossent.cli.scaling import Scaling

FILE_NAME = "model.safetensors"
FORMAT_VERSION = 1
ARRAYS = {"coef": 2, "intercept": 1, "feature_offset": 1, "feature_scale": 1}
METADATA = ("format_version", "classes", "feature_names", "image_shape")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SavedModel:
    """A fitted softmax layer.

    Parameters
    ----------
    coef : ndarray of float64, shape (K, D)
        K is V, or 1 for two classes.
    intercept : ndarray of float64, shape (K,)
    scaling : Scaling
        Applied to features before the layer.
    classes : list of str, int or bool, length V
        All of one type.
    feature_names : list of str, length D
    image_shape : tuple of int, optional
        Shape of a row that is an image.
    """

    coef: Floats
    intercept: Floats
    scaling: Scaling
    classes: list[Label]
    feature_names: list[str]
    image_shape: tuple[int, ...] | None

    def logits(self, features: NDArray[np.generic]) -> Floats:
        """Return the weighted sums of unscaled features `(N, D)`, shape (N, V)."""
        from crossent.sklearn import SoftmaxClassifier

        classifier = SoftmaxClassifier()
        classifier.coef_, classifier.intercept_ = self.coef, self.intercept
        classifier.classes_ = np.arange(len(self.classes))
        classifier.n_features_in_ = self.coef.shape[1]
        scores = np.asarray(classifier.decision_function(self.scaling(features)), np.float64)
        return np.column_stack([np.zeros_like(scores), scores]) if scores.ndim == 1 else scores

    def class_weights(self) -> Floats:
        """Return the weights as one row a class, shape (V, D), for two classes too."""
        if len(self.coef) > 1:
            return self.coef
        return np.concatenate([np.zeros_like(self.coef), self.coef])


def save(model: SavedModel, path: Path) -> None:
    """Write the model to a new file; the same model gives the same bytes."""
    from safetensors.numpy import save as serialize

    metadata = {
        "format_version": FORMAT_VERSION,
        "classes": model.classes,
        "feature_names": model.feature_names,
        "image_shape": model.image_shape,
    }
    arrays = {
        "coef": model.coef,
        "intercept": model.intercept,
        "feature_offset": model.scaling.offset,
        "feature_scale": model.scaling.scale,
    }
    content = serialize(
        {name: np.ascontiguousarray(array, np.float64) for name, array in arrays.items()},
        {"crossent": json.dumps(metadata)},
    )
    path.write_bytes(content)


def load(path: Path) -> SavedModel:
    """Return the model in a file, or in the folder that `crossent train` made.

    Raises
    ------
    InputError
        If the file is missing, damaged, of another kind, or inconsistent in any way.
    """
    path = existing_file(path / FILE_NAME if path.is_dir() else path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = _parse(file.metadata(), path)
            arrays = {name: _array(file, name, path) for name in _expected(file.keys(), path)}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a model: {first_line(error)}; copy or train it again"
        ) from None
    _require_consistent(arrays, metadata, path)
    image_shape = metadata["image_shape"]
    return SavedModel(
        coef=arrays["coef"],
        intercept=arrays["intercept"],
        scaling=Scaling(arrays["feature_offset"], arrays["feature_scale"]),
        classes=metadata["classes"],
        feature_names=metadata["feature_names"],
        image_shape=None if image_shape is None else tuple(image_shape),
    )


def _broken(path: Path, what: str) -> InputError:
    return InputError(f"{path} is no usable crossent model: {what}; copy or train it again")


def _parse(metadata: dict[str, str] | None, path: Path) -> dict[str, Any]:
    text = (metadata or {}).get("crossent")
    if text is None:
        raise _broken(path, "it has no 'crossent' metadata")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        raise _broken(path, "its metadata is no JSON") from None
    if not isinstance(parsed, dict) or set(parsed) != set(METADATA):
        raise _broken(path, f"its metadata needs exactly the keys {', '.join(METADATA)}")
    if parsed["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path} has the format version {str(parsed['format_version'])[:20]}, and this "
            f"crossent reads version {FORMAT_VERSION}; update crossent or train again"
        )
    return parsed


def _expected(names: list[str], path: Path) -> list[str]:
    if set(names) != set(ARRAYS):
        raise _broken(path, f"it needs exactly the arrays {', '.join(ARRAYS)}")
    return list(ARRAYS)


def _array(file: Any, name: str, path: Path) -> Floats:
    part = file.get_slice(name)
    dtype, dimensions = part.get_dtype(), len(part.get_shape())
    if dtype != "F64" or dimensions != ARRAYS[name]:
        raise _broken(
            path,
            f"{name} has {dimensions} dimensions of {dtype}, expected {ARRAYS[name]} of F64",
        )
    array: Floats = file.get_tensor(name)
    if not np.isfinite(array).all():
        raise _broken(path, f"{name} is not finite")
    return array


def _require_consistent(arrays: dict[str, Floats], metadata: dict[str, Any], path: Path) -> None:
    classes, names = metadata["classes"], metadata["feature_names"]
    if not _are_labels(classes):
        raise _broken(path, "its classes are not two or more distinct labels of one type")
    if not (_is_list_of(names, str) and len(set(names)) == len(names) >= 1 and _is_text(names)):
        raise _broken(path, "its feature names are not distinct strings")
    vectors, columns = (1 if len(classes) == 2 else len(classes)), len(names)
    expected = {
        "coef": (vectors, columns),
        "intercept": (vectors,),
        "feature_offset": (columns,),
        "feature_scale": (columns,),
    }
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise _broken(path, f"{name} has the shape {arrays[name].shape}, expected {shape}")
    if not (arrays["feature_scale"] > 0).all():
        raise _broken(path, "feature_scale is not positive")
    image_shape = metadata["image_shape"]
    if image_shape is not None and not (
        _is_list_of(image_shape, int)
        and len(image_shape) in (2, 3)
        and min(image_shape) > 0
        and int(np.prod(image_shape, dtype=object)) == columns
    ):
        raise _broken(path, "its image shape does not fit its features")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _are_labels(classes: Any) -> bool:
    if not any(_is_list_of(classes, kind) for kind in (str, int, bool)):
        return False
    in_range = all(isinstance(label, str) or -(2**63) <= label < 2**63 for label in classes)
    texts = [label for label in classes if isinstance(label, str)]
    return len(set(classes)) == len(classes) >= 2 and in_range and _is_text(texts)


def _is_text(strings: list[str]) -> bool:
    """Whether the strings can be written as UTF-8, which lone surrogates cannot."""
    try:
        "".join(strings).encode()
    except UnicodeEncodeError:
        return False
    return True
