from typing import Any

import numpy as np
from numpy.typing import NDArray

def cross_entropy(
    logits: NDArray[Any], plan: tuple[Any, ...], out: NDArray[Any] | None, each: bool
) -> NDArray[np.float64] | float: ...
def hvp(
    logits: NDArray[Any], plan: tuple[Any, ...], vector: NDArray[Any], out: NDArray[Any]
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
def matmul(
    a: NDArray[Any],
    b: NDArray[Any],
    out: NDArray[Any],
    accumulate: bool,
    bias: NDArray[Any] | None,
    may_round: bool = False,
) -> None: ...
def thin_head(
    x: NDArray[Any],
    w: NDArray[Any],
    bias: NDArray[Any] | None,
    plan: tuple[Any, ...],
    each: bool,
    dx: NDArray[Any] | None,
    dw: NDArray[Any] | None,
    db: NDArray[Any] | None,
    accumulate: bool,
) -> NDArray[np.float64] | float: ...
def thin_hvp(
    x: NDArray[Any],
    w: NDArray[Any],
    bias: NDArray[Any] | None,
    plan: tuple[Any, ...],
    along_w: NDArray[Any] | None,
    along_bias: NDArray[Any] | None,
    dw: NDArray[Any] | None,
    db: NDArray[Any] | None,
    accumulate: bool,
) -> None: ...
def thin(n_classes: int, n_features: int, wide: bool) -> bool: ...
def copy_bytes(out: NDArray[np.uint8], source: NDArray[np.uint8], streaming: bool) -> None: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def available_cpus() -> int: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> bool: ...
