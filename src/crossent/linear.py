"""The NumPy front end of the fused head: features and weights in, loss and gradients out.

Conventions: `input` holds features x ``(…, D)``, `linear_weight` W ``(V, D)``, `linear_bias` b
``(V,)``; the logits z = x Wᵀ + b ``(…, V)`` are never held as a whole. "The rows' shape" is
`input`'s without its last axis. All three take the dtype that NumPy promotes them to; float16 and
bfloat16 (`ml_dtypes`) are computed in float32 and rounded once. The algorithm is in `head.py`, the
meaning of the options in `rows.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crossent import call, rows, runtime
from crossent import options as errors
from crossent.head import Head, LinearGrad
from crossent.numpy import LossGrad, RowStats
from crossent.options import Options, Reduction

_NAMES = ("input", "linear_weight", "linear_bias")


def linear_cross_entropy(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    divisor: float | None = None,
    target_prob: ArrayLike | None = None,
    workspace_mb: float | None = None,
) -> Any:
    """Return the cross-entropy of z = x Wᵀ + b without holding the logits.

    Parameters
    ----------
    input : array_like (…, D), or a SciPy sparse matrix (N, D)
        Features x. Sparse ones are taken as CSR and never made dense.
    linear_weight : array_like (V, D)
        W, a row for each class.
    target : array_like
        Class indices (integers, the rows' shape), probabilities (floats, the rows' shape and V),
        or, with `target_prob`, K class ids a row (the rows' shape and K).
    linear_bias : array_like (V,), optional
        b.
    weight, sample_weight, ignore_index, label_smoothing, z_loss, logit_scale, softcap, \
reduction, divisor, target_prob
        As for `cross_entropy`. Rows that are ignored or of weight 0 are left out before anything is
        multiplied.
    workspace_mb : float > 0, optional
        Memory to use beside the outputs, in units of 2**20 bytes; by default
        ``CROSSENT_WORKSPACE_MB``, else 128. One row's logits and 8 are used at least.

    Returns
    -------
    NumPy scalar, or an ndarray of the rows' shape with reduction="none"
        float64 for float64 features, weights and bias, else float32.

    Raises
    ------
    IndexError
        A target outside 0 … V − 1 that is not `ignore_index`.
    TypeError, ValueError
        Arguments that do not fit; the message says which, and what to do.

    Notes
    -----
    See docs/head.md for the algorithm, docs/maths.md for the formulas.

    Examples
    --------
    >>> features = [[1.0, 2.0], [0.5, -1.0]]
    >>> weights = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    >>> print(round(linear_cross_entropy(features, weights, [2, 0]), 4))
    0.436
    """
    given = _Given("linear_cross_entropy", input, linear_weight, linear_bias)
    plan = given.plan(
        target,
        Options(
            weight,
            sample_weight,
            ignore_index,
            label_smoothing,
            z_loss,
            logit_scale,
            softcap,
            reduction,
            divisor,
            target_prob,
        ),
    )
    return given.loss(plan, given.head(plan, workspace_mb).loss())


def linear_cross_entropy_value_and_grad(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    divisor: float | None = None,
    target_prob: ArrayLike | None = None,
    wrt: str | tuple[str, ...] | None = None,
    grad_output: ArrayLike | None = None,
    workspace_mb: float | None = None,
) -> LossGrad:
    """Return `linear_cross_entropy` and its gradients in features, weights and bias.

    Parameters
    ----------
    input, linear_weight, target, linear_bias, weight, sample_weight, ignore_index, \
label_smoothing, z_loss, logit_scale, softcap, reduction, divisor, target_prob, workspace_mb
        As for `linear_cross_entropy`.
    wrt : names out of "input", "linear_weight" and "linear_bias", optional
        The gradients that are wanted: by default all, but for that in sparse features, which would
        be dense. The others cost nothing.
    grad_output : float, or array_like of the rows' shape with reduction="none", optional
        Upstream gradient: multiplies the gradients (not the loss).

    Returns
    -------
    LossGrad
        ``loss`` as of `linear_cross_entropy`; ``grad``, a `LinearGrad` of ``input``,
        ``linear_weight`` and ``linear_bias``, each of its argument's shape in the common dtype;
        None where it was not asked for, and for a bias that is None.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `linear_cross_entropy`, and for a name in `wrt` that is none of the three.

    Notes
    -----
    With g = ∂λ/∂z, a − â for a plain row: g W, gᵀ x and Σ g; see docs/maths.md.

    Examples
    --------
    >>> found = linear_cross_entropy_value_and_grad([1.0, 2.0], [[0.0, 0.0], [0.0, 0.0]], 0)
    >>> found.grad.linear_weight
    array([[-0.5, -1. ],
           [ 0.5,  1. ]])
    """
    given = _Given("linear_cross_entropy_value_and_grad", input, linear_weight, linear_bias)
    wanted = given.wanted(wrt)
    plan = given.plan(
        target,
        Options(
            weight,
            sample_weight,
            ignore_index,
            label_smoothing,
            z_loss,
            logit_scale,
            softcap,
            reduction,
            divisor,
            target_prob,
        ),
    )
    upstream = call.upstream(given.where, plan, grad_output)
    found, grad = given.head(plan, workspace_mb).value_and_grad(upstream, wanted)
    return LossGrad(given.loss(plan, found), given.shaped(grad))


def linear_cross_entropy_hvp(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    vector: LinearGrad,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    divisor: float | None = None,
    target_prob: ArrayLike | None = None,
    grad_output: ArrayLike | None = None,
    workspace_mb: float | None = None,
) -> LinearGrad:
    """Return the Hessian of `linear_cross_entropy` in features, weights and bias times `vector`.

    Parameters
    ----------
    input, linear_weight, target, linear_bias, weight, sample_weight, ignore_index, \
label_smoothing, z_loss, logit_scale, softcap, reduction, divisor, target_prob, grad_output, \
workspace_mb
        As for `linear_cross_entropy_value_and_grad`.
    vector : LinearGrad, or three of these
        Directions of the shapes of `input`, `linear_weight` and `linear_bias`; None holds an
        argument fixed. What two directions have in common counts in both answers.

    Returns
    -------
    LinearGrad
        The products, in the common dtype; None where `vector` is. With reduction="none", of the sum
        of the rows' losses weighted by `grad_output`.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `linear_cross_entropy`, and for a `vector` that does not fit.

    Notes
    -----
    With z' = x' Wᵀ + x W'ᵀ + b' and h = (∂²λ/∂z²) z': h W + g W', hᵀ x + gᵀ x' and Σ h; see
    docs/head.md.

    Examples
    --------
    >>> frozen = LinearGrad(None, [[1.0, 0.0], [0.0, 0.0]], None)
    >>> linear_cross_entropy_hvp([1.0, 2.0], [[0.0, 0.0], [0.0, 0.0]], 0, frozen).linear_weight
    array([[ 0.25,  0.5 ],
           [-0.25, -0.5 ]])
    """
    given = _Given("linear_cross_entropy_hvp", input, linear_weight, linear_bias)
    along = given.directions(vector)
    plan = given.plan(
        target,
        Options(
            weight,
            sample_weight,
            ignore_index,
            label_smoothing,
            z_loss,
            logit_scale,
            softcap,
            reduction,
            divisor,
            target_prob,
        ),
    )
    upstream = call.upstream(given.where, plan, grad_output)
    return given.shaped(given.head(plan, workspace_mb).hvp(upstream, along))


def linear_cross_entropy_stats(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike | None = None,
    *,
    linear_bias: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_mb: float | None = None,
) -> RowStats:
    """Return what the softmax of z = x Wᵀ + b says of each row, without holding the logits.

    Parameters
    ----------
    input, linear_weight, linear_bias, workspace_mb
        As for `linear_cross_entropy`.
    target : array_like of integers, the rows' shape, optional
        Class indices.
    sample_weight, ignore_index, logit_scale, softcap
        As for `cross_entropy_stats`.

    Returns
    -------
    RowStats
        As of `cross_entropy_stats`, arrays of the rows' shape.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `linear_cross_entropy`.

    Examples
    --------
    >>> stats = linear_cross_entropy_stats([[1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]], [0])
    >>> int(stats.argmax[0]), int(stats.target_rank[0])
    (1, 1)
    """
    given = _Given("linear_cross_entropy_stats", input, linear_weight, linear_bias)
    # Without a target class 0 stands in, and what it gives is left out; weight 0 alone drops a row.
    with_target = target is not None
    options = Options(
        sample_weight=sample_weight,
        ignore_index=ignore_index if with_target else Options().ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        reduction="none",
    )
    plan = given.plan(np.zeros(given.lead, np.int64) if target is None else target, options)
    if plan.kind != "index":
        raise errors.bad_target_dtype_for_stats(given.where, plan.target.dtype)
    found = given.head(plan, workspace_mb).stats()
    lse, logprob, entropy, argmax, rank = (a.reshape(plan.rows_shape) for a in found)
    return RowStats(
        call.rounded(lse, given.compute_dtype),
        call.rounded(logprob, given.compute_dtype) if with_target else None,
        call.rounded(entropy, given.compute_dtype),
        argmax,
        rank if with_target else None,
    )


class _Layer(NamedTuple):
    """x, W and b as arrays of one dtype; x may be CSR."""

    input: Any
    linear_weight: NDArray[Any]
    linear_bias: NDArray[Any] | None


class _Given:
    """One call's layer: checked, in one dtype, the features in rows."""

    def __init__(self, where: str, input: Any, weight: Any, bias: Any) -> None:
        self.where = where
        self.sparse = hasattr(input, "tocsr")
        features = input.tocsr() if self.sparse else call.as_logits(where, "input", input)
        layer = [features, call.as_logits(where, "linear_weight", weight)]
        if bias is not None:
            layer.append(call.as_logits(where, "linear_bias", bias))
        if self.sparse and features.dtype.kind not in "fiu":
            raise errors.bad_input_dtype(where, "input", features.dtype)
        if self.sparse and features.dtype.kind in "iu":
            layer[0] = features = features.astype(np.float64)
        self._check_shapes(features, layer[1], layer[2] if bias is not None else None)
        self.dtype = layer[1].dtype
        if any(array.dtype != self.dtype for array in layer):
            self.dtype = np.result_type(*(array.dtype for array in layer))
            layer = [array.astype(self.dtype, copy=False) for array in layer]
        self.compute_dtype = np.dtype(np.float64 if self.dtype == np.float64 else np.float32)
        self.lead = features.shape[:-1]
        if not self.sparse:
            layer[0] = layer[0].reshape(-1, features.shape[-1]) if features.ndim != 2 else layer[0]
        self.layer = _Layer(layer[0], layer[1], layer[2] if bias is not None else None)
        self.shapes = features.shape, layer[1].shape, layer[1].shape[:1]

    def _check_shapes(self, features: Any, weight: NDArray[Any], bias: Any) -> None:
        where = self.where
        if features.ndim == 0:
            raise errors.bad_shape(where, "input", "(…, D)", features.shape)
        if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != features.shape[-1]:
            expected = f"(V, {features.shape[-1]}), V ≥ 1 classes for the features of this input"
            raise errors.bad_shape(where, "linear_weight", expected, weight.shape)
        if bias is not None and bias.shape != weight.shape[:1]:
            expected = f"{weight.shape[:1]}, one for each class"
            raise errors.bad_shape(where, "linear_bias", expected, bias.shape)

    def plan(self, target: ArrayLike, options: Options) -> rows.RowPlan:
        """Lower the options for the logits of this layer."""
        shape = (*self.lead, self.shapes[1][0])
        return rows.lower(self.where, shape, len(self.lead), self.compute_dtype, target, options)

    def head(self, plan: rows.RowPlan, workspace_mb: float | None) -> Head:
        """Return the head that computes it."""
        bias = self.layer.linear_bias
        return Head(
            self.where,
            self.layer.input if self.sparse else _bits(self.layer.input),
            _bits(self.layer.linear_weight),
            None if bias is None else _bits(bias),
            plan,
            self.dtype.name,
            workspace=runtime.workspace_bytes(self.where, workspace_mb),
        )

    def wanted(self, wrt: str | tuple[str, ...] | None) -> tuple[bool, bool, bool]:
        """Tell which gradients are asked for, and there to be had."""
        if wrt is None:
            wrt = _NAMES[1:] if self.sparse else _NAMES
        names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
        for name in names:
            if name not in _NAMES:
                raise errors.bad_wrt(self.where, _NAMES, name)
        if self.sparse and "input" in names:
            raise errors.sparse_gradient(self.where)
        has_bias = self.layer.linear_bias is not None
        return "input" in names, "linear_weight" in names, "linear_bias" in names and has_bias

    def directions(self, vector: Any) -> LinearGrad:
        """Return a direction in each argument as the head reads it."""
        if not isinstance(vector, tuple | list) or len(vector) != len(_NAMES):
            expected = "a LinearGrad: directions in input, linear_weight and linear_bias, or None"
            raise errors.bad_array(self.where, "vector", expected, vector)
        if self.sparse and vector[0] is not None:
            raise errors.sparse_gradient(self.where)
        found: list[NDArray[Any] | None] = []
        for name, part, shape in zip(_NAMES, vector, self.shapes, strict=True):
            if part is None:
                found.append(None)
                continue
            array = call.as_logits(self.where, f"vector.{name}", part)
            if array.shape != shape:
                raise errors.bad_shape(self.where, f"vector.{name}", f"{shape}", array.shape)
            with np.errstate(over="ignore"):
                array = array.astype(self.dtype, copy=False)
            found.append(_bits(array.reshape(-1, shape[-1]) if name == "input" else array))
        return LinearGrad(*found)

    def loss(self, plan: rows.RowPlan, found: Any) -> Any:
        """Return the loss in the compute dtype."""
        return call.loss(plan, found, self.compute_dtype)

    def shaped(self, grad: LinearGrad) -> LinearGrad:
        """Return gradients in the arguments' shapes and their dtype."""
        return LinearGrad(
            *(
                None if part is None else part.view(self.dtype).reshape(shape)
                for part, shape in zip(grad, self.shapes, strict=True)
            )
        )


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """Return bfloat16 as uint16, which is how the head reads it."""
    return array.view(np.uint16) if array.dtype.kind == "V" else array
