"""--help of every command answers at once, by its name or by its script's."""

import subprocess
import sys
from importlib.metadata import version

import pytest
from fakes_scripts import SCRIPTS, run_script

from latentdiff.cli.help import MAX_DESCRIBED, help_of
from latentdiff.cli.main import COMMANDS, ENTRIES, RENAMED, family, main
from latentdiff.config.describe import settings_of
from latentdiff.config.text_to_image import Config

HEAVY = ("torch", "diffusers", "transformers", "open_clip", "gradio", "matplotlib")
PROBE = """
import sys
from latentdiff.cli.main import COMMANDS, main
for name in COMMANDS:
    assert main([*name.split(), "--help"]) == 0
print("loaded:", *(name for name in sys.argv[1:] if name in sys.modules))
"""
HELP_SECONDS = """
import os, sys, time
from latentdiff.cli.main import main
before = time.process_time()
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        os._exit(main([*name.split(), "--help"]))
    _, status, used = os.wait4(child, 0)
    assert status == 0, name
    print(before + used.ru_utime + used.ru_stime)
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


@pytest.fixture(scope="module")
def help_seconds() -> dict[str, float]:
    """Processor time of each --help with all before it, which other work does not lengthen.

    Commands are forks of a process that has imported what all need; the least of up to five tries.
    """
    command, least = [sys.executable, "-c", HELP_SECONDS, "", *COMMANDS], dict[str, float]()
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for name, seconds in zip(command[3:], map(float, done.stdout.split()), strict=True):
            least[name] = min(seconds, least.get(name, seconds))
        if max(least.values()) < 0.5:
            break
    return least


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_answers_within_half_a_second(name: str, help_seconds: dict[str, float]) -> None:
    assert help_seconds[name] < 0.5


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
    assert len(lines) < 24  # a screen
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
    assert main([old, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: latentdiff {new}")
    assert err == f"latentdiff: {old} is now {new}; the old name still works\n"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"latentdiff {version('latentdiff')}\n"


@pytest.mark.parametrize("name", [name for name, entry in COMMANDS.items() if entry.function])
def test_every_option_of_every_command_is_described(name: str) -> None:
    found = help_of(COMMANDS[name].load(), prog=name)
    options = [*found.arguments, *found.options, *found.settings]
    assert [one.name for one in options if len(one.description) < 12] == []
    text = found.text(["all"] if len(found.settings) > MAX_DESCRIBED else [])
    for one in [*found.options, *found.settings]:
        assert f"--{one.name}" in text
        assert " ".join(one.description.split()) in " ".join(text.split())


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")


def help_lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main([*arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_help_of_many_settings_names_them_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_lines(capsys, "train", "--help")
    text = " ".join("\n".join(lines).split())
    assert all(one.name.rpartition(".")[2] in text for one in settings_of(Config))
    assert any(line.startswith("  model.unet: A U-Net") for line in lines)
    assert len(lines) < 70


def test_help_shows_meaning_default_range_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_lines(capsys, "train", "--help", "train.lr_schedule", "warm-up")
    assert lines[0] == "  --train.lr_schedule {constant,cosine,linear}"
    assert lines[1].endswith("over max_steps (default constant)")
    lines = help_lines(capsys, "train", "--help", "network_dim")  # kohya's name
    assert lines[0] == "  --finetune.lora_rank INT"
    assert lines[1].endswith("(default 16; a number of at least 1)")


def test_help_of_a_section_holds_those_in_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_lines(capsys, "train", "--help", "model")
    shown = {line.split()[0] for line in lines if line.startswith("  --")}
    known = (f"--{one.name}" for one in settings_of(Config))
    assert shown == {name for name in known if name.startswith("--model.")}


def test_help_comes_first_whatever_else_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_lines(capsys, "train", "--config=absent", "--help")
    assert help_lines(capsys, "sample", "--zzz", "-h")


def test_help_for_a_word_of_no_option_is_a_no_with_the_nearest_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--help", "learning_rat"]) == 0
    capsys.readouterr()
    assert main(["train", "--help", "learnin_rate"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "did you mean train.learning_rate?" in err
