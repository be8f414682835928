"""Guidance equals its closed forms and diffusers."""

import pytest
import torch
from fakes_diffusion import gaussian
from torch import Tensor

from latentdiff.diffusion.ddpm import p_mean_variance, p_sample_loop
from latentdiff.diffusion.guidance import (
    classifier_free,
    is_guided,
    rescale,
    score_guidance,
    with_score_guidance,
)
from latentdiff.diffusion.prediction import DDPM_TYPES
from latentdiff.diffusion.schedules import Schedule, make_betas, rescale_zero_terminal_snr


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_scale_zero_one_and_beyond() -> None:
    uncond, cond = _randn(2, 4, seed=1), _randn(2, 4, seed=2)
    assert torch.equal(classifier_free(uncond, cond, 0.0), uncond)
    torch.testing.assert_close(classifier_free(uncond, cond, 1.0), cond)
    torch.testing.assert_close(
        classifier_free(uncond, cond, 7.5), 7.5 * cond - 6.5 * uncond, rtol=1e-5, atol=1e-5
    )


def test_guidance_of_two_gaussians_is_the_analytic_gaussian() -> None:
    """Scores of N(m, s^2) and N(0, 1): the guided score is that of p(x|c)^w p(x)^(1-w)."""
    x, m, s2, w = _randn(8, 1), 0.7, 0.4, 3.0
    guided = classifier_free(-x, -(x - m) / s2, w)
    precision = w / s2 + (1 - w)
    mean = w * m / s2 / precision
    torch.testing.assert_close(guided, -(x - mean) * precision, rtol=1e-5, atol=1e-5)


def test_rescale_gives_back_the_conditional_spread() -> None:
    cond = _randn(3, 4, 2, 2, seed=1)
    guided = 5 * cond + _randn(3, 4, 2, 2, seed=2)
    full, none, half = (rescale(guided, cond, phi) for phi in (1.0, 0.0, 0.5))
    torch.testing.assert_close(full.flatten(1).std(1), cond.flatten(1).std(1))
    torch.testing.assert_close(none, guided)
    torch.testing.assert_close(half, (full + none) / 2)
    assert not torch.allclose(full, guided)


def test_rescale_matches_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    cond, guided = _randn(3, 4, 2, 2, seed=1), 4 * _randn(3, 4, 2, 2, seed=2)
    torch.testing.assert_close(rescale(guided, cond, 0.7), rescale_noise_cfg(guided, cond, 0.7))


def test_rescale_of_nothing_is_nothing() -> None:
    assert torch.equal(rescale(torch.zeros(1, 4), torch.zeros(1, 4), 0.7), torch.zeros(1, 4))


def test_interval_counts_from_pure_noise() -> None:
    assert is_guided(999)
    assert is_guided(0)
    middle = [t for t in range(1000) if is_guided(t, start=0.25, end=0.75)]
    assert (min(middle), max(middle), len(middle)) == (250, 749, 500)
    assert not is_guided(999, start=0.1)
    assert not is_guided(0, end=0.9)


# --- Guidance by gradient: data N(0, C), a reading y = x0 + N(0, TAU2); all is known ---

C, TAU2, Y = 0.7, 0.3, 1.1
POSTERIOR = gaussian([Y * C / (C + TAU2)], [C * TAU2 / (C + TAU2)])  # of x0 given y


def _schedule(*, zero_snr: bool = False, num_timesteps: int = 1000) -> Schedule:
    betas = make_betas("cosine", num_timesteps)
    return Schedule.from_betas(rescale_zero_terminal_snr(betas) if zero_snr else betas)


def _log_likelihood(schedule: Schedule, x0: Tensor, t: Tensor) -> Tensor:
    """log p(y | xt) but for a constant, of the predicted x0."""
    abar = schedule.alphas_cumprod[t, None]
    doubt = C * (1 - abar) / (abar * C + 1 - abar)
    return (-(Y - x0).square() / (2 * (TAU2 + doubt))).sum(1)


GUIDED = [(name, False) for name in DDPM_TYPES] + [("v_prediction", True), ("sample", True)]


@pytest.mark.parametrize(("prediction_type", "zero_snr"), GUIDED)
@pytest.mark.parametrize("through_x0", [True, False])
def test_guided_model_is_that_of_the_posterior(
    prediction_type: str, zero_snr: bool, through_x0: bool
) -> None:
    """Score of p(x | y) = score of p(x) + gradient of log p(y | x), at every noise level."""
    schedule, world = _schedule(zero_snr=zero_snr), gaussian([0.0], [C])

    def score(x: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[t]
        return _log_likelihood(schedule, x if through_x0 else world.denoise(x, abar), t)

    guided = with_score_guidance(
        schedule,
        world.model(schedule, prediction_type),
        score,
        scale=1.0,
        prediction_type=prediction_type,
        through_x0=through_x0,
    )
    t = torch.tensor([0, 10, 500, 900, 998])
    xt = _randn(5, 1).double()
    exact = POSTERIOR.model(schedule, prediction_type)(xt, t)
    torch.testing.assert_close(guided(xt, t), exact, rtol=1e-6, atol=1e-7)
    assert not guided(xt, t).requires_grad


def test_pure_noise_is_not_guided() -> None:
    schedule = _schedule(zero_snr=True)
    output, t = _randn(2, 3), torch.tensor([999, 998])
    moved = score_guidance(schedule, output, torch.ones(2, 3), t, prediction_type="v_prediction")
    assert torch.equal(moved[0], output[0])
    assert not torch.equal(moved[1], output[1])


def test_guided_samples_have_the_analytic_moments() -> None:
    schedule, world, n = _schedule(num_timesteps=200), gaussian([0.0], [C]), 10_000
    guided = with_score_guidance(
        schedule,
        world.model(schedule, "epsilon"),
        lambda x, t: _log_likelihood(schedule, x, t),
        scale=1.0,
        prediction_type="epsilon",
    )
    x0 = p_sample_loop(
        schedule,
        guided,
        _randn(n, 1).double(),
        generator=torch.Generator().manual_seed(1),
        prediction_type="epsilon",
        variance_type="fixed_large",
    )
    mean, std = float(POSTERIOR.means), float(POSTERIOR.variances.sqrt())
    assert abs(float(x0.mean()) - mean) < 4 * std / n**0.5
    assert abs(float(x0.std()) / std - 1) < 4 / (2 * n) ** 0.5 + 0.02


def test_shifted_mean_and_shifted_output_are_one_move() -> None:
    """Both move the mean of p(x_{t-1} | xt) by variance times gradient, but for sqrt(alpha_t)."""
    schedule, t = _schedule(), torch.tensor([3, 400])
    xt, output, gradient = (_randn(2, 3, seed=s).double() for s in (1, 2, 3))
    settings = {"prediction_type": "epsilon", "variance_type": "fixed_large"}
    plain = p_mean_variance(schedule, output, xt, t, **settings)
    moved = score_guidance(schedule, output, gradient, t, prediction_type="epsilon")
    by_output = p_mean_variance(schedule, moved, xt, t, **settings).mean
    by_mean = plain.mean + plain.log_variance.exp() * gradient  # Alg. 1
    factor = schedule.alphas[t, None].sqrt()
    torch.testing.assert_close((by_output - plain.mean) * factor, by_mean - plain.mean)
    torch.testing.assert_close(by_mean - plain.mean, schedule.betas[t, None] * gradient)


def test_variance_channels_are_left_alone() -> None:
    schedule, t, xt = _schedule(), torch.tensor([5]), _randn(1, 2)
    guided = with_score_guidance(
        schedule,
        lambda xt, t: torch.cat([0.1 * xt, xt], 1),
        lambda x, t: x.sum(1),
        scale=3.0,
        prediction_type="epsilon",
        variance_type="learned_range",
    )
    output = guided(xt, t)
    assert torch.equal(output[:, 2:], xt)
    assert not torch.allclose(output[:, :2], 0.1 * xt)
