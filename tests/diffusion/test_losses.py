"""Targets, losses and changes to the noise against their closed forms."""

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.bound import bound_term
from latentdiff.diffusion.ddpm import q_sample
from latentdiff.diffusion.loss_weighting import LOSS_WEIGHTINGS, loss_weights
from latentdiff.diffusion.losses import (
    hybrid_loss,
    per_sample_loss,
    variance_loss,
)
from latentdiff.diffusion.noise import offset_noise, perturb_input
from latentdiff.diffusion.prediction import PREDICTION_TYPES, predict_x0, target
from latentdiff.diffusion.schedules import (
    Schedule,
    make_betas,
    rectified_flow,
    rescale_zero_terminal_snr,
)

T = 1000
ALL = torch.arange(T)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _schedule_of(prediction_type: str) -> Schedule:
    return rectified_flow(T) if prediction_type == "flow_prediction" else _schedule()


def _schedule(*, zero_snr: bool = False) -> Schedule:
    betas = make_betas("scaled_linear", T)
    return Schedule.from_betas(rescale_zero_terminal_snr(betas) if zero_snr else betas)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_target_is_what_predicts_x0(prediction_type: str) -> None:
    schedule, t = _schedule_of(prediction_type), torch.tensor([0, 1, 500, 999])
    x0, eps = _randn(4, 3, 2, 2, seed=1), _randn(4, 3, 2, 2, seed=2)
    output = target(schedule, x0, eps, t, prediction_type=prediction_type)
    xt = q_sample(schedule, x0, t, eps)
    torch.testing.assert_close(
        predict_x0(schedule, output, xt, t, prediction_type=prediction_type), x0
    )


def test_loss_is_each_samples_own_mean_square_in_float32() -> None:
    output = torch.tensor([[1.0, 3.0], [0.0, 0.5]], dtype=torch.bfloat16)
    loss = per_sample_loss(output, torch.zeros(2, 2, dtype=torch.float64))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [5.0, 0.125]


def test_huber_is_square_near_zero_and_linear_far_away() -> None:
    error = torch.tensor([[1e-3], [100.0], [3.0]])
    loss = per_sample_loss(error, torch.zeros(3, 1), huber_delta=0.5)
    assert float(loss[0]) == pytest.approx(1e-6, rel=0.2)  # float32 cancels, as it must
    assert float(loss[1]) == pytest.approx(2 * 0.5 * 100, rel=0.01)
    assert float(loss[2]) == pytest.approx(2 * 0.5 * ((9 + 0.25) ** 0.5 - 0.5), rel=1e-6)


def test_mask_averages_what_it_keeps() -> None:
    output = torch.arange(8.0).view(1, 2, 2, 2).repeat(3, 1, 1, 1)
    mask = torch.zeros(3, 1, 2, 2)
    mask[0] = 1
    mask[1, :, 0, 1] = 1  # keeps 1 and 5
    loss = per_sample_loss(output, torch.zeros_like(output), mask=mask)
    torch.testing.assert_close(loss, torch.tensor([140 / 8, (1 + 25) / 2, 0.0]))


def test_unknown_prediction_type_is_named() -> None:
    x = _randn(1, 2)
    with pytest.raises(ValueError, match="v_prediction"):
        target(_schedule(), x, x, torch.tensor([0]), prediction_type="v")


def test_offset_noise_widens_only_the_channel_means() -> None:
    eps, channel = _randn(4000, 2, 4, 4, seed=1), _randn(4000, 2, 1, 1, seed=2)
    noise = offset_noise(eps, channel, strength=0.5)
    torch.testing.assert_close(
        noise - noise.mean((2, 3), keepdim=True), eps - eps.mean((2, 3), keepdim=True)
    )
    means = noise.mean((2, 3)).flatten()
    assert float(means.var()) == pytest.approx(1 / 16 + 0.25, rel=4 * (2 / len(means)) ** 0.5)


def test_input_perturbation_makes_the_noise_longer_by_the_stated_amount() -> None:
    """xt of Ning et al. 2023 is q_sample with noise eps + strength * xi."""
    schedule, t = _schedule(), torch.tensor([0, 500, 999])
    x0, eps, xi = (_randn(3, 8, seed=s) for s in (1, 2, 3))
    xt = q_sample(schedule, x0, t, eps)
    torch.testing.assert_close(
        perturb_input(schedule, xt, t, xi, strength=0.1),
        q_sample(schedule, x0, t, eps + 0.1 * xi),
    )


def test_loss_never_waits_for_the_device() -> None:
    """On the meta device there are no values: looking at one, as a wait would, is an error."""
    schedule = _schedule(zero_snr=True).to("meta")
    x0, eps = torch.empty(2, 8, 4, 4, device="meta").chunk(2, 1)
    t = torch.empty(2, dtype=torch.int64, device="meta")
    xt = perturb_input(schedule, q_sample(schedule, x0, t, eps), t, eps, strength=0.1)
    truth = target(schedule, x0, eps, t, prediction_type="v_prediction")
    loss = per_sample_loss(xt, truth, huber_delta=0.1, mask=torch.empty(2, 1, 4, 4, device="meta"))
    for weighting in ("none", *LOSS_WEIGHTINGS):
        weights = loss_weights(schedule, t, prediction_type="v_prediction", weighting=weighting)
        assert (weights * loss).device.type == "meta"
    output = torch.cat([xt, xt], 1)
    loss = hybrid_loss(schedule, output, x0, xt, t, eps=eps, prediction_type="v_prediction")
    assert loss.shape == (2,)


# --- Learned variance ---


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_hybrid_loss_stops_its_gradient_at_the_mean(prediction_type: str) -> None:
    schedule, t = _schedule_of(prediction_type), torch.tensor([0, 1, 400, 999])
    x0, eps = _randn(4, 3, seed=1), _randn(4, 3, seed=2)
    xt = q_sample(schedule, x0, t, eps)
    prediction = _randn(4, 3, seed=3).requires_grad_()
    place = (0.3 * _randn(4, 3, seed=4)).requires_grad_()
    loss = hybrid_loss(
        schedule,
        torch.cat([prediction, place], 1),
        x0,
        xt,
        t,
        eps=eps,
        prediction_type=prediction_type,
    )
    truth = target(schedule, x0, eps, t, prediction_type=prediction_type)
    simple = per_sample_loss(prediction, truth)
    bits = bound_term(
        schedule,
        torch.cat([prediction, place], 1),
        x0,
        xt,
        t,
        prediction_type=prediction_type,
        variance_type="learned_range",
    ).bits
    torch.testing.assert_close(loss, simple + 0.001 * T * bits.float())
    got = torch.autograd.grad(loss.sum(), [prediction, place])
    (of_simple,) = torch.autograd.grad(simple.sum(), prediction)
    (of_bound,) = torch.autograd.grad(0.001 * T * bits.sum(), place)
    torch.testing.assert_close(got[0], of_simple)
    torch.testing.assert_close(got[1], of_bound, rtol=1e-5, atol=1e-9)
    assert bool((got[1] != 0).all())


def test_trained_variance_becomes_the_true_one() -> None:
    """Data N(0, 0.3): Adam on the variance alone finds log Var q(x_{t-1} | xt) at every step."""
    schedule = Schedule.from_betas(make_betas("linear", 6, beta_start=0.05, beta_end=0.5))
    abar, c = schedule.alphas_cumprod, 0.3
    v = abar * c + 1 - abar
    before = torch.cat([torch.tensor([c], dtype=torch.float64), v[:-1]])
    true = (schedule.betas * before / v).log()
    place = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([place], lr=0.05)
    t = torch.arange(6).repeat(2000)
    x0, eps = c**0.5 * _randn(12_000, 1, seed=1), _randn(12_000, 1, seed=2)
    xt = q_sample(schedule, x0, t, eps)
    exact = abar[t, None].sqrt() * c / v[t, None] * xt
    for _ in range(200):
        output = torch.cat([exact, place[t, None]], 1)
        loss = variance_loss(schedule, output, x0, xt, t, prediction_type="sample").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    small, large = schedule.log_variance_small, schedule.log_variance_large
    learned = torch.lerp(small, large, (place.detach() + 1) / 2)
    assert float((learned - true).abs().max()) < 0.05
    assert float((small - true).abs().max()) > 0.3  # neither fixed one is right everywhere
    assert float((large - true).abs().max()) > 0.05


def test_fixed_variance_has_no_hybrid_loss() -> None:
    x, t = _randn(1, 3), torch.tensor([4])
    with pytest.raises(ValueError, match="3 channels"):
        hybrid_loss(_schedule(), x, x, x, t, eps=x, prediction_type="epsilon")
