"""--help of every command answers at once, by its name or by its script's."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from fakes_scripts import SCRIPTS, run_script

from latentdiff.cli.main import COMMANDS, ENTRIES, RENAMED, family, main

HEAVY = ("torch", "diffusers", "transformers", "open_clip", "gradio", "matplotlib")
PROBE = """
import sys
from latentdiff.cli.main import COMMANDS, main
for name in COMMANDS:
    try:
        main([*name.split(), "--help"])
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
    usages = [line for line in lines if line.startswith("usage: ")]
    for usage, name in zip(usages, COMMANDS, strict=True):
        assert usage.startswith(f"usage: latentdiff {name}")
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
    summaries = [line[9:] for line in lines[:-2] if line]
    listed = [entry for entry in ENTRIES if entry.group]
    for line, entry in zip(summaries, listed, strict=True):
        assert line.split()[0] == entry.name
        assert line.endswith(entry.summary)
    assert len(lines) < 24
    assert max(map(len, lines)) < 80


@pytest.mark.parametrize("name", ["export", "convert"])
def test_help_of_a_family_lists_its_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert family(name)
    assert all(entry.summary in out for entry in family(name))


def test_every_command_has_a_group_or_a_family_and_one_line() -> None:
    assert len(COMMANDS) == len(ENTRIES)
    for entry in ENTRIES:
        assert bool(entry.group) == (" " not in entry.name)
        assert entry.summary.endswith(".")
        assert len(entry.summary) <= 60
        assert bool(entry.function) != (entry.name in ("export", "convert"))


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_starts_its_command_with_one_line_of_notice(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([old, "--help"])
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: latentdiff {new}")
    assert err == f"latentdiff: {old} is now {new}; the old name still works\n"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"latentdiff {version('latentdiff')}\n"
