"""Score, SDE, probability flow and its likelihood, where all of them are known."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from fakes_diffusion import Mixture, gaussian, three_blobs
from torch import Tensor

from latentdiff.diffusion.bound import TimestepPlan, estimate, evaluate_bound
from latentdiff.diffusion.ddpm import p_sample_loop
from latentdiff.diffusion.prediction import DDPM_TYPES
from latentdiff.diffusion.schedules import (
    Schedule,
    log_snr,
    make_betas,
    rescale_zero_terminal_snr,
    respace,
    space_timesteps,
)
from latentdiff.diffusion.theory.continuous_time import (
    angle_at,
    angle_of_log_snr,
    angles,
    flow_bits,
    flow_log_prob,
    predictor_corrector,
    probability_flow,
    rademacher,
    score,
    timestep_at,
    vp_sde,
)

MEAN, VARIANCE = 0.6, 0.25


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


def _schedule(num_timesteps: int = 1000, *, zero_snr: bool = False) -> Schedule:
    betas = make_betas("scaled_linear", num_timesteps)
    return Schedule.from_betas(rescale_zero_terminal_snr(betas) if zero_snr else betas)


def test_score_is_the_gradient_of_the_log_density() -> None:
    world, schedule, t = three_blobs(), _schedule(), torch.tensor([0, 3, 200, 999])
    xt = _randn(4, 2).requires_grad_()
    world.log_prob(xt, schedule.alphas_cumprod[t]).sum().backward()
    eps = world.model(schedule, "epsilon")(xt.detach(), t)
    assert xt.grad is not None
    torch.testing.assert_close(score(schedule, eps, t), xt.grad, rtol=1e-6, atol=1e-8)


def test_sde_moves_the_marginal_variance_as_the_chain_does() -> None:
    """d variance / d phi = 2 f variance + g^2 (Särkkä & Solin 2019, Eq. 5.51)."""
    phi = torch.linspace(0.01, 1.55, 50, dtype=torch.float64, requires_grad=True)
    variance = phi.cos().square() * VARIANCE + phi.sin().square()
    (slope,) = torch.autograd.grad(variance.sum(), phi)
    f, g = vp_sde(phi)
    torch.testing.assert_close(slope, 2 * f * variance + g.square())


def test_sde_integrates_to_the_betas_of_the_chain() -> None:
    """The integral of beta(phi) over one step is -log(1 - beta_t)."""
    schedule = _schedule()
    phi = angles(schedule)
    places = torch.lerp(phi[:-1, None], phi[1:, None], torch.linspace(0, 1, 201).double())
    beta = vp_sde(places)[1].square()
    integral = torch.trapezoid(beta, places, dim=1)
    torch.testing.assert_close(integral, -schedule.alphas[1:].log(), rtol=1e-5, atol=0)


def test_angles_and_timesteps_are_inverse_and_meet_the_table() -> None:
    schedule = respace(_schedule(zero_snr=True), space_timesteps("50", 1000))
    timesteps = schedule.timesteps.double()
    torch.testing.assert_close(angle_at(schedule, timesteps), angles(schedule))
    between = torch.linspace(0, 999, 333, dtype=torch.float64)
    torch.testing.assert_close(timestep_at(schedule, angle_at(schedule, between)), between)
    torch.testing.assert_close(angle_of_log_snr(log_snr(schedule.alphas_cumprod)), angles(schedule))
    assert float(angles(schedule)[-1]) == pytest.approx(math.pi / 2)


def _exact_flow(schedule: Schedule, world: Mixture) -> tuple[Tensor, Tensor]:
    """The map x = shift + scale noise from the last step to the first, for one Gaussian."""
    phi = angles(schedule)[[0, -1], None]
    centre = phi.cos() * world.means
    std = (phi.cos().square() * world.variances + phi.sin().square()).sqrt()
    scale = std[0] / std[1]
    return centre[0] - scale * centre[1], scale


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [(name, False) for name in DDPM_TYPES] + [("v_prediction", True), ("sample", True)],
)
def test_flow_carries_gaussian_noise_to_gaussian_data_exactly(
    prediction_type: str, zero_snr: bool
) -> None:
    """The flow of one Gaussian is known: x keeps its place in standard deviations from the mean."""
    schedule = _schedule(zero_snr=zero_snr)
    world, noise = gaussian([MEAN, -MEAN], [VARIANCE, 1.5]), _randn(50, 2)
    shift, scale = _exact_flow(schedule, world)
    expected = shift + scale * noise
    x = probability_flow(
        schedule,
        world.model(schedule, prediction_type),
        noise,
        prediction_type=prediction_type,
        num_steps=60,
    )
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-4)


def test_flow_there_and_back_is_the_identity() -> None:
    schedule, world = _schedule(), three_blobs()
    model, x = world.model(schedule, "v_prediction"), world.sample(50, _generator())
    noise = probability_flow(
        schedule, model, x, prediction_type="v_prediction", num_steps=200, to_noise=True
    )
    back = probability_flow(schedule, model, noise, prediction_type="v_prediction", num_steps=200)
    assert float((noise - x).abs().max()) > 0.5
    torch.testing.assert_close(back, x, rtol=0, atol=2e-3)


def test_flow_refuses_epsilon_with_zero_terminal_snr() -> None:
    with pytest.raises(ValueError, match="v_prediction"):
        probability_flow(
            _schedule(10, zero_snr=True), lambda x, t: x, _randn(1, 1), prediction_type="epsilon"
        )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_flow_likelihood_of_a_gaussian_is_exact(prediction_type: str) -> None:
    """The Jacobian is diagonal, and there every probe of +-1 gives the trace without error."""
    schedule, world = _schedule(zero_snr=True), gaussian([MEAN, -MEAN], [VARIANCE, 1.5])
    x = _randn(20, 2)
    log_p = flow_log_prob(
        schedule,
        world.model(schedule, prediction_type),
        x,
        probes=rademacher(x, 2, generator=_generator(1)),
        prediction_type=prediction_type,
        num_steps=60,
    )
    exact = world.log_prob(x, schedule.alphas_cumprod[:1].expand(20))
    torch.testing.assert_close(log_p, exact[:, None].expand(20, 2), rtol=0, atol=2e-3)


def test_flow_likelihood_of_a_mixture_is_within_its_error_bar() -> None:
    schedule, world = _schedule(zero_snr=True), three_blobs()
    x = world.sample(40, _generator()) + 0.05
    log_p = flow_log_prob(
        schedule,
        world.model(schedule, "v_prediction"),
        x,
        probes=rademacher(x, 24, generator=_generator(1)),
        prediction_type="v_prediction",
        num_steps=80,
    )
    exact = world.log_prob(x, schedule.alphas_cumprod[:1].expand(40))
    result = estimate(log_p - exact[:, None])
    assert 0 < result.se_noise < 0.02
    assert abs(result.mean) < 4 * result.se_noise + 2e-3
    error = log_p.mean(1) - exact
    bar = log_p.std(1) / 24**0.5
    assert float((error.abs() < 4 * bar + 5e-3).double().mean()) >= 0.95


def test_flow_bits_of_clean_data_meet_the_entropy() -> None:
    schedule, world = _schedule(zero_snr=True), gaussian([MEAN, 0.0], [VARIANCE, 1.5])
    x0 = world.sample(3000, _generator())
    bits = flow_bits(
        schedule,
        world.model(schedule, "v_prediction"),
        x0,
        generator=_generator(1),
        prediction_type="v_prediction",
        variance_type="fixed_large",
        num_steps=40,
    )
    own = -world.log_prob(x0, torch.ones(3000)) / 2 / math.log(2)
    gap = estimate(bits - own[:, None])  # of the same images: the noise is left
    assert gap.se_images < 0.01
    assert abs(gap.mean) < 4 * gap.se_images + 2e-3


@pytest.mark.parametrize("zero_snr", [False, True])
def test_diffusers_ddim_with_the_exact_denoiser_passes_a_moment_test(zero_snr: bool) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(200)
    schedule = _schedule(zero_snr=zero_snr)
    world, n = gaussian([MEAN], [VARIANCE]), 10_000
    model, xt = world.model(schedule, "v_prediction"), _randn(10_000, 1)
    for t in scheduler.timesteps:
        xt = scheduler.step(model(xt, t.expand(n)), t, xt).prev_sample
    mean, std = (float(x) for x in _exact_flow(schedule, world))
    # without zero terminal SNR the mean is off by what N(0, 1) lacks of q(x_T): known, so no slack
    assert abs(float(xt.mean()) - mean) < 4 * std / n**0.5
    assert abs(float(xt.std()) / std - 1) < 4 / (2 * n) ** 0.5 + 0.005


def test_corrections_widen_what_a_short_chain_narrows() -> None:
    """Short chains of fixed_small are too narrow; Langevin steps widen them."""
    schedule = respace(_schedule(), space_timesteps("10", 1000))
    world = gaussian([MEAN] * 64, [VARIANCE] * 64)
    model, xt = world.model(schedule, "epsilon"), _randn(400, 64)
    plain = p_sample_loop(schedule, model, xt, generator=_generator(1), prediction_type="epsilon")
    corrected = predictor_corrector(
        schedule,
        model,
        xt,
        generator=_generator(1),
        prediction_type="epsilon",
        num_corrections=10,
    )
    std = VARIANCE**0.5
    assert float(plain.std()) < 0.9 * std
    assert abs(float(corrected.std()) / std - 1) < 0.05
    assert abs(float(corrected.mean()) - MEAN) < 0.02
    none = predictor_corrector(
        schedule,
        model,
        xt,
        generator=_generator(1),
        prediction_type="epsilon",
        num_corrections=0,
    )
    assert torch.equal(none, plain)


def test_a_conditional_unet_is_asked_through_a_closure() -> None:
    """The contract of every function here: model(xt, t), real timesteps, float32 latents."""
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    states, z0 = torch.randn(2, 3, 8), torch.randn(2, 4, 4, 4)

    def model(xt: Tensor, t: Tensor) -> Tensor:
        return unet(xt, t, encoder_hidden_states=states).sample

    schedule = _schedule(zero_snr=True)
    bits = flow_bits(
        schedule,
        model,
        z0,
        generator=_generator(),
        prediction_type="v_prediction",
        num_steps=3,
    )
    samples = evaluate_bound(
        schedule,
        model,
        z0,
        generator=_generator(),
        prediction_type="v_prediction",
        plan=TimestepPlan.uniform(1000, num_draws=3),
    )
    assert bits.shape == samples.total().shape == (2, 2)
    assert bool(bits.isfinite().all())
    assert bool(samples.total().isfinite().all())
    assert all(p.grad is None for p in unet.parameters())
