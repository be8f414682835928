"""docs/theory.md points at code, tests and figures that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
ROWS = [
    match.groups()
    for match in re.finditer(
        r"\| \[`\w+\.(\w+)`\]\(\.\./latentdiff/([\w/]+\.py)\)"
        r" \| .+ \| \[`(\w+)`\]\(\.\./tests/([\w/]+\.py)\) \|",
        TEXT,
    )
]


def names(path: Path) -> set[str]:
    """Return the functions and classes at a file's top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_every_row_of_the_table_is_read() -> None:
    rows = [line for line in TEXT.splitlines() if "](../latentdiff/" in line]
    assert len(ROWS) == len(rows) > 20


@pytest.mark.parametrize(("function", "code", "test", "test_file"), ROWS)
def test_row_names_code_and_test_that_exist(
    function: str, code: str, test: str, test_file: str
) -> None:
    assert function in names(ROOT / "latentdiff" / code)
    assert test in names(ROOT / "tests" / test_file)


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / link).is_file(), link
