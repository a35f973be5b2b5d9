"""Break one line at a time and demand that the named test notices: `make faults`.

    python tools/faults.py                  every fault of tests/faults.toml
    python tools/faults.py rows.py -k sign  those whose file or text holds each word

The faults go into a copy of the tree under build/faults, never into the tree itself. A fault in
Python costs one run of its test; one in C++ also a rebuild, of the instruction set in use alone. A
fault with an `isa` of its own is for code of that one: emulated where this machine lacks it.
Exit status 1 when a named test fails without a fault or passes with it, or when a fault's line is
not found exactly once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path
from typing import Any

from crossent import _native

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "faults"
TREE, VENV = WORK / "tree", WORK / "venv"
COPIED = ("CMakeLists.txt", "pyproject.toml", "native", "src", "tests")
PACKAGE = TREE / "src" / "crossent"
TEST_SECONDS = 300


def main() -> int:
    """Check the chosen faults one after the other and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only faults that hold each of these words")
    options = parser.parse_args()
    faults = tomllib.loads((ROOT / "tests" / "faults.toml").read_text())["fault"]
    faults = [f for f in faults if all(word in str(f) for word in options.words)]
    if not faults:
        parser.error(f"no fault holds {' and '.join(options.words)}")
    copy_tree()
    misplaced = [f for f in faults if text_of(f).count(f["was"]) != 1]
    for fault in misplaced:
        found = text_of(fault).count(fault["was"])
        print(f"{fault['file']}: found {found} times, expected once: {fault['was']!r}")
    faults = [f for f in faults if f not in misplaced]
    make_environment()
    survivors = 0
    for group in [f for f in faults if not emulated(f)], [f for f in faults if emulated(f)]:
        if not group:
            continue
        if emulated(group[0]) or any(map(native, group)):
            build(group[0])
        else:
            use(Path(_native.__file__))
        if pytest(*sorted({fault["test"] for fault in group}), show=True) != 0:
            print("these tests must pass on the unbroken tree first")
            return 1
        survivors += sum(not caught(fault) for fault in sorted(group, key=native))
    print(f"{len(faults)} faults, {survivors} survived, {len(misplaced)} not found")
    return 1 if survivors or misplaced else 0


def caught(fault: dict[str, Any]) -> bool:
    """Apply one fault, run its test, take the fault back."""
    path, start = TREE / fault["file"], time.monotonic()
    whole = path.read_text()
    path.write_text(whole.replace(fault["was"], fault["is"]))
    try:
        built = not native(fault) or build_broken(fault)
        status = pytest(fault["test"]) if built else None
    finally:
        path.write_text(whole)
    verdict = {None: "does not compile", 0: "SURVIVED", 1: "caught", 124: "DOES NOT END"}
    text = verdict.get(status, f"pytest exit status {status}")
    seconds = time.monotonic() - start
    name = fault["file"].rpartition("/")[2]
    print(f"{text:16} {seconds:5.0f} s  {name:12} {fault['was']!r} -> {fault['is']!r}", flush=True)
    return text.startswith("caught")


def text_of(fault: dict[str, Any]) -> str:
    """The file a fault is for, unbroken."""
    return (ROOT / fault["file"]).read_text()


def native(fault: dict[str, Any]) -> bool:
    """Tell the faults that need a build."""
    return fault["file"].startswith("native/")


def emulated(fault: dict[str, Any]) -> bool:
    """Tell the faults whose instruction set only an emulating build has here."""
    return fault.get("isa", _native.isa()) not in _native.available_isas()


def cmake_of(fault: dict[str, Any]) -> Path:
    """Where the fault is built."""
    return WORK / ("cmake-emulated" if emulated(fault) else "cmake")


def copy_tree() -> None:
    """Bring the copy up to date; files that are the same keep their times, for short builds."""
    for name in COPIED:
        source = ROOT / name
        files = [source] if source.is_file() else [f for f in source.rglob("*") if f.is_file()]
        for file in files:
            if "__pycache__" in file.parts or file.suffix == ".so":
                continue
            to = TREE / file.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            # Not so optimised, kernels compile in half the time.
            wanted = file.read_bytes().replace(b"_OPTIONS -O3 ", b"_OPTIONS -O1 ")
            if not to.exists() or to.read_bytes() != wanted:
                to.write_bytes(wanted)
    for file in TREE.rglob("*"):
        gone = not (ROOT / file.relative_to(TREE)).exists()
        if gone and file.is_file() and file.suffix in (".py", ".cpp", ".h"):
            file.unlink()


def make_environment() -> None:
    """Make an environment with the packages of this one, but with the copy's crossent.

    A directory named in a .pth file has its own .pth files left alone, crossent's editable hook
    among them.
    """
    if not (VENV / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", VENV], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(VENV)}))
    site.joinpath("tree.pth").write_text(f"{PACKAGE.parent}\n{sysconfig.get_path('purelib')}\n")


def build(fault: dict[str, Any]) -> None:
    """Build the extension from the copy, unbroken."""
    at = cmake_of(fault)
    if not (at / "CMakeCache.txt").exists():
        where = ["-S", str(TREE), "-B", str(at), "-DCMAKE_BUILD_TYPE=Release"]
        where.append(f"-DCROSSENT_EMULATE_V4={'ON' if emulated(fault) else 'OFF'}")
        run(["cmake", *where, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"])
    run(["cmake", "--build", str(at)])
    use(next(at.glob("_native*.so")))


def build_broken(fault: dict[str, Any]) -> bool:
    """Build the binding, the host and one set of kernels alone; False if they do not compile."""
    at = cmake_of(fault)
    isa = fault.get("isa", _native.available_isas()[0])
    isa = isa.removeprefix("x86-64-").replace("-", "")
    command = [
        "cmake",
        "--build",
        str(at),
        "--target",
        f"crossent_kernels_{isa}",
        "crossent_host",
        "CMakeFiles/_native.dir/native/module.cpp.o",
    ]
    if subprocess.run(command, capture_output=True).returncode:
        return False
    # The link by itself: the other instruction sets keep the objects they have.
    commands = run(["ninja", "-C", str(at), "-t", "commands", "_native"]).splitlines()
    subprocess.run(commands[-1], shell=True, check=True, cwd=at)
    use(next(at.glob("_native*.so")))
    return True


def use(library: Path) -> None:
    """Give the copy this extension module."""
    (PACKAGE / library.name).unlink(missing_ok=True)
    shutil.copyfile(library, PACKAGE / library.name)


def pytest(*tests: str, show: bool = False) -> int:
    """Run the tests with the copy's crossent; 124 if they do not end."""
    command = [str(VENV / "bin" / "python"), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *tests], cwd=TREE, env=environment, timeout=None if show else TEST_SECONDS,
            capture_output=not show,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124
    return done.returncode if done.returncode >= 0 else 1  # a crash is noticed as well


def run(command: list[str]) -> str:
    """Run a command that must succeed; return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
