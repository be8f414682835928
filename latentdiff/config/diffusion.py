"""Settings of the diffusion chain, of the prediction and of its loss."""

import math
from dataclasses import dataclass
from typing import Literal

from latentdiff.config.choices import (
    BetaSchedule,
    Loss,
    LossWeighting,
    PredictionType,
    TimestepSampling,
)
from latentdiff.config.validation import at_least, beta, positive, share


@dataclass(frozen=True)
class DiffusionConfig:
    """The chain and the prediction; fine-tuning keeps the model's own where empty."""

    beta_schedule: Literal["", BetaSchedule] = ""
    """empty: scaled_linear from scratch, the model's own for fine-tuning"""
    beta_start: float = beta(default=0.00085)
    """first beta of the linear schedules"""
    beta_end: float = beta(default=0.012)
    """last beta of the linear schedules"""
    num_timesteps: int = at_least(2, default=1000)
    """length of the chain, T"""
    zero_terminal_snr: bool = False
    """rescale the betas so that the last step is pure noise (Lin et al. 2024), from scratch or of
    model.pretrained; needs a prediction_type of v_prediction or sample"""
    prediction_type: Literal["", PredictionType] = ""
    """prediction of the U-Net: noise, velocity, clean latents, or the direction of rectified flow
    (Liu et al. 2023), which schedulers with use_flow_sigmas sample; empty: epsilon, or the
    model's"""
    loss_weighting: LossWeighting = "none"
    """loss weight by timestep"""
    snr_gamma: float = at_least(0, default=0.0)
    """gamma of the weighting; 0: 5 for min_snr and soft_min_snr, 1 for p2"""
    loss: Loss = "mse"
    """squared errors, or the pseudo-Huber loss, which counts large errors by their size"""
    huber_delta: float = positive(default=0.1)
    """error from which the Huber loss is no longer square"""
    timestep_sampling: TimestepSampling = "uniform"
    """distribution of timesteps; stratified: evenly spaced over each batch; logit_normal: more of
    the middle, as for flow_prediction (Esser et al. 2024); loss_aware: those with large losses more
    often, and weighted less (Nichol & Dhariwal 2021)"""
    logit_normal_mean: float = 0.0
    """of timestep_sampling=logit_normal: above 0 means more noise"""
    logit_normal_std: float = positive(default=1.0)
    """of timestep_sampling=logit_normal: small means more of the middle"""
    logit_normal_unbiased: bool = False
    """sample a tenth of these uniformly and weight losses by 1 / (T p_t), so that the minimum is
    that of uniform timesteps"""
    learned_variance: bool = False
    """learn the variance of the reverse steps too, by the hybrid loss (Nichol & Dhariwal 2021); the
    export next to pipeline/ is then pipeline_learned_variance/, for ancestral sampling"""
    caption_dropout: float = share(default=0.1)
    """share of captions replaced by the empty one, which guidance needs (Ho & Salimans 2022)"""
    offset_noise: float = at_least(0, default=0.0)
    """strength of a noise that is constant over each channel"""
    input_perturbation: float = at_least(0, default=0.0)
    """strength of noise in the U-Net's input that is not in its target, against exposure bias; 0.1
    in Ning et al. 2023"""

    def check(self) -> None:
        """Raise ValueError for settings that exclude each other."""
        if not math.isfinite(self.logit_normal_mean):
            raise ValueError(
                f"diffusion.logit_normal_mean={self.logit_normal_mean}, expected a finite number"
            )
        if self.beta_end < self.beta_start:
            raise ValueError(
                f"diffusion.beta_end={self.beta_end} is below diffusion.beta_start="
                f"{self.beta_start}, expected betas that rise"
            )
        if self.logit_normal_unbiased and self.timestep_sampling != "logit_normal":
            raise ValueError(
                "diffusion.logit_normal_unbiased weights the losses of "
                "diffusion.timestep_sampling=logit_normal, got "
                f"{self.timestep_sampling!r}; leave the first out, or set the second"
            )
