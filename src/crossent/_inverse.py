"""The inverse of a symmetric matrix: of one that is hardly definite, with the same bits always."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from threadpoolctl import ThreadpoolController

Matrix = NDArray[np.float64]

_LEAST = 1e-12  # of the largest diagonal entry: a feature that is always 0
_ONE_AT_A_TIME = threading.Lock()


def symmetric_inverse(matrix: Matrix, lifted: float) -> Matrix:
    """Return the inverse of a symmetric matrix that rounding may have made singular, or worse.

    The matrix's own diagonal is written to.

    `lifted` is the share of each diagonal entry that is added to it, and more if that is not
    enough. Along a direction without curvature, as where features are copies of each other, it
    keeps the inverse from making a step of what is rounding in the gradient; it does not depend on
    the features' scales.

    Raises
    ------
    OverflowError
        If an entry is not finite.
    """
    diagonal = matrix.diagonal().copy()
    largest = float(diagonal.max(initial=0.0))
    if not math.isfinite(largest) or not np.isfinite(matrix).all():
        raise OverflowError
    least = _LEAST * largest or 1.0
    at = np.arange(len(matrix))
    with _one_blas_thread():
        while True:
            matrix[at, at] = np.maximum(diagonal * (1 + lifted), least)
            factor, failed = linalg.lapack.dpotrf(matrix, lower=True, clean=False)
            if not failed:
                break
            lifted *= 1000
        inverse: Matrix = linalg.lapack.dpotri(factor, lower=True, overwrite_c=True)[0]
    for i in at:  # its other half
        inverse[i, i + 1 :] = inverse[i + 1 :, i]
    return inverse


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Bind the BLAS to one thread: a fit's bits must not depend on how many it has.

    That number is the process's, so two fits at once must not restore each other's.
    """
    with _ONE_AT_A_TIME, _blas().limit(limits=1, user_api="blas"):
        yield


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # which looks through all libraries that are loaded
