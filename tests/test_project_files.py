"""The project's own files: workflows, templates, Dockerfile, citation, packaging."""

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
YAMLS = sorted([*GITHUB.rglob("*.yml"), ROOT / "CITATION.cff"])
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def load(path: Path) -> Any:
    """Read a YAML file; GitHub's key `on` is YAML's true."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def lines(section: str, key: str) -> list[str]:
    return SETUP[section][key].split("\n")[1:]


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_file_is_a_yaml_object_without_tabs(path: Path) -> None:
    assert isinstance(load(path), dict)
    assert "\t" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((GITHUB / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_jobs_of_a_workflow_are_whole_and_bounded(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert job["timeout-minutes"] <= 60
        assert set(job.get("needs", "").split()) <= workflow["jobs"].keys()
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        for step in job["steps"]:
            assert re.search(r"@(v\d+|release/v\d+)$", step.get("uses", "@v1")), step
            for file in re.findall(r"\b(?:tests|\.ci)/[\w./]+", step.get("run", "")):
                assert (ROOT / file).exists(), file


def test_ci_runs_every_python_that_the_package_names() -> None:
    jobs = load(GITHUB / "workflows" / "ci.yml")["jobs"]
    versions = {*jobs["test"]["strategy"]["matrix"]["python"]}
    versions |= {
        step["with"]["python-version"] for step in jobs["check"]["steps"] if "with" in step
    }
    named = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert versions == set(named)
    assert SETUP["options"]["python_requires"] == f">={named[0]}"


def test_extra_all_is_every_extra_but_those_for_tests_and_some_gpus() -> None:
    extras = SETUP["options.extras_require"]
    [everything] = lines("options.extras_require", "all")
    named = set(re.fullmatch(r"latentdiff\[(.*)\]", everything)[1].split(","))  # type: ignore[index]
    assert named == {*extras} - {"all", "test", "docs", "xformers", "8bit"}


def test_bug_report_asks_for_the_output_of_doctor() -> None:
    form = load(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")
    [doctor] = [one for one in form["body"] if one["attributes"]["label"] == "latentdiff doctor"]
    assert doctor["validations"]["required"]


def test_citation_states_version_and_licence_of_the_package() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["version"] == SETUP["metadata"]["version"]
    assert citation["license"] == SETUP["metadata"]["license"]


def test_image_copies_files_that_exist_and_runs_without_privileges() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    kept = [one[1:] for one in (ROOT / ".dockerignore").read_text().split() if one[0] == "!"]
    copied = [
        name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()
    ]
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / name).exists() for name in copied)
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["latentdiff"]
    assert text.index("USER latentdiff") < text.index("ENTRYPOINT")
    assert set(re.findall(r"https?://([\w.]+)", text)) == {"download.pytorch.org"}
    extras = set(re.search(r'"\.\[(.*)\]"', text)[1].split(","))  # type: ignore[index]
    assert extras <= {*SETUP["options.extras_require"]}


def test_changelog_begins_with_what_is_unreleased() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", one) for one in headings[1:])
