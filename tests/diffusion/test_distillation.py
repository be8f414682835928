"""Distillation's targets against closed forms: Gaussian data, whose exact denoiser is known."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor

from latentdiff.diffusion.distillation import (
    CLEAN,
    consistency_scalings,
    ddim_step,
    guidance_weights,
    one_step_output,
    signal_and_noise,
    trailing_timesteps,
    velocity_weights,
)
from latentdiff.diffusion.guidance import classifier_free
from latentdiff.diffusion.prediction import predict_x0, target
from latentdiff.diffusion.schedules import Schedule, make_betas, rescale_zero_terminal_snr

TYPES = ("v_prediction", "sample", "epsilon")


def schedule_for(prediction_type: str) -> Schedule:
    """Zero terminal SNR, but for epsilon, which needs a signal at every step."""
    betas = make_betas("scaled_linear")
    return Schedule.from_betas(
        betas if prediction_type == "epsilon" else rescale_zero_terminal_snr(betas)
    )


def exact_output(
    schedule: Schedule, xt: Tensor, t: Tensor, *, mean: float, std: float, prediction_type: str
) -> Tensor:
    """The best possible output for data N(mean, std^2): that of E[x0 | xt]."""
    signal = schedule.sqrt_alphas_cumprod[t].view(-1, 1)
    noise = schedule.sqrt_one_minus_alphas_cumprod[t].view(-1, 1)
    x0 = mean + signal * std**2 * (xt - signal * mean) / (signal**2 * std**2 + noise**2)
    eps = (xt - signal * x0) / noise
    return target(schedule, x0, eps, t, prediction_type=prediction_type)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 16])
def test_a_student_step_lands_where_two_exact_ddim_steps_do(
    prediction_type: str, num_steps: int
) -> None:
    schedule = schedule_for(prediction_type)
    grid = trailing_timesteps(2 * num_steps, 1000)
    stops = torch.cat([grid, torch.tensor([CLEAN])])
    t, middle, end = stops[:-2:2], stops[1:-1:2], stops[2::2]
    assert torch.equal(t, trailing_timesteps(num_steps, 1000))
    xt = torch.randn(num_steps, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def step(x: Tensor, at: Tensor, to: Tensor) -> Tensor:
        output = exact_output(schedule, x, at, mean=0.7, std=0.4, prediction_type=prediction_type)
        return ddim_step(schedule, output, x, at, to, prediction_type=prediction_type)

    twice = step(step(xt, t, middle), middle, end)
    student = one_step_output(schedule, xt, twice, t, end, prediction_type=prediction_type)
    assert student.isfinite().all()
    once = ddim_step(schedule, student, xt, t, end, prediction_type=prediction_type)
    torch.testing.assert_close(once, twice, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_guided_target_is_the_analytic_one(prediction_type: str) -> None:
    """Guided Gaussians: the guided prediction of x0 is the same extrapolation of two means."""
    schedule, scale = schedule_for(prediction_type), torch.tensor([[1.0], [3.0], [7.5]])
    t = torch.tensor([998, 400, 30])
    xt = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cond, uncond = (
        exact_output(schedule, xt, t, mean=mean, std=std, prediction_type=prediction_type)
        for mean, std in ((1.0, 0.3), (0.0, 0.8))
    )
    guided = classifier_free(uncond, cond, scale)
    x0 = predict_x0(schedule, guided, xt, t, prediction_type=prediction_type)
    parts = [
        predict_x0(schedule, one, xt, t, prediction_type=prediction_type) for one in (uncond, cond)
    ]
    torch.testing.assert_close(x0, parts[0] + scale * (parts[1] - parts[0]), atol=1e-6, rtol=0)


def test_the_target_of_an_exact_step_is_the_output_itself() -> None:
    schedule = schedule_for("v_prediction")
    t, end = torch.tensor([999, 499]), torch.tensor([499, CLEAN])
    xt = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    output = exact_output(schedule, xt, t, mean=0.2, std=0.5, prediction_type="v_prediction")
    landed = ddim_step(schedule, output, xt, t, end, prediction_type="v_prediction")
    again = one_step_output(schedule, xt, landed, t, end, prediction_type="v_prediction")
    torch.testing.assert_close(again, output, atol=1e-9, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 16, 25, 32])
def test_the_grid_is_diffusers_trailing_spacing(num_steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    assert torch.equal(trailing_timesteps(num_steps, 1000), scheduler.timesteps)
    halves = trailing_timesteps(2 * num_steps, 1000)[::2]
    assert torch.equal(halves, trailing_timesteps(num_steps, 1000))


def test_a_grid_has_as_many_steps_as_asked_for() -> None:
    with pytest.raises(ValueError, match="num_steps=0, expected 1 to 1000"):
        trailing_timesteps(0, 1000)


def test_a_ddim_step_is_diffusers_step() -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )
    scheduler.set_timesteps(4)
    schedule = schedule_for("v_prediction")
    generator = torch.Generator().manual_seed(3)
    xt, output = (torch.randn(1, 4, 3, 3, generator=generator) for _ in range(2))
    stops = [*scheduler.timesteps.tolist(), CLEAN]
    for t, t_next in pairwise(stops):
        ours = ddim_step(
            schedule,
            output,
            xt,
            torch.tensor([t]),
            torch.tensor([t_next]),
            prediction_type="v_prediction",
        )
        theirs = scheduler.step(output, t, xt).prev_sample
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_a_consistency_model_returns_a_clean_sample_as_it_is() -> None:
    like = torch.zeros(3, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([0, 259, 999])
    skip, out = consistency_scalings(t, like=like)
    assert (skip[0].item(), out[0].item()) == (1.0, 0.0)
    scheduler = LCMScheduler()
    for k, step in enumerate(t):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(step.double())
        assert skip[k].item() == pytest.approx(float(expected[0]), rel=1e-12)
        assert out[k].item() == pytest.approx(float(expected[1]), rel=1e-12)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_weighted_error_is_that_of_the_velocity(prediction_type: str) -> None:
    schedule, t = schedule_for(prediction_type), torch.tensor([990, 500, 10])
    generator = torch.Generator().manual_seed(0)
    xt, a, b = torch.randn(3, 3, 5, dtype=torch.float64, generator=generator)

    def velocity(output: Tensor) -> Tensor:
        x0 = predict_x0(schedule, output, xt, t, prediction_type=prediction_type)
        signal, noise = signal_and_noise(schedule, t, like=xt)
        return signal * (xt - signal * x0) / noise - noise * x0

    weights = velocity_weights(schedule, t, prediction_type=prediction_type)
    weighted = weights * (a - b).square().sum(1)
    torch.testing.assert_close(
        weighted, (velocity(a) - velocity(b)).square().sum(1), rtol=1e-5, atol=0
    )


def test_errors_at_all_guidance_scales_count_as_shares_of_what_guidance_adds() -> None:
    scale = torch.linspace(1, 8, 70_001, dtype=torch.float64)
    weights = guidance_weights(scale, lowest=1.0, highest=8.0)
    assert weights.mean().item() == pytest.approx(1, abs=1e-3)  # the loss keeps its size
    torch.testing.assert_close(weights * scale.float() ** 2, torch.full((70_001,), 8.0))
