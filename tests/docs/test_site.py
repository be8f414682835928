"""The documentation builds without a warning and loads nothing from the network."""

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from fakes_docs import ROOT, pages

from latentdiff.cli.main import COMMANDS
from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import flat
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig

pytest.importorskip("mkdocs")
LOADED = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=["']?(https?:)?//""")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
IMAGE = re.compile(r"!\[[^\]]*\]\((?!\w+:)([^)\s]+)\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_of_the_site_loads_its_own_files_alone(site: Path) -> None:
    found = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(found) > 20
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert not LOADED.search(re.sub(r'<link rel="canonical"[^>]*>', "", text)), path


def test_formulas_are_mathml(site: Path) -> None:
    text = (site / "theory.html").read_text(encoding="utf-8")
    assert text.count("<math") > 25
    assert "arithmatex" not in text


def test_reference_has_every_setting_with_its_meaning(site: Path) -> None:
    text = unescape((site / "reference" / "settings.html").read_text(encoding="utf-8"))
    for kind in (Config, VaeConfig, ClipConfig):
        for name in flat(kind()):
            assert f">{name}</code>" in text, name
    rows = re.findall(r"<tr>\s*<td>.*?</tr>", text, re.DOTALL)
    assert len(rows) >= sum(len(flat(kind())) for kind in (Config, VaeConfig, ClipConfig))
    for row in rows:
        meaning = re.sub(r"<[^>]+>", "", row.rpartition("<td>")[2]).strip()
        assert len(meaning.partition("(")[0]) > 5, row


def test_reference_has_every_command(site: Path) -> None:
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"latentdiff {name}<a" in text, name


def test_public_names_are_described(site: Path) -> None:
    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in ("LatentDiffPipeline", "load_config", "Config", "read_settings", "q_sample"):
        assert re.search(rf'id="latentdiff\.[\w.]+\.{name}"', text), name


@pytest.mark.parametrize("path", [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
def test_links_of_a_page_lead_somewhere_in_the_repository(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for link, anchor in LINK.findall(text):
        target = (path.parent / link).resolve() if link else path
        assert target.exists(), f"{path}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{path}: {link}#{anchor}"
    for link in IMAGE.findall(text):
        assert (path.parent / link).is_file(), f"{path}: {link}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}
