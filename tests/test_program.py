"""Suggested commands can be typed as they stand."""

import sys
import sysconfig
from pathlib import Path

import pytest

from latentdiff.program import program


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in .venv of the current folder whose latentdiff PATH does not find."""
    command = tmp_path / ".venv" / "bin" / "latentdiff"
    command.parent.mkdir(parents=True)
    command.write_text("")
    command.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(command.parent))
    monkeypatch.setenv("PATH", "/nowhere")
    return command


def test_an_environment_that_is_not_active_is_named_by_its_path(
    installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert program() == ".venv/bin/latentdiff"
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir("deep")
    assert program() == str(installed)


def test_an_active_environment_is_not_named(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(installed.parent))
    assert program() == "latentdiff"


def test_the_command_of_another_environment_is_not_taken_for_ours(
    installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "latentdiff"
    other.write_text("")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == ".venv/bin/latentdiff"


def test_python_runs_the_package_where_it_is_not_installed(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.unlink()
    python = installed.with_name("python3.11")
    python.write_text("")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert program() == ".venv/bin/python3.11 -m latentdiff"
    monkeypatch.setenv("PATH", str(python.parent))
    assert program() == "python3.11 -m latentdiff"
