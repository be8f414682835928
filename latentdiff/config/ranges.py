"""The range of a number, declared with its field, and the check of all of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


def at_least(minimum: float, *, default: float) -> Any:
    """Declare a finite number from `minimum` up."""
    return _ranged(
        default, lambda value: minimum <= value < math.inf, f"a number of at least {minimum}"
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


def _ranged(default: float, allows: Callable[[float], bool], expected: str) -> Any:
    return dataclasses.field(default=default, metadata={"allows": allows, "expected": expected})


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise ValueError for the first number out of its range, by its dotted name."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{prefix}{field.name}.")
        elif "allows" in field.metadata and not field.metadata["allows"](value):
            expected = field.metadata["expected"]
            raise ValueError(f"{prefix}{field.name}={value}, expected {expected}")
