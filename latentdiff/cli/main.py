"""The table of commands, and the two ways to start one: by its name, or by its script's.

A new command is a function in the module of its group (see command.py for its signature) and a
line in COMMANDS. A module is imported when one of its commands runs, and imports nothing heavy
before options are parsed, so that --help answers at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from latentdiff.cli.command import Command, run_command
from latentdiff.cli.help import help_of


@dataclass(frozen=True)
class Entry:
    """A command of the table.

    name: as typed; two words for a command of a family, such as "export pack".
    function: "module:function" in latentdiff/cli; empty for a family's name alone.
    summary: its line in an overview, at most 60 characters.
    group: its heading in `latentdiff --help`, which lists names of one word.
    """

    name: str
    function: str
    summary: str
    group: str = ""

    def load(self) -> Command:
        """Import the command's module and return its function."""
        module, _, name = self.function.partition(":")
        command: Command = getattr(import_module(f"latentdiff.cli.{module}"), name)
        return command


ENTRIES = (
    Entry("demo", "demo:demo_command", "Fine-tune the bundled model in minutes.", "start"),
    Entry("demo scratch", "demo:demo_scratch_command", "Train from scratch on shapes, in minutes."),
    Entry("demo swiss-roll", "evaluate:swiss_roll_command", "Train on a swiss roll in the plane."),
    Entry("doctor", "doctor:doctor_command", "What this machine can do, what to install.", "start"),
    Entry("configs", "train:configs_command", "List the configs that --config takes.", "start"),
    Entry("inspect", "data:inspect_command", "Report problems of a captioned folder.", "data"),
    Entry("cache", "data:cache_command", "Encode images and captions ahead of training.", "data"),
    Entry("train", "train:train_command", "Train or fine-tune a text-to-image model.", "train"),
    Entry("train-vae", "train:train_vae_command", "Train a VAE on folders of images.", "train"),
    Entry("train-clip", "train:train_clip_command", "Train a CLIP on captioned folders.", "train"),
    Entry("distill", "train:distill_command", "Make a model draw in 4, 2 or 1 steps.", "train"),
    Entry("sample", "sample:sample_command", "Make images from prompts.", "use"),
    Entry("app", "sample:app_command", "Make images in a web UI.", "use"),
    Entry("evaluate", "evaluate:evaluate_command", "Measure a model on held-out data.", "measure"),
    Entry("compare", "evaluate:compare_subject_command", "Measure a tuned subject.", "measure"),
    Entry("report", "report:report_command", "One page on runs: curves, sheets.", "measure"),
    Entry("verify", "verify:verify_command", "Prove what a model was made of.", "measure"),
    Entry("audit", "audit:audit_command", "What a model betrays of its data.", "measure"),
    Entry("audit captions", "audit:audit_captions_command", "Captions in bits: wrong, empty."),
    Entry("explain", "attribution:explain_command", "Training images behind an image.", "measure"),
    Entry("twin", "attribution:twin_command", "The same run, without some images.", "measure"),
    Entry("export", "", "Write a model for other tools, smaller, or merged.", "share"),
    Entry("export single-file", "export:export_single_file_command", "One .safetensors file."),
    Entry("export lora", "export:lora_command", "A LoRA in kohya's or diffusers' names."),
    Entry("export merge", "export:merge_lora_command", "Merge LoRA files into a model."),
    Entry("export ema", "export:reconstruct_ema_command", "Another EMA width of a run's weights."),
    Entry("export pack", "export:pack_command", "A small model: half precision, in shards."),
    Entry("export push", "export:push_command", "Upload to the Hugging Face Hub, with a card."),
    Entry("export card-sheets", "evaluate:card_sheets_command", "The sheets of a model's card."),
    Entry("convert", "", "Convert what other tools wrote.", "share"),
    Entry("convert single-file", "convert:convert_single_file_command", "A .safetensors model."),
    Entry("convert vae", "convert:convert_vae_command", "The VAE of a .safetensors file."),
    Entry("convert open-clip", "convert:convert_open_clip_command", "An open_clip text encoder."),
    Entry("convert merge-folders", "data:merge_folders_command", "Captioned folders into one."),
)
COMMANDS = {entry.name: entry for entry in ENTRIES}
RENAMED = {  # old name of a command -> its name; the old one still works
    "demo-scratch": "demo scratch",
    "swiss-roll": "demo swiss-roll",
    "merge-folders": "convert merge-folders",
    "compare-subject": "compare",
    "card-sheets": "export card-sheets",
    "export-single-file": "export single-file",
    "merge-lora": "export merge",
    "pack": "export pack",
    "reconstruct-ema": "export ema",
    "convert-open-clip": "convert open-clip",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `latentdiff COMMAND ...` and return its exit code; `latentdiff --help` lists commands.

    arguments: by default those of the process.
    """
    given = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if given[0] in ("-h", "--help"):
        print(overview())
        return 0
    if given[0] == "--version":
        print(f"latentdiff {version('latentdiff')}")
        return 0
    if given[0] in RENAMED:
        new = RENAMED[given[0]]
        print(f"latentdiff: {given[0]} is now {new}; the old name still works", file=sys.stderr)
        given[:1] = new.split()
    name = next((name for name in (" ".join(given[:2]), given[0]) if name in COMMANDS), "")
    rest = given[len(name.split()) :]
    if name and rest in (["-h"], ["--help"]) and family(name):
        print(family_overview(name))
        return 0
    if name and COMMANDS[name].function:
        return run_command(COMMANDS[name].load(), rest, prog=f"latentdiff {name}")
    print(f"latentdiff: {_unknown(name, rest or given)}", file=sys.stderr)
    return 2


def run_as_script(name: str) -> int:
    """Run a command with the arguments and under the name of the script that was started."""
    return run_command(COMMANDS[name].load(), sys.argv[1:], prog=Path(sys.argv[0]).name)


def overview() -> str:
    """Return the usage line and a line for each command, by group."""
    entries = [entry for entry in ENTRIES if entry.group]
    lines = ["usage: latentdiff COMMAND [--help] ..."]  # no empty lines: it fits a screen of 24
    for group in dict.fromkeys(entry.group for entry in entries):
        lines += _lines(group, [entry for entry in entries if entry.group == group])
    return "\n".join([*lines, "", "latentdiff COMMAND --help describes a command's options."])


def family_overview(name: str) -> str:
    """Return the help of a family of commands: that of its own command, and a line for each."""
    if COMMANDS[name].function:
        lines = [help_of(COMMANDS[name].load(), prog=f"latentdiff {name}").text()]
    else:
        lines = [f"usage: latentdiff {name} COMMAND [--help] ...", "", COMMANDS[name].summary]
    return "\n".join([*lines, "", *_lines(name, family(name))])


def family(name: str) -> list[Entry]:
    """Return the commands whose names begin with another's."""
    return [entry for entry in ENTRIES if entry.name.startswith(f"{name} ")]


def _lines(heading: str, entries: Sequence[Entry]) -> list[str]:
    """Return a line for each command, the first of them after the heading."""
    names = [entry.name.rpartition(" ")[2] for entry in entries]
    width = max(10, *map(len, names))
    texts = [f"{name:{width}}  {entry.summary}" for name, entry in zip(names, entries, strict=True)]
    return [f"{'' if index else heading:9}{text}" for index, text in enumerate(texts)]


def _unknown(family_name: str, rest: Sequence[str]) -> str:
    """Return the message for a command that is not there, or for a family's name alone."""
    known = [entry.name for entry in family(family_name) or ENTRIES if entry.group or family_name]
    if family_name == " ".join(rest):
        return f"{family_name} is a family of commands: {', '.join(known)}"
    name = f"{family_name} {rest[0]}".strip()
    near = get_close_matches(name, [*known, *RENAMED], n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return f"unknown command {name}; {hint}"
