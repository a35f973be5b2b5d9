"""`benchmarks/profile_rows.py`: its tables, of a problem too small to measure."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "profile_rows.py"


def test_it_prints_every_table():
    arguments = [sys.executable, SCRIPT, "--quick", "--shapes", "tiny,segmentation"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Memory and arithmetic",
        "## Fresh outputs and page faults",
        "## A tiny call",
    ]
    tables = [block for block in done.stdout.split("\n\n") if block.startswith("| ")]
    assert [table.count("\n") for table in tables] == [3, 3, 12]
