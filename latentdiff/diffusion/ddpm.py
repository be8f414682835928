"""Denoising diffusion probabilistic models (Ho et al. 2020), in the paper's order.

Notation: the paper's t = 1..T is stored as t = 0..T-1, so `alphas_cumprod[0]` is the first, least
noisy step and x_{t-1} of t = 0 is the data x0 itself. Samples are (B, ...), timesteps (B,) int64 on
the sample's device. A result has the sample's dtype, or float32 where that is narrower. A model is
any callable `model(xt, t) -> output`.

Not here: schedules (schedules.py), loss weights (objectives.py), the variational bound (bound.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.diffusion.schedules import betas_from_alphas_cumprod

Model = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")


# --- Section 2: the forward chain ---


@dataclass(frozen=True, eq=False)
class Schedule:
    """The chain's coefficients, one a timestep, each (T,). Made by `from_betas`, in float64."""

    betas: Tensor
    alphas: Tensor  # 1 - betas
    alphas_cumprod: Tensor  # the paper's alpha-bar_t
    sqrt_alphas_cumprod: Tensor  # signal
    sqrt_one_minus_alphas_cumprod: Tensor  # noise
    posterior_mean_x0: Tensor  # Eq. 7, the factor of x0
    posterior_mean_xt: Tensor  # Eq. 7, the factor of xt
    posterior_variance: Tensor  # Eq. 7, beta-tilde_t; 0 at t = 0
    log_variance_small: Tensor  # log beta-tilde_t; at t = 0 that of t = 1, since log 0 is no use
    log_variance_large: Tensor  # log beta_t
    timesteps: Tensor  # what the model is told: 0..T-1 unless the chain was re-spaced

    @classmethod
    def from_betas(cls, betas: Tensor, *, timesteps: Tensor | None = None) -> "Schedule":
        """Compute every table from betas, (T,) in (0, 1); the last may be 1 (zero terminal SNR)."""
        betas = betas.detach().double()
        _check_betas(betas)
        alphas = 1 - betas
        alphas_cumprod = torch.cumprod(alphas, 0)
        previous = torch.cat([torch.ones_like(betas[:1]), alphas_cumprod[:-1]])
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        first = variance[1:2] if len(betas) > 1 else betas
        if timesteps is None:
            timesteps = torch.arange(len(betas), device=betas.device)
        return cls(
            betas=betas,
            alphas=alphas,
            alphas_cumprod=alphas_cumprod,
            sqrt_alphas_cumprod=alphas_cumprod.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - alphas_cumprod).sqrt(),
            posterior_mean_x0=betas * previous.sqrt() / (1 - alphas_cumprod),
            posterior_mean_xt=alphas.sqrt() * (1 - previous) / (1 - alphas_cumprod),
            posterior_variance=variance,
            log_variance_small=torch.cat([first, variance[1:]]).log(),
            log_variance_large=betas.log(),
            timesteps=timesteps,
        )

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps."""
        return len(self.betas)

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> "Schedule":
        """Move the tables to a device.

        dtype: as they are unless the device has no float64 (MPS). float32 saves casts in training.
        """
        if dtype is None:
            dtype = torch.float32 if torch.device(device).type == "mps" else self.betas.dtype
        tables = {f.name: getattr(self, f.name) for f in fields(self)}
        return Schedule(
            **{
                name: (table.to(dtype) if table.is_floating_point() else table).to(device)
                for name, table in tables.items()
            }
        )


def respace(schedule: Schedule, kept: Tensor) -> Schedule:
    """Return the shorter chain through some of the steps (Nichol & Dhariwal 2021, Eq. 19).

    kept: (K,) int64, ascending. The model is still told the timesteps it was trained on.
    """
    betas = betas_from_alphas_cumprod(schedule.alphas_cumprod[kept])
    return Schedule.from_betas(betas, timesteps=schedule.timesteps[kept])


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


# --- Section 3.2: what the network predicts, and what that says of x0 and eps ---


def velocity(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return v = signal * eps - noise * x0 (Salimans & Ho 2022, App. D). x0, eps: (B, ...)."""
    signal = extract(schedule.sqrt_alphas_cumprod, t, like=x0)
    noise = extract(schedule.sqrt_one_minus_alphas_cumprod, t, like=x0)
    return signal * eps - noise * x0


def predict_x0(
    schedule: Schedule, output: Tensor, xt: Tensor, t: Tensor, *, prediction_type: str
) -> Tensor:
    """Return the x0 that a model's output stands for (Eq. 15). output, xt: (B, ...).

    prediction_type "epsilon" has no answer where alphas_cumprod is 0: see `check_objective`.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "sample":
        return output.to(_wide(xt.dtype))
    signal = extract(schedule.sqrt_alphas_cumprod, t, like=xt)
    noise = extract(schedule.sqrt_one_minus_alphas_cumprod, t, like=xt)
    if prediction_type == "v_prediction":
        return signal * xt - noise * output
    return (xt - noise * output) / signal


def predict_eps(
    schedule: Schedule, output: Tensor, xt: Tensor, t: Tensor, *, prediction_type: str
) -> Tensor:
    """Return the noise that a model's output stands for. output, xt: (B, ...)."""
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return output.to(_wide(xt.dtype))
    signal = extract(schedule.sqrt_alphas_cumprod, t, like=xt)
    noise = extract(schedule.sqrt_one_minus_alphas_cumprod, t, like=xt)
    if prediction_type == "v_prediction":
        return noise * xt + signal * output
    return (xt - signal * output) / noise


def check_prediction_type(prediction_type: str) -> None:
    """Raise ValueError for a name that is not one of PREDICTION_TYPES."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}:"
            f" choose one of {', '.join(PREDICTION_TYPES)}"
        )


def check_objective(schedule: Schedule, prediction_type: str) -> None:
    """Raise ValueError where a schedule and a prediction type cannot work together.

    Call it once, before any work: it waits for the device. With zero terminal SNR the last xt holds
    no x0, and its noise says nothing about x0 (Lin et al. 2023, Sec. 3.2).
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon" and bool((schedule.alphas_cumprod == 0).any()):
        raise ValueError(
            "prediction_type 'epsilon' cannot be used with a zero-terminal-SNR schedule: its last"
            " step is pure noise, from which predicted noise gives no image. Use prediction_type"
            " 'v_prediction' (or 'sample'), or turn zero terminal SNR off."
        )


# --- Section 3.4: the simplified objective ---


def simple_loss(schedule: Schedule, model: Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Return L_simple = mean (eps - model(xt, t))^2 of an epsilon model (Eq. 14), a scalar."""
    output = model(q_sample(schedule, x0, t, eps), schedule.timesteps[t])
    return (output.to(_wide(output.dtype)) - eps).square().mean()


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
    takes the second half of the output's channels, in [-1, 1], as the place between their
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
    """Draw x_{t-1} from p(x_{t-1} | xt) (Algorithm 2, line 4), its mean alone at t = 0.

    reverse: of `p_mean_variance`; t: (B,); noise: (B, ...), standard normal.
    """
    std = (0.5 * reverse.log_variance).exp() * (_expand(t, noise) != 0)
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

    t: int  # the step that was left
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
    """Walk the reverse chain as `p_sample_loop` does, and show every step.

    start: the timestep that xt is at, T - 1 unless said.
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
        xt = p_sample(reverse, t, standard_normal(xt, generator=generator))
        yield Step(index, xt, reverse.x0)


def standard_normal(like: Tensor, *, generator: Generators) -> Tensor:
    """Draw noise of a sample's shape and device, at least float32, on the generator's own device.

    Raises ValueError when a list of generators is not as long as the batch.
    """
    dtype = _wide(like.dtype)
    if isinstance(generator, torch.Generator):
        noise = torch.randn(like.shape, generator=generator, device=generator.device, dtype=dtype)
        return noise.to(like.device)
    if len(generator) != len(like):
        raise ValueError(f"got {len(generator)} generators for {len(like)} samples: give one each")
    rows = [
        torch.randn(like.shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator
    ]
    return torch.stack(rows).to(like.device)


# --- Looking a coefficient up ---


def extract(table: Tensor, t: Tensor, *, like: Tensor) -> Tensor:
    """Return table[t] as (B, 1, ...), to multiply `like`, in its dtype but at least float32."""
    return _expand(table.gather(0, t).to(_wide(like.dtype)), like)


def _expand(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_betas(betas: Tensor) -> None:
    inside = bool(((betas > 0) & (betas <= 1)).all()) and bool((betas[:-1] < 1).all())
    if betas.ndim != 1 or len(betas) == 0 or not inside:
        raise ValueError(
            "betas must be a non-empty 1-D tensor of values in (0, 1), of which only the last may"
            f" be 1; got shape {tuple(betas.shape)}"
            + (f", values in [{betas.min()}, {betas.max()}]" if betas.numel() else "")
        )
