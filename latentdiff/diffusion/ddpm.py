"""Denoising diffusion probabilistic models (Ho et al. 2020), in the paper's order.

Notation: the paper's t = 1..T is stored as t = 0..T-1, so `alphas_cumprod[0]` is the first, least
noisy step and x_{t-1} of t = 0 is the data x0 itself. Samples are (B, ...), timesteps (B,) int64 on
the sample's device. A result has the sample's dtype, or float32 where that is narrower. A model is
any callable `model(xt, t) -> output`.

Not here: schedules and their tables (schedules.py), what the model predicts (prediction.py), loss
weights (loss_weighting.py), the variational bound (bound.py).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import check_objective, predict_x0
from latentdiff.diffusion.schedules import Schedule, at_least_float32, extract

Model = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator]

VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")


# --- Section 2: the forward chain ---


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Diffuse x0 to step t in closed form (Eq. 4). x0, eps: (B, ...); t: (B,) in [0, T)."""
    signal = extract(schedule.sqrt_alphas_cumprod, t, like=x0)
    noise = extract(schedule.sqrt_one_minus_alphas_cumprod, t, like=x0)
    return signal * x0 + noise * eps


def q_posterior_mean_variance(
    schedule: Schedule, x0: Tensor, xt: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of q(x_{t-1} | xt, x0) (Eq. 6 and 7); x0 and 0 at t = 0.

    x0, xt: (B, ...); t: (B,). Returns (B, ...) and (B, 1, ...).
    """
    mean = (
        extract(schedule.posterior_mean_x0, t, like=xt) * x0
        + extract(schedule.posterior_mean_xt, t, like=xt) * xt
    )
    return mean, extract(schedule.posterior_variance, t, like=xt)


# --- Section 3.4: the simplified objective ---


def simple_loss(schedule: Schedule, model: Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Return L_simple = mean (eps - model(xt, t))^2 of an epsilon model (Eq. 14), a scalar."""
    output = model(q_sample(schedule, x0, t, eps), schedule.timesteps[t])
    return (output.to(at_least_float32(output.dtype)) - eps).square().mean()


# --- Section 3.2 and Algorithm 2: the reverse chain ---


class PMeanVariance(NamedTuple):
    """A Gaussian p(x_{t-1} | xt) and the x0 it was built on."""

    mean: Tensor  # (B, ...)
    log_variance: Tensor  # (B, 1, ...), or (B, ...) when learned
    x0: Tensor  # (B, ...)


def p_mean_variance(
    schedule: Schedule,
    output: Tensor,
    xt: Tensor,
    t: Tensor,
    *,
    prediction_type: str,
    variance_type: str = "fixed_small",
    clip_x0: float | None = None,
) -> PMeanVariance:
    """Turn a model's output at (xt, t) into the Gaussian p(x_{t-1} | xt) (Eq. 11).

    variance_type: "fixed_small" is beta-tilde_t, "fixed_large" beta_t (Sec. 3.2); "learned_range"
    takes the second half of the output's channels, in [-1, 1], as the position between their
    logarithms (Nichol & Dhariwal 2021, Eq. 15). clip_x0: clamp the predicted x0 to [-clip_x0,
    clip_x0]: 1 for pixels, None for latents.
    """
    prediction, range_output = split_variance(output, xt, variance_type=variance_type)
    x0 = predict_x0(schedule, prediction, xt, t, prediction_type=prediction_type)
    if clip_x0 is not None:
        x0 = x0.clamp(-clip_x0, clip_x0)
    mean, _ = q_posterior_mean_variance(schedule, x0, xt, t)
    small = extract(schedule.log_variance_small, t, like=xt)
    large = extract(schedule.log_variance_large, t, like=xt)
    if range_output is not None:
        return PMeanVariance(
            mean, torch.lerp(small, large, (range_output.to(small.dtype) + 1) / 2), x0
        )
    return PMeanVariance(mean, large if variance_type == "fixed_large" else small, x0)


def split_variance(
    output: Tensor, xt: Tensor, *, variance_type: str
) -> tuple[Tensor, Tensor | None]:
    """Split a model's output into its prediction and, for "learned_range", its variance channels.

    output: (B, C, ...), or (B, 2C, ...) for "learned_range", with C that of xt. Raises ValueError
    otherwise.
    """
    if variance_type not in VARIANCE_TYPES:
        raise ValueError(
            f"unknown variance_type {variance_type!r}: choose one of {', '.join(VARIANCE_TYPES)}"
        )
    num_channels = xt.shape[1]
    expected = 2 * num_channels if variance_type == "learned_range" else num_channels
    if output.shape[1] != expected:
        raise ValueError(
            f"the model gives {output.shape[1]} channels for {num_channels} channels of input, but"
            f" variance_type {variance_type!r} needs {expected}: use 'learned_range' for twice the"
            " channels, a fixed one otherwise"
        )
    if variance_type != "learned_range":
        return output, None
    return output[:, :num_channels], output[:, num_channels:]


def p_sample(reverse: PMeanVariance, t: Tensor, noise: Tensor) -> Tensor:
    """Sample x_{t-1} from p(x_{t-1} | xt) (Algorithm 2, line 4), its mean alone at t = 0.

    reverse: of `p_mean_variance`; t: (B,); noise: (B, ...), standard normal.
    """
    std = (0.5 * reverse.log_variance).exp() * (t.view(-1, *[1] * (noise.ndim - 1)) != 0)
    return reverse.mean + std * noise


def p_sample_loop(
    schedule: Schedule,
    model: Model,
    xt: Tensor,
    *,
    generator: Generators,
    prediction_type: str,
    variance_type: str = "fixed_small",
    clip_x0: float | None = None,
) -> Tensor:
    """Run the whole reverse chain from xt ~ N(0, I), (B, ...), to x0 (Algorithm 2).

    generator: one for the batch, or one for each sample, which then does not depend on its
    neighbours.
    """
    steps = p_sample_steps(
        schedule,
        model,
        xt,
        generator=generator,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_x0=clip_x0,
    )
    for step in steps:
        xt = step.sample
    return xt


class Step(NamedTuple):
    """One step of the reverse chain."""

    t: int  # the step of xt
    sample: Tensor  # x_{t-1}, (B, ...)
    x0: Tensor  # the x0 predicted at t, (B, ...): progressive decoding (Sec. 4.3)


@torch.no_grad()
def p_sample_steps(
    schedule: Schedule,
    model: Model,
    xt: Tensor,
    *,
    generator: Generators,
    prediction_type: str,
    variance_type: str = "fixed_small",
    clip_x0: float | None = None,
    start: int | None = None,
) -> Iterator[Step]:
    """Run the reverse chain as `p_sample_loop` does, and yield every step.

    start: the timestep of xt, by default T - 1.
    """
    check_objective(schedule, prediction_type)
    for index in range(schedule.num_timesteps - 1 if start is None else start, -1, -1):
        t = torch.full((len(xt),), index, device=xt.device)
        reverse = p_mean_variance(
            schedule,
            model(xt, schedule.timesteps[t]),
            xt,
            t,
            prediction_type=prediction_type,
            variance_type=variance_type,
            clip_x0=clip_x0,
        )
        xt = p_sample(reverse, t, randn_like(xt, generator=generator))
        yield Step(index, xt, reverse.x0)


def randn_like(like: Tensor, *, generator: Generators) -> Tensor:
    """Sample noise of a sample's shape and device, at least float32, on the generator's own device.

    Raises ValueError when a list of generators is not as long as the batch.
    """
    dtype = at_least_float32(like.dtype)
    if isinstance(generator, torch.Generator):
        noise = torch.randn(like.shape, generator=generator, device=generator.device, dtype=dtype)
        return noise.to(like.device)
    if len(generator) != len(like):
        raise ValueError(f"got {len(generator)} generators for {len(like)} samples: give one each")
    rows = [
        torch.randn(like.shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator
    ]
    return torch.stack(rows).to(like.device)
