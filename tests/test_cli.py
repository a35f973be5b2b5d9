"""The console command: real runs, its three files, predictions, and one line for bad input."""

import io
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("polars")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("typer")
import polars as pl
from safetensors import safe_open
from sklearn.datasets import load_digits, load_iris
from sklearn.model_selection import train_test_split

import crossent
from crossent import cli
from crossent.sklearn import SoftmaxClassifier

SCALING = ("feature_offset", "feature_scale")
COMMAND = [sys.executable, "-m", "crossent"]


def command(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; return exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["crossent", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    """A folder with iris.csv and the model trained on it."""
    folder = tmp_path_factory.mktemp("iris")
    bunch = load_iris()
    names = [name.removesuffix(" (cm)").replace(" ", "_") for name in bunch.feature_names]
    kinds = [str(bunch.target_names[code]) for code in bunch.target]
    frame = pl.DataFrame(bunch.data, schema=names).with_columns(kind=pl.Series(kinds))
    frame.write_csv(folder / "iris.csv")
    assert command("train", "iris.csv", "--target", "kind", cwd=folder).returncode == 0
    return folder


def test_digits_from_the_console(tmp_path):
    """The fit is scikit-learn's data through our estimator, and the three files say so."""
    done = command("train", "--max-iter", "2000", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["crossent-digits"]
    folder = tmp_path / "crossent-digits"
    assert sorted(os.listdir(folder)) == ["metrics.json", "model.safetensors", "report.html"]

    X, y = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    train, test = np.sort(train), np.sort(test)
    same = SoftmaxClassifier(tol=1e-6, max_iter=2000).fit(X[train] / 16, y[train])
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("coef"), same.coef_)
        np.testing.assert_array_equal(file.get_tensor("intercept"), same.intercept_)
        assert json.loads(file.metadata()["crossent"])["classes"] == list(range(10))

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["data"]["scale"] == "pixel"
    assert metrics["fit"]["converged"] is True
    assert metrics["fit"]["iterations"] == same.n_iter_[0]
    assert metrics["fit"]["gradient_norm"] <= 1e-6
    assert metrics["fit"]["objective"] == same.history_[-1].objective
    assert metrics["test"]["accuracy"] == same.score(X[test] / 16, y[test]) > 0.95
    loss = crossent.cross_entropy(same.decision_function(X[test] / 16), y[test])
    assert metrics["test"]["loss"] == pytest.approx(loss, rel=1e-13)

    lines = done.stdout.splitlines()
    assert "digits: 1437 training rows, 360 test rows, 64 features, 10 classes" in lines
    assert f"{metrics['test']['accuracy']:.2%}" in lines[-2]
    assert lines[-1] == "written to crossent-digits: metrics.json, model.safetensors, report.html"
    assert len(lines) < 20
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_predictions_are_the_estimators(iris, run):
    model = iris / "crossent-iris"
    frame = pl.read_csv(iris / "iris.csv")
    names = frame.columns[:4]
    with safe_open(model / "model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in ("coef", "intercept", *SCALING)}
    same = SoftmaxClassifier()
    same.coef_, same.intercept_ = tensors["coef"], tensors["intercept"]
    same.classes_, same.n_features_in_ = np.array(["setosa", "versicolor", "virginica"]), 4
    scaled = (frame[names].to_numpy() - tensors["feature_offset"]) / tensors["feature_scale"]
    expected = same.predict_proba(scaled)

    status, out, err = run("predict", model, iris / "iris.csv")
    assert (status, err) == (0, "")
    table = pl.read_csv(io.StringIO(out))
    assert table.columns == ["class", "p_setosa", "p_versicolor", "p_virginica"]
    assert table["class"].to_list() == same.predict(scaled).tolist()
    np.testing.assert_array_equal(table[:, 1:].to_numpy(), expected)


def test_predict_reads_columns_by_name_from_any_file(iris, run, tmp_path):
    model = iris / "crossent-iris" / "model.safetensors"
    frame = pl.read_csv(iris / "iris.csv")
    _, expected, _ = run("predict", model, iris / "iris.csv")
    frame.drop("kind")[:, ::-1].with_columns(note=pl.lit("x")).write_parquet(tmp_path / "t.parquet")
    np.savez(tmp_path / "t.npz", X=frame[:, :4].to_numpy())
    for name in ("t.parquet", "t.npz"):
        assert run("predict", model, tmp_path / name) == (0, expected, "")


@pytest.mark.parametrize(
    ("labels", "column"),
    [
        ([True, False], pl.Boolean),
        ([10, -3], pl.Int64),
        ([10.0, -3.0], pl.Int64),
        (['a,"b"', "é\n"], pl.String),
    ],
)
def test_labels_keep_their_type(tmp_path, run, labels, column):
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"x": rng.normal(size=40), "y": labels * 20})
    frame.write_parquet(tmp_path / "t.parquet")
    out = tmp_path / "out"
    assert run("train", tmp_path / "t.parquet", "--target", "y", "-o", out, "-q") == (0, "", "")
    for name, read in (("p.parquet", pl.read_parquet), ("p.csv", pl.read_csv)):
        assert run("predict", out, tmp_path / "t.parquet", "-o", tmp_path / name) == (0, "", "")
        table = read(tmp_path / name)
        assert table["class"].dtype == column
        assert set(table["class"]) <= set(labels)
    written = {str(label).lower() if column == pl.Boolean else label for label in labels}
    names = {f"p_{int(x) if isinstance(x, float) else x}" for x in written}
    assert set(pl.read_parquet(tmp_path / "p.parquet").columns[1:]) == names


def test_a_model_of_images(tmp_path, run):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 3, 3), dtype=np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "t.npz", X=images, y=labels)
    out = tmp_path / "out"
    assert run("train", tmp_path / "t.npz", "-o", out, "-q")[0] == 0
    assert run("predict", out, tmp_path / "t.npz")[0] == 0
    np.savez(tmp_path / "t.npz", X=images.reshape(40, 9, 1))
    status, _, err = run("predict", out, tmp_path / "t.npz")
    assert status == 2
    assert "X has the shape (40, 9, 1); the model was trained on images (3, 3), 9 features" in err


def test_nothing_is_overwritten_unless_told(iris, run, tmp_path):
    out, table = tmp_path / "out", tmp_path / "p.csv"
    train = ("train", iris / "iris.csv", "--target", "kind", "-o", out)
    predict = ("predict", out, iris / "iris.csv", "-o", table)
    for arguments, path in ((train, out / "metrics.json"), (predict, table)):
        assert run(*arguments)[0] == 0
        path.write_text("old")
        status, printed, err = run(*arguments)
        assert (status, printed, path.read_text()) == (2, "", "old")  # before any fit
        assert "exists already" in err
        assert "--force" in err
        assert run(*arguments, "--force")[0] == 0
        assert path.read_text() != "old"


def test_the_seed_decides_the_model(iris, run, tmp_path):
    models = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        run("train", iris / "iris.csv", "--target", "kind", "-o", out, "--seed", seed)
        models.append((out / "model.safetensors").read_bytes())
    assert models[0] == models[1] != models[2]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("train absent.csv --target y", "no such file: absent.csv"),
        ("train iris.csv", "name the column of classes with --target"),
        ("train iris.csv --target nope", "has no column 'nope'"),
        ("train iris.csv --target petal_width", "numbers that are not whole (0.2, 22 distinct)"),
        ("train iris.csv --target kind -o new --test-size 0", "--test-size is 0"),
        ("train iris.csv --target kind -o new --C 0", "'C' parameter"),
        ("train iris.csv --target kind -o new --tol -1", "'tol' parameter"),
        (
            "train iris.csv --target kind -o new --scale pixel",
            "--scale pixel needs images of bytes",
        ),
        ("train iris.csv --target kind --scale log", "--scale"),
        ("train iris.csv --target kind --max-iter 0", "--max-iter"),
        ("train iris.csv --target kind -o absent/out", "absent is no folder"),
        ("train iris.csv --target kind -o iris.csv --force", "is not a folder"),
        ("predict absent iris.csv", "no such file: absent"),
        ("predict crossent-iris absent.csv", "no such file: absent.csv"),
        ("predict crossent-iris iris.txt", "unknown kind of file '.txt'"),
        ("predict crossent-iris iris.csv -o out.xlsx", "written as .csv or .parquet"),
        ("predict crossent-iris iris.csv -o absent/out.csv", "absent is no folder"),
        ("predict crossent-iris/report.html iris.csv", "cannot be read as a model"),
        ("predict crossent-iris other.csv", "lacks 3 of the model's 4 feature columns"),
        ("predict crossent-iris other.npz", "X has the shape (2, 3)"),
        ("predict crossent-iris", "Missing argument"),
        ("bogus", "No such command 'bogus'"),
        ("train --bogus", "No such option"),
        ("explain --logits 1,two --target 0", "--logits is '1,two'; give numbers separated by"),
        ("explain --logits 1,2 --target 2", "target"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(iris, run, monkeypatch, arguments, text):
    monkeypatch.chdir(iris)
    (iris / "iris.txt").write_text("a")
    (iris / "other.csv").write_text("sepal_width,b\n1,2\n")
    np.savez(iris / "other.npz", X=np.zeros((2, 3)))
    before = sorted(os.listdir(iris))
    status, _, err = run(*arguments.split())
    assert status == 2
    assert err.startswith("crossent: ")
    assert err.count("\n") == 1
    assert text in err
    assert sorted(os.listdir(iris)) == before


def test_a_control_character_cannot_reach_the_terminal(run, tmp_path):
    status, _, err = run("predict", tmp_path / "a\x1b[2J\nb", "c")
    assert (status, "\x1b" in err, err.count("\n")) == (2, False, 1)


def test_a_full_disk_leaves_nothing(iris, run, tmp_path, monkeypatch):
    def write_bytes(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pathlib.Path.write_bytes", write_bytes)
    status, _, err = run("train", iris / "iris.csv", "--target", "kind", "-o", tmp_path / "out")
    assert status == 2
    assert "No space left on device" in err
    assert os.listdir(tmp_path) == []


def test_a_reader_that_goes_away_is_no_error(iris):
    frame = pl.read_csv(iris / "iris.csv")
    pl.concat([frame] * 200).write_csv(iris / "long.csv")
    with subprocess.Popen(
        [*COMMAND, "predict", "crossent-iris", "long.csv"],
        cwd=iris,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
    (iris / "long.csv").unlink()


def test_help_and_version(run):
    assert run("--version") == (0, f"crossent {crossent.__version__}\n", "")
    for arguments in ((), ("--help",)):
        status, out, _ = run(*arguments)
        assert status == 0
        assert all(name in out for name in ("train", "predict", "explain", "check", "bench"))
    assert "--test-size" in run("train", "--help")[1]


@pytest.mark.parametrize(
    "command", ["'train'", "'bench', 'rows'", "'bench', 'torch-rows'", "'bench', 'head'"]
)
def test_help_loads_no_heavy_module(command):
    code = (
        f"import sys; sys.argv = ['crossent', {command}, '--help']\n"
        "from crossent.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'matplotlib', 'polars', 'scipy', 'sklearn', 'safetensors', 'torch', 'jax'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("module", ["typer", "polars"])
def test_a_missing_extra_is_named(run, monkeypatch, tmp_path, module):
    for name in list(sys.modules):
        if name.startswith(
            ("crossent.cli.commands", "crossent.cli.predict", "crossent.cli.tables")
        ):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    status, _, err = run("train", tmp_path / "t.csv", "--target", "b")
    assert status == 2
    assert err == f"crossent: the command line needs {module}; pip install 'crossent[cli]'\n"


def test_logits_may_begin_with_a_minus_sign(run):
    status, out, err = run("explain", "--logits", "-1,2", "--target", "0")
    assert (status, err) == (0, "")
    assert out


def test_the_exit_status_of_check(run, monkeypatch):
    import crossent.cli.check

    for agreed in (True, False):
        asked = []

        def check(*, console, quick, agreed=agreed, asked=asked):
            asked.append(quick)
            return agreed

        monkeypatch.setattr(crossent.cli.check, "check", check)
        assert run("check", "--quick")[0] == (0 if agreed else 1)
        assert asked == [True]


def test_the_installed_command_is_this_one():
    (script,) = entry_points(group="console_scripts", name="crossent")
    assert script.load() is cli.main
