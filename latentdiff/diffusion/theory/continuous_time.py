"""Diffusion in continuous time: score, SDE, probability-flow ODE and its likelihood.

Y. Song et al. 2021. A variance-preserving path is an arc, xt = cos(phi) x0 + sin(phi) eps, and the
angle phi is the time here: near 0 for data, at most pi / 2 for noise. The probability-flow ODE is
then dx / dphi = v, the model's v-prediction (Salimans & Ho 2022, App. D), finite also at zero
terminal SNR. A schedule's table ties angles to timesteps, straight lines between its steps, and a
model takes real timesteps. The flow ends at the table's first step: its x has that step's
noise. Samplers are diffusers' own (DDIM, DPM-Solver); a DDIM step is in distillation.py, whose
students learn it.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from latentdiff.diffusion.bound import bound_term
from latentdiff.diffusion.ddpm import (
    Generators,
    Model,
    p_mean_variance,
    p_sample,
    q_sample,
    randn_like,
    split_variance,
)
from latentdiff.diffusion.prediction import check_objective, parametrization, predict_eps
from latentdiff.diffusion.schedules import Schedule, extract


def score(schedule: Schedule, eps: Tensor, t: Tensor) -> Tensor:
    """Return the gradient of log q(xt) of predicted noise, -eps / sigma_t. eps: (B, ...)."""
    return -eps / extract(schedule.sqrt_one_minus_alphas_cumprod, t, like=eps)


def vp_sde(phi: Tensor) -> tuple[Tensor, Tensor]:
    """Return f, g of the VP SDE dx = f x dphi + g dw (Y. Song et al. 2021, Eq. 11).

    beta(phi) = 2 tan(phi), f = -beta / 2, g = sqrt(beta). Reverse: dx = (f x - g^2 score) dphi +
    g dw; probability flow: dx = (f x - g^2 score / 2) dphi = v dphi.
    """
    beta = 2 * torch.tan(phi)
    return -0.5 * beta, beta.sqrt()


# --- Angles and timesteps ---


def angles(schedule: Schedule) -> Tensor:
    """Return phi of each step, (T,), ascending, in (0, pi / 2]."""
    return torch.atan2(schedule.sqrt_one_minus_alphas_cumprod, schedule.sqrt_alphas_cumprod)


def angle_at(schedule: Schedule, timesteps: Tensor) -> Tensor:
    """Return phi at real timesteps between the schedule's first and last. (...) -> (...)."""
    return _interpolate(timesteps, _timesteps(schedule), angles(schedule))


def timestep_at(schedule: Schedule, phi: Tensor) -> Tensor:
    """Return the real timestep of an angle, to give to a model. (...) -> (...)."""
    return _interpolate(phi, angles(schedule), _timesteps(schedule))


def angle_of_log_snr(log_snr: Tensor) -> Tensor:
    """Return phi where log(cos^2 / sin^2) is the given logSNR. (...) -> (...)."""
    return torch.atan(torch.exp(-0.5 * log_snr))


def _timesteps(schedule: Schedule) -> Tensor:
    return schedule.timesteps.to(schedule.betas.dtype)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Interpolate (xs, ys), xs ascending, linearly at x; outside, take the nearest end."""
    x = x.to(xs.dtype).contiguous()
    left = (torch.searchsorted(xs, x, right=True) - 1).clamp(0, len(xs) - 2)
    part = (x - xs[left]) / (xs[left + 1] - xs[left])
    return torch.lerp(ys[left], ys[left + 1], part.clamp(0, 1))


# --- The probability-flow ODE ---


def flow_velocity(
    schedule: Schedule, model: Model, x: Tensor, phi: Tensor, *, prediction_type: str
) -> Tensor:
    """Return v = dx / dphi at an angle, (B, ...). phi: a scalar tensor.

    A model of rectified flow is given x on its straight path, x / (cos phi + sin phi).
    """
    signal, noise = phi.cos().to(x.dtype), phi.sin().to(x.dtype)
    if prediction_type == "flow_prediction":
        total = signal + noise
        x, signal, noise = x / total, signal / total, noise / total
    output = model(x, timestep_at(schedule, phi).expand(len(x)))
    return parametrization(prediction_type).to_velocity(output, x, signal, noise)


@torch.no_grad()
def probability_flow(
    schedule: Schedule,
    model: Model,
    x: Tensor,
    *,
    prediction_type: str,
    num_steps: int = 50,
    to_noise: bool = False,
) -> Tensor:
    """Carry x from pure noise to the first step, or back `to_noise`, by Runge-Kutta 4.

    x: (B, ...). Four model calls a step. One way and back again is the identity but for the solver.
    """
    check_objective(schedule, prediction_type)
    grid = _grid(schedule, num_steps)
    grid = grid if to_noise else grid.flip(0)

    def velocity(x: Tensor, phi: Tensor) -> Tensor:
        return flow_velocity(schedule, model, x, phi, prediction_type=prediction_type)

    for start, end in pairwise(grid):
        h, middle = (end - start).to(x.dtype), (start + end) / 2
        k1 = velocity(x, start)
        k2 = velocity(x + h / 2 * k1, middle)
        k3 = velocity(x + h / 2 * k2, middle)
        k4 = velocity(x + h * k3, end)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def flow_log_prob(
    schedule: Schedule,
    model: Model,
    x: Tensor,
    *,
    probes: Tensor,
    prediction_type: str,
    num_steps: int = 50,
) -> Tensor:
    """Return log p(x) in nats under the probability flow (Y. Song et al. 2021, Eq. 39), (B, R).

    x: (B, ...), at the first step's noise. probes: (R, B, ...) of independent +-1, see
    `rademacher`; each gives one unbiased estimate of the trace of dv / dx (Hutchinson 1990, Eq.
    40).
    """
    check_objective(schedule, prediction_type)
    grid = _grid(schedule, num_steps)

    def rates(x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = flow_velocity(schedule, model, x, phi, prediction_type=prediction_type)
            traces = [_trace(v, x, z) for z in probes]
        return v.detach(), torch.stack(traces, 1)

    trace = torch.zeros(len(x), len(probes), dtype=x.dtype, device=x.device)
    for start, end in pairwise(grid):
        h, middle = (end - start).to(x.dtype), (start + end) / 2
        k1, d1 = rates(x, start)
        k2, d2 = rates(x + h / 2 * k1, middle)
        k3, d3 = rates(x + h / 2 * k2, middle)
        k4, d4 = rates(x + h * k3, end)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        trace = trace + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    log_prior = -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return log_prior[:, None] + trace


def _trace(v: Tensor, x: Tensor, z: Tensor) -> Tensor:
    (vjp,) = torch.autograd.grad(v, x, z, retain_graph=True)
    return (vjp * z).flatten(1).sum(1)


def _grid(schedule: Schedule, num_steps: int) -> Tensor:
    """Return num_steps + 1 angles at evenly spaced timesteps of the chain, ascending."""
    last = schedule.num_timesteps - 1
    kept = torch.linspace(0, last, min(num_steps, last) + 1, dtype=torch.float64).round().long()
    return angles(schedule)[kept.to(schedule.betas.device)]


def rademacher(like: Tensor, num_probes: int, *, generator: torch.Generator) -> Tensor:
    """Sample independent +-1, (R, *like.shape), for `flow_log_prob`."""
    shape = (num_probes, *like.shape)
    signs = torch.randint(0, 2, shape, generator=generator, device=generator.device) * 2 - 1
    return signs.to(like.device, like.dtype)


def flow_bits(
    schedule: Schedule,
    model: Model,
    x0: Tensor,
    *,
    generator: torch.Generator,
    prediction_type: str,
    variance_type: str = "fixed_small",
    levels: int | None = None,
    num_steps: int = 50,
    repeats: int = 2,
) -> Tensor:
    """Bound -log p(x0) of clean data by the flow, in bits per dimension, (B, R).

    x0 is noised to the first step, x1, and -log p(x0) <= E[-log p(x0|x1) - log p(x1) + log
    q(x1|x0)], with L_0 of the variational bound, so that the two bounds compare. Each repeat
    samples noise and a probe: `bound.estimate` gives the error bars.
    """
    t = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    size = x0[0].numel() * math.log(2)
    columns = []
    for _ in range(repeats):
        x1 = q_sample(schedule, x0, t, randn_like(x0, generator=generator))
        decoder = bound_term(
            schedule,
            model(x1, schedule.timesteps[t]).detach(),
            x0,
            x1,
            t,
            prediction_type=prediction_type,
            variance_type=variance_type,
            levels=levels,
        )
        if schedule.is_flow:  # onto the circle of angles
            x1 = x1 * schedule.alphas_cumprod[0].sqrt() / schedule.sqrt_alphas_cumprod[0]
        probes = rademacher(x1, 1, generator=generator)
        log_p = flow_log_prob(
            schedule, model, x1, probes=probes, prediction_type=prediction_type, num_steps=num_steps
        )
        columns.append(decoder.bits - log_p[:, 0] / size - _entropy_bits(schedule))
    return torch.stack(columns, 1)


def _entropy_bits(schedule: Schedule) -> float:
    """Return the entropy of q(x1 | x0) in bits per dimension."""
    variance = float(1 - schedule.alphas_cumprod[0])
    return 0.5 * math.log(2 * math.pi * math.e * variance) / math.log(2)


# --- Sampling with corrections ---


@torch.no_grad()
def predictor_corrector(
    schedule: Schedule,
    model: Model,
    xt: Tensor,
    *,
    generator: Generators,
    prediction_type: str,
    variance_type: str = "fixed_small",
    clip_x0: float | None = None,
    snr: float = 0.16,
    num_corrections: int = 1,
) -> Tensor:
    """Run the reverse chain with Langevin steps at each new noise level (Y. Song et al. 2021, Alg.
    1).

    xt: (B, ...) pure noise. snr: a correction's signal-to-noise ratio r (Alg. 5). The arguments of
    the chain are those of `ddpm.p_sample_loop`.
    """
    check_objective(schedule, prediction_type)
    for index in reversed(range(schedule.num_timesteps)):
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
        for _ in range(num_corrections if index > 0 else 0):
            output, _ = split_variance(
                model(xt, schedule.timesteps[t - 1]), xt, variance_type=variance_type
            )
            eps = predict_eps(schedule, output, xt, t - 1, prediction_type=prediction_type)
            noise = randn_like(xt, generator=generator)
            xt = _langevin(schedule, xt, eps, t - 1, noise, snr=snr)
    return xt


def _langevin(
    schedule: Schedule, xt: Tensor, eps: Tensor, t: Tensor, noise: Tensor, *, snr: float
) -> Tensor:
    """Take one Langevin step whose drift is `snr` times its noise in length (Alg. 5)."""
    gradient = score(schedule, eps, t)
    ratio: Tensor = noise.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
    ratio = snr * ratio.view(-1, *[1] * (xt.ndim - 1))
    step = 2 * extract(schedule.alphas, t, like=xt) * ratio.square()
    return xt + step * gradient + (2 * step).sqrt() * noise
