"""Rectified flow: the straight path as a Schedule, its closed forms, and diffusers' samplers."""

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from fakes_diffusion import gaussian
from torch import Tensor

from latentdiff.diffusion.bound import bound_term
from latentdiff.diffusion.ddpm import p_sample_loop, q_posterior_mean_variance, q_sample
from latentdiff.diffusion.guidance import with_score_guidance
from latentdiff.diffusion.loss_weighting import LOSS_WEIGHTINGS, loss_weights
from latentdiff.diffusion.losses import per_sample_loss
from latentdiff.diffusion.prediction import (
    check_objective,
    parametrization,
    predict_eps,
    predict_x0,
    target,
)
from latentdiff.diffusion.schedules import Schedule, make_betas, rectified_flow, respace
from latentdiff.diffusion.theory.continuous_time import flow_bits, probability_flow

FLOW = "flow_prediction"
T = 1000
ALL = torch.arange(T)
MEAN, STD = 0.6, 0.5
WORLD = gaussian([MEAN], [STD**2])


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_path_is_straight_from_data_to_pure_noise() -> None:
    schedule, x0, eps = rectified_flow(T), _randn(T, 2, seed=1), _randn(T, 2, seed=2)
    sigma = (ALL + 1)[:, None] / T
    torch.testing.assert_close(q_sample(schedule, x0, ALL, eps), (1 - sigma) * x0 + sigma * eps)
    assert torch.equal(q_sample(schedule, x0, ALL, eps)[-1], eps[-1])
    assert schedule.is_flow
    assert not Schedule.from_betas(make_betas("linear", T)).is_flow


def test_output_gives_x0_eps_and_the_velocity_of_the_same_angle() -> None:
    schedule, x0, eps = rectified_flow(T), _randn(T, 2, seed=1), _randn(T, 2, seed=2)
    xt, output = (
        q_sample(schedule, x0, ALL, eps),
        target(schedule, x0, eps, ALL, prediction_type=FLOW),
    )
    torch.testing.assert_close(output, eps - x0)
    torch.testing.assert_close(predict_x0(schedule, output, xt, ALL, prediction_type=FLOW), x0)
    torch.testing.assert_close(predict_eps(schedule, output, xt, ALL, prediction_type=FLOW), eps)
    signal, noise = (
        table[:, None]
        for table in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    )
    abar = schedule.alphas_cumprod[:, None]
    torch.testing.assert_close(
        parametrization(FLOW).to_velocity(output, xt, signal, noise),
        abar.sqrt() * eps - (1 - abar).sqrt() * x0,
    )


def test_tables_of_a_ddpm_chain_come_out_of_its_path_too() -> None:
    chain = Schedule.from_betas(make_betas("scaled_linear", T))
    path = Schedule.from_path(chain.sqrt_alphas_cumprod, chain.sqrt_one_minus_alphas_cumprod)
    for name, table in vars(chain).items():
        torch.testing.assert_close(getattr(path, name), table, rtol=1e-9, atol=1e-12)


def test_posterior_composes_to_the_path() -> None:
    """q(x_{t-1}) is that of q(x_{t-1} | xt, x0) with xt from q(xt | x0), in mean and variance."""
    schedule, x0 = respace(rectified_flow(T), torch.tensor([9, 99, 499, 999])), _randn(3, 1)
    t, signal = torch.tensor([1, 2, 3]), schedule.sqrt_alphas_cumprod
    noise = schedule.sqrt_one_minus_alphas_cumprod
    mean, variance = q_posterior_mean_variance(schedule, x0, signal[t, None] * x0, t)
    torch.testing.assert_close(mean, signal[t - 1, None] * x0)
    slope = q_posterior_mean_variance(schedule, 0 * x0, torch.ones_like(x0), t)[0]
    total = variance + (slope * noise[t, None]) ** 2
    torch.testing.assert_close(total, noise[t - 1, None] ** 2)


@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_weighted_loss_is_that_of_the_noise_it_stands_for(weighting: str) -> None:
    schedule, t = rectified_flow(T), torch.tensor([10, 300, 800, 998])
    x0, eps, guess = _randn(4, 16, seed=1), _randn(4, 16, seed=2), _randn(4, 16, seed=3)
    xt = q_sample(schedule, x0, t, eps)
    output, wanted = guess, target(schedule, x0, eps, t, prediction_type=FLOW)
    implied = predict_eps(schedule, output, xt, t, prediction_type=FLOW)
    weights = loss_weights(schedule, t, prediction_type=FLOW, weighting=weighting)
    of_eps = loss_weights(schedule, t, prediction_type="epsilon", weighting=weighting)
    torch.testing.assert_close(
        weights * per_sample_loss(output, wanted), of_eps * per_sample_loss(implied, eps)
    )


def test_objective_and_path_must_agree() -> None:
    chain = Schedule.from_betas(make_betas("linear", T))
    check_objective(rectified_flow(T), FLOW)
    with pytest.raises(ValueError, match="use_flow_sigmas"):
        check_objective(chain, FLOW)
    with pytest.raises(ValueError, match="straight path"):
        check_objective(rectified_flow(T), "v_prediction")


def test_ancestral_samples_of_gaussian_data_have_its_moments() -> None:
    schedule, n = respace(rectified_flow(T), torch.arange(9, T, 10)), 20_000
    model = WORLD.model(schedule, FLOW)
    x0 = p_sample_loop(
        schedule,
        model,
        _randn(n, 1, seed=1),
        generator=torch.Generator().manual_seed(2),
        prediction_type=FLOW,
        variance_type="fixed_large",
    )
    assert float(x0.mean()) == pytest.approx(MEAN, abs=4 * STD / n**0.5)
    assert float(x0.std()) == pytest.approx(STD, rel=0.03)


def test_bound_and_flow_of_exact_models_meet_the_entropy() -> None:
    """The probability flow and the chain bound -log p of Gaussian data from above, closely."""
    schedule, x0 = rectified_flow(200), MEAN + STD * _randn(200, 1)
    model = WORLD.model(schedule, FLOW)
    bits = flow_bits(
        schedule, model, x0, generator=torch.Generator().manual_seed(0), prediction_type=FLOW
    )
    z = (x0 - MEAN) / STD
    exact = (0.5 * z.square() + torch.log(torch.tensor(STD * (2 * torch.pi) ** 0.5))) / 0.6931471806
    assert float(bits.mean()) == pytest.approx(float(exact.mean()), abs=0.1)
    t = torch.full((200,), 150)
    xt = q_sample(schedule, x0, t, _randn(200, 1, seed=5))
    term = bound_term(schedule, model(xt, t), x0, xt, t, prediction_type=FLOW)
    assert bool((term.bits >= 0).all() & term.bits.isfinite().all())


def test_probability_flow_carries_noise_to_data() -> None:
    schedule, noise = rectified_flow(T), _randn(50, 1)
    x = probability_flow(schedule, WORLD.model(schedule, FLOW), noise, prediction_type=FLOW)
    torch.testing.assert_close(x, MEAN + STD * noise, rtol=0, atol=2e-3)


def test_score_guidance_is_that_of_the_posterior() -> None:
    variance, doubt, y = 0.7, 0.3, 1.1
    schedule, world = rectified_flow(T), gaussian([0.0], [variance])
    posterior = gaussian(
        [y * variance / (variance + doubt)], [variance * doubt / (variance + doubt)]
    )

    def score(x: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[t, None]
        spread = variance * (1 - abar) / (abar * variance + 1 - abar)
        return (-(y - x).square() / (2 * (doubt + spread))).sum(1)

    model = world.model(schedule, FLOW)
    guided = with_score_guidance(schedule, model, score, scale=1.0, prediction_type=FLOW)
    xt, t = _randn(4, 1), torch.tensor([10, 500, 900, 998])
    exact = posterior.model(schedule, FLOW)(xt, t)
    torch.testing.assert_close(guided(xt, t), exact, rtol=1e-6, atol=1e-7)


SAMPLERS: list[tuple[Any, dict[str, Any]]] = [
    (UniPCMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
]


@pytest.mark.parametrize(("cls", "options"), SAMPLERS)
def test_diffusers_samplers_read_the_exact_model_as_we_train_it(
    cls: Any, options: dict[str, Any]
) -> None:
    """One Gaussian: 50 steps of a stock flow sampler end where the flow does."""
    scheduler = cls(prediction_type=FLOW, use_flow_sigmas=True, **options)
    scheduler.set_timesteps(50)
    model, noise = WORLD.model(rectified_flow(T), FLOW), _randn(100, 1)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x).prev_sample
    torch.testing.assert_close(x.double(), MEAN + STD * noise, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("cls", "options"), SAMPLERS)
def test_diffusers_noises_as_the_path_does(cls: Any, options: dict[str, Any]) -> None:
    scheduler = cls(prediction_type=FLOW, use_flow_sigmas=True, **options)
    scheduler.set_timesteps(20)
    t, x0, eps = scheduler.timesteps[[0, 7, 19]], _randn(3, 1, seed=1), _randn(3, 1, seed=2)
    noised = scheduler.add_noise(x0, eps, t)
    torch.testing.assert_close(
        noised, q_sample(rectified_flow(T), x0, t, eps), rtol=0, atol=2.5 * 1 / T
    )
