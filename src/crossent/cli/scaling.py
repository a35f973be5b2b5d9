"""Feature scaling: fitted on training rows, kept in the model, applied to every row."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent.cli.errors import InputError

KINDS = ("standard", "minmax", "pixel", "none")
MAX_SCALED = 1e100  # products with weights of any use stay far from overflow
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scaling:
    """The map (x − offset) / scale, column by column.

    Parameters
    ----------
    offset, scale : ndarray of float64, shape (D,)
        `scale` is positive. A constant column has scale 1.

    Examples
    --------
    >>> Scaling(np.array([1.0]), np.array([2.0]))(np.array([[5]]))
    array([[2.]])
    """

    offset: Floats
    scale: Floats

    def __call__(self, features: NDArray[Any]) -> Floats:
        """Return scaled features, shape (N, D); an `InputError` where one is out of all bounds."""
        with np.errstate(over="ignore"):
            scaled: Floats = (features - self.offset) / self.scale
        if not (np.abs(scaled) <= MAX_SCALED).all():
            row, column = (int(place) for place in np.argwhere(~(np.abs(scaled) <= MAX_SCALED))[0])
            raise InputError(
                f"feature {column + 1} of row {row + 1} is {features[row, column]:g}, more than "
                f"{MAX_SCALED:g} times the training rows' spread; correct or remove the row"
            )
        return scaled


def fit_scaling(kind: str, features: NDArray[Any], pixel_max: float | None) -> Scaling:
    """Return the scaling of one of `KINDS` for training rows.

    Parameters
    ----------
    kind : {"standard", "minmax", "pixel", "none"}
        Mean 0 and variance 1; range 0 to 1; division by `pixel_max`; nothing.
    features : ndarray, shape (N, D)
    pixel_max : float or None
        Value of a white pixel; None for data that are no images of bytes.

    Raises
    ------
    InputError
        For "pixel" without a white level, and for columns whose spread float64 cannot hold.
    """
    from sklearn.preprocessing import MinMaxScaler, StandardScaler

    offset, scale = np.zeros(features.shape[1]), np.ones(features.shape[1])
    if kind == "pixel":
        if pixel_max is None:
            raise InputError(
                "--scale pixel needs images of bytes (digits, fashion-mnist, uint8 arrays); "
                "use standard or minmax"
            )
        scale *= pixel_max
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if kind == "standard":
            standard = StandardScaler().fit(features)
            offset, scale = standard.mean_, standard.scale_
        elif kind == "minmax":
            minmax = MinMaxScaler().fit(features)
            offset, scale = minmax.data_min_, 1 / minmax.scale_
    if not (np.isfinite(offset).all() and np.isfinite(scale).all() and (scale > 0).all()):
        column = int(np.argmin(np.isfinite(offset) & np.isfinite(scale) & (scale > 0)))
        raise InputError(
            f"feature column {column + 1} spans too wide a range to scale in float64; "
            "divide it by a large constant first"
        )
    return Scaling(np.asarray(offset, np.float64), np.asarray(scale, np.float64))
