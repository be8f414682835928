"""A learned schedule against the best one, which is known where the error is."""

import pytest
import torch
from fakes_diffusion import three_blobs
from torch import Tensor

from latentdiff.diffusion.bound import TimestepPlan, estimate, evaluate_bound
from latentdiff.diffusion.schedules import Schedule, log_snr, make_betas
from latentdiff.diffusion.theory.continuous_time import angle_at, angle_of_log_snr
from latentdiff.diffusion.theory.learned_schedule import (
    MonotoneLogSNR,
    discretise,
    learn_log_snr,
    variance_surrogate,
)

START, END = 8.0, -6.0


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _error(lam: Tensor) -> Tensor:
    """Mean squared noise error by logSNR: large on one side, as for images."""
    return 0.05 + torch.sigmoid(0.8 * (lam - 2))


def _second_moment(schedule: MonotoneLogSNR, num: int = 4001) -> Tensor:
    """E[l^2] / E[l]^2 of the one-sample estimate; 1 is no variance at all."""
    lam, slope = schedule(torch.linspace(0, 1, num, dtype=torch.float64))
    loss = -slope * _error(lam) / 2
    return loss.square().mean() / loss.mean() ** 2


def test_log_snr_falls_between_its_ends_and_knows_its_slope() -> None:
    torch.manual_seed(0)
    schedule = MonotoneLogSNR(start=START, end=END)
    with torch.no_grad():
        schedule.heights.normal_(0, 4)
    u = torch.linspace(0, 1, 501, dtype=torch.float64, requires_grad=True)
    lam, slope = schedule(u)
    ends = lam.detach()[[0, -1]].tolist()
    (derivative,) = torch.autograd.grad(lam.sum(), u, retain_graph=True)
    torch.testing.assert_close(slope, derivative)
    assert bool((slope < 0).all())
    assert ends == pytest.approx([START, END])
    with pytest.raises(ValueError, match="fall"):
        MonotoneLogSNR(start=END, end=START)


def test_surrogate_has_the_gradient_of_the_second_moment() -> None:
    """Against numbers: E[l^2] as an integral over a fine grid, differentiated by differences."""
    schedule = MonotoneLogSNR(start=START, end=END, num_steps=6)
    with torch.no_grad():
        schedule.heights.copy_(torch.tensor([-3.0, 0.0, -1.0, 0.5, -2.0, -4.0]))
    num = 20_000
    u = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    (gradient,) = torch.autograd.grad(variance_surrogate(schedule, u, _error), schedule.heights)

    def log_second_moment() -> float:
        lam, slope = schedule(u)
        return (slope * _error(lam) / 2).square().mean().log().item()

    differences = []
    for i in range(6):
        values = []
        for step in (1e-4, -2e-4):
            with torch.no_grad():
                schedule.heights[i] += step
            values.append(log_second_moment())
        with torch.no_grad():
            schedule.heights[i] += 1e-4
        differences.append((values[0] - values[1]) / 2e-4)
    torch.testing.assert_close(gradient, torch.tensor(differences).double(), rtol=1e-3, atol=1e-6)


def test_learning_takes_nearly_all_variance_away() -> None:
    """The best density of steps is proportional to the error, and its estimate has none left."""
    straight = MonotoneLogSNR(start=START, end=END)
    learned = learn_log_snr(_error, start=START, end=END, generator=_generator())
    with torch.no_grad():
        assert float(_second_moment(straight)) > 1.4
        assert float(_second_moment(learned)) < 1.05
    u = torch.linspace(0.02, 0.98, 200, dtype=torch.float64)
    with torch.no_grad():
        lam, slope = learned(u)
    ratio = 1 / slope.abs() / _error(lam)
    assert float((ratio / ratio.mean()).std()) < 0.25


def test_a_learned_chain_asks_a_trained_model_at_the_same_log_snr() -> None:
    trained_on = Schedule.from_betas(make_betas("cosine", 1000))
    ends = log_snr(trained_on.alphas_cumprod)[[0, -10]]
    schedule = MonotoneLogSNR(start=float(ends[0]), end=float(ends[1]))
    chain = discretise(schedule, 100, trained_on=trained_on)
    lam = log_snr(chain.alphas_cumprod)
    torch.testing.assert_close(lam[[0, -1]], ends)
    torch.testing.assert_close(angle_at(trained_on, chain.timesteps), angle_of_log_snr(lam))
    assert torch.equal(discretise(schedule, 100).timesteps, torch.arange(100))


def test_learned_schedule_lowers_the_error_of_the_bound_of_a_real_denoiser() -> None:
    """Two chains between the same ends, the same model: equal bounds, unequal errors."""
    world, trained_on = three_blobs(), Schedule.from_betas(make_betas("cosine", 1000))
    model = world.model(trained_on, "epsilon")
    ends = log_snr(trained_on.alphas_cumprod)
    start, end = float(ends[0]), float(ends[-5])
    x0 = world.sample(2000, _generator(5))
    generator = _generator(6)

    def error(lam: Tensor) -> Tensor:
        abar = torch.sigmoid(lam)[:, None]
        eps = torch.randn(len(lam), 2, generator=generator, dtype=torch.float64)
        xt = abar.sqrt() * x0[: len(lam)] + (1 - abar).sqrt() * eps
        predicted = (xt - abar.sqrt() * world.denoise(xt, abar)) / (1 - abar).sqrt()
        return (eps - predicted).square().sum(1)

    straight = MonotoneLogSNR(start=start, end=end)
    learned = learn_log_snr(error, start=start, end=end, generator=_generator(7), batch_size=512)
    errors, means = [], []
    for schedule in (straight, learned):
        samples = evaluate_bound(
            discretise(schedule, 500, trained_on=trained_on),
            model,
            x0,
            generator=_generator(8),
            prediction_type="epsilon",
            variance_type="fixed_large",
            plan=TimestepPlan.uniform(500, num_draws=2),
        )
        result = estimate(samples.transitions())
        errors.append(result.se_noise)
        means.append(result.mean)
    assert errors[1] < 0.8 * errors[0]
    assert abs(means[0] - means[1]) < 4 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5 + 0.05
