"""Intervals for figures estimated from samples: bootstrap, Student's, Wilson's and the normal one.

The bootstrap (Efron 1979) resamples the values with replacement and takes the interval from the
figures of the resamples; BCa corrects for bias and skewness (Efron 1987, "Better bootstrap
confidence intervals"). A statistic that compares points with each other (KID, nearest neighbours)
is misled by the duplicates in a resample: fd_kid.py has its own ways.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import stats
from torch import Tensor

Values = np.ndarray | Tensor | Sequence[float]
CHUNK_VALUES = 2**22  # resampled values held at once
CONSTANT = 1e-12  # values whose range is this small a part of them differ by rounding alone


@dataclass(frozen=True)
class Interval:
    """An estimate from num_samples samples, and the bounds that hold the truth at `level`."""

    estimate: float
    low: float
    high: float
    level: float
    num_samples: int

    def contains(self, value: float) -> bool:
        """Tell whether a value is compatible with the samples."""
        return self.low <= value <= self.high


def bootstrap_mean(
    values: Values, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Estimate the mean of the distribution of values (N,), with its BCa interval.

    Raises ValueError for fewer than 2 values, values that are not finite, or bad settings. For
    fractions of N yes-or-no answers use `proportion`, whose interval has a width even where all
    answers are alike.
    """
    x = _checked(values, level=level, num_resamples=num_resamples)
    mean = float(x.mean())
    if np.ptp(x) <= CONSTANT * np.abs(x).max():  # BCa's acceleration would be 0 / 0
        return Interval(mean, mean, mean, level, len(x))
    result = stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=num_resamples,
        batch=max(1, CHUNK_VALUES // len(x)),
        confidence_level=level,
        rng=np.random.default_rng(seed),
    )
    low, high = map(float, result.confidence_interval)
    return Interval(mean, low, high, level, len(x))


def bootstrap_difference(
    a: Values, b: Values, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Estimate the mean of a - b, where a[i] and b[i] (N,) were measured on the same thing.

    The difficulty that both share cancels, so the interval is narrower than those of a and b apart.
    Raises ValueError for unequal lengths, and as `bootstrap_mean` does.
    """
    first, second = _numbers(a), _numbers(b)
    if first.shape != second.shape:
        raise ValueError(
            f"a {first.shape} and b {second.shape} are not paired; "
            "give one value of each for the same prompts and seeds, in the same order"
        )
    return bootstrap_mean(first - second, level=level, num_resamples=num_resamples, seed=seed)


def student_difference(a: Values, b: Values, *, level: float = 0.95) -> Interval:
    """Estimate the mean of a - b, paired as in `bootstrap_difference`, with Student's interval.

    Exact for normal differences; for fewer than ten pairs, of which bootstrap intervals are too
    narrow. Raises ValueError for unequal lengths, fewer than 2 pairs or values that are not finite.
    """
    first, second = _numbers(a), _numbers(b)
    if first.shape != second.shape:
        raise ValueError(f"a {first.shape} and b {second.shape} are not paired")
    x = _checked(first - second, level=level, num_resamples=100)
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half), level, len(x))


def proportion(num_yes: int, num_samples: int, *, level: float = 0.95) -> Interval:
    """Estimate a probability from yes-or-no answers (Wilson 1927): 64 of 64 is not certainty."""
    if not 0 <= num_yes <= num_samples or num_samples == 0:
        raise ValueError(f"got {num_yes} of {num_samples} answers; expected 0 <= yes <= samples")
    _check_level(level)
    bounds = stats.binomtest(num_yes, num_samples).proportion_ci(level, method="wilson")
    return Interval(
        num_yes / num_samples, float(bounds.low), float(bounds.high), level, num_samples
    )


def normal_interval(estimate: float, se: float, *, level: float, num_samples: int) -> Interval:
    """Return estimate +- z standard errors."""
    _check_level(level)
    half = NormalDist().inv_cdf((1 + level) / 2) * se
    return Interval(estimate, estimate - half, estimate + half, level, num_samples)


def _numbers(values: Values) -> np.ndarray:
    on_cpu = values.detach().cpu().double() if isinstance(values, Tensor) else values
    return np.asarray(on_cpu, np.float64)


def _checked(values: Values, *, level: float, num_resamples: int) -> np.ndarray:
    """Return the values as float64, or raise ValueError for them or for the settings."""
    numbers = _numbers(values)
    _check_level(level)
    if num_resamples < 100:
        raise ValueError(f"num_resamples is {num_resamples}; 100 are too few for an interval's end")
    if numbers.ndim != 1 or len(numbers) < 2:
        raise ValueError(f"an interval needs values (N,), N of 2 or more, got {numbers.shape}")
    if not np.isfinite(numbers).all():
        bad = int((~np.isfinite(numbers)).sum())
        raise ValueError(f"{bad} of {numbers.size} values are not finite; exclude them knowingly")
    return numbers


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a probability between 0 and 1, such as 0.95")
