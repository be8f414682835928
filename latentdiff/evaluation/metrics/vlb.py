"""The bound of held-out latents with and without their captions (Ho et al. 2020, Eq. 5).

Their difference is how many bits a caption is worth to the model. Numbers are bits per dimension of
the latent. L_0 is a density, so a bound may be negative and only differences between models of the
same latents mean something. The mathematics is in diffusion/bound.py; here it meets a U-Net.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from latentdiff.models.build import schedule_of
from latentdiff.models.components import Components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.unet.guidance_embedding import predict

LEARNED = "learned_range"
Z_95 = 1.96  # standard errors of a 95 % interval


@dataclass(frozen=True, eq=False)
class Chain:
    """The reverse chain that is bounded."""

    unet: UNet2DConditionModel
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
        return cls(components.unet, schedule, prediction_type, chosen, channels)

    @property
    def num_outputs(self) -> int:
        """Channels of the U-Net's output that the variance type reads."""
        return self.channels * (2 if self.variance_type == LEARNED else 1)


def unet_model(
    unet: UNet2DConditionModel, conditioning: Conditioning, *, num_outputs: int
) -> Model:
    """Return a U-Net as a model (xt, t) -> output under the conditioning of B images, or of one."""

    def model(xt: Tensor, t: Tensor) -> Tensor:
        given = conditioning.to(xt.device, unet.dtype).expand(len(xt))
        return predict(unet, xt.to(unet.dtype), t, given)[:, :num_outputs].float()

    return model


@dataclass(frozen=True, eq=False)
class CaptionedLatents:
    """N images as latents with their conditioning, on the CPU."""

    captions: tuple[str, ...]
    z0: Tensor  # (N, C, h, w) normalised, one sample of the VAE's posterior each
    conditioning: Conditioning  # of N images
    null_conditioning: Conditioning  # of one image without a caption

    def __len__(self) -> int:
        return len(self.z0)

    def select(self, indices: Sequence[int]) -> "CaptionedLatents":
        """Return some of the images, in that order."""
        chosen = list(indices)
        return replace(
            self,
            captions=tuple(self.captions[i] for i in chosen),
            z0=self.z0[chosen],
            conditioning=self.conditioning[chosen],
        )


@dataclass(frozen=True, eq=False)
class CaptionBound:
    """The bound of the same latents, timesteps and noise without and with captions."""

    unconditional: BoundSamples
    conditional: BoundSamples


def caption_bound(
    chain: Chain,
    latents: CaptionedLatents,
    *,
    plan: TimestepPlan | None,
    repeats: int,
    batch_size: int,
    seed: int,
) -> CaptionBound:
    """Evaluate both bounds of each image `repeats` times; plan: None takes all T steps."""
    without, conditional = (
        bound_samples(
            chain, latents.z0, given, plan=plan, repeats=repeats, batch_size=batch_size, seed=seed
        )
        for given in (latents.null_conditioning, latents.conditioning)
    )
    return CaptionBound(without, conditional)


def pilot_plan(
    chain: Chain,
    latents: CaptionedLatents,
    *,
    num_draws: int,
    num_pilot: int,
    batch_size: int,
    seed: int,
) -> TimestepPlan | None:
    """Return how to draw `num_draws` timesteps an image, from every step of a few images.

    None where the chain is not longer than num_draws: then all its steps are taken.
    """
    if chain.schedule.num_timesteps - 1 <= num_draws:
        return None
    spaced = torch.linspace(0, len(latents) - 1, min(num_pilot, len(latents))).round().long()
    few = latents.select(spaced.tolist())
    pilot = bound_samples(
        chain, few.z0, few.conditioning, plan=None, repeats=1, batch_size=batch_size, seed=seed
    )
    return TimestepPlan.from_pilot(pilot, num_draws=num_draws)


def bound_samples(
    chain: Chain,
    z0: Tensor,
    conditioning: Conditioning,
    *,
    plan: TimestepPlan | None,
    repeats: int,
    batch_size: int,
    seed: int,
) -> BoundSamples:
    """Evaluate the bound of z0 (N, C, h, w) under a conditioning of N images or one, in batches.

    Calls with one seed draw the same timesteps and noise.
    """
    device, generator = chain.unet.device, torch.Generator().manual_seed(seed)
    schedule, given = chain.schedule.to(device), conditioning.expand(len(z0))
    batches = []
    for start in tqdm(range(0, len(z0), batch_size), desc="bound", leave=False):
        part = slice(start, start + batch_size)
        model = unet_model(chain.unet, given[part].to(device), num_outputs=chain.num_outputs)
        batches.append(
            evaluate_bound(
                schedule,
                model,
                z0[part].to(device),
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
    """Timesteps first..last with their terms summed, in bits per dimension."""

    first: int
    last: int
    unconditional: Estimate
    conditional: Estimate
    caption: Estimate  # unconditional less conditional: at which noise the caption helps
    x0_rmse: float  # distortion of the predicted x0, with captions; NaN where no t was drawn
    rate: float  # bits spent on x_t in the middle of the bin, with captions


def timestep_bins(bound: CaptionBound, num_timesteps: int, *, count: int = 40) -> list[TimestepBin]:
    """Sum the terms of t = 1 .. T-1 over at most `count` bins of about equal length."""
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
    """Sum each estimate's values by bin. t, values: (N, R, K) -> (count, N, R)."""
    index = torch.bucketize(t, edges[1:-1], right=True)
    sums = torch.zeros(*t.shape[:2], len(edges) - 1, dtype=values.dtype)
    return sums.scatter_add_(2, index, values).permute(2, 0, 1)


# --- As plain JSON values ---


def to_json(value: Estimate, *, factor: float = 1.0) -> dict[str, Any]:
    """Return an estimate with its 95 % interval as JSON values, None where it is unknown.

    FloatingPointError where the estimate itself is not finite.
    """
    if not math.isfinite(value.mean):
        raise FloatingPointError(
            "the model's output became NaN or Inf, so it has no bound; is the folder damaged?"
        )
    mean, se, noise = (x * factor if math.isfinite(x) else None for x in value)
    interval = None if se is None else [mean - Z_95 * se, mean + Z_95 * se]  # type: ignore[operator]
    return {"mean": mean, "se": se, "se_noise": noise, "interval_95": interval}


def summary(bound: CaptionBound, *, num_dims: int) -> dict[str, Any]:
    """Return the figures of both bounds as JSON values. num_dims: of a latent, C h w."""
    caption_bits = estimate(difference(bound.unconditional, bound.conditional))
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
        "caption_bits_per_dim": to_json(caption_bits),
        "caption_bits_per_image": to_json(caption_bits, factor=num_dims),
    }
