"""Each numbered formula of docs/maths.md, proved with SymPy for two, three and four classes.

Symbols: z weighted sums, t desired outputs (â), a outputs. A proof rewrites every z as ln E. The
difference of two formulas is then a rational function of E and of logarithms, which SymPy decides.
`test_maths_numbers.py` holds the library's numbers against the same formulas.
"""

import re
from pathlib import Path

import pytest
import sympy as sp

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "maths.md").read_text(encoding="utf-8")


@pytest.fixture(params=[2, 3, 4])
def classes(request):
    return request.param


def symbols(name, n):
    return sp.symbols(f"{name}:{n}", real=True)


def softmax(z):
    total = sum(sp.exp(x) for x in z)
    return [sp.exp(x) / total for x in z]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def delta(i, j):
    return int(i == j)


def vanishes(expression, z=()):
    """Whether an expression in exp(z), ln and other symbols is identically zero."""
    positive = sp.symbols(f"E:{len(z)}", positive=True)
    in_e = expression.subs({x: sp.log(e) for x, e in zip(z, positive, strict=True)})
    split = in_e.replace(sp.log, lambda x: sp.expand_log(sp.log(sp.factor(x)), force=True))
    return sp.cancel(sp.together(split)) == 0


class Layer:
    """The definitions (M1) and (M2), and what follows from them up to (M8)."""

    def __init__(self, V):
        self.z, self.t = symbols("z", V), symbols("t", V)
        self.a = softmax(self.z)
        self.loss = -dot(self.t, map(sp.log, self.a))
        self.total = sum(self.t)
        self.gradient = [a * self.total - t for a, t in zip(self.a, self.t, strict=True)]  # (M8)
        self.normalised = {self.t[-1]: 1 - sum(self.t[:-1])}  # Σâ = 1


class ZLoss(Layer):
    """The definition (M17) and its gradient (M18), with q = t."""

    def __init__(self, V):
        super().__init__(V)
        self.c = sp.Symbol("c", positive=True)
        self.lse = sp.log(sum(map(sp.exp, self.z)))
        self.loss = self.loss + self.c * self.total * self.lse**2
        self.factor = self.total * (1 + 2 * self.c * self.lse)
        self.gradient = [self.factor * a - t for a, t in zip(self.a, self.t, strict=True)]


def test_every_label_of_the_doc_has_a_proof_and_every_proof_a_label():
    labels = [int(n) for n in re.findall(r"^\*\*\(M(\d+)\)\*\* ", DOC, re.M)]
    proofs = {int(m[1]) for name in globals() if (m := re.match(r"test_m(\d+)_", name))}
    assert labels == list(range(1, len(labels) + 1))
    assert proofs == set(labels)


def test_every_label_in_the_code_is_in_the_doc():
    code = (ROOT / "src" / "crossent" / "reference.py").read_text(encoding="utf-8")
    cited = set(re.findall(r"\bM\d+\b", code))
    assert len(cited) > 10
    assert cited <= set(re.findall(r"(?<=\*\*\()M\d+(?=\)\*\*)", DOC))


# 1. From the definitions to the gradient ----------------------------------------------------------


def test_m1_softmax(classes):
    layer = Layer(classes)
    assert vanishes(sum(layer.a) - 1, layer.z)
    assert all(a.is_positive for a in layer.a)


def test_m2_loss_of_a_one_hot_target(classes):
    layer = Layer(classes)
    for y in range(classes):
        one_hot = {t: delta(i, y) for i, t in enumerate(layer.t)}
        assert vanishes(layer.loss.subs(one_hot) + sp.log(layer.a[y]), layer.z)


def test_m3_chain_rule(classes):
    layer = Layer(classes)
    for z in layer.z:
        by_chain = -sum(t / a * sp.diff(a, z) for t, a in zip(layer.t, layer.a, strict=True))
        assert vanishes(sp.diff(layer.loss, z) - by_chain, layer.z)


def test_m4_delta_and_the_first_slip(classes):
    layer = Layer(classes)
    for i, x in enumerate(layer.z):
        assert [sp.diff(x, y) for y in layer.z] == [delta(i, j) for j in range(classes)]
        own = sp.diff(layer.a[i], x)
        assert vanishes(own - layer.a[i] * (1 - layer.a[i]), layer.z)
        assert not vanishes(own + layer.a[i] ** 2, layer.z)  # what 0 on the diagonal would give


def test_m5_jacobian(classes):
    layer = Layer(classes)
    e = [sp.exp(x) for x in layer.z]
    total = sum(e)
    for i, a in enumerate(layer.a):
        for j, z in enumerate(layer.z):
            quotient = (delta(i, j) * e[i] * total - e[i] * e[j]) / total**2
            assert vanishes(sp.diff(a, z) - quotient, layer.z)
            assert vanishes(quotient - a * (delta(i, j) - layer.a[j]), layer.z)


def test_m6_substitution_and_the_second_slip(classes):
    layer = Layer(classes)
    for j, (z, t, a) in enumerate(zip(layer.z, layer.t, layer.a, strict=True)):
        substituted = -sum(layer.t[i] * (delta(i, j) - a) for i in range(classes))
        assert vanishes(sp.diff(layer.loss, z) - substituted, layer.z)
        assert vanishes(substituted - (-t + a * layer.total), layer.z)
        assert not vanishes(substituted - (t - a * layer.total), layer.z)  # the minus sign dropped


def test_m7_gradient(classes):
    layer = Layer(classes)
    loss = layer.loss.subs(layer.normalised)
    gradient = [sp.diff(loss, x) for x in layer.z]
    for g, a, t in zip(gradient, layer.a, layer.t, strict=True):
        assert vanishes(g - (a - t).subs(layer.normalised), layer.z)
    assert vanishes(sum(gradient), layer.z)


def test_m8_gradient_for_targets_of_any_sum(classes):
    layer = Layer(classes)
    for z, g in zip(layer.z, layer.gradient, strict=True):
        assert vanishes(sp.diff(layer.loss, z) - g, layer.z)
    assert vanishes(sum(layer.gradient), layer.z)


def test_m9_descent(classes):
    layer = Layer(classes)
    eta, d = sp.Symbol("eta"), symbols("d", classes)
    along = {x: x + eta * y for x, y in zip(layer.z, d, strict=True)}
    change = sp.diff(layer.loss.subs(along, simultaneous=True), eta).subs(eta, 0)
    step = {y: t - a for y, t, a in zip(d, layer.t, layer.a, strict=True)}
    stated = -sum(s**2 for s in step.values())
    assert vanishes((change.subs(step) - stated).subs(layer.normalised), layer.z)


# 2. The second derivative -------------------------------------------------------------------------


def test_m10_hessian(classes):
    layer = Layer(classes)
    for j, g in enumerate(layer.gradient):
        for k, z in enumerate(layer.z):
            stated = layer.total * layer.a[j] * (delta(j, k) - layer.a[k])
            assert vanishes(sp.diff(g, z) - stated, layer.z)


def test_m11_positive_semi_definite(classes):
    a, x = symbols("a", classes), symbols("x", classes)
    pairs = [(j, k) for j in range(classes) for k in range(classes)]
    form = sum(x[j] * (delta(j, k) * a[j] - a[j] * a[k]) * x[k] for j, k in pairs)
    variance = dot(a, [y**2 for y in x]) - dot(a, x) ** 2
    squares = sum(a[j] * a[k] * (x[j] - x[k]) ** 2 for j, k in pairs) / 2
    assert sp.expand(form - variance) == 0
    assert sp.expand((variance - squares).subs(a[-1], 1 - sum(a[:-1]))) == 0


# 3. The layer's own gradients ---------------------------------------------------------------------


class Row:
    """One row of two features through a layer; Λ adds such rows up."""

    def __init__(self, V):
        self.x, self.b, self.t = symbols("x", 2), symbols("b", V), symbols("t", V)
        self.w = [symbols(f"w{j}_", 2) for j in range(V)]
        self.z = [dot(w, self.x) + b for w, b in zip(self.w, self.b, strict=True)]
        self.a = softmax(self.z)
        self.loss = -dot(self.t, map(sp.log, self.a))
        self.g = [a - t for a, t in zip(self.a, self.t, strict=True)]
        self.normalised = {self.t[-1]: 1 - sum(self.t[:-1])}

    def proves(self, parameter, stated):
        return vanishes((sp.diff(self.loss, parameter) - stated).subs(self.normalised))


def test_m12_weights(classes):
    row = Row(classes)
    for j in range(classes):
        for d in range(2):
            assert row.proves(row.w[j][d], row.g[j] * row.x[d])


def test_m13_bias(classes):
    row = Row(classes)
    assert all(row.proves(b, g) for b, g in zip(row.b, row.g, strict=True))


def test_m14_features(classes):
    row = Row(classes)
    assert all(row.proves(row.x[d], dot(row.g, [w[d] for w in row.w])) for d in range(2))


# 4. Every option ----------------------------------------------------------------------------------


def test_m15_weighted_index_target(classes):
    w, t, e = symbols("w", classes), symbols("t", classes), sp.Symbol("epsilon")
    for y in range(classes):
        for j in range(classes):
            general = w[j] * ((1 - e) * t[j] + e / classes)
            stated = (1 - e) * w[y] * delta(j, y) + e / classes * w[j]
            assert sp.expand(general.subs(t[j], delta(j, y)) - stated) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_m16_scale_and_softcap(sign):
    v, tau, kappa = sp.symbols("v tau kappa", positive=True)
    x = sign * tau * v / kappa
    omega = sp.exp(-2 * tau * v / kappa)  # e^(−2|x|)
    slope = 4 * tau * omega / (1 + omega) ** 2
    curvature = -2 * tau / kappa * sp.tanh(x) * slope
    z = kappa * sp.tanh(x)  # of sign·v: each derivative in v brings one more sign
    assert sp.simplify((sp.diff(z, v) * sign - slope).rewrite(sp.exp)) == 0
    assert sp.simplify((sp.diff(z, v, 2) - curvature).rewrite(sp.exp)) == 0
    assert sp.simplify((slope - tau * sp.sech(x) ** 2).rewrite(sp.exp)) == 0


def test_m17_loss_with_z_loss(classes):
    layer = ZLoss(classes)
    stated = layer.total * layer.lse * (1 + layer.c * layer.lse) - dot(layer.t, layer.z)
    assert vanishes(layer.loss - stated, layer.z)


def test_m18_gradient_with_z_loss(classes):
    layer = ZLoss(classes)
    for z, a, g in zip(layer.z, layer.a, layer.gradient, strict=True):
        assert vanishes(sp.diff(layer.lse, z) - a, layer.z)
        assert vanishes(sp.diff(layer.loss, z) - g, layer.z)


class ThroughSlope:
    """A row's z-loss as a function of v by any z = f(v), for r = u = 1."""

    def __init__(self, V):
        self.layer, self.v, f = ZLoss(V), symbols("v", V), sp.Function("f", real=True)
        self.slope, self.curvature = symbols("slope", V), symbols("curvature", V)
        z = [f(x) for x in self.v]
        self.loss = self.layer.loss.subs(dict(zip(self.layer.z, z, strict=True)))
        self.back = [
            dict(zip([sp.diff(f(x), x, 2) for x in self.v], self.curvature, strict=True)),
            dict(zip([sp.diff(f(x), x) for x in self.v], self.slope, strict=True)),
            dict(zip(z, self.layer.z, strict=True)),
        ]

    def derivative(self, *at):
        expression = sp.diff(self.loss, *(self.v[j] for j in at))
        for names in self.back:
            expression = expression.subs(names)
        return expression


def test_m19_gradient_in_the_logits(classes):
    row = ThroughSlope(classes)
    for j, g in enumerate(row.layer.gradient):
        assert vanishes(row.derivative(j) - g * row.slope[j], row.layer.z)


# 5. The same formulas, computed so that nothing is lost -------------------------------------------


def test_m20_mass_beside_the_maximum(classes):
    layer = ZLoss(classes)
    for top, m in enumerate(layer.z):
        mass = sum(sp.exp(x - m) for k, x in enumerate(layer.z) if k != top)
        assert vanishes(layer.lse - (m + sp.log(1 + mass)), layer.z)
        for a, x in zip(layer.a, layer.z, strict=True):
            assert vanishes(-sp.log(a) - ((m - x) + sp.log(1 + mass)), layer.z)


def others(x, j):
    return sum(y for k, y in enumerate(x) if k != j)


def test_m21_products_of_complements(classes):
    layer = ZLoss(classes)
    for j, (p, q) in enumerate(zip(layer.a, layer.t, strict=True)):
        a, b = p * others(layer.t, j), q * others(layer.a, j)
        c = 2 * layer.c * layer.lse * layer.total * p
        assert vanishes(a - b + c - layer.gradient[j], layer.z)


def test_m22_sum_of_others(classes):
    x = symbols("x", classes)
    for t in range(classes):
        for j in range(classes):
            assert sp.expand(others(x, j) - (others(x, t) + (x[t] - x[j]))) == 0


# 6. Second derivatives with every option ----------------------------------------------------------


def hessian_in_z(factor, rank_one, p, j, k):
    return factor * p[j] * (delta(j, k) - p[k]) + rank_one * p[j] * p[k]


def test_m23_hessian_with_z_loss(classes):
    layer = ZLoss(classes)
    for j, g in enumerate(layer.gradient):
        for k, z in enumerate(layer.z):
            stated = hessian_in_z(layer.factor, 2 * layer.c * layer.total, layer.a, j, k)
            assert vanishes(sp.diff(g, z) - stated, layer.z)


def test_m24_hessian_in_the_logits(classes):
    row = ThroughSlope(classes)
    layer = row.layer
    for j in range(classes):
        for k in range(j, classes):
            in_z = hessian_in_z(layer.factor, 2 * layer.c * layer.total, layer.a, j, k)
            stated = row.slope[j] * in_z * row.slope[k]
            stated += delta(j, k) * layer.gradient[j] * row.curvature[j]
            assert vanishes(row.derivative(j, k) - stated, layer.z)


def test_m25_hessian_vector_product(classes):
    p, s, x = (symbols(name, classes) for name in ("p", "slope", "x"))
    bend = symbols("bend", classes)  # g_j·∂²z_j/∂v_j²
    factor, rank_one = sp.symbols("factor rank_one")
    y = [a * b for a, b in zip(s, x, strict=True)]
    for j in range(classes):
        row = [s[j] * hessian_in_z(factor, rank_one, p, j, k) * s[k] for k in range(classes)]
        pairs = sum(p[j] * p[k] * (y[j] - y[k]) for k in range(classes) if k != j)
        stated = s[j] * (factor * pairs + rank_one * p[j] * dot(p, y)) + bend[j] * x[j]
        difference = dot(row, x) + bend[j] * x[j] - stated
        assert sp.expand(difference.subs(p[-1], 1 - sum(p[:-1]))) == 0
        py = [a * b for a, b in zip(p, y, strict=True)]
        one_pass = p[j] * y[j] * others(p, j) - p[j] * others(py, j)
        assert sp.expand(pairs - one_pass) == 0


# 7. Gradients in the other arguments --------------------------------------------------------------


def test_m26_target(classes):
    t, p, w = (sp.symbols(f"{name}:{classes}", positive=True) for name in "tpw")
    e, c, lse, r = sp.symbols("epsilon c lse r")
    q = [w[j] * ((1 - e) * t[j] + e / classes) for j in range(classes)]
    loss = r * (-dot(q, map(sp.log, p)) + c * sum(q) * lse**2)
    for j in range(classes):
        stated = r * (1 - e) * w[j] * (-sp.log(p[j]) + c * lse**2)
        assert sp.expand(sp.diff(loss, t[j]) - stated) == 0


def test_m27_target_prob(classes):
    ids, prob, t = (0, classes - 1, 0), symbols("p", 3), symbols("t", classes)
    slope = symbols("slope", classes)  # the loss is linear in t, by (M26)
    gathered = [sum(x for i, x in zip(ids, prob, strict=True) if i == j) for j in range(classes)]
    loss = dot(slope, t).subs(dict(zip(t, gathered, strict=True)))
    assert [sp.diff(loss, x) for x in prob] == [slope[i] for i in ids]


def test_m28_row_weight(classes):
    s, loss, d = (symbols(name, classes) for name in ("s", "loss", "d"))
    fixed = sp.Symbol("fixed")
    divisor = dot(s, d)
    mean = dot(s, loss) / divisor
    for i in range(classes):
        assert vanishes(sp.diff(mean, s[i]) - (loss[i] - d[i] * mean) / divisor)
        assert vanishes(sp.diff(dot(s, loss) / fixed, s[i]) - loss[i] / fixed)


# 8. The layer's Hessian, times a direction --------------------------------------------------------


def test_m29_the_layer_s_hessian(classes):
    row = Row(classes)
    x, b = symbols("dx", 2), symbols("db", classes)
    w = [symbols(f"dw{j}_", 2) for j in range(classes)]
    along = list(zip((*row.x, *row.b, *sum(row.w, ())), (*x, *b, *sum(w, ())), strict=True))

    def moves(expression):
        return sum(sp.diff(expression, of) * step for of, step in along)

    z = [dot(x, row.w[j]) + dot(row.x, w[j]) + b[j] for j in range(classes)]
    mean = dot(row.a, z)
    h = [a * (step - mean) for a, step in zip(row.a, z, strict=True)]  # (M25), plain
    for j in range(classes):
        assert vanishes(moves(row.g[j]) - h[j])  # the bias
        assert vanishes(moves(row.g[j] * row.x[0]) - (h[j] * row.x[0] + row.g[j] * x[0]))
    columns, steps = [u[0] for u in row.w], [u[0] for u in w]
    assert vanishes(moves(dot(row.g, columns)) - (dot(h, columns) + dot(row.g, steps)))
