"""The bound against the closed-form world, where every term is known."""

import math

import pytest
import torch
from fakes_diffusion import Mixture, gaussian, quadrature, three_blobs
from torch import Tensor

from latentdiff.diffusion.bound import (
    BoundSamples,
    TimestepPlan,
    bound_term,
    estimate,
    evaluate_bound,
    per_timestep,
    prior_bits,
)
from latentdiff.diffusion.ddpm import Model, q_sample
from latentdiff.diffusion.schedules import Schedule, make_betas, rescale_zero_terminal_snr

MEAN, VARIANCE = 0.3, 0.8
ENTROPY_BITS = 0.5 * math.log2(2 * math.pi * math.e * VARIANCE)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _marginal_variance(schedule: Schedule) -> Tensor:
    return schedule.alphas_cumprod * VARIANCE + 1 - schedule.alphas_cumprod


def _exact_terms(schedule: Schedule, model: Model, variance_type: str) -> Tensor:
    """E of each term over N(MEAN, VARIANCE) and noise, (T,) bits; exact, being quadratic."""

    def term(step: int, a: Tensor, b: Tensor) -> Tensor:
        x0, t = MEAN + VARIANCE**0.5 * a, torch.full((9,), step)
        xt = q_sample(schedule, x0, t, b)
        return bound_term(
            schedule,
            model(xt, t),
            x0,
            xt,
            t,
            prediction_type="epsilon",
            variance_type=variance_type,
        ).bits

    return torch.stack(
        [
            quadrature(lambda a, b, step=step: term(step, a, b))  # type: ignore[misc]
            for step in range(schedule.num_timesteps)
        ]
    )


def _exact_prior(schedule: Schedule) -> Tensor:
    return quadrature(lambda a, b: prior_bits(schedule, MEAN + VARIANCE**0.5 * a))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_every_term_of_gaussian_data_is_the_analytic_one(variance_type: str) -> None:
    schedule = Schedule.from_betas(make_betas("linear", 50, beta_start=1e-3, beta_end=0.2))
    model = gaussian([MEAN], [VARIANCE]).model(schedule, "epsilon")
    log_v = (
        schedule.log_variance_small
        if variance_type == "fixed_small"
        else schedule.log_variance_large
    )
    uncertainty = VARIANCE * (1 - schedule.alphas_cumprod) / _marginal_variance(schedule)
    v, small = log_v.exp(), schedule.posterior_variance
    kl = 0.5 * (small / v - 1 - (small / v).log()) + (
        schedule.posterior_mean_x0.square() * uncertainty / (2 * v)
    )
    expected = torch.cat(
        [0.5 * ((2 * math.pi * v[:1]).log() + uncertainty[:1] / v[:1]), kl[1:]]
    ) / math.log(2)
    torch.testing.assert_close(
        _exact_terms(schedule, model, variance_type), expected, rtol=1e-9, atol=1e-12
    )


def test_prior_term_is_the_analytic_one() -> None:
    schedule = Schedule.from_betas(make_betas("linear", 50, beta_start=1e-3, beta_end=0.05))
    signal2 = schedule.alphas_cumprod[-1]
    noise2 = 1 - signal2
    expected = 0.5 * (signal2 * (MEAN**2 + VARIANCE) + noise2 - 1 - noise2.log()) / math.log(2)
    torch.testing.assert_close(_exact_prior(schedule), expected)
    assert float(expected) > 0.01


def _exact_reverse(schedule: Schedule) -> Model:
    """The best denoiser and, as learned variance, that of q(x_{t-1} | xt)."""
    denoise, v = (
        gaussian([MEAN], [VARIANCE]).model(schedule, "epsilon"),
        _marginal_variance(schedule),
    )
    before = torch.cat([torch.tensor([VARIANCE], dtype=torch.float64), v[:-1]])
    small, large = schedule.log_variance_small, schedule.log_variance_large
    place = 2 * ((schedule.betas * before / v).log() - small) / (large - small) - 1
    assert bool((place.abs() < 1).all())
    return lambda xt, t: torch.cat([denoise(xt, t), place[t, None]], 1)


@pytest.mark.parametrize("num_timesteps", [4, 16])
def test_with_exact_variance_the_bound_is_tight_at_any_length(num_timesteps: int) -> None:
    """p(x_{t-1}|xt) = q(x_{t-1}|xt) leaves the entropy and KL(q(x_T) || N(0, 1)), nothing else."""
    schedule = Schedule.from_betas(make_betas("linear", num_timesteps, beta_end=0.5))
    terms = _exact_terms(schedule, _exact_reverse(schedule), "learned_range")
    mean2 = schedule.alphas_cumprod[-1] * MEAN**2
    variance = _marginal_variance(schedule)[-1]
    gap = 0.5 * (mean2 + variance - 1 - variance.log()) / math.log(2)
    bound = float(_exact_prior(schedule) + terms.sum())
    assert bound == pytest.approx(ENTROPY_BITS + float(gap), abs=1e-9)


@pytest.mark.parametrize("fixed", ["fixed_small", "fixed_large"])
def test_exact_variance_beats_a_fixed_one_in_every_term(fixed: str) -> None:
    schedule = Schedule.from_betas(make_betas("cosine", 10))
    learned = _exact_terms(schedule, _exact_reverse(schedule), "learned_range")
    denoise = gaussian([MEAN], [VARIANCE]).model(schedule, "epsilon")
    assert bool((learned < _exact_terms(schedule, denoise, fixed)).all())


def test_fixed_variance_bound_meets_the_entropy_as_the_chain_grows() -> None:
    gaps = []
    for num_timesteps in (25, 100, 400):
        schedule = Schedule.from_betas(make_betas("cosine", num_timesteps))
        model = gaussian([MEAN], [VARIANCE]).model(schedule, "epsilon")
        bound = _exact_prior(schedule) + _exact_terms(schedule, model, "fixed_large").sum()
        gaps.append(float(bound) - ENTROPY_BITS)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[2] < 0.01


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("with_plan", [False, True])
def test_evaluated_bound_is_the_analytic_one_within_its_error(
    with_plan: bool, zero_snr: bool
) -> None:
    betas = make_betas("linear", 50, beta_start=1e-3, beta_end=0.2)
    schedule = Schedule.from_betas(rescale_zero_terminal_snr(betas) if zero_snr else betas)
    world = gaussian([MEAN], [VARIANCE])
    exact = _exact_prior(schedule) + _exact_terms_of_v(schedule, world).sum()
    samples = evaluate_bound(
        schedule,
        world.model(schedule, "v_prediction"),
        world.sample(4000, _generator(1)),
        generator=_generator(2),
        prediction_type="v_prediction",
        plan=TimestepPlan.uniform(50, num_draws=8) if with_plan else None,
    )
    total = estimate(samples.total())
    assert abs(total.mean - float(exact)) < 4 * total.se_images
    assert total.se_images < 0.04 * float(exact)
    assert float(samples.prior.mean()) == pytest.approx(float(_exact_prior(schedule)), abs=0.01)
    assert zero_snr == bool((samples.prior == 0).all())


def _exact_terms_of_v(schedule: Schedule, world: Mixture) -> Tensor:
    model = world.model(schedule, "v_prediction")

    def term(step: int, a: Tensor, b: Tensor) -> Tensor:
        x0, t = MEAN + VARIANCE**0.5 * a, torch.full((9,), step)
        xt = q_sample(schedule, x0, t, b)
        return bound_term(schedule, model(xt, t), x0, xt, t, prediction_type="v_prediction").bits

    return torch.stack(
        [
            quadrature(lambda a, b, step=step: term(step, a, b))  # type: ignore[misc]
            for step in range(schedule.num_timesteps)
        ]
    )


def test_bound_of_a_mixture_meets_its_entropy() -> None:
    world, schedule = three_blobs(), Schedule.from_betas(make_betas("cosine", 200))
    x0 = world.sample(4000, _generator(1))
    own_bits = -world.log_prob(x0, torch.ones(len(x0))) / 2 / math.log(2)
    total = evaluate_bound(
        schedule,
        world.model(schedule, "epsilon"),
        x0,
        generator=_generator(2),
        prediction_type="epsilon",
        variance_type="fixed_large",
    ).total()
    gap = estimate(total - own_bits[:, None])  # of the same images: the noise is left
    assert gap.se_images < 0.015
    assert abs(gap.mean) < 4 * gap.se_images


# --- L_0 ---


def _l0(x0: Tensor, mean: float, schedule: Schedule, levels: int | None) -> Tensor:
    t = torch.zeros(len(x0), dtype=torch.int64)
    return bound_term(
        schedule,
        torch.full_like(x0, mean),
        x0,
        torch.zeros_like(x0),
        t,
        prediction_type="sample",
        variance_type="fixed_large",
        levels=levels,
    ).bits


@pytest.mark.parametrize("beta", [1e-4, 0.02, 0.9])
@pytest.mark.parametrize("mean", [-1.2, 0.1, 0.97])
def test_discretised_decoder_is_a_distribution_over_the_levels(beta: float, mean: float) -> None:
    schedule = Schedule.from_betas(torch.tensor([beta, 0.5]))
    x0 = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    assert float((2 ** -_l0(x0, mean, schedule, 256)).sum()) == pytest.approx(1, abs=1e-6)


def test_discretised_decoder_approaches_the_density_times_the_bin() -> None:
    schedule = Schedule.from_betas(torch.tensor([0.05, 0.5]))
    x0 = torch.linspace(-0.5, 0.5, 11, dtype=torch.float64)[:, None]
    x0 = (x0 * 2**15).round() / 2**15
    density, mass = _l0(x0, 0.1, schedule, None), _l0(x0, 0.1, schedule, 2**16 + 1)
    torch.testing.assert_close(mass, density + 15, rtol=1e-6, atol=0)


def test_profile_rate_and_distortion_are_the_analytic_ones() -> None:
    schedule = Schedule.from_betas(make_betas("linear", 30, beta_start=1e-3, beta_end=0.3))
    world = gaussian([MEAN], [VARIANCE])
    model = world.model(schedule, "epsilon")
    x0 = world.sample(6000, _generator(1))
    halves = [
        evaluate_bound(
            schedule, model, half, generator=_generator(2 + i), prediction_type="epsilon"
        )
        for i, half in enumerate(x0.chunk(2))
    ]
    samples = BoundSamples.cat(halves)
    assert samples.total().shape == (6000, 2)
    profile = per_timestep(samples, 30)
    exact = _exact_terms(schedule, model, "fixed_small")
    assert bool(((profile.bits - exact).abs() < 4.5 * profile.se + 1e-9).all())
    uncertainty = VARIANCE * (1 - schedule.alphas_cumprod) / _marginal_variance(schedule)
    torch.testing.assert_close(profile.x0_rmse, uncertainty.sqrt(), rtol=0.05, atol=0)
    assert bool((profile.rate[:-1] > profile.rate[1:]).all())
    torch.testing.assert_close(profile.rate[-1], samples.prior.mean())
    torch.testing.assert_close(profile.rate[0] + profile.bits[0], samples.total().mean())


def test_epsilon_with_zero_terminal_snr_is_refused() -> None:
    schedule = Schedule.from_betas(rescale_zero_terminal_snr(make_betas("linear", 10)))
    with pytest.raises(ValueError, match="v_prediction"):
        evaluate_bound(
            schedule,
            lambda xt, t: xt,
            torch.zeros(1, 1),
            generator=_generator(),
            prediction_type="epsilon",
        )
