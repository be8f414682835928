"""CONTRIBUTING.md points at files and names that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`([\w/]+/(?:\w+\.\w+)?)`", TEXT)))
NAMES = re.findall(r"`(\w+)` of `([\w/]+\.py)`", TEXT)


@pytest.mark.parametrize("path", PATHS)
def test_path_exists(path: str) -> None:
    package = ROOT / "latentdiff"
    places = (ROOT, package, package / "training", package / "config")
    assert any((place / path).exists() for place in places)


@pytest.mark.parametrize(("name", "path"), NAMES)
def test_name_is_defined_where_it_says(name: str, path: str) -> None:
    text = (ROOT / "latentdiff" / path).read_text(encoding="utf-8")
    assert re.search(rf"^{name}\b", text, re.MULTILINE)
