"""Hooks of mkdocs: pages of files outside docs/, tables made of the code, and formulas as MathML.

README.md is the site's first page; CONTRIBUTING.md, CHANGELOG.md and whatever else in the
repository a page links to become pages too, so every link works in the repository and on the site;
so does the notebook, without its outputs.
"""

import html
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from latentdiff.cli.help import help_of
from latentdiff.cli.main import COMMANDS, family_overview, overview
from latentdiff.config.clip import ClipConfig
from latentdiff.config.describe import Setting, settings_of
from latentdiff.config.text_to_image import Config
from latentdiff.config.vae import VaeConfig

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
PAGES["CHANGELOG.md"] = "changelog.md"
NOTEBOOK = "docs/quickstart.ipynb"
PAGES[NOTEBOOK] = "quickstart.md"
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=(?:#[^)\s]*)?\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
RECIPES = {"train": Config, "train-vae": VaeConfig, "train-clip": ClipConfig}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and files outside docs/ that a page links to."""
    waiting = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        if source in PAGES or not source.startswith("docs/"):
            files.append(_file_outside(source, config))
        if not source.endswith(".md"):
            continue
        found = {path for path in _links(source) if (ROOT / path).is_file()}
        waiting += [path for path in found - seen if not path.startswith("docs/")]
        seen |= found
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the tables made of the code; point links at the pages that their files become."""
    for name, fill in MADE.items():
        marker = f"<!-- {name} -->"
        markdown = markdown.replace(marker, fill()) if marker in markdown else markdown
    place = page.file.src_uri
    source = {target: path for path, target in PAGES.items()}.get(place)
    source = source or (place[5:-3] if place.startswith("repo/") else f"docs/{place}")
    return LINK.sub(lambda link: _on_site(_target(source, link[1]), place), markdown)


def on_page_content(page_html: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers show without a script."""
    return FORMULA.sub(lambda formula: convert(html.unescape(formula[2])), page_html)


def _links(source: str) -> Iterator[str]:
    text = (ROOT / source).read_text(encoding="utf-8")
    return (_target(source, link) for link in LINK.findall(text))


def _target(source: str, link: str) -> str:
    """Return the path in the repository of a link in one of its files."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _site_path(path: str) -> str:
    if path.startswith("docs/") and path not in PAGES:
        return path[len("docs/") :]
    return PAGES.get(path) or f"repo/{path}" + (".md" if _is_text(path) else "")


def _on_site(path: str, place: str) -> str:
    return posixpath.relpath(_site_path(path), posixpath.dirname(place) or ".")


def _is_text(path: str) -> bool:
    return path.endswith((".py", ".md", ".yaml", ".json", ".cfg"))


def _file_outside(path: str, config: Any) -> File:
    where = _site_path(path)
    if path == NOTEBOOK:
        return File.generated(config, where, content=_notebook_page())
    if not _is_text(path):
        return File.generated(config, where, abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8")
    if path not in PAGES:
        unfound = "---\nsearch:\n  exclude: true\n---\n"
        text = unfound + (text.partition("\n---\n")[2] if text.startswith("---\n") else text)
    if not path.endswith(".md"):
        text = f"# {path}\n\n```{path.rpartition('.')[2]}\n{text}\n```\n"
    return File.generated(config, where, content=text)


def _notebook_page() -> str:
    """Return the notebook's text and code as Markdown."""
    cells = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    parts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    return "\n\n".join(f"```python\n{text}\n```" if code else text for text, code in parts)


def settings_tables() -> str:
    """Return the tables of every setting: default, description and range, from the dataclasses."""
    parts = []
    for command, kind in RECIPES.items():
        parts.append(f"## latentdiff {command}\n")
        anchor = "" if command == "train" else f"{command}."
        sections: dict[str, list[Setting]] = {}
        for one in settings_of(kind):
            sections.setdefault(one.name.rpartition(".")[0], []).append(one)
        for section, rows in sections.items():
            parts.append(f"### {section}\n" if section else "")
            parts.append(f"{rows[0].section}\n\n| setting | default | description |\n|---|---|---|")
            parts += [_row(one, anchor) for one in rows]
            parts.append("")
    return "\n".join(parts)


def _row(one: Setting, anchor: str) -> str:
    values = one.expected or one.form.replace(",", ", ")
    description = html.escape(f"{one.description} ({values})").replace("|", "\\|")
    return f"| `{one.name}`{{#{anchor}{one.name}}} | `{one.default}` | {description} |"


def commands_help() -> str:
    """Return the list of commands and the --help of each."""
    parts = [f"```text\n{overview()}\n```\n"]
    for name, entry in COMMANDS.items():
        text = f"{entry.summary} Its [settings](settings.md#latentdiff-{name})."
        if name not in RECIPES:
            text = f"```text\n{_help(name)}\n```"
        parts.append(f"## latentdiff {name}\n\n{text}\n")
    return "\n".join(parts)


def _help(name: str) -> str:
    entry = COMMANDS[name]
    if not entry.function:
        return family_overview(name)
    return help_of(entry.load(), prog=f"latentdiff {name}").text()


MADE = {"settings": settings_tables, "commands": commands_help}
