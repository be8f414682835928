"""Settings from a YAML file and the command line, and back to YAML.

Answers for messages that name the setting, the given value and the nearest known name.
"""

import dataclasses
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from latentdiff.config.data import DataSource
from latentdiff.config.describe import OTHER_TOOLS, commented_yaml, names_meant, plain_value
from latentdiff.config.text_to_image import Config
from latentdiff.config.validation import is_list_of_settings, without_idle_settings
from latentdiff.config.yaml_file import check_yaml, find_config, read_yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Settings = TypeVar("Settings")

TYPE_NOUNS = {"float": "a finite number", "int": "a whole number", "bool": "true or false"}
RENAMED = {  # old name of a setting -> its name; an old file or command line still works
    "data.split_fraction": "data.heldout_fraction",
    "data.max_bad_fraction": "data.max_invalid_fraction",
    "data.trigger": "data.trigger_word",
    "model.measure_latents": "model.fit_scaling_factor",
    "finetune.token_from": "finetune.initializer_token",
    "finetune.prior_weight": "finetune.prior_loss_weight",
    "diffusion.weighting": "diffusion.loss_weighting",
    "diffusion.weighting_gamma": "diffusion.snr_gamma",
    "diffusion.timesteps": "diffusion.timestep_sampling",
    "train.precision": "train.mixed_precision",
    "train.warmup_steps": "train.lr_warmup_steps",
    "train.power_ema": "train.posthoc_ema_sigma_rel",
    "train.power_ema_every_steps": "train.posthoc_ema_every_steps",
    "train.max_bad_steps": "train.max_skipped_steps",
    "preview.held_out_every_steps": "eval.every_steps",
    "preview.num_held_out": "eval.num_heldout",
    "precision": "mixed_precision",
    "warmup_steps": "lr_warmup_steps",
    "principal": "pca_channels",
    "trained": "train_part",
    "equivariance": "equivariance_prob",
}

logger = logging.getLogger(__name__)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, kind: type[Settings] | None = None
) -> Settings:
    """Read a YAML file and overrides such as "--train.seed=1" into a Config (or VaeConfig).

    path: a file, or the name of a config that ships, such as "demo".

    Raises ValueError or FileNotFoundError for a missing file, an unknown key (with the nearest
    name), a wrong type or a value out of range.
    """
    settings_class: Any = kind or Config
    return parse_arguments(settings_class, ["--config", str(find_config(path)), *overrides])


def load_stored_config(path: Path, kind: type[Settings]) -> Settings:
    """Read the settings that a run has stored, as an earlier version may have written them.

    What is absent has its default, and so has what had no effect, which a new run is refused for.
    """
    return kind(**without_idle_settings(_stored_values(path, kind), kind)[0])


def parse_arguments(kind: type[Settings], arguments: Sequence[str]) -> Settings:
    """Parse options such as "--train.seed=1" and --config into settings; see parse_settings."""
    settings_class: Any = kind
    return _parsed(_parser_of(settings_class), kind, arguments, own=())[0]


def parse_settings(
    parser: "ArgumentParser", kind: type[Settings], arguments: Sequence[str]
) -> tuple[Settings, dict[str, Any]]:
    """Parse settings and the options that a parser has besides; return both.

    Adds --config, --print_config and an option per setting to the parser; --print_config ends the
    process. Raises ValueError with one message for bad usage. An old name of a setting works and is
    logged once as a warning. The precision that accelerate launch was asked for stands where
    neither file nor option names one.
    """
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print the resulting settings as a YAML file with their descriptions, and exit",
    )
    own = list(parser.get_defaults().keys())
    _add_settings(parser, kind)
    return _parsed(parser, kind, arguments, own=own)


def _parsed(
    parser: "ArgumentParser", kind: type[Settings], arguments: Sequence[str], *, own: Sequence[str]
) -> tuple[Settings, dict[str, Any]]:
    """Parse settings, and the parser's own options, of these names."""
    from jsonargparse import ArgumentError

    try:
        given = [*_asked_of_accelerate(kind), *arguments]
        values = _parse_values(parser, _with_current_names(given, kind))
        options = {name: values.pop(name) for name in own if name in values}
        if options.pop("print_config", False):  # also where a setting is still to be filled in
            sys.stdout.write(commented_yaml(SimpleNamespace(**values), kind))
            raise SystemExit(0)
        return kind(**_as_begun(values, kind)), options
    except (ArgumentError, ValueError, TypeError) as error:
        search = f"{parser.prog} --help WORD" if own else ""
        message = _readable(str(error), [*own, *flat(kind())], search=search)
        raise ValueError(message) from error


def _asked_of_accelerate(kind: Any) -> list[str]:
    """Return the option for `accelerate launch --mixed_precision`; "no" is what it gives unasked.

    It comes first, so that files and options win; training refuses to start where they differ.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    names = [name for name in flat(kind()) if name.rpartition(".")[2] == "mixed_precision"]
    return [f"--{name}={asked}" for name in names if asked != "no"]


@cache
def _parser_of(kind: type[Settings]) -> "ArgumentParser":
    """Build the parser of settings alone, which takes longer than most parsing."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, print_config=None)
    _add_settings(parser, kind)
    return parser


def _add_settings(parser: "ArgumentParser", kind: Any) -> None:
    parser.add_argument(
        "--config",
        action="config",
        metavar="NAME",
        help="a config that ships, by its name, or a YAML file",
    )
    parser.add_class_arguments(kind)


def _parse_values(parser: "ArgumentParser", arguments: Sequence[str]) -> dict[str, Any]:
    """Parse options; return them by name, sections as their dataclasses, not checked as a whole."""
    values: dict[str, Any] = parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    values.pop("config", None)
    return values


def _stored_values(path: Path, kind: Any) -> dict[str, Any]:
    from jsonargparse import ArgumentError

    given = _with_current_names(["--config", str(path)], kind, warns=False)
    try:
        return _parse_values(_parser_of(kind), given)
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}, the settings of a run: {_readable(str(error), list(flat(kind())))}"
        ) from error


def _as_begun(values: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Return a config's values; of a run that was begun with settings without effect, less these.

    Earlier versions took them. Any other run is refused for them when its config is built.
    """
    output_dir = values["output_dir"]
    kept, names = without_idle_settings(values, kind)
    if not isinstance(output_dir, str) or "\0" in output_dir:
        return values  # which the config itself refuses
    path = Path(output_dir).expanduser() / "config.yaml"
    if not names or not path.is_file():
        return values
    now, before = (SimpleNamespace(**found) for found in (values, _stored_values(path, kind)))
    if any(attrgetter(name)(now) != attrgetter(name)(before) for name in names):
        return values
    logger.warning("without effect, as when %s was begun: %s", path.parent, ", ".join(names))
    return kept


def _with_current_names(arguments: Sequence[str], kind: Any, *, warns: bool = True) -> list[str]:
    """Rename settings that a config file or an option gives under their old names; warn once."""
    known, found, given = set(flat(kind())), {}, []

    def current(name: str) -> str:
        if name in known or RENAMED.get(name) not in known:
            return name
        found[name] = RENAMED[name]
        return RENAMED[name]

    is_path = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if is_path or (option == "--config" and equals):
            path = find_config(argument if is_path else value)
            text = _renamed_file(path, current) or str(path)
            given.append(text if is_path else f"--config={text}")
        elif option.startswith("--"):
            _check_value(option[2:], value)
            given.append(f"--{current(option[2:])}{equals}{value}")
        else:
            given.append(argument)
        is_path = argument == "--config"
    if found and warns:
        names = ", ".join(f"{old} is now {new}" for old, new in sorted(found.items()))
        logger.warning("settings have new names, the old ones still work: %s", names)
    return given


def _renamed_file(path: Path, current: Callable[[str], str]) -> str | None:
    """Return the text of a YAML file with current names; None where nothing changes.

    Raises ValueError for a setting that is given under two spellings.
    """
    text = read_yaml(path)
    try:
        settings = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError) as error:  # such as a date of month 13
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    given: dict[str, str] = {}
    for name in _leaf_names(settings):
        if (new := current(name)) in given:
            raise ValueError(f"{path} gives {new} twice, as {given[new]} and {name}; keep one")
        given[new] = name
    renamed: dict[str, Any] = {}
    for name, value in settings.items():
        if not isinstance(value, dict):
            renamed[current(str(name))] = value
            continue
        for key, inner in value.items():
            section, dot, rest = current(f"{name}.{key}").partition(".")
            inside = renamed.setdefault(section, {})
            if not isinstance(inside, dict):
                raise ValueError(f"{path}: {section} is {inside!r}, expected settings in it")
            inside[rest if dot else key] = inner
        renamed.setdefault(str(name), {})
    return None if renamed == settings else yaml.safe_dump(renamed, sort_keys=False)


def _leaf_names(settings: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every value."""
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaf_names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _check_value(option: str, value: str) -> None:
    """Refuse an option's value that the parser must not build as YAML."""
    try:
        check_yaml(value, where=f"the option --{option}")
    except yaml.YAMLError:
        return  # plain text


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return {"train.seed": 0, ...}: every setting by its dotted name."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            settings |= flat(value, f"{prefix}{field.name}.")
        else:
            is_list = is_list_of_settings(value)
            settings[prefix + field.name] = plain_value(value) if is_list else value
    return settings


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain dicts, lists and values, as its YAML file holds them."""
    plain: dict[str, Any] = plain_value(config)
    return plain


def to_yaml(config: Any) -> str:
    """Return the YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _readable(message: str, names: Sequence[str], *, search: str = "") -> str:
    """Shorten jsonargparse's message and add the nearest of the known names to an unknown key.

    search: the command that finds settings by a word, where there is one.
    """
    message = re.sub(r"\s+", " ", message).strip()
    if entry := re.match(r'Parser key "data.sources": (.*)', message):
        return f"data.sources: {_readable_entry(entry[1])}"
    if "argument after ** must be a mapping" in message or message.startswith("Unexpected config"):
        return "a section of settings holds something else, expected lines such as 'seed: 1' in it"
    unknown = re.search(r"[Kk]ey '?([\w.]+)'? is not expected", message) or re.search(
        r"[Uu]nrecognized arguments: --([\w.]+)", message
    )
    inside = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    mistyped = re.search(r'Parser key "([\w.]+)": Expected (.+?)\. Got value: (.*)', message)
    if mistyped:
        kind = re.sub(r"an? typing\.Literal\[(.*)\]", r"one of \1", mistyped[2])
        kind = re.sub(r"an? <class '(\w+)'>", lambda one: TYPE_NOUNS.get(one[1], one[1]), kind)
        return f"{mistyped[1]}={mistyped[3]}, expected {kind}"
    wrong = f"{inside[1]}.{inside[2]}" if inside else unknown[1] if unknown else ""
    return f"unknown setting {wrong}; {_hint(wrong, names, search=search)}" if wrong else message


def _hint(wrong: str, names: Sequence[str], *, search: str) -> str:
    """Return the setting that an unknown name means, or the three nearest and how to search."""
    last = wrong.rpartition(".")[2]
    if last in OTHER_TOOLS and (meant := names_meant(last, names)):
        return f"that of other tools (diffusers, kohya) is {' or '.join(meant)} here"
    if near := [*names_meant(last, names), *difflib.get_close_matches(wrong, names, n=1)]:
        return f"did you mean {near[0]}?"
    nearest = difflib.get_close_matches(wrong, names, n=3, cutoff=0)
    return f"the nearest are {', '.join(nearest)}{search and f'; search: {search}'}"


def _readable_entry(message: str) -> str:
    """Describe a fault in an entry of data.sources."""
    names = [field.name for field in dataclasses.fields(DataSource)]
    if unknown := re.search(r"Option '([\w.]+)' is not accepted", message):
        near = difflib.get_close_matches(unknown[1], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        return f"unknown setting {unknown[1]} of a source; {hint}"
    if "arguments are required: root" in message:
        return "a source has no root, expected the folder of its images"
    if inner := re.search(r'Parser key "([\w.]+)": .*', message):
        return _readable(inner[0], names)
    return "expected a list of sources, such as [{root: cats, repeats: 2}, {root: dogs}]"
