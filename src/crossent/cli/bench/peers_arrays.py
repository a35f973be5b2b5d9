"""The peers that compute on NumPy arrays: NumPy by hand, SciPy's functions, scikit-learn's loss."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossent.cli.bench.peers import Contender, Problem, Unserved


class NumPyPeer:
    """The formulas as one writes them by hand, each array operation once and in place."""

    name = "numpy"
    title = "NumPy by hand"
    package = "numpy"
    modules: tuple[str, ...] = ("numpy",)
    how = (
        "maximum, subtract, exp, sum and divide, in place after the first; one thread, as NumPy has"
    )

    def prepare(self, threads: int) -> None:
        """Do nothing: NumPy's elementwise functions have no threads."""

    def contenders(self, problem: Problem) -> list[Contender]:
        """Return the formulas with a new output and with a kept one."""
        problem.require_dtype("float32", "float64")
        x, axis, picked = problem.logits, problem.axis, problem.picked
        n = x.dtype.type(problem.target.size)

        def shifted(out: NDArray[Any] | None) -> NDArray[Any]:
            found: NDArray[Any] = np.subtract(x, x.max(axis=axis, keepdims=True), out=out)
            return found

        def gradient(out: NDArray[Any] | None) -> tuple[Any, NDArray[Any]]:
            grad = shifted(out)
            at_target = np.take_along_axis(grad, picked, axis)
            np.exp(grad, out=grad)
            total = grad.sum(axis=axis, keepdims=True)
            loss = (np.log(total) - at_target).mean()
            grad /= total * n
            less = np.take_along_axis(grad, picked, axis) - 1 / n
            np.put_along_axis(grad, picked, less, axis)
            return loss, grad

        def loss() -> Any:
            z = shifted(None)
            at_target = np.take_along_axis(z, picked, axis)
            np.exp(z, out=z)
            return (np.log(z.sum(axis=axis, keepdims=True)) - at_target).mean()

        def softmax(out: NDArray[Any] | None, log: bool) -> NDArray[Any]:
            z = shifted(out)
            if log:
                z -= np.log(np.exp(z).sum(axis=axis, keepdims=True))
            else:
                np.exp(z, out=z)
                z /= z.sum(axis=axis, keepdims=True)
            return z

        if problem.task == "loss":
            return [Contender("none", loss)]
        kept = problem.kept
        if problem.task == "loss+gradient":
            fresh, again = (lambda: gradient(None)), (lambda: gradient(kept))
            return [Contender("fresh", fresh), Contender("kept", again)]
        if problem.task in ("softmax", "log_softmax"):
            return [Contender("fresh", lambda: softmax(None, problem.task == "log_softmax"))]
        raise Unserved("has no such function")


class SciPyPeer:
    """SciPy's logsumexp, softmax and log_softmax."""

    name = "scipy"
    title = "SciPy"
    package = "scipy"
    modules: tuple[str, ...] = ("scipy",)
    how = "scipy.special.logsumexp, softmax and log_softmax; one thread, as SciPy has"

    def prepare(self, threads: int) -> None:
        """Do nothing: these functions have no threads."""

    def contenders(self, problem: Problem) -> list[Contender]:
        """Return the function of the task."""
        from scipy import special

        problem.require_dtype("float32", "float64")
        x, axis, picked = problem.logits, problem.axis, problem.picked

        def loss() -> Any:
            at_target = np.take_along_axis(x, picked, axis)
            return (special.logsumexp(x, axis=axis, keepdims=True) - at_target).mean()

        if problem.task == "loss":
            return [Contender("none", loss)]
        if problem.task == "softmax":
            return [Contender("fresh", lambda: special.softmax(x, axis=axis))]
        if problem.task == "log_softmax":
            return [Contender("fresh", lambda: special.log_softmax(x, axis=axis))]
        raise Unserved("has no such function")


class ScikitLearn:
    """The loss inside scikit-learn's linear models."""

    name = "sklearn"
    title = "scikit-learn"
    package = "scikit-learn"
    modules: tuple[str, ...] = ("sklearn",)
    how = "sklearn._loss.HalfMultinomialLoss().loss_gradient(n_threads=N), row weights of 1/N"

    def prepare(self, threads: int) -> None:
        """Do nothing: each call says how many threads it uses."""

    def contenders(self, problem: Problem) -> list[Contender]:
        """Return the loss, or loss and gradient with a new output and with a kept one."""
        from sklearn._loss import HalfMultinomialLoss

        x, threads = problem.logits, problem.threads
        problem.require_dtype("float32", "float64")
        if x.ndim != 2 or problem.axis % 2 != 1:
            raise Unserved("takes rows (N, V) only")
        n, classes = x.shape
        multinomial = HalfMultinomialLoss(n_classes=classes)
        y = problem.target.astype(x.dtype)
        weight = np.full(n, 1 / n, x.dtype)

        def loss() -> Any:
            return multinomial.loss(y, x, sample_weight=weight, n_threads=threads).sum()

        def gradient(out: NDArray[Any] | None) -> tuple[Any, NDArray[Any]]:
            losses, grad = multinomial.loss_gradient(
                y, x, sample_weight=weight, gradient_out=out, n_threads=threads
            )
            return losses.sum(), grad

        if problem.task == "loss":
            return [Contender("none", loss)]
        if problem.task == "loss+gradient":
            kept = problem.kept
            fresh, again = (lambda: gradient(None)), (lambda: gradient(kept))
            return [Contender("fresh", fresh), Contender("kept", again)]
        raise Unserved("has no such function")
