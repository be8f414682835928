"""The chain against diffusers' DDPMScheduler."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from latentdiff.diffusion.ddpm import (
    VARIANCE_TYPES,
    p_mean_variance,
    p_sample,
    p_sample_loop,
    q_sample,
)
from latentdiff.diffusion.prediction import DDPM_TYPES, velocity
from latentdiff.diffusion.schedules import (
    Schedule,
    make_betas,
    rescale_zero_terminal_snr,
    respace,
    space_timesteps,
)

T = 1000
TIMESTEPS = [0, 1, 2, 17, 500, 998, 999]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=dtype)


def _scheduler(**changes: Any) -> DDPMScheduler:
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
    }
    return DDPMScheduler(**{**settings, **changes})


def _schedule(*, zero_snr: bool = False) -> Schedule:
    betas = make_betas("scaled_linear", T)
    return Schedule.from_betas(rescale_zero_terminal_snr(betas) if zero_snr else betas)


def _schedule_of_its_tables(scheduler: DDPMScheduler) -> Schedule:
    """Our chain with diffusers' own rounded coefficients, in float32 as its step has them."""
    abar = scheduler.alphas_cumprod
    previous = torch.cat([torch.ones(1), abar[:-1]])
    alphas = abar / previous
    betas = 1 - alphas
    variance = ((1 - previous) / (1 - abar) * betas).clamp(min=1e-20)
    return Schedule(
        betas=betas,
        alphas=alphas,
        alphas_cumprod=abar,
        sqrt_alphas_cumprod=abar**0.5,
        sqrt_one_minus_alphas_cumprod=(1 - abar) ** 0.5,
        posterior_mean_x0=previous**0.5 * betas / (1 - abar),
        posterior_mean_xt=alphas**0.5 * (1 - previous) / (1 - abar),
        posterior_variance=variance,
        log_variance_small=variance.log(),
        log_variance_large=betas.log(),
        timesteps=torch.arange(len(betas)),
    )


# Its float32 tables put beta_t off by up to 1e-4 of itself at the first steps.
TABLES = [
    pytest.param(_schedule_of_its_tables, 1e-5, id="its-tables"),
    pytest.param(lambda s: _schedule(zero_snr=s.config.rescale_betas_zero_snr), 1e-3, id="ours"),
]


@pytest.mark.parametrize(("tables", "tolerance"), TABLES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_q_sample_and_velocity_match_diffusers(
    tables: Any, tolerance: float, zero_snr: bool
) -> None:
    scheduler = _scheduler(rescale_betas_zero_snr=zero_snr)
    schedule = tables(scheduler)
    t = torch.tensor(TIMESTEPS)
    x0, eps = _randn(len(t), 4, 3, 3, seed=1), _randn(len(t), 4, 3, 3, seed=2)
    for ours, theirs in [
        (q_sample(schedule, x0, t, eps), scheduler.add_noise(x0, eps, t)),
        (velocity(schedule, x0, eps, t), scheduler.get_velocity(x0, eps, t)),
    ]:
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("tables", "tolerance"), TABLES)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", DDPM_TYPES)
@pytest.mark.parametrize("t", TIMESTEPS)
def test_reverse_step_matches_diffusers(
    tables: Any, tolerance: float, variance_type: str, prediction_type: str, t: int
) -> None:
    scheduler = _scheduler(variance_type=variance_type, prediction_type=prediction_type)
    schedule = tables(scheduler)
    channels = 8 if variance_type == "learned_range" else 4
    xt, output = _randn(2, 4, 3, 3, seed=1), _randn(2, channels, 3, 3, seed=2)
    theirs = scheduler.step(output, t, xt, generator=_generator(3))
    ts = torch.full((2,), t)
    reverse = p_mean_variance(
        schedule, output, xt, ts, prediction_type=prediction_type, variance_type=variance_type
    )
    ours = p_sample(reverse, ts, _randn(2, 4, 3, 3, seed=3))
    # An epsilon model's x0 is the difference of two large numbers at the end: compare relatively.
    size = max(1.0, float(theirs.pred_original_sample.abs().max()))
    torch.testing.assert_close(
        reverse.x0, theirs.pred_original_sample, atol=tolerance * size, rtol=0
    )
    torch.testing.assert_close(ours, theirs.prev_sample, atol=tolerance, rtol=0)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_whole_zero_terminal_snr_chain_matches_diffusers(prediction_type: str) -> None:
    scheduler = DDPMScheduler(
        num_train_timesteps=20,
        prediction_type=prediction_type,
        clip_sample=False,
        rescale_betas_zero_snr=True,
    )
    schedule = _schedule_of_its_tables(scheduler)

    def model(xt: Tensor, t: Tensor) -> Tensor:
        return (xt * 0.7 + 0.01 * t.view(-1, 1)).tanh()

    xt = _randn(3, 2, seed=1)
    ours = p_sample_loop(
        schedule, model, xt, generator=_generator(5), prediction_type=prediction_type
    )
    generator, theirs = _generator(5), xt
    for t in range(19, -1, -1):
        output = model(theirs, torch.full((3,), t))
        theirs = scheduler.step(output, t, theirs, generator=generator).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_respaced_chain_matches_diffusers(variance_type: str, zero_snr: bool) -> None:
    scheduler = _scheduler(
        variance_type=variance_type,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(20)
    kept = scheduler.timesteps.flip(0)
    assert torch.equal(kept, space_timesteps("20", T))
    schedule = respace(_schedule(zero_snr=zero_snr), kept)
    seen: list[int] = []

    def model(xt: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        output = (0.7 * xt + 0.001 * t.view(-1, 1)).tanh()
        return torch.cat([output, output], 1) if variance_type == "learned_range" else output

    xt = _randn(3, 4, seed=1)
    ours = p_sample_loop(
        schedule,
        model,
        xt,
        generator=_generator(5),
        prediction_type="v_prediction",
        variance_type=variance_type,
    )
    assert seen == scheduler.timesteps.tolist()
    generator, theirs = _generator(5), xt
    for t in scheduler.timesteps:
        output = model(theirs, t.expand(3))
        theirs = scheduler.step(output, t, theirs, generator=generator).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_clip_x0_matches_diffusers_clip_sample() -> None:
    scheduler = _scheduler(clip_sample=True, clip_sample_range=0.8)
    xt, output, t = _randn(2, 4, seed=1), _randn(2, 4, seed=2), torch.full((2,), 900)
    theirs = scheduler.step(output, 900, xt, generator=_generator(3))
    reverse = p_mean_variance(
        _schedule_of_its_tables(scheduler),
        output,
        xt,
        t,
        prediction_type="epsilon",
        clip_x0=0.8,
    )
    assert reverse.x0.abs().max() <= 0.8
    torch.testing.assert_close(
        p_sample(reverse, t, _randn(2, 4, seed=3)), theirs.prev_sample, atol=1e-5, rtol=0
    )
