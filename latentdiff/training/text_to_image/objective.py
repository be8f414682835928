"""The objective: from a batch to the loss of each sample (Ho et al. 2020, Alg. 1, on latents).

Drop captions, sample timesteps, add noise, predict, weight the error. The mathematics is in
diffusion/, the update that follows in train_step.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latentdiff.diffusion.ddpm import q_sample
from latentdiff.diffusion.loss_weighting import loss_weights
from latentdiff.diffusion.losses import (
    per_sample_loss,
    variance_loss,
)
from latentdiff.diffusion.noise import offset_noise, perturb_input
from latentdiff.diffusion.prediction import target
from latentdiff.diffusion.schedules import Schedule
from latentdiff.diffusion.timesteps import LossSecondMomentSampler, TimestepSampler
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.unet.learned_variance import VLB_WEIGHT
from latentdiff.training.objective import Losses


@dataclass(frozen=True)
class Objective:
    """The terms of the loss, on the device: see config/diffusion.py for their meaning."""

    schedule: Schedule
    prediction_type: str
    null_text: Conditioning  # of one null prompt
    sample_timesteps: TimestepSampler
    loss_weighting: str = "none"
    snr_gamma: float | None = None  # None: the weighting's default
    huber_delta: float | None = None  # None: squared errors
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    learned_variance: bool = False

    @property
    def loss_aware(self) -> LossSecondMomentSampler | None:
        """The timestep sampler whose history is part of a run's state; None for any other."""
        sampler = self.sample_timesteps
        return sampler if isinstance(sampler, LossSecondMomentSampler) else None

    def losses(self, model: Any, batch: Mapping[str, Tensor], *, count: int) -> Losses:
        """Return the weighted loss of each sample, of `count` in the whole step.

        Where the batch has a mask (B, 1, h, w), a sample's loss is the mean weighted by the mask.
        """
        z0, eps = batch["z0"], batch["eps"]
        t, importance_weight = self.sample_timesteps(batch["u"], batch["stratum"], count)
        if self.offset_noise:
            eps = offset_noise(eps, batch["offset"], strength=self.offset_noise)
        zt = q_sample(self.schedule, z0, t, eps)
        if self.input_perturbation:
            strength = self.input_perturbation
            zt = perturb_input(self.schedule, zt, t, batch["perturbation"], strength=strength)
        conditioning = Conditioning.of(batch).with_text(self.null_text, where=batch["dropped"])
        output = model(zt, t, conditioning)
        wanted = target(self.schedule, z0, eps, t, prediction_type=self.prediction_type)
        weights = loss_weights(
            self.schedule,
            t,
            prediction_type=self.prediction_type,
            weighting=self.loss_weighting,
            gamma=self.snr_gamma,
        )
        loss = weights * per_sample_loss(
            output[:, : z0.shape[1]],
            wanted,
            huber_delta=self.huber_delta,
            mask=batch.get("mask"),
        )
        if self.learned_variance:
            loss = loss + VLB_WEIGHT * variance_loss(
                self.schedule, output, z0, zt, t, prediction_type=self.prediction_type
            )
        return Losses(loss, t, importance_weight)
