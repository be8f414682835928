"""The bound of held-out latents with and without their captions (Ho et al. 2020, Eq. 5).

Their difference is how many bits a caption is worth to the model. Numbers are bits per dimension of
the latent. L_0 is a density, so a bound may be negative and only differences between models of the
same latents mean something. The mathematics is in diffusion/bound.py; here it meets a U-Net.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm

from latentdiff.diffusion.bound import (
    BoundSamples,
    Estimate,
    TimestepPlan,
    difference,
    estimate,
    evaluate_bound,
    per_timestep,
)
from latentdiff.diffusion.ddpm import VARIANCE_TYPES, Model
from latentdiff.diffusion.schedules import Schedule, respace, space_timesteps
from latentdiff.evaluation.eval_set import CaptionedLatents, EvalModel
from latentdiff.models.build import schedule_of
from latentdiff.models.components import Components

LEARNED = "learned_range"
WIDTH = 1.96  # standard errors of a 95 % interval


@dataclass(frozen=True, eq=False)
class Chain:
    """The reverse chain that is bounded."""

    schedule: Schedule
    prediction_type: str
    variance_type: str
    channels: int  # of a latent

    @classmethod
    def of(
        cls, components: Components, *, steps: str = "", variance_type: str | None = None
    ) -> "Chain":
        """Return a model's own chain, or the shorter one of `space_timesteps`.

        variance_type: by default the learned one where the U-Net has it, else "fixed_small"; a
        U-Net with a learned variance can be asked for a fixed one.
        """
        channels = int(components.vae.config["latent_channels"])
        learned = components.unet.config["out_channels"] == 2 * channels
        chosen = variance_type or (LEARNED if learned else "fixed_small")
        if chosen not in VARIANCE_TYPES or (chosen == LEARNED and not learned):
            known = [name for name in VARIANCE_TYPES if learned or name != LEARNED]
            raise ValueError(
                f"variance_type is {chosen!r}, expected one of {', '.join(known)} for this U-Net"
            )
        schedule = schedule_of(components.scheduler)
        if steps:
            schedule = respace(schedule, space_timesteps(steps, schedule.num_timesteps))
        prediction_type = components.scheduler.config["prediction_type"]
        return cls(schedule, prediction_type, chosen, channels)

    @property
    def num_outputs(self) -> int:
        """Channels that are read of the U-Net's output."""
        return self.channels * (2 if self.variance_type == LEARNED else 1)


def denoiser(unet: UNet2DConditionModel, text: Tensor, *, num_outputs: int) -> Model:
    """Return a U-Net as a model (xt, t) -> output under text states (B, L, D) or (1, L, D)."""

    def model(xt: Tensor, t: Tensor) -> Tensor:
        states = text.to(xt.device, unet.dtype).expand(len(xt), -1, -1)
        output: Tensor = unet(xt.to(unet.dtype), t, states, return_dict=False)[0]
        return output[:, :num_outputs].float()

    return model


@dataclass(frozen=True, eq=False)
class CaptionBound:
    """The bound of the same latents, timesteps and noise without and with captions."""

    unconditional: BoundSamples
    conditional: BoundSamples


def caption_bound(
    chain: Chain,
    subject: EvalModel,
    *,
    plan: TimestepPlan | None,
    repeats: int,
    latents: CaptionedLatents | None = None,
) -> CaptionBound:
    """Evaluate both bounds of each image `repeats` times.

    plan: None calls the U-Net for all T steps. latents: others than the subject's.
    """
    latents = subject.latents if latents is None else latents
    null = latents.null_text
    return CaptionBound(
        _samples(chain, subject, latents, lambda part: null, plan=plan, repeats=repeats),
        _samples(chain, subject, latents, lambda part: part.text, plan=plan, repeats=repeats),
    )


def conditional_bound(
    chain: Chain, subject: EvalModel, *, plan: TimestepPlan | None, repeats: int
) -> BoundSamples:
    """Evaluate the bound with captions alone; the same draws as in `caption_bound`."""
    return _samples(
        chain, subject, subject.latents, lambda part: part.text, plan=plan, repeats=repeats
    )


def pilot_plan(
    chain: Chain, subject: EvalModel, *, num_draws: int, num_pilot: int
) -> TimestepPlan | None:
    """Return how to draw `num_draws` timesteps an image, from every step of a few images.

    None where the chain is not longer than that: then all its steps are taken.
    """
    if chain.schedule.num_timesteps - 1 <= num_draws:
        return None
    count = min(num_pilot, len(subject.latents))
    spread = torch.linspace(0, len(subject.latents) - 1, count).round().long()
    few = subject.latents.select(spread.tolist())
    pilot = _samples(chain, subject, few, lambda part: part.text, plan=None, repeats=1)
    return TimestepPlan.from_pilot(pilot, num_draws=num_draws)


def _samples(
    chain: Chain,
    subject: EvalModel,
    latents: CaptionedLatents,
    text_of: Callable[[CaptionedLatents], Tensor],
    *,
    plan: TimestepPlan | None,
    repeats: int,
) -> BoundSamples:
    """Evaluate batch by batch; every call draws the same timesteps and noise."""
    schedule, generator = chain.schedule.to(subject.device), subject.generator()
    unet = subject.components.unet
    batches = []
    for start in tqdm(range(0, len(latents), subject.batch_size), desc="bound", leave=False):
        stop = min(start + subject.batch_size, len(latents))
        part = latents.select(range(start, stop))
        batches.append(
            evaluate_bound(
                schedule,
                denoiser(unet, text_of(part).to(subject.device), num_outputs=chain.num_outputs),
                part.z0.to(subject.device),
                generator=generator,
                prediction_type=chain.prediction_type,
                variance_type=chain.variance_type,
                plan=plan,
                repeats=repeats,
            )
        )
    return BoundSamples.cat(batches)


# --- Along the chain ---


class TimestepBin(NamedTuple):
    """A stretch of timesteps first..last, its terms summed; bits per dimension."""

    first: int
    last: int
    unconditional: Estimate
    conditional: Estimate
    caption: Estimate  # their difference: at which noise the caption helps
    x0_rmse: float  # distortion of the x0 predicted there, with captions; NaN where none was drawn
    rate: float  # bits spent on x_t in the middle of the stretch, with captions


def timestep_bins(bound: CaptionBound, num_timesteps: int, *, count: int = 40) -> list[TimestepBin]:
    """Spread the terms of t = 1 .. T-1 over at most `count` stretches of about equal length."""
    count = min(count, num_timesteps - 1)
    edges = torch.linspace(1, num_timesteps, count + 1).round().long()
    without, with_captions = (
        _by_timestep_bin(s.t, s.weights * s.bits, edges)
        for s in (bound.unconditional, bound.conditional)
    )
    samples = bound.conditional
    rate = per_timestep(samples, num_timesteps).rate
    error = _by_timestep_bin(samples.t, samples.weights * samples.x0_mse, edges).sum((1, 2))
    error /= _by_timestep_bin(samples.t, samples.weights, edges).sum((1, 2))
    return [
        TimestepBin(
            int(edges[i]),
            int(edges[i + 1]) - 1,
            estimate(without[i]),
            estimate(with_captions[i]),
            estimate(without[i] - with_captions[i]),
            float(error[i].sqrt()),
            float(rate[edges[i] : edges[i + 1]].mean()),
        )
        for i in range(count)
    ]


def _by_timestep_bin(t: Tensor, values: Tensor, edges: Tensor) -> Tensor:
    """Sum each estimate's values by stretch. t, values: (N, R, K) -> (count, N, R)."""
    index = torch.bucketize(t, edges[1:-1], right=True)
    sums = torch.zeros(*t.shape[:2], len(edges) - 1, dtype=values.dtype)
    return sums.scatter_add_(2, index, values).permute(2, 0, 1)


# --- As plain JSON values ---


def to_json(value: Estimate, *, factor: float = 1.0) -> dict[str, Any]:
    """Return an estimate with its 95 % interval as JSON values, None where it is not known.

    FloatingPointError where the estimate itself is no number.
    """
    if not math.isfinite(value.mean):
        raise FloatingPointError(
            "the model's output became NaN or Inf, so it has no bound; is the folder damaged?"
        )
    mean, se, noise = (x * factor if math.isfinite(x) else None for x in value)
    interval = None if se is None else [mean - WIDTH * se, mean + WIDTH * se]  # type: ignore[operator]
    return {"mean": mean, "se": se, "se_noise": noise, "interval_95": interval}


def summary(bound: CaptionBound, *, num_dims: int) -> dict[str, Any]:
    """Return the figures of both bounds as JSON values. num_dims: of a latent, C h w."""
    worth = estimate(difference(bound.unconditional, bound.conditional))
    parts = {
        name: {
            "bits_per_dim": to_json(estimate(samples.total())),
            "L_T": to_json(estimate(samples.prior[:, None])),
            "sum_L_t": to_json(estimate(samples.transitions())),
            "L_0": to_json(estimate(samples.decoder)),
        }
        for name, samples in vars(bound).items()
    }
    return parts | {
        "caption_bits_per_dim": to_json(worth),
        "caption_bits_per_image": to_json(worth, factor=num_dims),
    }
