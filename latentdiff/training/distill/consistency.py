"""The objective of latent consistency distillation, LCM: from a batch to the loss of each sample.

A consistency model maps every point of a guided trajectory of its teacher to the trajectory's clean
end (Y. Song et al. 2023; of latents, guided: Luo et al. 2023, Alg. 1). Neighbours on a grid of 50
DDIM steps are taught the same end; the target is the average of the student's own weights. With
adapters on a frozen teacher it is an LCM-LoRA (Luo et al. 2023b). The mathematics is in diffusion/.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.diffusion.ddpm import q_sample
from latentdiff.diffusion.distillation import (
    SOLVER_STEPS,
    consistent_x0,
    ddim_step,
    trailing_timesteps,
)
from latentdiff.diffusion.losses import per_sample_loss
from latentdiff.diffusion.schedules import Schedule
from latentdiff.diffusion.timesteps import TimestepSampler
from latentdiff.models.conditioning import Conditioning
from latentdiff.training.distill.objective import GuidedTarget, Predict
from latentdiff.training.objective import Losses

HUBER_C = 0.001  # of the pseudo-Huber loss, as in diffusers' training script


@dataclass
class Consistency:
    """The loss of a latent consistency model, on the device.

    teacher: predicts without guidance; guided by a random scale an image. sample_steps: samples
    numbers of the grid's steps. averaged: a context in which the student has its averaged weights.
    """

    schedule: Schedule
    prediction_type: str
    teacher: Predict
    null_text: Conditioning  # of one null prompt
    sample_steps: TimestepSampler
    min_guidance: float
    max_guidance: float
    averaged: Callable[[], AbstractContextManager[None]]

    @cached_property
    def path(self) -> Tensor:
        """The grid's timesteps, noisiest first, and 0, its clean end; (SOLVER_STEPS + 1,)."""
        grid = trailing_timesteps(SOLVER_STEPS, self.schedule.num_timesteps)
        return F.pad(grid, (0, 1)).to(self.schedule.betas.device, non_blocking=True)

    @property
    def loss_aware(self) -> None:
        """None: no timestep sampler keeps a history of losses."""

    def losses(self, model: Any, batch: Mapping[str, Tensor], *, count: int) -> Losses:
        """Return the loss of each sample, of `count` in the whole step.

        model: a TextToImage. batch: as of plain training, with `guidance`, the place of each
        sample's scale between the lowest and the highest.
        """
        z0, text = batch["z0"], Conditioning.of(batch)
        number, importance_weight = self.sample_steps(batch["u"], batch["stratum"], count)
        t, t_next = self.path[number], self.path[number + 1]
        zt = q_sample(self.schedule, z0, t, batch["eps"])
        width = self.max_guidance - self.min_guidance
        scale = self.min_guidance + width * batch["guidance"]
        with torch.no_grad():
            guided = GuidedTarget(self.teacher, self.path, self.null_text)(zt, number, text, scale)
            z_next = ddim_step(
                self.schedule, guided, zt, t, t_next, prediction_type=self.prediction_type
            )
            with self.averaged():
                wanted = self._end(model, z_next, t_next, text)
        found = self._end(model, zt, t, text)
        loss = per_sample_loss(found, wanted, huber_delta=HUBER_C, mask=batch.get("mask"))
        return Losses(loss / (2 * HUBER_C), t, importance_weight)

    def _end(self, model: Any, zt: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """Return the clean end of the trajectory through zt, as the model predicts it, float32."""
        output = model(zt, t, text).float()
        return consistent_x0(self.schedule, output, zt, t, prediction_type=self.prediction_type)
