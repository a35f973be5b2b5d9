"""Each numbered formula of docs/maths.md, evaluated as it stands there, against `reference`.

Inputs are drawn at random as float64. Both sides are computed at 60 digits: the formula plainly,
with no care for rounding, or by a central difference of what it is the derivative of.
"""

import re
from dataclasses import replace
from pathlib import Path

import mpmath
import numpy as np
import pytest

from crossent import reference
from crossent.options import Options
from crossent.reference import exact
from crossent.rows import lower

DOC = (Path(__file__).parents[1] / "docs" / "maths.md").read_text(encoding="utf-8")

# A few hundred operations at 60 digits on numbers below 1e3 are off by less than 1e-54.
EXACT = mpmath.mpf(10) ** -50
# A central difference with step h is off by about h² and by 1e-60/h, relative to its terms.
STEP = mpmath.mpf(10) ** -20
BY_DIFFERENCE = mpmath.mpf(10) ** -36

EPSILON, Z_LOSS, SCALE, CAP = 0.25, 0.125, 1.5, 4.0
EVERY = {"label_smoothing": EPSILON, "z_loss": Z_LOSS, "logit_scale": SCALE, "softcap": CAP}

exp = np.frompyfunc(mpmath.exp, 1, 1)
ln = np.frompyfunc(mpmath.ln, 1, 1)
tanh = np.frompyfunc(mpmath.tanh, 1, 1)


@pytest.fixture(autouse=True)
def _sixty_digits():
    with mpmath.workdps(60):
        yield


@pytest.fixture(params=[2, 3, 4])
def classes(request):
    return request.param


@pytest.fixture
def rng(classes):
    return np.random.default_rng(classes)


def plan_for(logits, target, **options):
    shape, dtype = np.shape(logits), np.dtype(float)
    return lower("test", shape, 1, dtype, target, Options(**{"reduction": "sum", **options}))


def plain_softmax(z):
    return exp(z) / exp(z).sum(axis=-1, keepdims=True)


def dyadic(rng, classes, n_rows=1):
    """Draw distributions whose float64 entries sum to exactly 1."""
    return rng.multinomial(64, np.ones(classes) / classes, size=n_rows) / 64


def close(actual, expected, within=EXACT):
    actual, expected = np.atleast_1d(actual), np.atleast_1d(expected)
    assert actual.shape == expected.shape
    return (np.abs(actual - expected) <= within * (1 + np.abs(expected).max())).all()


def table(function, *shape):
    out = np.empty(shape, object)
    for at in np.ndindex(*shape):
        out[at] = function(*at)
    return out


def central(function, x):
    """∂function/∂x for every entry of x; the function returns one number or an array."""

    def one(*at):
        up, down = x.copy(), x.copy()
        up[at] += STEP
        down[at] -= STEP
        return (function(up) - function(down)) / (2 * STEP)

    return table(one, *x.shape)


@pytest.fixture
def row(rng, classes):
    """One row: weighted sums, an unnormalised and partly negative target, and their plan."""
    z, t = rng.normal(size=(2, 1, classes)) * 2
    return exact(z), exact(t), plan_for(z, t)


def test_every_label_of_the_doc_is_met():
    labels = {int(n) for n in re.findall(r"^\*\*\(M(\d+)\)\*\* ", DOC, re.M)}
    assert {int(m[1]) for name in globals() if (m := re.match(r"test_m(\d+)_", name))} == labels


# 1. From the definitions to the gradient ----------------------------------------------------------


def test_m1_softmax(row):
    z, _, _ = row
    assert close(reference.softmax(z), plain_softmax(z))


def test_m2_loss(row):
    z, t, plan = row
    assert close(reference.loss(z, plan), -(t * ln(plain_softmax(z))).sum())


def test_m3_chain_rule(row, classes):
    z, t, _ = row
    a = plain_softmax(z)[0]
    jacobian = table(lambda i, j: a[i] * (int(i == j) - a[j]), classes, classes)
    terms = -(t[0] / a)[:, None] * jacobian
    assert close(reference.chain_rule_terms(a, t[0]), terms)


def test_m4_delta(row, classes):
    z, _, _ = row
    own = [central(lambda x, i=i: reference.softmax(x)[i], z[0])[i] for i in range(classes)]
    assert all(x > 0 for x in own)  # and not −a², which the note's delta would give


def test_m5_jacobian(row, classes):
    z, _, _ = row
    a = plain_softmax(z)[0]
    stated = table(lambda i, j: a[i] * (int(i == j) - a[j]), classes, classes)
    assert close(reference.softmax_jacobian(z[0]), stated)
    by_rows = [central(lambda x, i=i: plain_softmax(x)[i], z[0]) for i in range(classes)]
    assert close(stated, by_rows, BY_DIFFERENCE)


def test_m6_sum_of_the_terms(row):
    z, t, _ = row
    a = plain_softmax(z)[0]
    columns = reference.chain_rule_terms(a, t[0]).sum(axis=0)
    assert close(columns, -t[0] + a * t.sum())


def test_m7_gradient(rng, classes):
    z, target = exact(rng.normal(size=(1, classes))), dyadic(rng, classes)
    gradient = reference.grad(z, plan_for(z, target))
    assert close(gradient, plain_softmax(z) - exact(target))
    assert close(gradient.sum(), 0)


def test_m8_gradient_for_targets_of_any_sum(row):
    z, t, plan = row
    gradient = reference.grad(z, plan)
    assert close(gradient, plain_softmax(z) * t.sum() - t)
    assert close(gradient, central(lambda x: reference.loss(x, plan), z), BY_DIFFERENCE)


def test_m9_descent(rng, classes):
    z, target = exact(rng.normal(size=(1, classes))), dyadic(rng, classes)
    plan, step = plan_for(z, target), exact(target) - plain_softmax(z)
    change = central(lambda eta: reference.loss(z + eta[0] * step, plan), exact([0.0]))
    assert close(change, [-(step**2).sum()], BY_DIFFERENCE)


# 2. The second derivative -------------------------------------------------------------------------


def test_m10_hessian(row, classes):
    z, t, plan = row
    a = plain_softmax(z)[0]
    stated = t.sum() * table(lambda j, k: a[j] * (int(j == k) - a[k]), classes, classes)
    assert close(reference.hessian(z, plan)[0], stated)


def test_m11_positive_semi_definite(rng, classes):
    z, x = exact(rng.normal(size=(1, classes))), exact(rng.normal(size=classes))
    hessian, a = reference.hessian(z, plan_for(z, [0]))[0], plain_softmax(z)[0]
    squares = table(lambda j, k: a[j] * a[k] * (x[j] - x[k]) ** 2, classes, classes).sum() / 2
    assert close(x @ hessian @ x, squares)
    assert squares > 0
    assert close(hessian @ np.ones(classes), np.zeros(classes))


# 3. The layer's own gradients ---------------------------------------------------------------------


@pytest.fixture
def head(rng, classes):
    """Three rows of two features: x, W, b, Λ(x, W, b) and G = a − â of the library."""
    x, w, b = (exact(rng.normal(size=shape)) for shape in ((3, 2), (classes, 2), classes))
    target = dyadic(rng, classes, 3)

    def summed(x, w, b):
        return -(exact(target) * ln(plain_softmax(x @ w.T + b))).sum()

    return x, w, b, summed, reference.grad(x @ w.T + b, plan_for(np.empty((3, classes)), target))


def test_m12_weights(head):
    x, w, b, summed, g = head
    assert close(g.T @ x, central(lambda w: summed(x, w, b), w), BY_DIFFERENCE)


def test_m13_bias(head):
    x, w, b, summed, g = head
    assert close(g.sum(axis=0), central(lambda b: summed(x, w, b), b), BY_DIFFERENCE)


def test_m14_features(head):
    x, w, b, summed, g = head
    assert close(g @ w, central(lambda x: summed(x, w, b), x), BY_DIFFERENCE)


# 4. Every option ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["index", "distribution", "sparse"])
def test_m15_weighted_target(rng, classes, kind):
    v, weight, prob = rng.normal(size=(1, classes)), rng.normal(size=classes), None
    last = classes - 1
    if kind == "index":
        target, dense = [last], np.eye(classes)[last]
    elif kind == "distribution":
        target = dyadic(rng, classes)
        dense = target[0]
    else:  # an id that repeats, and padding
        target, prob = [[last, -100, 0, last]], [[0.5, 9.0, 0.25, 0.125]]
        dense = np.zeros(classes)
        dense[[0, last]] += [0.25, 0.625]
    plan = plan_for(v, target, target_prob=prob, weight=weight, label_smoothing=EPSILON)
    terms = reference.rows(exact(v), plan)
    share = exact(EPSILON) / classes
    stated = exact(weight) * ((1 - EPSILON) * exact(dense) + share)
    # Dyadic numbers leave one rounding in the plan: that of ε/V, for V = 3.
    within = 2.0**-53 * float(share)
    assert close(terms.q[0], stated, within)
    assert close(terms.Q[0], stated.sum(), classes * within)


def test_m16_scale_and_softcap(rng, classes):
    v, target = exact(rng.normal(size=(1, classes)) * 3), dyadic(rng, classes)
    terms = reference.rows(v, plan_for(v, target, logit_scale=SCALE, softcap=CAP))
    x = SCALE * v / CAP
    omega = exp(-2 * np.abs(x))
    slope = 4 * SCALE * omega / (1 + omega) ** 2
    assert close(terms.z, CAP * tanh(x))
    assert close(terms.slope, slope)
    assert close(terms.slope, SCALE * (1 - tanh(x) ** 2))
    assert close(terms.curvature, -2 * SCALE / CAP * tanh(x) * slope)
    uncapped = reference.rows(v, plan_for(v, target, logit_scale=SCALE))
    assert close(uncapped.z, SCALE * v)
    assert (uncapped.slope == SCALE).all()
    assert not uncapped.curvature.any()


def test_m17_loss_with_z_loss(row):
    z, q, plan = row
    plan = replace(plan, z_loss=Z_LOSS)
    lse = mpmath.ln(exp(z).sum())
    stated = q.sum() * lse * (1 + Z_LOSS * lse) - (q * z).sum()
    assert close(reference.loss(z, plan), stated)
    assert close(reference.rows(z, plan).lse, [lse])


def test_m18_gradient_with_z_loss(row):
    z, q, plan = row
    lse = mpmath.ln(exp(z).sum())
    stated = q.sum() * (1 + 2 * Z_LOSS * lse) * plain_softmax(z) - q
    assert close(reference.grad(z, replace(plan, z_loss=Z_LOSS)), stated)


TARGET = np.array([1, -100, 0])
ROW_WEIGHT = np.array([0.5, 2.0, 1.25])


@pytest.fixture
def every(rng, classes):
    """Three rows under every option, the middle one dropped: logits, weight, plan for "mean"."""
    v, weight = rng.normal(size=(3, classes)) * 2, rng.normal(size=classes)
    options = EVERY | {"weight": weight, "sample_weight": ROW_WEIGHT, "reduction": "mean"}
    return exact(v), weight, plan_for(v, TARGET, **options)


def plain_row_losses(v, q):
    """λ of each row as (M16) and (M17) have it, with every option."""
    z = CAP * tanh(SCALE * v / CAP)
    lse = ln(exp(z).sum(axis=1))
    return q.sum(axis=1) * lse * (1 + Z_LOSS * lse) - (q * z).sum(axis=1)


def test_m19_all_rows(every, classes):
    v, weight, plan = every
    q = exact(weight) * ((1 - EPSILON) * np.eye(classes)[[1, 0, 0]] + exact(plan.off))
    share = exact(ROW_WEIGHT * [1, 0, 1]) * exact(weight)[[1, 0, 0]]
    assert abs(plan.divisor - share.sum()) <= 2.0**-51 * np.abs(share).sum()
    r = exact(ROW_WEIGHT * [1, 0, 1]) / exact(plan.divisor)

    def total(v):
        return (r * plain_row_losses(v, q)).sum()

    assert close(reference.loss(v, plan), total(v))
    assert close(reference.grad(v, plan, 3.0), 3 * central(total, v), BY_DIFFERENCE)
    each = replace(plan, reduction="none", divisor=1.0)
    u = exact([1.0, np.nan, -0.5])  # what reaches a dropped row does not matter
    by_row = (u * exact(plan.divisor))[:, None] * reference.grad(v, plan)
    by_row[1] = 0
    assert close(reference.grad(v, each, u), by_row)
    assert close(reference.loss(v, each), exact(plan.divisor) * reference.loss_rows(v, plan))


# 5. The same formulas, computed so that nothing is lost -------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 1.0, 50.0, 500.0])
def test_m20_mass_beside_the_maximum(rng, classes, margin):
    z = rng.normal(size=classes)
    z[0] = z[1:].max() + margin
    truth = reference.log_softmax(exact(z))
    with mpmath.workdps(300):  # 60 digits would lose what 1 + e^-500 holds
        assert close(truth, ln(plain_softmax(exact(z))))
        beside = -mpmath.log1p(exp(exact(z[1:]) - exact(z[0])).sum())
        assert mpmath.almosteq(truth[0], beside, rel_eps=EXACT)
    # Rounding z − m moves an exponential by (z − m)/2 ulp; sums and functions add less than 2V.
    within = (z.max() - z.min() + 2 * classes) * 2.0**-52
    floats = reference.log_softmax(z)
    assert all(abs(x - y) <= within * abs(y) for x, y in zip(floats, truth, strict=True))


@pytest.mark.parametrize("margin", [0.0, 50.0, 500.0])
def test_m21_products_of_complements(rng, classes, margin):
    z = rng.normal(size=(1, classes))
    z[0, -1] = z[0, :-1].max() + margin
    plan = plan_for(z, [classes - 1])
    truth, floats = reference.grad(exact(z), plan)[0], reference.grad(z, plan)[0]
    with mpmath.workdps(300):
        p = plain_softmax(exact(z))[0]
        stated = [*p[:-1], -p[:-1].sum()]
        assert all(mpmath.almosteq(x, y, EXACT) for x, y in zip(truth, stated, strict=True))
    within = (np.ptp(z) + 2 * classes) * 2.0**-52  # as for (M20)
    assert all(abs(x - y) <= within * abs(y) for x, y in zip(floats, truth, strict=True))


def test_m22_sum_of_others(rng, classes):
    x = rng.integers(-9, 10, size=(5, classes)).astype(float)
    np.testing.assert_array_equal(reference.sum_of_others(x), x.sum(axis=1, keepdims=True) - x)
    confident = np.array([1.0] + [1e-30] * (classes - 1))
    rest = reference.sum_of_others(confident)[0]
    assert rest == pytest.approx((classes - 1) * 1e-30, rel=classes * 2.0**-53, abs=0)


# 6. Second derivatives with every option ----------------------------------------------------------


def test_m23_hessian_with_z_loss(row, classes):
    z, q, plan = row
    p, lse = plain_softmax(z)[0], mpmath.ln(exp(z).sum())
    spread = table(lambda j, k: p[j] * (int(j == k) - p[k]), classes, classes)
    stated = q.sum() * ((1 + 2 * Z_LOSS * lse) * spread + 2 * Z_LOSS * np.outer(p, p))
    assert close(reference.hessian(z, replace(plan, z_loss=Z_LOSS))[0], stated)


def test_m24_hessian_in_the_logits(every, classes):
    v, _, plan = every
    hessian = reference.hessian(v, plan)
    for i in range(3):
        for j in range(classes):
            by_difference = central(lambda v, i=i, j=j: reference.grad(v, plan)[i, j], v)
            assert close(hessian[i, j], by_difference[i], BY_DIFFERENCE)
    assert not hessian[1].any()


def test_m25_hessian_vector_product(every, rng, classes):
    v, _, plan = every
    x = exact(rng.normal(size=(3, classes)))
    stated = 3 * np.einsum("ijk,ik->ij", reference.hessian(v, plan), x)
    x[1] = exact(np.nan)  # beside a dropped row, nothing is read
    assert close(reference.hvp(v, plan, x, 3.0), np.where([[1], [0], [1]], stated, 0))


# 7. Gradients in the other arguments --------------------------------------------------------------


def test_m26_target(rng, classes):
    v, target = exact(rng.normal(size=(2, classes))), exact(rng.random((2, classes)))
    weight = rng.normal(size=classes)
    weight[0] = 0
    options = EVERY | {"weight": weight, "reduction": "mean"}
    plan = plan_for(v, target.astype(float), **options)
    by_difference = central(lambda t: reference.loss(v, replace(plan, target=t)), target)
    actual = reference.grad_target(v, plan, 3.0)
    assert close(actual, 3 * by_difference, BY_DIFFERENCE)
    assert not actual[:, 0].any()


def test_m27_target_prob(rng, classes):
    v, prob = exact(rng.normal(size=(2, classes))), exact(rng.random((2, 3)))
    ids = np.array([[0, classes - 1, 0], [-100, 1, 1]])
    options = EVERY | {"weight": rng.normal(size=classes), "reduction": "mean"}
    plan = plan_for(v, ids, target_prob=prob.astype(float), **options)
    by_difference = central(lambda p: reference.loss(v, replace(plan, target_prob=p)), prob)
    by_difference[1, 0] = 0  # padding
    assert close(reference.grad_target_prob(v, plan, 3.0), 3 * by_difference, BY_DIFFERENCE)


def test_m28_row_weight(every):
    v, weight, plan = every
    s, share = exact(ROW_WEIGHT), exact(weight)[[1, 0, 0]] * np.array([1, 0, 1])

    def mean(s):
        return reference.loss(v, replace(plan, row_weight=s, divisor=(s * share).sum()))

    plan = replace(plan, divisor=(s * share).sum())
    actual = reference.grad_sample_weight(v, plan, 3.0)
    assert close(actual, 3 * central(mean, s), BY_DIFFERENCE)

    fixed = central(lambda s: reference.loss(v, replace(plan, row_weight=s)), s)
    actual = reference.grad_sample_weight(v, plan, 3.0, fixed_divisor=True)
    assert close(actual, 3 * fixed, BY_DIFFERENCE)

    u = exact([1.0, np.nan, -0.5])
    each = replace(plan, reduction="none", divisor=1.0)
    stated = (u * reference.loss(v, replace(each, row_weight=None)))[::2]
    actual = reference.grad_sample_weight(v, each, u)
    assert close(actual[::2], stated)
    assert actual[1] == 0


# 8. The layer's Hessian, times a direction --------------------------------------------------------


def test_m29_the_layer_s_hessian(head, rng, classes):
    """With the gradients of (M12) to (M14), by `reference.linear_grad`, moved along a direction."""
    arrays, target = head[:3], dyadic(rng, classes, 3)
    x, w, b = arrays
    plan = plan_for(np.empty((3, classes)), target)
    dx, dw, db = (exact(rng.normal(size=a.shape)) for a in arrays)
    z, g = x @ w.T + b, reference.grad(x @ w.T + b, plan)
    h = reference.hvp(z, plan, dx @ w.T + x @ dw.T + db)
    stated = h @ w + g @ dw, h.T @ x + g.T @ dx, h.sum(axis=0)
    for k in range(3):
        moved = central(
            lambda t, k=k: reference.linear_grad(
                *(a + t[()] * d for a, d in zip(arrays, (dx, dw, db), strict=True)), plan
            )[k],
            exact(0.0),
        )
        assert close(stated[k], moved[()], BY_DIFFERENCE)
