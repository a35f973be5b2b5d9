"""`crossent` against the ONNX node tests of SoftmaxCrossEntropyLoss and NegativeLogLikelihoodLoss.

The onnx package makes the cases on import: a model of one node, its inputs and expected outputs,
all float32, of layouts (N, C) to (N, C, d1, …, d5) with the classes on axis 1.
"""

import numpy as np
import pytest

pytest.importorskip("onnx")
import onnx
from onnx.backend.test.case import node as node_tests

# Each module adds its cases on import. `collect_testcases` would import all operators' modules,
# some of which warn.
from onnx.backend.test.case.node import (  # noqa: F401
    negativeloglikelihoodloss,
    softmax_cross_entropy_loss,
)
from onnx.reference import ReferenceEvaluator

import crossent


def cases(op_type):
    """Return the operator's test cases, without those of its decomposition into other operators."""
    return [
        pytest.param(case, id=case.name)
        for case in node_tests._NodeTestCases
        if [node.op_type for node in case.model.graph.node] == [op_type]
    ]


CROSS_ENTROPY = cases("SoftmaxCrossEntropyLoss")
LIKELIHOOD = cases("NegativeLogLikelihoodLoss")
# ONNX computes in float32: ln(e/Σe) of logits in [0, 1] and 5 classes loses up to 12 roundings
# of values above 0.9; NumPy's sums of losses and of weights up to 22 more each (blocks of 128,
# eight lanes, then pairs). eps is two roundings.
RTOL = 28 * np.finfo(np.float32).eps


def inputs_and_options(case):
    """Return the first input, the target and `cross_entropy`'s options for a case."""
    (node,) = case.model.graph.node
    ((arrays, _),) = case.data_sets
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    options["reduction"] = options["reduction"].decode()
    input, target, *weight = arrays
    return input, target, options | ({"weight": weight[0]} if weight else {})


def evaluate(case, input):
    """Run the case's own model by ONNX's evaluator on another first input."""
    ((arrays, _),) = case.data_sets
    names = [value.name for value in case.model.graph.input]
    return ReferenceEvaluator(case.model).run(
        None, dict(zip(names, [input, *arrays[1:]], strict=True))
    )


def test_the_cases_cover_layouts_weights_ignoring_and_reductions():
    """So that an empty or thinned-out collection does not pass unnoticed."""
    for collected, count in ((CROSS_ENTROPY, 34), (LIKELIHOOD, 18)):
        assert len(collected) >= count
        seen = [inputs_and_options(parameter.values[0]) for parameter in collected]
        assert {input.ndim for input, _, _ in seen} >= {2, 3, 4, 5, 7}
        assert {options["reduction"] for _, _, options in seen} == {"mean", "sum", "none"}
        assert {"weight" in options for _, _, options in seen} == {True, False}
        ignored = {np.sign(options.get("ignore_index", -100)) for _, _, options in seen}
        assert ignored == {-1, 0, 1}


@pytest.mark.parametrize("case", CROSS_ENTROPY)
def test_softmax_cross_entropy_loss(case):
    input, target, options = inputs_and_options(case)
    ((_, (expected, *log_prob)),) = case.data_sets
    loss = crossent.cross_entropy(input, target, axis=1, **options)
    np.testing.assert_allclose(loss, expected, rtol=RTOL, strict=True)
    for expected in log_prob:
        np.testing.assert_allclose(
            crossent.log_softmax(input, axis=1), expected, rtol=RTOL, strict=True
        )


@pytest.mark.parametrize("case", LIKELIHOOD)
def test_negative_log_likelihood_loss(case):
    """`cross_entropy` of normalised log-probabilities is their negative log-likelihood.

    Their logsumexp is 0, so lse − z is −z. The cases hold numbers that are no log-probabilities;
    ONNX's evaluator, which must return the case's expected output for them, runs its model again
    on their log-softmax.
    """
    input, target, options = inputs_and_options(case)
    ((_, (expected,)),) = case.data_sets
    np.testing.assert_array_equal(evaluate(case, input)[0], expected)

    log_prob = crossent.log_softmax(input, axis=1)
    loss = crossent.cross_entropy(log_prob, target, axis=1, **options)
    np.testing.assert_allclose(loss, evaluate(case, log_prob)[0], rtol=RTOL, strict=True)


# Differences ------------------------------------------------------------------------------------


def _case(name):
    return next(p.values[0] for p in CROSS_ENTROPY + LIKELIHOOD if p.values[0].name == name)


def test_differs_mean_of_no_kept_row():
    case = _case("test_sce_mean_no_weight_ii")
    input, target, options = inputs_and_options(case)
    target = np.full_like(target, options["ignore_index"])
    assert crossent.cross_entropy(input, target, axis=1, **options) == 0
    with np.errstate(invalid="ignore"):
        loss, *_ = ReferenceEvaluator(case.model).run(None, {"x": input, "y": target})
    assert np.isnan(loss)


def test_differs_likelihood_of_numbers_that_are_not_normalised():
    """`cross_entropy` normalises, an ONNX NegativeLogLikelihoodLoss takes its input at its word."""
    case = _case("test_nllloss_NC")
    input, target, options = inputs_and_options(case)
    ((_, (expected,)),) = case.data_sets
    np.testing.assert_array_equal(expected, -input[np.arange(len(target)), target])
    lse = crossent.cross_entropy_stats(input, target).logsumexp
    loss = crossent.cross_entropy(input, target, **options)
    np.testing.assert_allclose(loss, expected + lse, rtol=RTOL)


def test_differs_target_out_of_range():
    """ONNX leaves such a target undefined; its evaluator counts −1 from the end, as NumPy does."""
    case = _case("test_sce_mean")
    input, target, _ = inputs_and_options(case)
    target[1] = -1
    with pytest.raises(IndexError, match=r"target\[1\] is -1, but there are 5 classes"):
        crossent.cross_entropy(input, target, axis=1)
    last = np.where(target == -1, 4, target)
    losses = [
        ReferenceEvaluator(case.model).run(None, {"x": input, "y": t})[0] for t in (target, last)
    ]
    assert losses[0] == losses[1]
