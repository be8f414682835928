"""A monotone noise schedule that is learned (Kingma et al. 2021).

In continuous time the bound is the integral of a model's squared noise error over logSNR: its value
does not depend on the path between the two ends, but the variance of its one-sample estimate does.
The schedule is trained to minimise that variance, which puts steps where the error is large.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.diffusion.schedules import (
    Schedule,
    alphas_cumprod_from_log_snr,
    betas_from_alphas_cumprod,
)
from latentdiff.diffusion.theory.continuous_time import angle_of_log_snr, timestep_at


class MonotoneLogSNR(nn.Module):
    """logSNR as a falling function of time u in [0, 1] between two fixed ends.

    A straight line and a sum of logistic steps, all of positive weight, scaled to the ends.
    """

    def __init__(self, *, start: float, end: float, num_steps: int = 64) -> None:
        """start: logSNR at u = 0; end: at u = 1, smaller; num_steps: logistic steps in between."""
        super().__init__()
        if not end < start:
            raise ValueError(f"logSNR must fall: start {start} is not above end {end}")
        self.start, self.end = start, end
        self.line = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.heights = nn.Parameter(torch.full((num_steps,), -5.0, dtype=torch.float64))
        self.sharpness = 2.0 * num_steps

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return logSNR at u and its derivative there, always negative. (B,) -> (B,), (B,)."""
        (value, slope), (low, _), (high, _) = (
            self._unscaled(x) for x in (u, u.new_zeros(1), u.new_ones(1))
        )
        scale = (self.end - self.start) / (high - low)
        return self.start + (value - low) * scale, slope * scale

    def _unscaled(self, u: Tensor) -> tuple[Tensor, Tensor]:
        line, heights = F.softplus(self.line), F.softplus(self.heights)
        centres = torch.linspace(0, 1, len(heights), dtype=heights.dtype)
        steps = torch.sigmoid(self.sharpness * (u[:, None] - centres))  # (B, num_steps)
        slopes = self.sharpness * steps * (1 - steps)
        return line * u + steps @ heights, line + slopes @ heights


def learn_log_snr(
    error: Callable[[Tensor], Tensor],
    *,
    start: float,
    end: float,
    generator: torch.Generator,
    num_steps: int = 300,
    batch_size: int = 256,
    learning_rate: float = 0.05,
) -> MonotoneLogSNR:
    """Fit a schedule to a fixed model's errors, to minimise the variance of its bound.

    error: logSNR (B,) float64 -> |eps - model's eps|^2 of one fresh sample each, (B,); no gradient
    goes through the model.
    """
    schedule = MonotoneLogSNR(start=start, end=end)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=learning_rate)
    for _ in range(num_steps):
        place = torch.arange(batch_size, dtype=torch.float64)
        jitter = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        loss = variance_surrogate(schedule, (place + jitter) / batch_size, error)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return schedule


def variance_surrogate(
    schedule: MonotoneLogSNR, u: Tensor, error: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return a scalar whose gradient is that of log E[l^2], l = -logSNR'(u) error / 2 (Eq. 17).

    Since E[l] is fixed, minimum E[l^2] is minimum variance. With p(logSNR) = 1 / |logSNR'| the
    density of the samples, E[l^2] is the integral of (error / 2)^2 / p, and its gradient E[l^2 grad
    log
    |logSNR'|] at fixed logSNR: u moves against the weights, by one Newton step. u: (B,).
    """
    log_snr, slope = schedule(u)
    squared = (slope * error(log_snr.detach()) / 2).square().detach()
    moved = u - (log_snr - log_snr.detach()) / slope.detach()
    _, slope_at_fixed = schedule(moved)
    surrogate: Tensor = (squared * slope_at_fixed.abs().log()).mean() / squared.mean()
    return surrogate


def discretise(
    learned: MonotoneLogSNR, num_timesteps: int, *, trained_on: Schedule | None = None
) -> Schedule:
    """Cut a learned schedule into a chain of T steps, both ends among them.

    trained_on: the schedule that a model was trained on; the chain's timesteps are then the real
    ones at which that schedule has the same logSNR. None numbers the steps 0 .. T-1, to train a
    model on.
    """
    with torch.no_grad():
        log_snr, _ = learned(torch.linspace(0, 1, num_timesteps, dtype=torch.float64))
    betas = betas_from_alphas_cumprod(alphas_cumprod_from_log_snr(log_snr))
    if trained_on is None:
        return Schedule.from_betas(betas)
    timesteps = timestep_at(trained_on, angle_of_log_snr(log_snr))
    return Schedule.from_betas(betas, timesteps=timesteps)
