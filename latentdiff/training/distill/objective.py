"""The objective of a stage of distillation: from a batch to the loss of each sample.

A student learns its teacher's answers at the timesteps of its own sampler: first the guided
prediction for a scale that it reads as an input (Meng et al. 2023, Alg. 1), then in one step where
two steps of its teacher lead (Salimans & Ho 2022, Alg. 2). The loss is the squared error of the
velocity, whatever the prediction type: SNR + 1 in x0. The mathematics is in diffusion/.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.ddpm import q_sample
from latentdiff.diffusion.distillation import (
    ddim_step,
    guidance_weights,
    one_step_output,
    trailing_timesteps,
    velocity_weights,
)
from latentdiff.diffusion.guidance import classifier_free
from latentdiff.diffusion.losses import per_sample_loss
from latentdiff.diffusion.schedules import Schedule
from latentdiff.diffusion.timesteps import TimestepSampler
from latentdiff.models.conditioning import Conditioning
from latentdiff.training.objective import Losses

# (zt (B, C, h, w), t (B,), conditioning of B images, scale (B,)) -> output, float32
Predict = Callable[[Tensor, Tensor, Conditioning, Tensor], Tensor]
# (zt, number of the student's step (B,), conditioning, scale) -> the student's output
Target = Callable[[Tensor, Tensor, Conditioning, Tensor], Tensor]


@dataclass(frozen=True)
class GuidedTarget:
    """The teacher's classifier-free guided prediction at each of num_steps timesteps."""

    teacher: Predict
    timesteps: Tensor  # (num_steps,) of the student
    null_text: Conditioning  # of one null prompt

    def __call__(self, zt: Tensor, number: Tensor, text: Conditioning, scale: Tensor) -> Tensor:
        """Return uncond + scale (cond - uncond), both from one pass."""
        t = self.timesteps[number]
        texts = Conditioning.cat([text.with_text(self.null_text), text])
        both = self.teacher(torch.cat([zt, zt]), torch.cat([t, t]), texts, torch.cat([scale] * 2))
        uncond, cond = both.chunk(2)
        return classifier_free(uncond, cond, scale.view(-1, 1, 1, 1))


@dataclass(frozen=True)
class HalvedTarget:
    """The output whose one step is two DDIM steps of the teacher, which takes twice as many."""

    teacher: Predict
    schedule: Schedule
    prediction_type: str
    path: Tensor  # (2 num_steps + 1,) timesteps of the teacher, and CLEAN

    def __call__(self, zt: Tensor, number: Tensor, text: Conditioning, scale: Tensor) -> Tensor:
        """Return the output for the step of that number; the last one ends at clean latents."""
        start, middle, end = (self.path[2 * number + k] for k in range(3))
        z = zt
        for t, t_next in ((start, middle), (middle, end)):
            output = self.teacher(z, t, text, scale)
            z = ddim_step(self.schedule, output, z, t, t_next, prediction_type=self.prediction_type)
        return one_step_output(
            self.schedule, zt, z, start, end, prediction_type=self.prediction_type
        )


@dataclass(frozen=True)
class Distillation:
    """The loss of a student of num_steps steps against its target, on the device.

    sample_steps: samples numbers of the student's steps, as timesteps of a chain of num_steps.
    """

    schedule: Schedule
    prediction_type: str
    target: Target
    num_steps: int
    sample_steps: TimestepSampler
    min_guidance: float
    max_guidance: float
    weighs_guidance: bool = False  # errors by 1 / scale^2

    @cached_property
    def timesteps(self) -> Tensor:
        """The student's timesteps, noisiest first, (num_steps,)."""
        timesteps = trailing_timesteps(self.num_steps, self.schedule.num_timesteps)
        return timesteps.to(self.schedule.betas.device, non_blocking=True)

    @property
    def loss_aware(self) -> None:
        """None: no timestep sampler keeps a history of losses."""

    def losses(self, model: Any, batch: Mapping[str, Tensor], *, count: int) -> Losses:
        """Return the loss of each sample, of `count` in the whole step.

        model: a TextToImage that reads the guidance. batch: as of plain training, with `guidance`,
        the place of each sample's scale between the lowest and the highest.
        """
        z0, text = batch["z0"], Conditioning.of(batch)
        number, importance_weight = self.sample_steps(batch["u"], batch["stratum"], count)
        t = self.timesteps[number]
        width = self.max_guidance - self.min_guidance
        scale = self.min_guidance + width * batch["guidance"]
        zt = q_sample(self.schedule, z0, t, batch["eps"])
        with torch.no_grad():
            wanted = self.target(zt, number, text, scale)
        output = model(zt, t, text, scale)
        weights = velocity_weights(self.schedule, t, prediction_type=self.prediction_type)
        if self.weighs_guidance:
            lowest, highest = self.min_guidance, self.max_guidance
            weights = weights * guidance_weights(scale, lowest=lowest, highest=highest)
        loss = weights * per_sample_loss(output, wanted, mask=batch.get("mask"))
        return Losses(loss, t, importance_weight)
