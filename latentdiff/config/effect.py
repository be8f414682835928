"""Settings that have no effect next to others: refused unless they have their default.

Each recipe's settings have rules in `effect_rules`: names, when they act, and why not otherwise.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace
from typing import Any


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
