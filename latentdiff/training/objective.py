"""What a train step asks of its objective, of plain training and of distillation alike."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from latentdiff.diffusion.schedules import Schedule
from latentdiff.diffusion.timesteps import LossSecondMomentSampler


class Losses(NamedTuple):
    """The losses of a forward pass by sample: (B,) each."""

    loss: Tensor  # float32, with the objective's weight of its timestep
    t: Tensor
    importance_weight: Tensor  # 1 / (T p_t) where timesteps are not uniform


class TrainingObjective(Protocol):
    """From a batch to the loss of each sample, on the device."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def loss_aware(self) -> LossSecondMomentSampler | None:
        """The timestep sampler whose history is part of a run's state; None for any other."""

    def losses(self, model: Any, batch: Mapping[str, Tensor], *, count: int) -> Losses:
        """Return the weighted loss of each sample, of `count` in the whole step."""
