"""What settings may be: the range declared with each field, and settings without an effect.

A setting that has no effect next to others is refused unless it has its default: each recipe's
settings have rules in `effect_rules` with names, when they act, and why not otherwise.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

NO_FOLDER = ("", "null", "none", "~", "''", '""')  # a folder of such a name is ./null


def at_least(minimum: float, *, default: float) -> Any:
    """Declare a finite number from `minimum` up."""
    return _ranged(
        default, lambda value: minimum <= value < math.inf, f"a number of at least {minimum}"
    )


def at_least_if_given(minimum: float) -> Any:
    """Declare a finite number from `minimum` up, or none."""
    return _ranged(
        None,
        lambda value: value is None or minimum <= value < math.inf,
        f"a number of at least {minimum}, or null",
    )


def positive(*, default: float) -> Any:
    """Declare a finite number above 0."""
    return _ranged(default, lambda value: 0 < value < math.inf, "a number above 0")


def share(*, default: float) -> Any:
    """Declare a share of a whole, 0 and 1 included."""
    return _ranged(default, lambda value: 0 <= value <= 1, "a share in [0, 1]")


def share_below_1(*, default: float) -> Any:
    """Declare a share of a whole, 1 excluded."""
    return _ranged(default, lambda value: 0 <= value < 1, "a share in [0, 1), a number below 1")


def between(minimum: float, maximum: float, *, default: float | None) -> Any:
    """Declare a number in [minimum, maximum]; None too where it is the default."""
    return _ranged(
        default,
        lambda value: value is default is None or minimum <= value <= maximum,
        f"a number in [{minimum}, {maximum}]",
    )


def beta(*, default: float) -> Any:
    """Declare the variance of one diffusion step."""
    return _ranged(default, lambda value: 0 < value < 1, "a number above 0 and below 1")


def color(*, default: tuple[int, int, int]) -> Any:
    """Declare an RGB color."""
    return _ranged(
        default, lambda value: all(0 <= part <= 255 for part in value), "three numbers in 0..255"
    )


def widths(*, default: tuple[int, ...]) -> Any:
    """Declare the channels of each level, at least one."""
    return _ranged(
        default,
        lambda value: value and all(0 < width <= 65536 for width in value),
        "one or more widths of at least 1",
    )


def non_empty_texts(*, default: tuple[str, ...] = ()) -> Any:
    """Declare texts, none of them empty."""
    return _ranged(default, lambda value: all(text.strip() for text in value), "texts, none empty")


def folder(*, default: str) -> Any:
    """Declare the name of a folder that is needed."""
    return _ranged(
        default,
        lambda value: value.strip().lower() not in NO_FOLDER and "\0" not in value,
        "the name of a folder",
    )


def _ranged(default: Any, allows: Callable[[Any], Any], expected: str) -> Any:
    return dataclasses.field(default=default, metadata={"allows": allows, "expected": expected})


def check_multiples(name: str, numbers: Sequence[int], divisor: int) -> None:
    """Raise ValueError where one of the numbers is no multiple of the divisor."""
    if odd := [number for number in numbers if number % divisor]:
        raise ValueError(f"{name} holds {odd[0]}, expected multiples of {divisor}")


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise ValueError for the first number out of its range, by its dotted name."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None and not re.search("None|Optional", str(field.type)):
            raise ValueError(f"{prefix}{field.name} is null, expected a value; leave it out")
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{prefix}{field.name}.")
        elif is_list_of_settings(value):
            for number, entry in enumerate(value):
                check_ranges(entry, f"{prefix}{field.name}[{number}].")
        elif "allows" in field.metadata and not field.metadata["allows"](value):
            expected = field.metadata["expected"]
            raise ValueError(f"{prefix}{field.name}={value}, expected {expected}")


def is_list_of_settings(value: Any) -> bool:
    """Return whether a value is a tuple of dataclasses."""
    return isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))


@dataclass(frozen=True)
class EffectRule:
    """Settings by dotted name; `acts` tells of a whole config whether they have an effect in it."""

    names: tuple[str, ...]
    acts: Callable[[Any], bool]
    why: str


def settings_without_effect(config: Any, kind: Any) -> dict[str, str]:
    """Return the settings that differ from their default without an effect, and why they have none.

    config: of the dataclass `kind`, or anything with the same attributes.
    """
    return {
        name: rule.why
        for rule in kind.effect_rules
        if not rule.acts(config)
        for name in rule.names
        if attrgetter(name)(config) != _default(kind, name)
    }


def check_effect(config: Any) -> None:
    """Raise ValueError that names every setting without an effect."""
    if found := settings_without_effect(config, type(config)):
        reasons = "; ".join(
            f"{name}={attrgetter(name)(config)} has no effect: {why}" for name, why in found.items()
        )
        raise ValueError(f"{reasons}. Leave out {', '.join(found)}")


def without_idle_settings(values: Mapping[str, Any], kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Return a config's values with those without an effect at their default, and their names.

    values: of the dataclass `kind`, before it is built.
    """
    kept, names = dict(values), list(settings_without_effect(SimpleNamespace(**values), kind))
    for name in names:
        section, _, field = name.rpartition(".")
        change = {field: _default(kind, name)}
        kept |= {section: dataclasses.replace(kept[section], **change)} if section else change
    return kept, names


def _default(kind: Any, name: str) -> Any:
    section, _, field = name.rpartition(".")
    owner = _field(kind, section).default_factory if section else kind
    return _field(owner, field).default


def _field(kind: Any, name: str) -> Any:
    return next(field for field in dataclasses.fields(kind) if field.name == name)
