"""The variational bound on -log p(x0), in bits per dimension (Ho et al. 2020, Eq. 5).

Bound = L_T + sum over t of L_{t-1} + L_0. Per sample, so that errors over images and over noise can
both be estimated. For latents L_0 is the density of a Gaussian: differential, may be negative, and
only differences between models of the same latents mean something. For pixels give `levels=256`:
L_0 is then a probability and the bound a code length. Computed in the dtype of the schedule's
tables.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.ddpm import (
    Model,
    p_mean_variance,
    q_posterior_mean_variance,
    q_sample,
    randn_like,
)
from latentdiff.diffusion.prediction import check_objective
from latentdiff.diffusion.schedules import Schedule


def prior_bits(schedule: Schedule, x0: Tensor) -> Tensor:
    """Return L_T = KL(q(x_T | x0) || N(0, I)) in bits per dimension. x0: (B, ...) -> (B,)."""
    x0 = x0.to(schedule.betas.dtype)
    signal2 = schedule.alphas_cumprod[-1]
    nats = 0.5 * (signal2 * x0.square() - signal2 - torch.log1p(-signal2))
    return _per_sample(nats) / math.log(2)


class Term(NamedTuple):
    """One term of the bound for each sample."""

    bits: Tensor  # (B,) bits per dimension
    x0_mse: Tensor  # (B,) mean squared error of the predicted x0


def bound_term(
    schedule: Schedule,
    output: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    *,
    prediction_type: str,
    variance_type: str = "fixed_small",
    clip_x0: float | None = None,
    levels: int | None = None,
) -> Term:
    """Return L_{t-1} = KL(q(x_{t-1} | xt, x0) || p(x_{t-1} | xt)), or L_0 where t = 0.

    output: the model's, at (xt, t); x0, xt: (B, ...); t: (B,). levels: None takes L_0 as a density;
    a number takes x0 as that many evenly spaced values in [-1, 1] (Ho et al. 2020, Eq. 13).
    """
    dtype = schedule.betas.dtype
    output, x0, xt = output.to(dtype), x0.to(dtype), xt.to(dtype)
    mean, variance = q_posterior_mean_variance(schedule, x0, xt, t)
    p = p_mean_variance(
        schedule,
        output,
        xt,
        t,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_x0=clip_x0,
    )
    first = t == 0
    q_log_variance = torch.where(variance > 0, variance, 1.0).log()
    kl = _gaussian_kl(mean, q_log_variance, p.mean, p.log_variance)
    nll = (
        _gaussian_nll(x0, p.mean, p.log_variance)
        if levels is None
        else _discretised_nll(x0, p.mean, p.log_variance, levels)
    )
    nats = torch.where(first, _per_sample(nll), _per_sample(kl))
    return Term(nats / math.log(2), _per_sample((x0 - p.x0).square()))


def _gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """Return KL(N(mean1, var1) || N(mean2, var2)) of each element, in nats."""
    gap = log_var1 - log_var2
    return 0.5 * (gap.expm1() - gap + (mean1 - mean2).square() * (-log_var2).exp())


def _gaussian_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Return -log N(x; mean, var) of each element, in nats."""
    return 0.5 * (math.log(2 * math.pi) + log_var + (x - mean).square() * (-log_var).exp())


def _discretised_nll(x: Tensor, mean: Tensor, log_var: Tensor, levels: int) -> Tensor:
    """Return -log of a Gaussian's mass in x's bin; the outer bins reach to infinity. In nats."""
    half, scale = 1 / (levels - 1), (-0.5 * log_var).exp()
    below_upper = torch.special.ndtr((x + half - mean) * scale)
    below_lower = torch.special.ndtr((x - half - mean) * scale)
    above_lower = torch.special.ndtr((mean - x + half) * scale)
    inside = torch.where(x < half - 1, below_upper, below_upper - below_lower)
    mass = torch.where(x > 1 - half, above_lower, inside)
    return -mass.clamp(min=1e-12).log()


def _per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


# --- Estimates over images, noise and timesteps ---


@dataclass(frozen=True, eq=False)
class TimestepPlan:
    """Sampling of K of the steps t = 1 .. T-1, whose weighted sum has the mean of the full sum.

    The unit interval is cut into K equal strata, one uniform draw falls into each, and t is where
    the cumulated probabilities meet it. A step's weight is 1 / (K p_t).
    """

    probabilities: Tensor  # (T - 1,) of t = 1 .. T-1, positive, sums to 1
    num_draws: int  # K

    @classmethod
    def uniform(cls, num_timesteps: int, *, num_draws: int) -> "TimestepPlan":
        """Sample every step as often as any other."""
        return cls(torch.full((num_timesteps - 1,), 1 / (num_timesteps - 1)).double(), num_draws)

    @classmethod
    def from_pilot(
        cls, pilot: "BoundSamples", *, num_draws: int, uniform_share: float = 0.1
    ) -> "TimestepPlan":
        """Sample a step in proportion to its root mean square term: minimum variance for K = 1.

        pilot: every step of a few images, from `evaluate_bound(plan=None)`.
        """
        size = pilot.bits.square().mean((0, 1)).sqrt()
        share = size / size.sum()
        return cls(share * (1 - uniform_share) + uniform_share / len(size), num_draws)

    def sample(self, num_samples: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return timesteps (K, N) int64 and their weights (K, N) float64, on the CPU."""
        shape = (self.num_draws, num_samples)
        u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        u = (torch.arange(self.num_draws)[:, None] + u.cpu()) / self.num_draws
        index = torch.searchsorted(self.probabilities.cumsum(0), u, right=True)
        index = index.clamp(max=len(self.probabilities) - 1)
        return index + 1, 1 / (self.num_draws * self.probabilities[index])


@dataclass(frozen=True, eq=False)
class BoundSamples:
    """The bound of N images, each estimated R times from K steps, in bits per dimension."""

    prior: Tensor  # (N,) L_T
    decoder: Tensor  # (N, R) L_0
    t: Tensor  # (N, R, K) int64 in [1, T)
    weights: Tensor  # (N, R, K)
    bits: Tensor  # (N, R, K) L_{t-1}
    x0_mse: Tensor  # (N, R, K) of the x0 predicted at t
    decoder_x0_mse: Tensor  # (N, R) of the x0 predicted at t = 0

    def transitions(self) -> Tensor:
        """Return each estimate of the sum of L_{t-1} over t = 1 .. T-1, (N, R)."""
        return (self.weights * self.bits).sum(-1)

    def total(self) -> Tensor:
        """Return each estimate of each image's bound, (N, R)."""
        return self.prior[:, None] + self.decoder + self.transitions()

    @staticmethod
    def cat(batches: Sequence["BoundSamples"]) -> "BoundSamples":
        """Join the images of several batches."""
        names = [f.name for f in fields(BoundSamples)]
        return BoundSamples(**{n: torch.cat([getattr(b, n) for b in batches]) for n in names})


@torch.no_grad()
def evaluate_bound(
    schedule: Schedule,
    model: Model,
    x0: Tensor,
    *,
    generator: torch.Generator,
    prediction_type: str,
    variance_type: str = "fixed_small",
    clip_x0: float | None = None,
    levels: int | None = None,
    plan: TimestepPlan | None = None,
    repeats: int = 2,
) -> BoundSamples:
    """Evaluate the bound of each image `repeats` times, without bias. x0: (B, ...).

    plan: None calls the model for all T steps, a plan for L_0 and its K samples. Two or more
    repeats separate the error of the estimate from the variation of the images. Models given
    generators of one seed get the same timesteps and noise. Other arguments: see `bound_term`.
    """
    check_objective(schedule, prediction_type)
    sampled = [_sample(plan, schedule, len(x0), generator) for _ in range(repeats)]
    terms = []
    for steps, _ in sampled:
        for t in (torch.zeros(len(x0), dtype=torch.int64), *steps):
            t = t.to(x0.device)  # noqa: PLW2901  sampled on the CPU, used on the device
            xt = q_sample(schedule, x0, t, randn_like(x0, generator=generator))
            term = bound_term(
                schedule,
                model(xt, schedule.timesteps[t]),
                x0,
                xt,
                t,
                prediction_type=prediction_type,
                variance_type=variance_type,
                clip_x0=clip_x0,
                levels=levels,
            )
            terms.append(torch.stack(term))
    values = torch.stack(terms).view(repeats, -1, 2, len(x0))
    return _collect(prior_bits(schedule, x0), values, sampled)


def _collect(prior: Tensor, values: Tensor, sampled: list[tuple[Tensor, Tensor]]) -> BoundSamples:
    """Name the parts. prior: (N,); values: (R, 1 + K, 2, N), bits and x0_mse, L_0's first."""
    bits, x0_mse = values.permute(2, 3, 0, 1).cpu().double()  # (N, R, 1 + K) each
    return BoundSamples(
        prior=prior.cpu().double(),
        decoder=bits[..., 0],
        t=torch.stack([t for t, _ in sampled]).permute(2, 0, 1),
        weights=torch.stack([w for _, w in sampled]).permute(2, 0, 1),
        bits=bits[..., 1:],
        x0_mse=x0_mse[..., 1:],
        decoder_x0_mse=x0_mse[..., 0],
    )


def _sample(
    plan: TimestepPlan | None, schedule: Schedule, num_samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    if plan is not None:
        return plan.sample(num_samples, generator=generator)
    t = torch.arange(1, schedule.num_timesteps)[:, None].expand(-1, num_samples)
    return t, torch.ones(t.shape, dtype=torch.float64)


class Estimate(NamedTuple):
    """A mean with its two standard errors. An interval at 95 % is mean +- 1.96 of one of them."""

    mean: float
    se_images: (
        float  # as an estimate for all images of this kind: variation of the images, and noise
    )
    se_noise: float  # as an estimate for these very images: noise and timesteps only; NaN if R = 1


def estimate(values: Tensor) -> Estimate:
    """Summarise N images' values, each estimated R times, (N, R), as `BoundSamples.total` gives."""
    num_images, repeats = values.shape
    per_image = values.mean(1)
    noise = values.var(1).mean() / (repeats * num_images) if repeats > 1 else torch.tensor(math.nan)
    std = per_image.std() if num_images > 1 else torch.tensor(math.nan)
    return Estimate(float(per_image.mean()), float(std) / num_images**0.5, float(noise) ** 0.5)


def difference(a: BoundSamples, b: BoundSamples) -> Tensor:
    """Return a's bound less b's, (N, R), where both saw the same images, timesteps and noise.

    Unconditional less conditional is how many bits per dimension a caption is worth. Raises
    ValueError where the timesteps differ.
    """
    if not torch.equal(a.t, b.t):
        raise ValueError(
            "the two bounds have other timesteps: evaluate both on the same images, with the same"
            " plan and with generators of the same seed"
        )
    return a.total() - b.total()


class PerTimestep(NamedTuple):
    """The terms of the bound along the chain; NaN at steps never sampled. All (T,)."""

    bits: Tensor  # mean L_{t-1}; L_0 at t = 0
    se: Tensor  # its standard error over images and noise
    x0_rmse: Tensor  # distortion of the x0 predicted at t
    rate: Tensor  # bits per dimension spent on x_t: L_T and all terms of later steps


def per_timestep(samples: BoundSamples, num_timesteps: int) -> PerTimestep:
    """Average the samples by timestep: the bound's profile, rate and distortion (Sec. 4.3)."""
    t = torch.cat([torch.zeros(samples.decoder.numel(), dtype=torch.int64), samples.t.flatten()])
    bits = torch.cat([samples.decoder.flatten(), samples.bits.flatten()])
    mse = torch.cat([samples.decoder_x0_mse.flatten(), samples.x0_mse.flatten()])
    weighted = (
        torch.cat([samples.decoder.flatten(), (samples.weights * samples.bits).flatten()])
        / len(samples.prior)
        / samples.decoder.shape[1]
    )

    def total(values: Tensor) -> Tensor:
        return torch.zeros(num_timesteps, dtype=torch.float64).index_add_(0, t, values)

    count = total(torch.ones_like(bits))
    mean = total(bits) / count
    variance = total((bits - mean[t]).square()) / (count - 1).clamp(min=0)
    spent = total(weighted)
    later = spent.flip(0).cumsum(0).flip(0) - spent
    return PerTimestep(
        mean, (variance / count).sqrt(), (total(mse) / count).sqrt(), samples.prior.mean() + later
    )
