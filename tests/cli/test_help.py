"""--help of every command answers at once, by its name or by its script's."""

import os
import subprocess
import sys

import pytest
from fakes_scripts import SCRIPTS, run_script

from latentdiff.cli.main import COMMANDS, main

HEAVY = ("torch", "diffusers", "transformers", "open_clip", "gradio", "matplotlib")
PROBE = """
import sys
from latentdiff.cli.main import COMMANDS, main
for name in COMMANDS:
    try:
        main([name, "--help"])
    except SystemExit as end:
        assert not end.code
print("loaded:", *(name for name in sys.argv[1:] if name in sys.modules))
"""
NAMES = sorted(path.name for path in SCRIPTS.glob("*.py"))


def test_help_of_no_command_loads_anything_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *HEAVY], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    usages = [line.split()[1:3] for line in lines if line.startswith("usage: ")]
    assert usages == [["latentdiff", name] for name in COMMANDS]
    assert lines[-1].strip() == "loaded:"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_answers_within_half_a_second(arguments: list[str]) -> None:
    command, seconds = [sys.executable, "-m", "latentdiff", *arguments], []
    for _ in range(5):
        started = children_seconds()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(children_seconds() - started)
        assert "usage: latentdiff" in done.stdout
    assert min(seconds) < 0.5


def children_seconds() -> float:
    """Return the processor time of ended child processes, which other work does not lengthen."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_a_command_under_its_own_name(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(name, "--help") == 0
    assert capsys.readouterr().out.split()[:2] == ["usage:", name]


def test_each_script_starts_a_command_of_its_own() -> None:
    texts = [(SCRIPTS / name).read_text() for name in NAMES]
    started = [text.partition('run_as_script("')[2].partition('"')[0] for text in texts]
    assert set(started) <= set(COMMANDS)
    assert len(set(started)) == len(started)


def test_help_lists_every_command_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage, *lines = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: latentdiff COMMAND")
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert all(line.strip().endswith(".") for line in lines if line.startswith("  "))
