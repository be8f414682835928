"""Every command ends with a code of one table, which the documentation shows."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentdiff.cli.command import EXIT_CODES
from latentdiff.cli.help import CommandParser
from latentdiff.cli.main import COMMANDS, main
from latentdiff.training.inputs.workers import DeadWorkerError

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "commands.md"
NAMES = [name for name, entry in COMMANDS.items() if entry.function]
FAULTS = (
    (ValueError("no such value"), 2),
    (FileNotFoundError("no such file"), 2),
    (PermissionError("no such right"), 2),
    (FloatingPointError("no such number"), 1),
    (DeadWorkerError("no such worker"), 1),
    (KeyboardInterrupt(), 130),
    (BrokenPipeError(), 141),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_ends_with_the_code_of_its_fault(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for fault, code in FAULTS:
        with monkeypatch.context() as patch:
            patch.setattr(CommandParser, "parse_args", raises(fault))
            patch.setattr(sys, "stdout", sys.stdout)
            assert main(name.split()) == code
        assert code in EXIT_CODES
        expected = f"latentdiff {name}: {fault}\n" if str(fault) else ""
        assert capsys.readouterr() == ("", expected)


def raises(fault: BaseException) -> Any:
    """Return a function that raises."""

    def fail(*arguments: object, **named: object) -> None:
        raise fault

    return fail


@pytest.mark.parametrize("name", NAMES)
def test_a_command_ends_with_2_and_one_line_after_bad_usage(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*name.split(), "--no_such_option=1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"latentdiff {name}: ")
    assert err.count("\n") == 1


def test_the_documentation_shows_every_exit_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(code): text for code, text in rows} == EXIT_CODES


def test_output_that_nobody_reads_ends_a_command_silently() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "latentdiff", "train", "--help", "all"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_command_that_is_no_training_ends_by_sigterm_at_once() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    program = f"from latentdiff.cli.command import run_command\n{code}"
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGTERM
