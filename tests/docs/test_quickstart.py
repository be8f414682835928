"""The notebook runs from top to bottom on the model that ships, and is stored without outputs."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from fakes_docs import DOCS
from PIL import Image

NOTEBOOK = json.loads((DOCS / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def shown(cell: Any, names: dict[str, Any]) -> object:
    """Run a cell as a notebook does; return the value of its last expression."""
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop()
    assert isinstance(last, ast.Expr), "each cell ends with something to look at"
    exec(compile(tree, "quickstart.ipynb", "exec"), names)
    return eval(compile(ast.Expression(last.value), "quickstart.ipynb", "eval"), names)


def test_every_cell_runs_and_shows_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    values = [shown(cell, names) for cell in CODE]
    images = [value for value in values if isinstance(value, Image.Image)]
    assert len(images) >= len(CODE) - 1 > 5
    assert all(len(image.convert("RGB").getcolors(1 << 20) or []) > 50 for image in images)
    assert [value["seed"] for value in values if isinstance(value, dict)] == [7]


def test_outputs_are_stripped() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
