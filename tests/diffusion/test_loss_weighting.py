"""Loss weights over the timesteps against their closed forms and diffusers' SNR."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from latentdiff.diffusion.ddpm import q_sample
from latentdiff.diffusion.loss_weighting import LOSS_WEIGHTINGS, loss_weights
from latentdiff.diffusion.losses import (
    per_sample_loss,
)
from latentdiff.diffusion.prediction import DDPM_TYPES, PREDICTION_TYPES, target
from latentdiff.diffusion.schedules import Schedule, make_betas, rescale_zero_terminal_snr

T = 1000
ALL = torch.arange(T)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _schedule(*, zero_snr: bool = False) -> Schedule:
    betas = make_betas("scaled_linear", T)
    return Schedule.from_betas(rescale_zero_terminal_snr(betas) if zero_snr else betas)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("weighting", ["none", *LOSS_WEIGHTINGS])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("gamma", [None, 0.5, 5.0])
def test_every_weight_is_positive_and_finite(
    prediction_type: str, weighting: str, zero_snr: bool, gamma: float | None
) -> None:
    weights = loss_weights(
        _schedule(zero_snr=zero_snr),
        ALL,
        prediction_type=prediction_type,
        weighting=weighting,
        gamma=gamma,
    )
    assert weights.shape == (T,)
    assert weights.dtype == torch.float32
    assert bool(((weights > 0) & weights.isfinite()).all())


@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_weighted_loss_does_not_depend_on_what_is_predicted(weighting: str) -> None:
    """One denoiser, written three ways, has one weighted loss."""
    schedule, t = _schedule(), torch.tensor([0, 10, 300, 800, 999])
    x0, eps = _randn(5, 16, seed=1), _randn(5, 16, seed=2)
    xt = q_sample(schedule, x0, t, eps)
    guess = x0 + 0.1 * _randn(5, 16, seed=3)
    implied_eps = (xt - schedule.sqrt_alphas_cumprod[t, None] * guess) / (
        schedule.sqrt_one_minus_alphas_cumprod[t, None]
    )
    losses = []
    for prediction_type in DDPM_TYPES:
        output = target(schedule, guess, implied_eps, t, prediction_type=prediction_type)
        truth = target(schedule, x0, eps, t, prediction_type=prediction_type)
        weights = loss_weights(schedule, t, prediction_type=prediction_type, weighting=weighting)
        losses.append(weights * per_sample_loss(output, truth))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-4, atol=0)


def test_min_snr_matches_the_formula_over_diffusers_snr() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr, gamma = compute_snr(scheduler, ALL), 5.0
    clamped = snr.clamp(max=gamma)
    expected = {
        "epsilon": clamped / snr,
        "v_prediction": clamped / (snr + 1),
        "sample": clamped,
    }
    for prediction_type, weights in expected.items():
        ours = loss_weights(
            _schedule(), ALL, prediction_type=prediction_type, weighting="min_snr", gamma=gamma
        )
        torch.testing.assert_close(ours, weights, rtol=1e-3, atol=0)


def test_soft_min_snr_and_p2_closed_forms() -> None:
    schedule = _schedule()
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)

    def epsilon_weights(weighting: str, gamma: float | None = None) -> Tensor:
        return loss_weights(
            schedule, ALL, prediction_type="epsilon", weighting=weighting, gamma=gamma
        ).double()

    torch.testing.assert_close(
        epsilon_weights("soft_min_snr", 3.0), 3 / (3 + snr), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(epsilon_weights("p2"), 1 / (1 + snr), rtol=1e-6, atol=0)
    torch.testing.assert_close(epsilon_weights("p2", 0.5), (1 + snr) ** -0.5, rtol=1e-6, atol=0)
    # the soft form is at most the hard one, and at least half of it
    ratio = epsilon_weights("soft_min_snr") / epsilon_weights("min_snr")
    assert float(ratio.max()) <= 1 + 1e-6
    assert float(ratio.min()) >= 0.5 - 1e-6


@pytest.mark.parametrize("weighting", ["none", *LOSS_WEIGHTINGS])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_the_pure_noise_step_is_trained(prediction_type: str, weighting: str) -> None:
    weights = loss_weights(
        _schedule(zero_snr=True), ALL, prediction_type=prediction_type, weighting=weighting
    )
    assert float(weights[-1]) == 1


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="min_snr"):
        loss_weights(_schedule(), ALL, prediction_type="epsilon", weighting="min-snr")
    with pytest.raises(ValueError, match="positive"):
        loss_weights(_schedule(), ALL, prediction_type="epsilon", weighting="p2", gamma=0.0)
    with pytest.raises(ValueError, match="v_prediction"):
        loss_weights(_schedule(), ALL, prediction_type="v")
