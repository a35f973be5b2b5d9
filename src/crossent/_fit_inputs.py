"""Turns labels and weights into what the loss takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_array, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets

from crossent._fit_parameters import is_number

Vector = NDArray[np.float64]


def is_distribution(y: Any) -> bool:
    """Whether ``y`` holds floating rows of at least two columns."""
    rows: NDArray[Any] = np.asarray(y)
    return rows.ndim == 2 and rows.shape[1] > 1 and rows.dtype.kind == "f"


def label_target(y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Return the sorted classes (V,) and the class index of each row (N,)."""
    try:
        check_classification_targets(y)
        classes, index = np.unique(y, return_inverse=True)
    except TypeError as error:
        raise TypeError(
            f"SoftmaxClassifier.fit: y mixes labels that have no order ({error}); "
            "give all labels one type, for example with y.astype(str)"
        ) from None
    if len(classes) < 2:
        raise ValueError(
            "SoftmaxClassifier needs samples of at least 2 classes in y, but it contains only one "
            f"class: {classes[0]!r}"
        )
    return classes, index


def distribution_target(
    y: NDArray[Any], dtype: np.dtype[Any]
) -> tuple[NDArray[np.intp], NDArray[np.floating[Any]]]:
    """Return the classes 0 to V - 1 and the distributions (N, V), checked, in a dtype."""
    total = y.sum(axis=1, dtype=np.float64)
    # A rounded row of V probabilities sums to 1 within V/2 epsilons of its dtype; 16 times that
    # leaves room for rows that were normalised in the same dtype.
    eps = max(np.finfo(y.dtype).eps, np.finfo(total.dtype).eps)
    slack = 8 * y.shape[1] * eps
    bad = np.flatnonzero((y < 0).any(axis=1) | (np.abs(total - 1) > slack))
    if bad.size:
        row = bad[0]
        raise ValueError(
            f"each row of a floating y of shape (N, V) must be a distribution: not negative, with "
            f"sum 1; y[{row}] has minimum {y[row].min():g} and sum {total[row]:g}. Divide each row "
            "by its sum, or pass class labels of shape (N,)"
        )
    return np.arange(y.shape[1]), y.astype(dtype)


def row_weights(
    sample_weight: Any,
    target: NDArray[Any],
    classes: NDArray[Any],
    class_weight: dict[Any, float] | str | None,
) -> Vector | None:
    """Return the row weights (N,) with class weights multiplied in, or None for ones."""
    if class_weight is not None and target.ndim == 2:
        raise ValueError(
            "class_weight needs class labels, but y holds distributions of shape "
            f"{target.shape}; weight its rows by sample_weight"
        )
    if sample_weight is None and class_weight is None:
        return None
    weight = _checked_weight(sample_weight, len(target))
    if class_weight is not None:
        weight = weight * _class_weights(class_weight, classes, target, weight)[target]
    if (weight < 0).any():
        raise ValueError(
            "sample_weight and class_weight must not be negative: the smallest row weight is "
            f"{weight.min():g}"
        )
    with np.errstate(over="ignore"):
        total = weight.sum()
    if not np.isfinite(total):
        raise ValueError(
            f"sample_weight and class_weight add up to {total}, too much for float64: the largest "
            f"row weight is {weight.max():g}. Divide all weights by it, and multiply C by it"
        )
    if not weight.any():
        raise ValueError(
            "Sample weights must contain at least one non-zero number, but all row weights are "
            "zero after class_weight"
        )
    return weight


def _checked_weight(sample_weight: Any, n_rows: int) -> Vector:
    if sample_weight is None or is_number(sample_weight):
        sample_weight = np.full(n_rows, 1.0 if sample_weight is None else sample_weight)
    weight: Vector = check_array(
        sample_weight, dtype=np.float64, ensure_2d=False, input_name="sample_weight"
    )
    if weight.shape != (n_rows,):
        raise ValueError(
            f"sample_weight has shape {weight.shape}, expected ({n_rows},): one weight for each "
            "row of X"
        )
    return weight


def _class_weights(
    class_weight: dict[Any, float] | str, classes: NDArray[Any], index: NDArray[Any], rows: Vector
) -> Vector:
    """Return the weight of each class (V,)."""
    if isinstance(class_weight, dict):
        weights: Vector = compute_class_weight(class_weight, classes=classes, y=classes[index])
        return weights
    # compute_class_weight("balanced") counts sample weights only from scikit-learn 1.7 on
    totals = np.bincount(index, weights=rows, minlength=len(classes))
    weights = np.zeros(len(classes))
    np.divide(totals.sum() / len(classes), totals, out=weights, where=totals > 0)
    return weights
