from typing import Any

import numpy as np
from numpy.typing import NDArray

def cross_entropy(
    logits: NDArray[Any],
    target: NDArray[np.int64] | None,
    target_prob: NDArray[np.float64] | None,
    distribution: NDArray[Any] | None,
    class_weight: NDArray[np.float64] | None,
    row_weight: NDArray[np.float64] | None,
    numbers: tuple[Any, ...],
    upstream: NDArray[np.float64] | None,
    out: NDArray[Any] | None,
) -> tuple[NDArray[np.float64], float]: ...
def hvp(
    logits: NDArray[Any],
    target: NDArray[np.int64] | None,
    target_prob: NDArray[np.float64] | None,
    distribution: NDArray[Any] | None,
    class_weight: NDArray[np.float64] | None,
    row_weight: NDArray[np.float64] | None,
    numbers: tuple[Any, ...],
    upstream: NDArray[np.float64] | None,
    vector: NDArray[Any],
    out: NDArray[Any],
) -> None: ...
def softmax(logits: NDArray[Any], out: NDArray[Any], log: bool, logit_scale: float) -> None: ...
def stats(
    logits: NDArray[Any],
    target: NDArray[np.int64] | None,
    row_weight: NDArray[np.float64] | None,
    skip: int,
    logit_scale: float,
    softcap: float,
) -> tuple[NDArray[Any], ...]: ...
def scan_targets(
    target: NDArray[np.int64],
    n_classes: int,
    skip: int,
    row_weight: NDArray[np.float64] | None,
    class_weight: NDArray[np.float64] | None,
) -> tuple[int, int, float]: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def available_cpus() -> int: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> bool: ...
