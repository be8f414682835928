"""The help of a command: its usage, and each option with its meaning, default and range.

A command with many settings shows them by section, in names alone; a section's name or any word
after --help picks those to describe. Nothing heavy is imported.
"""

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import getdoc
from os.path import expanduser
from typing import Any

from jsonargparse import ArgumentParser

from latentdiff.config.describe import (
    OTHER_TOOLS,
    Setting,
    form_of,
    settings_of,
    value_text,
)

MAX_DESCRIBED = 60  # settings; a command with more shows their names, by section
MAX_WIDTH = 100
HELP = "describe the options; with WORDs those that have all of them in their name or description"


OTHER_SPELLINGS = {  # of an option -> the spellings that stand for it, the first that a command has
    "--data": ("--data.root",),
    "--data.root": ("--data",),
    "--loras": ("--lora_dir",),
    "--out": ("--output_dir",),
    "--output_dir": ("--out",),
    "--sampler": ("--scheduler",),
    "--seed": ("--train.seed",),
    "--steps": ("--num_inference_steps", "--max_steps"),
}


class UnknownOptionError(Exception):
    """No option has the words that were searched for."""


class CommandParser(ArgumentParser):
    """The parser of a command; run_command answers --help, which is not one of its options."""

    def __init__(self, **named: Any) -> None:
        """Build the parser without options."""
        self.kinds: list[Any] = []
        plain = {"exit_on_error": False, "allow_abbrev": False, "add_help": False}
        # A list of dataclasses makes a parser of this class for them, by names of its own.
        super().__init__(**plain | {"print_config": None} | named)

    def add_class_arguments(self, kind: Any, *arguments: Any, **named: Any) -> Any:
        """Add an option for each field of a dataclass."""
        self.kinds.append(kind)
        return super().add_class_arguments(kind, *arguments, **named)

    def parse_args(self, args: Any = None, *others: Any, **named: Any) -> Any:
        """Parse arguments, options under any of their spellings."""
        if args is not None:
            args = [*map(self._spelled, args, [*args[1:], ""])]
        return super().parse_args(args, *others, **named)

    def nearest(self, name: str) -> str:
        """Return the option whose name is nearest to another; empty where none is near."""
        return next(iter(get_close_matches(name, self._option_string_actions, n=1)), "")

    def _spelled(self, argument: str, following: str) -> str:
        """Return an option under the spelling that the command has."""
        option, equals, value = argument.partition("=")
        known = self._option_string_actions
        is_yaml = (value if equals else following).endswith((".yaml", ".json", "}"))
        is_section = f"{option}.root" in known and not is_yaml
        if option in known and not is_section:
            return argument
        spellings = OTHER_SPELLINGS.get(option, ())
        found = next((other for other in spellings if other in known), option)
        return f"{found}{equals}{value}"


class _HelpParser(CommandParser):
    """A parser that stops where it would parse, when a command has added its options."""

    def parse_args(self, *arguments: Any, **named: Any) -> Any:
        raise _BuiltError(self._actions, self.kinds)


class _BuiltError(Exception):
    """Carries the actions of a parser, and its dataclasses."""


@dataclass(frozen=True)
class CommandHelp:
    """Every option of a command.

    arguments: those without a name, in order. options: those that it adds itself. kinds: the
    dataclasses whose fields are settings.
    """

    prog: str
    description: str
    arguments: Sequence[Setting]
    options: Sequence[Setting]
    kinds: Sequence[Any]

    @property
    def settings(self) -> list[Setting]:
        """The settings of all dataclasses."""
        return [setting for kind in self.kinds for setting in settings_of(kind)]

    def text(self, words: Sequence[str] = ()) -> str:
        """Return the text of --help, or with words of the options that they pick.

        words: the name of a section, "all", or words of an option's name or description. Raises
        UnknownOptionError with a message where there is no such option.
        """
        if words and words != ["all"]:
            return "\n".join(_found(self, words))
        is_whole = bool(words) or len(self.settings) <= MAX_DESCRIBED
        return "\n".join(_page(self, is_whole=is_whole))


def help_of(command: Any, *, prog: str) -> CommandHelp:
    """Return the options that a command adds to its parser, without running it."""
    try:
        command(_HelpParser(prog=prog), [])
        raise TypeError(f"the command {prog} parses no arguments")
    except _BuiltError as built:
        actions, kinds = built.args
    known = {one.name for kind in kinds for one in settings_of(kind)}
    sections = {name.rpartition(".")[0] for name in known}
    helps = {f"{name}.help" for name in known}  # that a list of dataclasses brings along
    own = [action for action in actions if action.dest not in known | sections | helps]
    arguments, options = (
        [_setting(action) for action in own if bool(action.option_strings) == is_option]
        for is_option in (False, True)
    )
    return CommandHelp(prog, getdoc(command) or "", arguments, options, kinds)


def _setting(action: Any) -> Setting:
    """Describe an option that is no setting of a dataclass."""
    kind = getattr(action, "_typehint", None) or action.type  # jsonargparse's, or argparse's
    form = "PATH" if kind is expanduser else form_of(kind or str)
    if action.choices:
        form = f"{{{','.join(action.choices)}}}"
    elif not action.option_strings:
        form = action.dest.upper()
    if action.metavar and form != "{true,false}":
        form = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar
    form = {0: "", "+": f"{form} ...", "*": f"[{form} ...]", "?": f"[{form}]"}.get(
        action.nargs, form
    )
    default = None if action.required else value_text(action.default or None)
    return Setting(action.dest, form, action.help or "", default, "", "")


# ---- the page ----


def _page(found: CommandHelp, *, is_whole: bool) -> Iterator[str]:
    yield from (_usage(found), "", *_wrapped(found.description, 0))
    if found.arguments:
        yield from ("", "arguments", *_described(found.arguments, is_option=False))
    own = Setting("help", "[WORD ...]", HELP, "null", "", "")
    yield from ("", "options", *_described([own, *found.options]))
    for kind in found.kinds:
        sections = _sections(settings_of(kind))
        if is_whole:
            for name, settings in sections.items():
                yield from ("", _heading(name, settings), *_described(settings))
        else:
            yield from _described(sections.pop("", []))
            yield from _overview(sections, found.prog) if sections else ()


def _usage(found: CommandHelp) -> str:
    """Return the usage: arguments and required options; the others are an ellipsis."""
    parts = [one.form for one in found.arguments]
    required = [one for one in [*found.options, *found.settings] if one.default is None]
    parts += [f"--{one.name} {one.form}" for one in required]
    return " ".join([f"usage: {found.prog}", *parts, "[OPTION ...]"])


def _overview(sections: dict[str, list[Setting]], prog: str) -> Iterator[str]:
    """Yield the names of settings by section, and how to have them described."""
    yield from ("", "settings by section, each given as --SECTION.NAME VALUE")
    for name, settings in sections.items():
        names = " ".join(one.name.rpartition(".")[2] for one in settings)
        yield from (f"  {_heading(name, settings)}", *_wrapped(names, 6))
    yield from (
        "",
        "for the meaning, default and range of settings",
        f"  {prog} --help {next(iter(sections))}    those of a section",
        f"  {prog} --help lr      those with a word in their name or description",
        f"  {prog} --help all     all",
    )


def _heading(section: str, settings: Sequence[Setting]) -> str:
    summary = settings[0].section
    return f"{section}: {summary}" if section else summary


def _sections(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Return settings by the section of their dotted name; "" is outside of any."""
    sections: dict[str, list[Setting]] = {}
    for one in settings:
        sections.setdefault(one.name.rpartition(".")[0], []).append(one)
    return sections


def _described(options: Sequence[Setting], *, is_option: bool = True) -> Iterator[str]:
    for one in options:
        yield f"  --{one.name} {one.form}".rstrip() if is_option else f"  {one.form}"
        notes = [_default_note(one) if is_option else "", one.expected]
        note = "; ".join(filter(None, notes))
        yield from _wrapped(f"{one.description} ({note})" if note else one.description, 6)


def _default_note(one: Setting) -> str:
    if one.default is None:
        return "required"
    return "" if one.default == "null" else f"default {one.default}"


def _wrapped(text: str, indent: int) -> list[str]:
    """Return paragraphs as lines of the terminal's width."""
    width = min(shutil.get_terminal_size().columns, MAX_WIDTH)
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        lines += [""] * bool(lines)
        lines += textwrap.wrap(
            " ".join(paragraph.split()),
            width,
            initial_indent=" " * indent,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


# ---- the search ----


def _found(found: CommandHelp, words: Sequence[str]) -> Iterator[str]:
    """Yield the options of a section, or those with every word, names before descriptions."""
    sections = {
        name: settings
        for kind in found.kinds
        for name, settings in _sections(settings_of(kind)).items()
        if name and [*words] in ([name.partition(".")[0]], [name])
    }
    for name, settings in sections.items():
        yield from (_heading(name, settings), *_described(settings), "")
    if sections:
        return
    options = [*found.options, *found.settings]
    wanted = [word.lstrip("-").lower() for word in words]
    named = [one for one in options if all(word in _names(one) for word in wanted)]
    others = [one for one in options if all(word in _text(one) for word in wanted)]
    if not others:
        known = [name for one in options for name in _names(one).split()]
        near = get_close_matches(wanted[-1], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownOptionError(
            f"no option has {' '.join(words)} in its name or description{hint}"
        )
    yield from _described(list(dict.fromkeys([*named, *others])))


def _names(one: Setting) -> str:
    """Return a setting's name, and its names in other tools."""
    last = one.name.rpartition(".")[2]
    return " ".join([one.name, *(name for name, ours in OTHER_TOOLS.items() if ours == last)])


def _text(one: Setting) -> str:
    return f"{_names(one)} {one.description} {one.form}".lower()
