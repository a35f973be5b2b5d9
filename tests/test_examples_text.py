"""Text classification: files stay apart, nothing is made dense, words are those of the training."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("sklearn")
from scipy import sparse

PAGE = Path(__file__).parents[1] / "docs" / "text-classification.md"


@pytest.fixture(scope="module")
def text(example):
    with example("text_classification") as module:
        yield module


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Three packages of ten files: words of the package, of all, and of one file alone."""
    folder, rng = tmp_path_factory.mktemp("library"), np.random.default_rng(0)
    files = {}
    for package in ("ant", "bee", "cat"):
        files[package] = []
        for i in range(10):
            own = [f"{package}_word", f"{package}_other", f"only_{package}{i}"]
            lines = []
            for _ in range(40):
                lines.append(" ".join(rng.choice([*own, "common", "shared", "the"], 6)))
            path = folder / f"{package}{i}.py"
            path.write_text("\n".join(lines), encoding="utf-8")
            files[package].append(path)
    return files


@pytest.fixture(scope="module")
def parts(text, library):
    return text.cut(library, 10, 4, 0).split(0)


@pytest.fixture(scope="module")
def result(text, parts):
    return text.fit(*parts, 0)


def test_pieces_of_a_file_stay_together(text, library, parts):
    train, test = parts
    assert not {*train.file} & {*test.file}
    assert {*train.package} == {*test.package} == {*library}
    assert len(train) + len(test) == 3 * 10 * 4
    train, test = text.cut(library, 10, 4, 0, apart=True).split(0)
    assert {*train.file} & {*test.file}


def test_cut_takes_whole_pieces_and_few_of_a_file(text, library):
    pieces = text.cut(library, 10, 3, 0)
    assert len(pieces) == 3 * 10 * 3
    for piece, package, file in zip(pieces.text, pieces.package, pieces.file, strict=True):
        assert piece.count("\n") == 9
        assert piece in Path(file).read_text("utf-8")
        assert Path(file).name.startswith(package)


def test_words_are_learnt_from_training_files_alone(result, parts):
    train, test = parts
    known = {*result.words.get_feature_names_out()}
    for file in {*train.file}:
        assert f"only_{Path(file).stem}" in known
    for file in {*test.file}:
        assert f"only_{Path(file).stem}" not in known
    assert result.features.shape == (len(train), len(known))
    assert result.test_features.shape == (len(test), len(known))


def test_c_is_that_of_the_least_held_out_loss(result):
    best = min(result.path, key=lambda step: step[1])
    assert best[0] == result.model.C
    assert len(result.path) >= 2


def test_telling_words_are_the_package_s_own(result, parts):
    for package in ("ant", "bee", "cat"):
        assert {*result.telling(parts[0], package, 2)} == {f"{package}_word", f"{package}_other"}
    assert (result.model.predict(result.test_features) == parts[1].package).mean() > 0.9


def test_nothing_is_made_dense(text, parts, monkeypatch):
    def guarded(plain):
        def convert(self, *args, **kwargs):
            # of words by words the classifier may make what it likes
            assert self.shape[0] == self.shape[1], f"{self.shape} made dense"
            return plain(self, *args, **kwargs)

        return convert

    for kind in (sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, sparse.csc_array):
        for name in ("toarray", "todense"):
            monkeypatch.setattr(kind, name, guarded(getattr(kind, name)))
    result = text.fit(*parts, 0)
    assert sparse.issparse(result.features)
    assert result.features.format == "csr"
    assert text.judge(result.model, result.test_features, parts[1])[1] > 0.9


def test_command_line_and_page(text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "figure.svg"
    given = ["--packages", "asyncio", "email", "xml", "--most", "3", "--plot", str(figure)]
    text.main(given)
    out = capsys.readouterr().out
    page = PAGE.read_text(encoding="utf-8")
    assert re.match(r"\d+ pieces of \d+ files to train on, .*, 0 files in both\n", out)
    assert out.count("← chosen") == 1
    for line in ("test pieces  found  most telling words", "accuracy    loss\nSoftmaxClassifier "):
        assert line in out
        assert line in page
    assert "most telling words" in figure.read_text(encoding="utf-8")


def test_the_library_has_no_tests_and_no_other_package(text):
    files = text.library_files()
    assert {"asyncio", "email", "json"} <= {*files} <= {*sys.stdlib_module_names}
    assert not any(
        part in text.TESTS for paths in files.values() for p in paths for part in p.parts
    )


def test_says_what_is_wrong_before_it_fits(text, tmp_path, capsys):
    for given, message in (
        (["--packages", "asyncio", "email", "nothing"], "nothing"),
        (["--packages", "asyncio", "email"], "three or more"),
        (["--lines", "0"], "less than 1"),
        (["--plot", f"{tmp_path}/a/b"], "no folder"),
    ):
        with pytest.raises(SystemExit):
            text.main(given)
        assert message in " ".join(capsys.readouterr().err.split())


def test_says_what_it_needs(example, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit, match="needs rich"), example("text_classification"):
        pass
