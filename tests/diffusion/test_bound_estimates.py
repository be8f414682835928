"""The bound estimated from few timesteps: unbiased, with honest errors, at little cost."""

import math

import pytest
import torch
from fakes_diffusion import Mixture, gaussian
from torch import Tensor

from latentdiff.diffusion.bound import (
    BoundSamples,
    TimestepPlan,
    difference,
    estimate,
    evaluate_bound,
    per_timestep,
    prior_bits,
)
from latentdiff.diffusion.schedules import Schedule, make_betas

MEAN, VARIANCE = 0.3, 0.8


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_plan_draws_every_step_as_often_as_its_weight_says() -> None:
    p = torch.tensor([0.5, 0.05, 0.15, 0.3], dtype=torch.float64)
    t, weights = TimestepPlan(p, num_draws=3).sample(50_000, generator=_generator())
    assert t.shape == weights.shape == (3, 50_000)
    for step in range(1, 5):
        hits = (weights * (t == step)).sum(0)  # each image's unbiased estimate of 1
        assert float(hits.mean()) == pytest.approx(1, abs=4 * float(hits.std()) / 50_000**0.5)
    # stratified: the middle sample never leaves the middle third of the cumulated probabilities
    assert set(t[1].tolist()) <= {1, 2, 3}


def test_estimate_tells_images_from_noise() -> None:
    images = 3 * torch.randn(2000, 1, generator=_generator(1), dtype=torch.float64)
    noise = 0.5 * torch.randn(2000, 4, generator=_generator(2), dtype=torch.float64)
    result = estimate(images + noise)
    assert result.se_noise == pytest.approx(0.5 / (4 * 2000) ** 0.5, rel=0.05)
    assert result.se_images == pytest.approx((9 + 0.25 / 4) ** 0.5 / 2000**0.5, rel=0.07)
    assert math.isnan(estimate(images).se_noise)


def _exact_bound_given_images(schedule: Schedule, x0: Tensor, variances: Tensor) -> float:
    """The full sum of N(0, diag variances) for these very x0, its noise integrated out."""
    abar = schedule.alphas_cumprod[:, None]
    v = abar * variances + 1 - abar  # (T, D)
    error2 = x0.square().mean(0) * ((1 - abar) / v) ** 2 + abar * variances**2 * (1 - abar) / v**2
    log_p, small = schedule.log_variance_small[:, None], schedule.posterior_variance[:, None]
    ratio = small / log_p.exp()
    gain2 = schedule.posterior_mean_x0.square()[:, None]
    kl = 0.5 * (ratio - 1 - ratio.log() + gain2 * error2 / log_p.exp())
    l0 = 0.5 * (math.log(2 * math.pi) + log_p[0] + error2[0] / log_p[0].exp())
    nats = l0.mean() + kl[1:].mean(1).sum()
    return float(prior_bits(schedule, x0).mean() + nats / math.log(2))


def test_stratified_estimate_covers_the_full_sum_at_a_twentieth_of_its_cost() -> None:
    """1,000 images, T = 1000, 20 seeds: half-width at most 1 %, at least 17 intervals hold it."""
    variances = torch.linspace(0.05, 2, 64, dtype=torch.float64)
    world = gaussian([0.0] * 64, variances.tolist())
    schedule = Schedule.from_betas(make_betas("scaled_linear"))
    exact_model, calls = world.model(schedule, "epsilon"), 0
    x0 = world.sample(1000, _generator(1))

    def model(xt: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += len(xt)
        return exact_model(xt, t)

    def evaluate(x0: Tensor, seed: int, plan: TimestepPlan | None, repeats: int) -> BoundSamples:
        return evaluate_bound(
            schedule,
            model,
            x0,
            generator=_generator(seed),
            prediction_type="epsilon",
            plan=plan,
            repeats=repeats,
        )

    plan = TimestepPlan.from_pilot(evaluate(x0[:12], 0, None, 1), num_draws=17)
    results = [estimate(evaluate(x0, seed, plan, 2).total()) for seed in range(1, 21)]
    pilot = 12 * 1000
    assert pilot + (calls - pilot) / 20 < 0.05 * 1000 * 1000

    full_sum = _exact_bound_given_images(schedule, x0, variances)
    assert max(1.96 * r.se_noise for r in results) <= 0.01 * full_sum
    assert sum(abs(r.mean - full_sum) < 1.96 * r.se_noise for r in results) >= 17


def test_whole_sum_given_images_is_the_exact_one() -> None:
    """The yardstick of the test above, against the plain sum of every term."""
    variances = torch.tensor([0.1, 0.5, 1.5], dtype=torch.float64)
    world = gaussian([0.0] * 3, variances.tolist())
    schedule = Schedule.from_betas(make_betas("linear", 40, beta_start=1e-3, beta_end=0.2))
    x0 = world.sample(3000, _generator(1))
    result = estimate(
        evaluate_bound(
            schedule,
            world.model(schedule, "epsilon"),
            x0,
            generator=_generator(2),
            prediction_type="epsilon",
        ).total()
    )
    exact = _exact_bound_given_images(schedule, x0, variances)
    assert abs(result.mean - exact) < 4 * result.se_noise
    assert result.se_noise < 0.01 * exact


def test_caption_is_worth_its_mutual_information() -> None:
    """Which of two far blobs: one bit for one dimension, seen as a paired difference."""
    schedule = Schedule.from_betas(make_betas("cosine", 100))
    blobs = [gaussian([m], [0.05]) for m in (-1.5, 1.5)]
    both = Mixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[-1.5], [1.5]]), torch.full((2, 1), 0.05)
    )
    differences, apart = [], []
    for seed, blob in enumerate(blobs):
        x0 = blob.sample(500, _generator(seed))
        bounds = [
            evaluate_bound(
                schedule,
                world.model(schedule, "epsilon"),
                x0,
                generator=_generator(9),
                prediction_type="epsilon",
                plan=TimestepPlan.uniform(100, num_draws=20),
            )
            for world in (both, blob)
        ]
        differences.append(difference(*bounds))
        apart.append(estimate(bounds[0].total()).se_images)
    worth = estimate(torch.cat(differences))
    assert worth.mean == pytest.approx(1, abs=4 * worth.se_images + 0.03)
    assert worth.se_images < min(apart) / 2**0.5  # pairing takes noise away


def test_bounds_that_were_not_drawn_alike_are_not_subtracted() -> None:
    world, schedule = gaussian([0.0], [1.0]), Schedule.from_betas(make_betas("cosine", 20))
    a, b = (
        evaluate_bound(
            schedule,
            world.model(schedule, "epsilon"),
            world.sample(4, _generator()),
            generator=_generator(seed),
            prediction_type="epsilon",
            plan=TimestepPlan.uniform(20, num_draws=5),
        )
        for seed in (1, 2)
    )
    with pytest.raises(ValueError, match="same seed"):
        difference(a, b)


def test_rate_from_a_plan_agrees_with_the_whole_sum() -> None:
    schedule = Schedule.from_betas(make_betas("linear", 30, beta_start=1e-3, beta_end=0.3))
    world = gaussian([MEAN], [VARIANCE])
    rates = [
        per_timestep(
            evaluate_bound(
                schedule,
                world.model(schedule, "epsilon"),
                world.sample(4000, _generator(1)),
                generator=_generator(2),
                prediction_type="epsilon",
                plan=plan,
            ),
            30,
        ).rate
        for plan in (None, TimestepPlan.uniform(30, num_draws=6))
    ]
    torch.testing.assert_close(rates[0], rates[1], rtol=0.1, atol=0.01)
