"""A tracker that remembers, in place of one of Accelerate's."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

from accelerate import tracking


class FakeTracker:
    """Remembers its options, and each call by (name, value, step); `fails` makes logging raise."""

    name = "wandb"
    fails = False

    def __init__(self, project: str, **options: Any) -> None:
        self.project, self.options, self.calls = project, options, []  # type: ignore[var-annotated]
        made.append(self)

    def start(self) -> None:
        self.calls.append(("start", None, None))

    def log(self, values: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.calls.append(("log", values, step))

    def log_images(self, values: dict[str, Any], step: int) -> None:
        self.calls.append(("image", values["samples"][0].size, step))

    def finish(self) -> None:
        self.calls.append(("finish", None, None))


made: list[FakeTracker] = []


def use_fake_wandb(monkeypatch: Any) -> list[FakeTracker]:
    """Let wandb, installed or not, be a fake; return the list that each new tracker is added to."""
    made.clear()
    package: Any = ModuleType("wandb")
    package.__spec__ = ModuleSpec("wandb", None)
    package.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="offline"))
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return made
