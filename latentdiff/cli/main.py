"""The table of commands, and the two ways to start one: by its name, or by its script's.

A new command is a function in the module of its group (see command.py for its signature) and a
line in COMMANDS. Modules of groups import nothing heavy before options are parsed, so that --help
answers at once.
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from latentdiff.cli import data, demo, evaluate, export, sample, train
from latentdiff.cli.command import Command, run_command

COMMANDS: dict[str, Command] = {
    "train": train.train_command,
    "train-vae": train.train_vae_command,
    "train-clip": train.train_clip_command,
    "configs": train.configs_command,
    "inspect": data.inspect_command,
    "cache": data.cache_command,
    "merge-folders": data.merge_folders_command,
    "sample": sample.sample_command,
    "app": sample.app_command,
    "evaluate": evaluate.evaluate_command,
    "compare-subject": evaluate.compare_subject_command,
    "card-sheets": evaluate.card_sheets_command,
    "swiss-roll": evaluate.swiss_roll_command,
    "export-single-file": export.export_single_file_command,
    "merge-lora": export.merge_lora_command,
    "pack": export.pack_command,
    "reconstruct-ema": export.reconstruct_ema_command,
    "convert-open-clip": export.convert_open_clip_command,
    "demo": demo.demo_command,
    "demo-scratch": demo.demo_scratch_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `latentdiff COMMAND ...` and return its exit code; `latentdiff --help` lists commands.

    arguments: by default those of the process.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
        print(f"latentdiff: unknown command {name}; {hint}", file=sys.stderr)
        return 2
    return run_command(COMMANDS[name], rest, prog=f"latentdiff {name}")


def run_as_script(name: str) -> int:
    """Run a command with the arguments and under the name of the script that was started."""
    return run_command(COMMANDS[name], sys.argv[1:], prog=Path(sys.argv[0]).name)


def overview() -> str:
    """Return the usage line and a line for each command."""
    width = max(map(len, COMMANDS))
    lines = ["usage: latentdiff COMMAND [--help] ...", "", "commands:"]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:{width}}  {(command.__doc__ or '').splitlines()[0]}")
    return "\n".join(lines)
