"""Errors become exit codes in one place; commands show nothing of the libraries but errors."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from latentdiff.cli.command import run_command, take_options
from latentdiff.cli.main import main
from latentdiff.config.sampling import SampleOptions, WebUIOptions
from latentdiff.training.inputs.workers import DeadWorkerError

SHOW = """
import sys
from latentdiff.cli.command import quieten_libraries
quieten_libraries()
from transformers import CLIPTextModel
import diffusers, huggingface_hub, transformers
CLIPTextModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
for library in (diffusers, transformers):
    logger = library.utils.logging.get_logger(f"{library.__name__}.models")
    logger.warning("a warning")
    logger.error("an error")
print(huggingface_hub.utils.are_progress_bars_disabled())
"""


def test_bars_and_warnings_are_silent_and_errors_and_downloads_are_not(
    sd_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SHOW, str(sd_folder / "text_encoder"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
    assert done.stderr.count("an error") == 2
    assert "a warning" not in done.stderr
    assert "it/s" not in done.stderr  # "Loading weights", "Writing model shards"


def code_of(error: BaseException) -> int:
    """Return the exit code of a command that raises."""

    def command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
        """Fail."""
        raise error

    return run_command(command, [], prog="latentdiff fail")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such\n name"), 2),
        (FileNotFoundError("no such file"), 2),
        (FloatingPointError("no such number"), 1),
        (DeadWorkerError("no such worker"), 1),
    ],
)
def test_a_foreseen_error_is_a_message_and_an_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(error) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"latentdiff fail: {error}\n")


def test_an_interrupted_command_ends_silently_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug"), KeyError("a bug")])
def test_an_unforeseen_error_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="a bug"):
        code_of(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command trian; did you mean train?"),
        (["zzz"], "known: train, train-vae"),
        (["train", "--train.sed=1"], "did you mean train.seed?"),
        (["inspect", "DIR", "--jsn"], "did you mean json?"),
        (["train", "--train.max_step=5"], "did you mean train.max_steps?"),
        (["inspect", "DIR", "--jso"], "did you mean json?"),
        (["sample", "MODEL", "a cat", "--out=a.png", "--step=3"], "--step"),
        (["cache", "clean"], "invalid choice: 'clean'"),
        (["sample", "MODEL", "a cat"], "arguments are required: out"),
        (["sample", "MODEL", "a cat", "--out=a.png", "--seed=first"], "seed"),
        (["merge-lora", "BASE", "--out=a"], "arguments are required: loras"),
        (["pack", "MODEL", "--out=a", "--max_file_mb=much"], "max_file_mb"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("latentdiff")
    assert err.count("\n") == 1
    assert message in err


def test_options_are_taken_out_of_the_parsed_values() -> None:
    parser = ArgumentParser()
    parser.add_argument("model", type=str)
    parser.add_class_arguments(SampleOptions)
    values = parser.parse_args(["m", "--out=a.png", "--steps=[1, 2]"]).as_dict()
    assert take_options(SampleOptions, values) == SampleOptions(out="a.png", steps=[1, 2])
    assert values == {"model": "m"}
    with pytest.raises(KeyError):
        take_options(WebUIOptions, values)
