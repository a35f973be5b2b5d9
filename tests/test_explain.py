"""`crossent explain`: the numbers it prints, that they line up, and what it refuses."""

import io
import math
import re

import numpy as np
import pytest

pytest.importorskip("rich")

from rich.console import Console

from crossent.cli.explain import explain


def printed(logits, target, width=80):
    page = io.StringIO()
    explain(logits, target, console=Console(file=page, width=width))
    return page.getvalue()


def tables(page):
    """Return the numbers below each line of column heads, a list of rows a table."""
    found = []
    for line in page.splitlines():
        if re.match(r" *(class  | j = )", line):
            found.append([])
        elif label := re.match(r" *(i = \d+|sum|\d+)(?= )", line):
            found[-1].append([float(cell) for cell in line[label.end() :].split()])
    return found


def test_the_numbers_of_the_readme_s_example():
    page = printed([2.0, 1.0, 0.1], 0)
    outputs, jacobian, terms, gradient, check = tables(page)
    e = [math.exp(z) for z in (2.0, 1.0, 0.1)]
    a = [x / sum(e) for x in e]
    a_minus_wanted = [a[0] - 1, a[1], a[2]]
    half = 0.5000001e-6  # of the last digit shown

    assert f"λ = −ln a₀ = {-math.log(a[0]):.6f}" in page
    np.testing.assert_allclose([row[0] for row in outputs], [2, 1, 0.1], atol=half)
    np.testing.assert_allclose([row[2] for row in outputs], a, atol=half)
    assert [row[3] for row in outputs] == [1, 0, 0]
    np.testing.assert_allclose(jacobian, np.diag(a) - np.outer(a, a), atol=half)
    np.testing.assert_allclose(terms[0], a_minus_wanted, atol=half)
    np.testing.assert_allclose(terms[-1], a_minus_wanted, atol=half)
    np.testing.assert_allclose(
        [row[:2] for row in gradient], np.c_[a_minus_wanted, a_minus_wanted], atol=half
    )
    # Both are within a few ulp, and no number here is above 1.
    assert max(abs(row[2]) for row in gradient) <= 4 * 2.0**-52
    np.testing.assert_allclose([row[1] for row in check], a_minus_wanted, atol=half)


def test_terms_of_classes_not_wanted_are_exactly_zero():
    lines = printed([2.0, 1.0, 0.1], 0).splitlines()
    assert [line.split()[3:] for line in lines if line.startswith("i = 1")][1] == ["0", "0", "0"]


@pytest.mark.parametrize("logits", [[2.0, 1.0, 0.1], [-3.0, 0.5, 8.0, 8.0], [40.0, 0.0], [1.0] * 5])
def test_finite_differences_agree_with_the_gradient(logits):
    # h = ∛eps·max(1, |z|). Truncation: h²/6·|λ‴|, and |λ‴| = |a(1−a)(1−2a)| < 0.0963. Rounding: a
    # few ulp of λ, over h.
    h = np.cbrt(2.0**-52) * max(1.0, *map(abs, logits))
    loss = max(logits) - min(logits) + math.log(len(logits))
    bound = 0.0963 * h**2 / 6 + 4 * 2.0**-52 * loss / h
    for target in range(len(logits)):
        errors = [row[2] for row in tables(printed(logits, target))[-1]]
        assert max(map(abs, errors)) <= bound


def test_the_note_s_slips_are_named_where_they_happen():
    page = " ".join(printed([2.0, 1.0, 0.1], 0).split())
    assert page.index("the other way round") < page.index("chain rule")
    assert page.index("chain rule") < page.index("loses its leading minus sign")


def test_a_confident_row_keeps_its_loss_and_gradient():
    page = printed([50.0, 0.0, 0.0], 0)
    assert "λ = −ln a₀ = 3.857e-22" in page
    assert "a₀ rounds to 1" in page
    assert tables(page)[3][0][1] == -3.857e-22


def test_a_loss_below_every_number_is_called_zero():
    page = printed([1000.0, 0.0], 0)
    assert "λ = −ln a₀ = 0\n" in page
    assert "rounds to 1" not in page


def test_one_class():
    page = printed([7.0], 0)
    assert "1 class, target class 0" in page
    assert "λ = −ln a₀ = 0\n" in page
    assert tables(page)[1:3] == [[[0.0]], [[0.0], [0.0]]]


@pytest.mark.parametrize(
    "logits", [[2.0, 1.0, 0.1, -4.0, 0.0, 1.5], [-200.0, 100.0, 0.0, 3.0, -9.0, 1.0]]
)
def test_six_classes_fit_in_eighty_columns(logits):
    page = printed(logits, 2)
    assert max(map(len, page.splitlines())) <= 80
    assert len([line for line in page.splitlines() if "j = 0" in line and "j = 5" in line]) == 2


def test_more_classes_are_printed_in_blocks_of_columns():
    page = printed(np.linspace(-3, 3, 20).tolist(), 19)
    assert max(map(len, page.splitlines())) <= 80
    for j in range(20):
        assert len(re.findall(rf"j = {j}\b", page)) == 2
    matrices = [table for table in tables(page)[1:-2] if len(table) == 20]
    assert sum(len(table[0]) for table in matrices) == 20


@pytest.mark.parametrize(
    ("logits", "target", "error", "text"),
    [
        ([1.0, math.nan], 0, ValueError, "logits[1] must be a finite number, got nan"),
        ([math.inf, 1.0], 0, ValueError, "logits[0] must be a finite number, got inf"),
        ([1e308, 1.0], 0, ValueError, "logits[0] is 1e+308, too far out"),
        ([], 0, ValueError, "got shape (0,)"),
        ([[1.0, 2.0]], 0, ValueError, "got shape (1, 2)"),
        ([1.0, 2.0], 2, IndexError, "target is 2, but there are 2 classes (0 to 1)"),
        ([1.0, 2.0], -1, IndexError, "target is -1"),
        ([1.0], -100, IndexError, "target is -100, but there is 1 class (0)"),
    ],
)
def test_bad_input(logits, target, error, text):
    with pytest.raises(error, match=re.escape(text)) as caught:
        printed(logits, target)
    assert str(caught.value).startswith("explain: ")
