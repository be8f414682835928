"""Intervals: they follow their definitions, and hold the truth as often as they promise."""

import warnings
from statistics import NormalDist

import numpy as np
import pytest
import torch

from latentdiff.evaluation.metrics import bootstrap as module
from latentdiff.evaluation.metrics.bootstrap import bootstrap_difference, bootstrap_mean, proportion

RNG = np.random.default_rng(0)
SKEWED = RNG.lognormal(0, 0.8, 60)
NUM_CASES = 400
SAMPLERS = {
    "normal": (lambda rng: rng.normal(2, 3, 50), 2.0),
    "uniform": (lambda rng: rng.uniform(0, 1, 40), 0.5),
    "skewed": (lambda rng: rng.gamma(2.0, 1.0, 100), 2.0),
    "yes or no": (lambda rng: (rng.random(100) < 0.3).astype(float), 0.3),
}


def ends(interval) -> tuple[float, float]:
    return interval.low, interval.high


def test_a_mean_s_interval_is_efron_s_bca_on_the_same_resamples():
    """Efron 1987, Eqs. 2.3 and 6.6, with the jackknife's acceleration in closed form."""
    resamples = np.random.default_rng(5).integers(60, size=(2000, 60))
    means = SKEWED[resamples].mean(1)
    below = ((means < SKEWED.mean()).mean() + (means <= SKEWED.mean()).mean()) / 2
    influence = SKEWED - SKEWED.mean()
    a = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    z0, normal = NormalDist().inv_cdf(below), NormalDist()
    z = [z0 + normal.inv_cdf(tail) for tail in (0.025, 0.975)]
    expected = np.quantile(means, [normal.cdf(z0 + one / (1 - a * one)) for one in z])
    interval = bootstrap_mean(SKEWED, seed=5)
    assert ends(interval) == pytest.approx(tuple(expected), rel=1e-12)
    assert interval.estimate == pytest.approx(SKEWED.mean())
    assert (interval.num_samples, interval.level) == (60, 0.95)


@pytest.mark.parametrize("case", SAMPLERS)
def test_an_interval_for_a_mean_holds_the_truth_in_95_percent_of_cases(case):
    sample, truth = SAMPLERS[case]
    rng = np.random.default_rng(7)
    intervals = [bootstrap_mean(sample(rng), num_resamples=1000, seed=i) for i in range(NUM_CASES)]
    assert np.mean([one.contains(truth) for one in intervals]) == pytest.approx(0.95, abs=0.03)


def test_a_lower_level_holds_the_truth_less_often():
    rng = np.random.default_rng(8)
    cases = [rng.normal(size=50) for _ in range(NUM_CASES)]
    held = [bootstrap_mean(case, level=0.8, num_resamples=1000).contains(0) for case in cases]
    assert np.mean(held) == pytest.approx(0.8, abs=0.05)


def test_a_paired_difference_is_the_mean_of_differences_and_narrower():
    hardness = RNG.normal(0, 5, 80)
    a, b = hardness + RNG.normal(0.5, 0.3, 80), hardness + RNG.normal(0, 0.3, 80)
    paired = bootstrap_difference(torch.from_numpy(a), list(b), seed=3)
    assert paired == bootstrap_mean(a - b, seed=3)
    alone = bootstrap_mean(a)
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    assert paired.contains(0.5)
    assert not paired.contains(0)


def test_the_interval_moves_and_stretches_with_its_values():
    once = np.array(ends(bootstrap_mean(SKEWED)))
    assert ends(bootstrap_mean(3 * SKEWED - 2)) == pytest.approx(tuple(3 * once - 2))


def test_the_same_seed_gives_the_same_interval_in_chunks_or_at_once(monkeypatch):
    once = bootstrap_mean(SKEWED, num_resamples=500)
    assert bootstrap_mean(SKEWED, num_resamples=500) == once
    assert bootstrap_mean(SKEWED, num_resamples=500, seed=1) != once
    monkeypatch.setattr(module, "CHUNK_VALUES", 60 * 7)
    assert bootstrap_mean(SKEWED, num_resamples=500) == once


@pytest.mark.parametrize("values", [[2.0] * 9, [0.0] * 3, [0.3] * 5 + [0.3 + 5.6e-17], [0.1] * 7])
def test_values_that_are_all_alike_have_no_width(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interval = bootstrap_mean(values)
    assert ends(interval) == pytest.approx((values[0], values[0]), abs=1e-15)
    assert interval.contains(interval.estimate)


@pytest.mark.parametrize(("yes", "of"), [(0, 20), (7, 20), (64, 64), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_a_proportion_has_wilson_s_interval(yes, of, level):
    """Its ends are where the normal test of p with p's own variance is just not refused."""
    interval = proportion(yes, of, level=level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    for p in ends(interval):
        assert abs(yes / of - p) == pytest.approx(z * (p * (1 - p) / of) ** 0.5, abs=1e-9)
    assert interval.contains(interval.estimate)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([1.0]), "N of 2 or more"),
        (lambda: bootstrap_mean([1.0, float("nan")]), "1 of 2 values are not finite"),
        (lambda: bootstrap_mean([1.0, 2.0], level=95), "level is 95"),
        (lambda: bootstrap_mean([1.0, 2.0], num_resamples=20), "num_resamples is 20"),
        (lambda: bootstrap_mean(np.ones((3, 2))), r"needs values \(N,\)"),
        (lambda: bootstrap_difference([1.0, 2.0], [1.0]), "not paired"),
        (lambda: proportion(3, 2), "3 of 2 answers"),
        (lambda: proportion(0, 0), "0 of 0 answers"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
