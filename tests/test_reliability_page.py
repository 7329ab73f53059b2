"""docs/reliability.md: every claim in its tables names tests, and they exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"


def names_of_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text())
    assert len(named) >= 20
    missing = [f"{file}::{test}" for file, test in named if test not in names_of_tests(ROOT / file)]
    assert missing == []


def test_every_row_of_a_table_with_tests_names_one() -> None:
    rows, has_tests = 0, False
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            has_tests = False
        elif cells[-1] == "test":
            has_tests = True
        elif has_tests and not set(line) <= set("|-"):
            rows += 1
            assert "::test_" in cells[-1], line
    assert rows >= 20
