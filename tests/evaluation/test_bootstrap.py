"""Intervals: they agree with scipy's, and hold the truth as often as they promise."""

import numpy as np
import pytest
import torch
from scipy import stats

from latentdiff.evaluation.metrics import bootstrap as module
from latentdiff.evaluation.metrics.bootstrap import (
    bootstrap,
    bootstrap_difference,
    bootstrap_mean,
    proportion,
)

RNG = np.random.default_rng(0)
SKEWED = RNG.lognormal(0, 0.8, 60)
NUM_CASES = 400
DRAWS = {
    "normal": (lambda rng: rng.normal(2, 3, 50), 2.0),
    "uniform": (lambda rng: rng.uniform(0, 1, 40), 0.5),
    "skewed": (lambda rng: rng.gamma(2.0, 1.0, 100), 2.0),
    "yes or no": (lambda rng: (rng.random(100) < 0.3).astype(float), 0.3),
}


def ends(interval) -> tuple[float, float]:
    return interval.low, interval.high


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_a_mean_s_interval_agrees_with_scipy(method):
    ours = bootstrap_mean(SKEWED, method=method, num_resamples=20_000)
    theirs = stats.bootstrap(
        (SKEWED,), np.mean, n_resamples=20_000, method=method, rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ends(ours) == pytest.approx((theirs.low, theirs.high), abs=0.02 * width)
    assert ours.estimate == pytest.approx(SKEWED.mean())
    assert (ours.num_samples, ours.level) == (60, 0.95)


def test_a_correlation_s_interval_agrees_with_scipy():
    pairs = RNG.normal(size=(40, 2)) @ np.array([[1.0, 0.7], [0.0, 0.6]])

    def correlation(x, y):
        return np.corrcoef(x, y)[0, 1]

    ours = bootstrap(pairs, lambda rows: correlation(*rows.T), num_resamples=6000)
    theirs = stats.bootstrap(
        (pairs[:, 0], pairs[:, 1]),
        correlation,
        paired=True,
        vectorized=False,
        n_resamples=6000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ends(ours) == pytest.approx((theirs.low, theirs.high), abs=0.05 * width)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_any_statistic_and_the_mean_are_one_computation(method):
    general = bootstrap(SKEWED, np.mean, method=method, num_resamples=300, seed=5)
    mean = bootstrap_mean(SKEWED, method=method, num_resamples=300, seed=5)
    assert ends(general) == pytest.approx(ends(mean), rel=1e-12)
    assert general.num_samples == mean.num_samples == 60


@pytest.mark.parametrize("case", DRAWS)
def test_an_interval_for_a_mean_holds_the_truth_in_95_percent_of_cases(case):
    draw, truth = DRAWS[case]
    rng = np.random.default_rng(7)
    intervals = [bootstrap_mean(draw(rng), num_resamples=1000, seed=i) for i in range(NUM_CASES)]
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
    flipped = ends(bootstrap_mean(-SKEWED, method="percentile"))
    assert flipped == pytest.approx(
        tuple(-np.array(ends(bootstrap_mean(SKEWED, method="percentile")))[::-1])
    )


def test_the_same_seed_gives_the_same_interval_in_chunks_or_at_once(monkeypatch):
    once = bootstrap_mean(SKEWED, num_resamples=500)
    assert bootstrap_mean(SKEWED, num_resamples=500) == once
    assert bootstrap_mean(SKEWED, num_resamples=500, seed=1) != once
    monkeypatch.setattr(module, "CHUNK_VALUES", 60 * 7)
    assert bootstrap_mean(SKEWED, num_resamples=500) == once


def test_values_that_are_all_alike_have_no_width():
    assert ends(bootstrap_mean([2.0] * 9)) == (2.0, 2.0)


@pytest.mark.parametrize(("yes", "of"), [(0, 20), (7, 20), (64, 64), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_a_proportion_agrees_with_scipy(yes, of, level):
    theirs = stats.binomtest(yes, of).proportion_ci(level, method="wilson")
    ours = proportion(yes, of, level=level)
    assert ends(ours) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.contains(ours.estimate)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([1.0]), "2 or more samples"),
        (lambda: bootstrap_mean([1.0, float("nan")]), "1 of 2 values are not finite"),
        (lambda: bootstrap_mean([1.0, 2.0], level=95), "level is 95"),
        (lambda: bootstrap_mean([1.0, 2.0], num_resamples=20), "num_resamples is 20"),
        (lambda: bootstrap_mean([1.0, 2.0], method="t"), "unknown method 't'"),
        (lambda: bootstrap_mean(np.ones((3, 2))), r"must be \(N,\)"),
        (lambda: bootstrap_difference([1.0, 2.0], [1.0]), "not paired"),
        (lambda: proportion(3, 2), "3 of 2 answers"),
        (lambda: proportion(0, 0), "0 of 0 answers"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
