"""The history of a fit: what each iteration reached, and whether it is the last."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from crossent._newton import Objective, Vector


class FitRecord(NamedTuple):
    """One line of a fit's history."""

    iteration: int
    objective: float
    gradient_norm: float
    seconds: float


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended, and its history from iteration 0, the start, onwards."""

    theta: Vector
    history: list[FitRecord]


class Monitor:
    """A solver's callback: records each iterate and stops at the tolerance or when told to."""

    def __init__(
        self, objective: Objective, tol: float, notify: Callable[[FitRecord, Vector], bool]
    ) -> None:
        self.objective = objective
        self.tol = tol
        self.notify = notify
        self.history: list[FitRecord] = []
        self.stopped = False
        self.start = time.perf_counter()

    def __call__(self, theta: Vector) -> None:
        value, grad = self.objective.value_and_grad(theta)
        record = FitRecord(
            iteration=len(self.history),
            objective=value,
            gradient_norm=float(np.max(np.abs(grad), initial=0.0)),
            seconds=time.perf_counter() - self.start,
        )
        if not np.isfinite([record.objective, record.gradient_norm]).all():
            raise self.overflow(f"the objective ({value}) or its gradient", record.iteration)
        self.history.append(record)
        try:
            told_to_stop = self.notify(record, theta)
        except StopIteration:
            told_to_stop = True
        self.stopped = told_to_stop or record.gradient_norm <= self.tol
        if self.stopped:
            raise StopIteration

    @staticmethod
    def overflow(what: str, iteration: int) -> ValueError:
        return ValueError(
            f"{what} is not finite at iteration {iteration}: the features, or the sample weights, "
            "are too large for their dtype; scale the features, for example with StandardScaler"
        )
