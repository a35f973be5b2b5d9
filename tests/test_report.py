"""report.html: self-contained, escaped, right numbers, readable for few and for many classes."""

import base64
import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("polars")
pytest.importorskip("sklearn")
from matplotlib.image import imread
from rich.console import Console

from crossent.cli.report_html import percent, table
from crossent.cli.train import TrainSettings, train

EVIL = "<script>alert(\"x\")</script> & 'more'"
VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """Elements with their attributes, tables as text, and a check that tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.tables, self.text = [], [], [], ""
        self.captions = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.captions.append("")
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "caption" in self.open:
            self.captions[-1] += data
        if self.open and ("td" in self.open or "th" in self.open):
            self.tables[-1][-1][-1] += data

    def table(self, caption):
        """Return the rows under the header of the one table whose caption begins so."""
        (rows,) = (
            rows
            for rows, text in zip(self.tables, self.captions, strict=True)
            if text.startswith(caption)
        )
        return rows[1:]

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(tmp_path, x, y, **settings):
    np.savez(tmp_path / "t.npz", X=x, y=y)
    settings = {"source": str(tmp_path / "t.npz"), "output": tmp_path / "out"} | settings
    folder = train(TrainSettings(**settings), Console(quiet=True)).folder
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def clusters(classes, rows, spread, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    return rng.normal(size=(classes, 5))[y] + spread * rng.normal(size=(rows, 5)), y


@pytest.fixture(scope="module")
def digits_page(tmp_path_factory):
    folder = train(
        TrainSettings("digits", output=tmp_path_factory.mktemp("digits") / "out"),
        Console(quiet=True),
    ).folder
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_nothing_is_fetched(digits_page):
    text, page = digits_page
    references = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "srcset", "href", "poster", "action", "data")
    ]
    assert len(references) > 10
    assert all(reference.startswith("data:image/") for reference in references)
    assert not page.of("script")
    assert not page.of("link")
    assert not re.search(r"@import|url\(", text)
    for reference in references:
        content = base64.b64decode(reference.partition("base64,")[2], validate=True)
        assert not re.search(rb'(xlink:)?href="(?!#)', content)


def test_accessible_and_for_small_screens(digits_page):
    text, page = digits_page
    assert page.of("html")[0]["lang"] == "en"
    assert "width=device-width" in page.of("meta")[1]["content"]
    assert all(len(image["alt"]) > 10 for image in page.of("img"))
    assert len({image["alt"] for image in page.of("img")}) == len(page.of("img"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert all("scope" in cell for cell in page.of("th"))
    assert "prefers-color-scheme: dark" in text
    assert len(page.of("source")) == 2
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1
    assert tags.count("h2") == 5


def test_mistakes_are_shown_as_their_images(digits_page, tmp_path):
    from sklearn.datasets import load_digits

    _, page = digits_page
    images = [image for image in page.of("img") if image["class"] == "example"]
    assert len(images) == 12
    bunch = load_digits()
    for image in images:
        row, true, answer = re.fullmatch(r"Row (\d+): (\d), taken for (\d)", image["alt"]).groups()
        assert bunch.target[int(row) - 1] == int(true) != int(answer)
        (tmp_path / "p.png").write_bytes(base64.b64decode(image["src"].partition("base64,")[2]))
        shown = imread(tmp_path / "p.png")[:, :, 0]
        np.testing.assert_allclose(shown, bunch.images[int(row) - 1] / 16, atol=1 / 255)


def test_confusion_matrix_of_few_classes(tmp_path):
    x, y = clusters(4, 400, 0.9)
    _, page = page_of(tmp_path, x, y)
    matrix = np.array([row[1:] for row in page.table("Test rows by true class")], int)
    assert matrix.shape == (4, 4)
    assert matrix.sum(axis=1).tolist() == [20] * 4
    accuracy = np.trace(matrix) / 80
    assert percent(accuracy) in page.text
    confusions = page.table("Commonest confusions")
    assert sum(int(row[2]) for row in confusions) == 80 - np.trace(matrix)
    recalls = [row[2] for row in page.table("Each class")]
    assert recalls == [percent(matrix[k, k] / 20) for k in range(4)]


def test_many_classes_are_summarised(tmp_path):
    x, y = clusters(120, 1200, 0.6)
    text, page = page_of(tmp_path, x, y)
    assert len(text) < 1_000_000
    assert max(len(row) for table in page.tables for row in table) <= 5
    tables = zip(page.tables, page.captions, strict=True)
    assert max(len(rows) for rows, text in tables if "iteration" not in text) <= 16
    assert any("Confusion matrix as an image" in image["alt"] for image in page.of("img"))


def test_names_are_escaped(tmp_path):
    import polars as pl

    x, y = clusters(3, 120, 1.0)
    columns = {f"{EVIL}{place}": x[:, place] for place in range(5)}
    frame = pl.DataFrame(columns | {"kind": [f"{EVIL}{code}" for code in y]})
    source = tmp_path / "a<b>&.parquet"
    frame.write_parquet(source)
    text, page = page_of(tmp_path, x, y, source=str(source), target="kind")
    assert not page.of("script")
    assert any(f"{EVIL}2" in rows[0] for rows in page.tables)
    assert f"'{source}' --target" in page.text
    assert "a<b>&" in page.text
    assert EVIL not in text


def test_contributions_name_the_features_that_misled(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1200, 12)), np.arange(1200) % 2
    x[:, 2] = 0
    x[:, 1] = 10 * y
    x[::15, 1] = 10 * (1 - y[::15])  # feature x1 tells the class, but in every 15th row it lies
    _, page = page_of(tmp_path, x, y)
    reasons = [row[4] for row in page.tables[-2][1:]]
    assert reasons
    assert all(reason.startswith("x1 = ") for reason in reasons)
    assert not any("x2 " in reason for reason in reasons)  # constant
    for reason in reasons:
        shown = [float(number) for number in re.findall(r"\(([+-].*?)\)", reason)]
        assert shown == sorted(shown, reverse=True)
        assert len(shown) == 4


def test_no_mistake_and_no_convergence_are_said(tmp_path):
    x, y = clusters(2, 60, 0.01)
    _, page = page_of(tmp_path, x, y, max_iter=1)
    assert "Every test row is classified correctly." in page.text
    assert "No class is taken for another." in page.text
    assert "Not converged. The fit stopped after 1 iteration with" in page.text
    assert "What to do: raise --max-iter." in page.text
    _, page = page_of(tmp_path, x, y, force=True)
    assert "Not converged" not in page.text
    _, page = page_of(tmp_path, x, y, force=True, tol=0.0)
    assert "no step lowers the loss further, a --tol of" in page.text


def test_the_choice_of_the_penalty_is_shown(tmp_path):
    x, y = clusters(3, 150, 0.9)
    choice = {"select_penalty": True, "Cs": (0.01, 1.0, 100.0), "folds": 3}
    text, page = page_of(tmp_path, x, y, **choice)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    selection = metrics["penalty_selection"]
    rows = page.table("✓ is the chosen C")
    assert [row[0].removesuffix(" ✓") for row in rows] == ["0.01", "1", "100"]
    (chosen,) = (row for row in rows if row[0].endswith("✓"))
    assert chosen[0] == f"{selection['chosen_C']:g} ✓"
    assert chosen[1] == f"{min(point['loss'] for point in selection['path']):.4f}"
    assert f"C = {selection['chosen_C']:g} was chosen" in page.text
    assert "Choice of the penalty" in page.text
    assert len([image for image in page.of("img") if image["class"] == "chart wide"]) == 1
    assert "chosen by 3-fold cross-validation" in page.text
    assert "12 fits; this one" in page.text
    assert not re.search(r"@import|url\(", text)


def test_the_iterations_are_a_table(tmp_path):
    x, y = clusters(3, 150, 0.9)
    _, page = page_of(tmp_path, x, y, max_iter=3)
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["fit"]["history"]
    rows = page.table("Loss with penalty")
    assert [row[:2] for row in rows] == [
        [str(record["iteration"]), f"{record['objective']:.6f}"] for record in history
    ]
    assert len(rows) == 4


def test_the_command_that_was_run_is_shown(tmp_path):
    x, y = clusters(2, 60, 0.5)
    _, page = page_of(tmp_path, x, y, C=0.25, seed=3)
    assert f"crossent train {tmp_path / 't.npz'} --seed 3 --C 0.25" in page.text


def test_tables_escape_every_cell():
    page = Page(table(EVIL, [EVIL, EVIL], [[EVIL, EVIL]], text_columns=(1,)))
    assert page.tables == [[[EVIL, EVIL], [EVIL, EVIL]]]
    assert [tag for tag, _ in page.elements].count("script") == 0
    assert unquote(page.text).count("script") == 10
