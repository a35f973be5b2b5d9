"""docs/conformance.md names every test of a difference, and no other."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_and_the_tests_name_the_same_differences():
    tested = {
        f"{path.stem.removeprefix('test_conformance_')}: {node.name}"
        for path in (ROOT / "tests").glob("test_conformance_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_differs_")
    }
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert len(tested) > 20
    assert set(re.findall(r"`(\w+: test_differs_\w+)` \|$", text, re.MULTILINE)) == tested
