"""The contract of a recipe: what the training loop asks of text-to-image, VAE and CLIP training.

Does not answer for: the loop itself (loop.py), or how a state is kept on disk (resume.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from latentdiff.training.bill.materials import Materials
from latentdiff.training.checkpoint import Parts
from latentdiff.training.stopping.verdicts import RunVerdicts


@dataclass(frozen=True)
class LoopSettings:
    """The settings that the loop takes from a recipe's config, under the same names."""

    max_steps: int
    batch_size: int
    log_every_steps: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    keep_every_steps: int = 0
    keep_best: bool = False
    lr_warmup_steps: int = 0
    report_to: str | tuple[str, ...] = "tensorboard"
    tracker_project_name: str = "latentdiff"

    @classmethod
    def of(cls, section: object) -> "LoopSettings":
        """Read them from a config, or the section of one, that need not have those of a default."""
        names = [field.name for field in fields(cls) if hasattr(section, field.name)]
        return cls(**{name: getattr(section, name) for name in names})


class Recipe(ABC):
    """What is trained: everything that the loop asks of it. One recipe is one run."""

    def __init__(self) -> None:
        self.heldout: dict[int, float] = {}  # losses so far, by step
        self.steps_per_epoch = 0.0  # 0: not known
        self.materials: Materials | None = None  # for the bill of what is exported
        self.verdicts: RunVerdicts | None = None  # where a recipe has its evaluations judged

    @abstractmethod
    def batches(self, first_step: int) -> Iterator[Any]:
        """Return the batches from optimiser step `first_step` on."""

    @abstractmethod
    def step(self, batches: Iterator[Any], step: int) -> int:
        """Do optimiser step `step`, counted from 0; return its number of images."""

    @abstractmethod
    def figures(self, step: int) -> dict[str, float]:
        """Return the figures, "loss" among them, of the steps since the last call, up to `step`.

        Raises FloatingPointError when the numbers went wrong.
        """

    @abstractmethod
    def tensors(self) -> Parts:
        """Return what a checkpoint holds as tensors, by part and name; not copies.

        What `figures` has not returned yet is part of it. FloatingPointError when it went wrong.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds as JSON."""

    @abstractmethod
    def load(self, tensors: Parts, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's state back; ValueError names what does not fit."""

    @abstractmethod
    def export(self) -> None:
        """Write what the run was for, from its last state."""

    def next_commands(self) -> list[str]:
        """Return what a person may want to type after `latentdiff` once the run has ended."""
        return []

    def evaluate(self, step: int, *, last: bool) -> dict[str, float]:
        """Return figures of the state after `step` steps, "heldout_loss" among them, when due."""
        return {}

    def ranking(self) -> dict[int, float]:
        """Return a figure by step of the states that a checkpoint may keep, the best the lowest."""
        return {at: loss for at, loss in self.heldout.items() if at}  # there is none at 0

    def save_samples(self, step: int, *, last: bool) -> dict[str, float]:
        """Write a sheet of images when it is due and not there yet; return its figures.

        The loop logs any error of it as a warning, and training continues.
        """
        return {}
