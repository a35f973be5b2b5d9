"""More than 2³¹ logits, with CROSSENT_TEST_HUGE=1: 6 GB of memory, two minutes of two cores."""

import os

import numpy as np
import pytest

import crossent

pytestmark = pytest.mark.skipif(
    not os.environ.get("CROSSENT_TEST_HUGE"), reason="CROSSENT_TEST_HUGE is not set"
)

SHAPE = N, V = 40_000, 60_000
assert N * V > 2**31


@pytest.mark.parametrize("order", ["C", "F"])
def test_many_rows(order):
    logits = np.empty(SHAPE, np.float16, order=order)
    logits[...] = np.linspace(-3, 3, V, dtype=np.float16)
    logits[:, 7] = np.arange(N) % 8
    target = np.arange(N) % V
    picked = [0, 1, 2**31 // V, 2**31 // V + 1, N - 1]
    rows = logits[picked].copy()
    loss, grad = crossent.cross_entropy_value_and_grad(logits, target, reduction="none", out=logits)
    wanted = crossent.cross_entropy_value_and_grad(rows, target[picked], reduction="none")
    assert loss[picked].tobytes() == wanted.loss.tobytes()
    assert np.ascontiguousarray(grad[picked]).tobytes() == wanted.grad.tobytes()


def test_many_classes():
    n_classes = 2**31 + 16
    logits = np.zeros(n_classes, np.float16)
    target = n_classes - 3
    logits[target] = 10
    loss = crossent.cross_entropy(logits, target)
    exact = np.log1p((n_classes - 1) * np.exp(-10.0))
    assert abs(float(loss) - exact) <= 4 * np.spacing(np.float32(exact))
    with pytest.raises(IndexError, match=f"there are {n_classes} classes"):
        crossent.cross_entropy(logits, n_classes)
