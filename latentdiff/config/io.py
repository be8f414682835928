"""Settings from a YAML file and the command line, and back to YAML.

Answers for messages that name the setting, what it was given and the nearest known name.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from latentdiff.config.text_to_image import Config, flat

Settings = TypeVar("Settings")


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, kind: type[Settings] | None = None
) -> Settings:
    """Read a YAML file and overrides such as "--train.seed=1" into a Config (or VaeConfig).

    Raises ValueError or FileNotFoundError for a missing file, an unknown key (with the nearest
    name), a wrong type or a value out of range.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the config file {path} does not exist")
    wanted: Any = kind or Config
    return parse_arguments(wanted, ["--config", str(path), *overrides], exit_on_error=False)


def parse_arguments(
    kind: type[Settings],
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
    exit_on_error: bool = True,
) -> Settings:
    """Parse a command line with --config, --print_config, --help and an option per setting.

    On bad usage: exit status 2 and one message on stderr, or ValueError without exit_on_error.
    """
    from jsonargparse import ArgumentError, ArgumentParser, Namespace

    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with these settings")
    parser.add_class_arguments(kind)
    try:
        parsed: Namespace = parser.parse_args(arguments)
        values = parser.instantiate_classes(parsed).as_dict()
        values.pop("config", None)
        return kind(**values)
    except (ArgumentError, ValueError, TypeError) as error:
        message = _readable(str(error), kind)
        if not exit_on_error:
            raise ValueError(message) from error
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        raise SystemExit(2) from error


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain dicts, lists and values, as its YAML file holds them."""
    return {
        name: _plain(value)
        for name, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    }


def to_yaml(config: Any) -> str:
    """Return the YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def _readable(message: str, kind: Any) -> str:
    """Shorten jsonargparse's message and add the nearest name to an unknown key."""
    message = re.sub(r"\s+", " ", message).strip()
    unknown = re.search(r"[Kk]ey '?([\w.]+)'? is not expected", message) or re.search(
        r"[Uu]nrecognized arguments: --([\w.]+)", message
    )
    inside = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    wrong = f"{inside[1]}.{inside[2]}" if inside else unknown[1] if unknown else ""
    if wrong:
        names = list(flat(kind()))
        near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        return f"unknown setting {wrong}; {hint}"
    return message
