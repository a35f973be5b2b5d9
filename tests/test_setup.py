"""The set-up, the README's examples and the shape of the source tree."""

import ast
import doctest
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import crossent

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "crossent"
MODULES = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "native").rglob("*") if path.suffix in (".h", ".cpp"))

# The package --------------------------------------------------------------------------------------


def test_public_names():
    assert sorted(crossent.__all__) == [
        "LinearGrad",
        "LossGrad",
        "RowStats",
        "cross_entropy",
        "cross_entropy_hessian",
        "cross_entropy_hvp",
        "cross_entropy_stats",
        "cross_entropy_value_and_grad",
        "get_num_threads",
        "linear_cross_entropy",
        "linear_cross_entropy_hvp",
        "linear_cross_entropy_stats",
        "linear_cross_entropy_value_and_grad",
        "log_softmax",
        "set_num_threads",
        "softmax",
        "softmax_jacobian",
    ]
    assert all(hasattr(crossent, name) for name in crossent.__all__)


def imported_with_crossent():
    code = (
        "import sys, numpy\nbefore = set(sys.modules)\nimport crossent\n"
        "print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_import_brings_numpy_and_nothing_heavier():
    packages = {name.partition(".")[0] for name in imported_with_crossent()}
    # multiprocessing, of the standard library, gives __main__ a second name.
    assert packages - sys.stdlib_module_names - {"numpy", "__mp_main__"} == {"crossent"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_the_core_imports_no_framework_anywhere():
    # Not at the top of a file and not inside a function; mpmath makes exact.py's exact numbers.
    core = {name.partition(".")[2] for name in imported_with_crossent() if "crossent." in name}
    allowed = sys.stdlib_module_names | {"crossent", "numpy"}
    for path in MODULES:
        if ".".join(path.relative_to(PACKAGE).with_suffix("").parts) in core:
            extra = {"mpmath"} if path.stem == "exact" else set()
            assert set(imports_of(path)) <= allowed | extra, path


def test_frameworks_stay_in_their_rooms():
    timed = r"|cli/bench/peers_frameworks"
    rooms = {
        "torch": r"torch/|distributed|triton_" + timed,
        "jax": r"jax\.py" + timed,
        "triton": r"triton_",
    }
    for path in MODULES:
        for framework in set(imports_of(path)) & set(rooms):
            assert re.match(rooms[framework], path.relative_to(PACKAGE).as_posix()), path


def test_no_module_is_named_after_nothing_or_after_a_framework():
    names = {path.stem for path in ROOT.glob("[!.]*/**/*.py") if "build" not in path.parts}
    assert not names & {"utils", "util", "helpers", "common", "misc", "torch"}


@pytest.mark.parametrize("option", ["label_smoothing", "ignore_index", "sample_weight"])
def test_kernels_know_no_option_by_name(option):
    assert [path for path in NATIVE if option in path.read_text("utf-8")] == []


def test_kernels_know_no_python():
    aware = {path.name for path in NATIVE if re.search(r"nanobind/|Python\.h", path.read_text())}
    assert aware == {"module.cpp"}


def test_the_build_keeps_nan_and_brings_no_openmp():
    build = (ROOT / "CMakeLists.txt").read_text("utf-8")
    assert not re.search(r"^[^#\n]*(-ffast-math|-Ofast|-ffinite-math|openmp)", build, re.I | re.M)


def test_files_stay_short():
    lengths = {
        path: len(path.read_text("utf-8").splitlines())
        for path in [*MODULES, *NATIVE, *ROOT.glob("tests/*.py")]
    }
    assert {path.name: n for path, n in lengths.items() if n > 500} == {}
    assert sorted(lengths[path] for path in MODULES)[len(MODULES) // 2] <= 150
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) <= 50


# The README and the pages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "n_blocks"), [("README.md", 2), ("docs/head.md", 2), ("docs/torch.md", 3)]
)
def test_the_examples_of_a_page(page, n_blocks):
    pytest.importorskip("sklearn" if page == "README.md" else "torch")
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"```pycon\n(.*?)```", text, re.S)
    assert len(blocks) == n_blocks
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page, None, 0)
    assert len(example.examples) >= 10
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0


def test_the_readme_s_links():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text("utf-8")):
            assert link.startswith("https://") or (ROOT / link).exists(), f"{name}: {link}"


# The set-up ---------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
    """Return a function that runs the preflight on a machine with just these programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in ("sh", "mktemp", "rm", "cat", "basename"):
        (programs / tool).symlink_to(shutil.which(tool))

    def run(environment=None, **scripts):
        for name, body in scripts.items():
            script = programs / name.replace("_", ".").replace("cxx", "c++")
            script.write_text(f"#!/bin/sh\n{body}\n")
            script.chmod(0o755)
        return subprocess.run(
            [programs / "sh", ROOT / "tools" / "preflight.sh"],
            env={"PATH": str(programs)} | (environment or {}),
            capture_output=True,
            text=True,
        )

    return run


PYTHON = f'exec "{sys.executable}" "$@"'
OLD = f"""[ "$1" = --version ] && echo Python 3.9.2 && exit
exec "{sys.executable}" -c 'import sys; sys.version_info = (3, 9, 2); exec(sys.argv[2])' "$@" """
COMPILER = "exit 0"


def test_preflight_prints_the_python_it_found(machine, tmp_path):
    found = machine(python3=PYTHON, cxx=COMPILER)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"{tmp_path}/bin/python3\n"


def test_preflight_passes_over_an_old_python(machine, tmp_path):
    found = machine(python3=OLD, python3_12=PYTHON, cxx=COMPILER)
    assert (found.returncode, found.stdout) == (0, f"{tmp_path}/bin/python3.12\n")


def one_line(found):
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.count("\n") == 1
    return found.stderr


def test_preflight_without_python(machine):
    line = one_line(machine(cxx=COMPILER))
    assert "there is no python3" in line
    assert "apt install python3 python3-venv python3-dev" in line
    assert "dnf install python3 python3-devel" in line


def test_preflight_with_an_old_python_only(machine):
    line = one_line(machine(python3=OLD, cxx=COMPILER))
    assert "Python 3.11 or newer is needed, but python3 is Python 3.9.2" in line
    assert "apt install python3.11 " in line


def test_preflight_does_not_replace_the_python_that_was_asked_for(machine):
    line = one_line(machine({"PYTHON": "python3.9"}, python3=PYTHON, python3_9=OLD, cxx=COMPILER))
    assert "python3.9 is Python 3.9.2" in line


def test_preflight_without_venv(machine, tmp_path):
    (tmp_path / "ensurepip.py").write_text("raise ModuleNotFoundError('ensurepip')")
    line = one_line(machine({"PYTHONPATH": str(tmp_path)}, python3=PYTHON, cxx=COMPILER))
    assert "has no venv module" in line
    assert "apt install python3-venv" in line


def test_preflight_without_headers(machine, tmp_path):
    fake = f"import sysconfig\nsysconfig.get_path = lambda name: {str(tmp_path)!r}\n"
    (tmp_path / "sitecustomize.py").write_text(fake)
    environment = {"PYTHONPATH": str(tmp_path)}
    line = one_line(machine(environment, python3=OLD, python3_13=PYTHON, cxx=COMPILER))
    assert "has no headers (Python.h)" in line
    assert "apt install python3.13-dev" in line
    assert "dnf install python3.13-devel" in line


@pytest.mark.parametrize("scripts", [{}, {"cxx": "exit 1"}])
def test_preflight_without_a_compiler(machine, scripts):
    line = one_line(machine(python3=PYTHON, **scripts))
    assert "no C++17 compiler" in line
    assert "apt install g++" in line
    assert "dnf install gcc-c++" in line


def test_preflight_uses_the_compiler_that_was_asked_for(machine):
    wanted = machine({"CXX": "ccache g++"}, python3=PYTHON, ccache='test "$1" = g++')
    assert wanted.returncode == 0
    line = one_line(machine({"CXX": "other"}, python3=PYTHON, cxx=COMPILER))
    assert "no C++17 compiler (other)" in line


def test_preflight_names_everything_that_is_missing(machine):
    assert machine().stderr.count("apt install") == 2


def test_make_test_lets_no_installed_peer_be_skipped():
    modules = {"scikit-learn": "sklearn"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wanted = {
        modules.get(name, name)
        for requirement in [
            *project["dependency-groups"]["test"],
            *project["project"]["optional-dependencies"]["cli"],
            *project["project"]["optional-dependencies"]["sklearn"],
        ]
        if (name := re.match(r"[\w-]+", requirement)[0]) not in ("crossent", "pytest")
    }
    required = re.search(r"^TEST_REQUIRE := (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert set(required[1].split(",")) == wanted


@pytest.mark.parametrize(
    "source",
    [
        'pytest.importorskip("absent")\ndef test_it(): pass',
        'def test_it(): pytest.importorskip("absent.part")',
        '@pytest.fixture\ndef peer(): pytest.importorskip("absent")\ndef test_it(peer): pass',
    ],
    ids=["module", "test", "fixture"],
)
def test_a_required_peer_that_is_skipped_fails(tmp_path, source):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text("utf-8"))
    (tmp_path / "test_peer.py").write_text(f"import pytest\n{source}\n")

    def run(required):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tmp_path],
            env=os.environ
            | {"CROSSENT_TEST_REQUIRE": required, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    # Status 5: all that was found was skipped while it was collected.
    assert run("torch").returncode in (0, 5)
    failed = run("torch,absent")
    assert failed.returncode in (1, 2)
    assert "CROSSENT_TEST_REQUIRE names absent" in failed.stdout
