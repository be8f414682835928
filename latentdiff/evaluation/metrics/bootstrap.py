"""Intervals for figures estimated from samples: the bootstrap, and proportions in closed form.

The bootstrap (Efron 1979) redraws the samples with replacement and sees how far the figure moves.
"bca" corrects for bias and skewness (Efron 1987, "Better bootstrap confidence intervals"),
"percentile" does not. A statistic that compares points with each other (KID, nearest neighbours) is
misled by the doubles in a redrawn set: distances.py has its own ways.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from torch import Tensor

Values = np.ndarray | Tensor | Sequence[float]
METHODS = ("bca", "percentile")
NORMAL = NormalDist()
CHUNK_VALUES = 2**22  # resampled values held at once


@dataclass(frozen=True)
class Interval:
    """An estimate from num_samples samples, and where the truth lies with probability `level`."""

    estimate: float
    low: float
    high: float
    level: float
    num_samples: int

    def contains(self, value: float) -> bool:
        """Tell whether a value is compatible with the samples."""
        return self.low <= value <= self.high


def bootstrap_mean(
    values: Values,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    method: str = "bca",
    seed: int = 0,
) -> Interval:
    """Estimate the mean of the distribution that values (N,) are drawn from.

    Raises ValueError for fewer than 2 values, values that are not finite, or bad settings. For
    fractions of N yes-or-no answers use `proportion`, which has a width even where all are alike.
    """
    numbers = _checked(values, level=level, num_resamples=num_resamples, method=method)
    if numbers.ndim != 1:
        raise ValueError(f"values must be (N,), got {numbers.shape}; use bootstrap() for rows")
    places = _resamples(len(numbers), num_resamples, seed=seed)
    means = np.concatenate([numbers[some].mean(axis=1) for some in places])
    left_out = (numbers.sum() - numbers) / (len(numbers) - 1)
    return _interval(
        float(numbers.mean()),
        means,
        left_out,
        level=level,
        method=method,
        num_samples=len(numbers),
    )


def bootstrap_difference(
    a: Values,
    b: Values,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    method: str = "bca",
    seed: int = 0,
) -> Interval:
    """Estimate the mean of a - b, where a[i] and b[i] (N,) were measured on the same thing.

    What makes one thing harder than another cancels, so the interval is narrower than those of a
    and b apart. Raises ValueError for unequal lengths, and as `bootstrap_mean` does.
    """
    first, second = _numbers(a), _numbers(b)
    if first.shape != second.shape:
        raise ValueError(
            f"a {first.shape} and b {second.shape} are not paired; "
            "give one value of each for the same prompts and seeds, in the same order"
        )
    return bootstrap_mean(
        first - second, level=level, num_resamples=num_resamples, method=method, seed=seed
    )


def bootstrap(
    rows: Values,
    statistic: Callable[[np.ndarray], float],
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    method: str = "bca",
    seed: int = 0,
) -> Interval:
    """Estimate any smooth statistic of samples: a ratio, a correlation, a trimmed mean.

    rows: (N, ...) float64, redrawn along the first axis; statistic((N, ...)) -> float. It is called
    num_resamples times, and N times more for "bca". Raises ValueError as `bootstrap_mean` does.
    """
    numbers = _checked(rows, level=level, num_resamples=num_resamples, method=method)
    places = _resamples(len(numbers), num_resamples, seed=seed)
    figures = np.array([statistic(numbers[one]) for some in places for one in some])
    left_out = np.zeros(0)
    if method == "bca":
        left_out = np.array([statistic(np.delete(numbers, i, 0)) for i in range(len(numbers))])
    return _interval(
        float(statistic(numbers)),
        figures,
        left_out,
        level=level,
        method=method,
        num_samples=len(numbers),
    )


def proportion(num_yes: int, num_samples: int, *, level: float = 0.95) -> Interval:
    """Estimate a probability from yes-or-no answers (Wilson 1927): 64 of 64 is not certainty."""
    if not 0 <= num_yes <= num_samples or num_samples == 0:
        raise ValueError(f"got {num_yes} of {num_samples} answers; expected 0 <= yes <= samples")
    _check_level(level)
    z = NORMAL.inv_cdf((1 + level) / 2)
    fraction, spread = num_yes / num_samples, z * z / num_samples
    centre = (fraction + spread / 2) / (1 + spread)
    half = (spread * (fraction * (1 - fraction) + spread / 4)) ** 0.5 / (1 + spread)
    low = 0.0 if num_yes == 0 else centre - half
    high = 1.0 if num_yes == num_samples else centre + half
    return Interval(fraction, low, high, level, num_samples)


def normal_interval(estimate: float, se: float, *, level: float, num_samples: int) -> Interval:
    """Return estimate +- z standard errors."""
    _check_level(level)
    half = NORMAL.inv_cdf((1 + level) / 2) * se
    return Interval(estimate, estimate - half, estimate + half, level, num_samples)


def _interval(
    estimate: float,
    figures: np.ndarray,
    left_out: np.ndarray,
    *,
    level: float,
    method: str,
    num_samples: int,
) -> Interval:
    """Read the interval off the resampled figures (R,); left_out (N,): without one sample each."""
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca" and np.ptp(figures) > 0:
        tails = _bca_tails(tails, estimate, figures, left_out)
    low, high = np.quantile(figures, tails)
    return Interval(estimate, float(low), float(high), level, num_samples)


def _bca_tails(
    tails: np.ndarray, estimate: float, figures: np.ndarray, left_out: np.ndarray
) -> np.ndarray:
    """Move the tails for the bias z0 and the acceleration a (Efron 1987, Eqs. 2.3 and 6.6)."""
    below = ((figures < estimate).mean() + (figures <= estimate).mean()) / 2
    edge = 0.5 / len(figures)
    z0 = NORMAL.inv_cdf(float(np.clip(below, edge, 1 - edge)))
    influence = left_out.mean() - left_out
    square = (influence**2).sum()
    a = (influence**3).sum() / (6 * square**1.5) if square > 0 else 0.0
    z = z0 + np.array([NORMAL.inv_cdf(tail) for tail in tails])
    return np.array([NORMAL.cdf(z0 + each / (1 - a * each)) for each in z])


def _resamples(n: int, num_resamples: int, *, seed: int) -> Iterator[np.ndarray]:
    """Yield the places drawn with replacement, (some, n) int64, num_resamples rows in all."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_VALUES // n)
    for start in range(0, num_resamples, step):
        yield rng.integers(n, size=(min(step, num_resamples - start), n))


def _numbers(values: Values) -> np.ndarray:
    on_cpu = values.detach().cpu().double() if isinstance(values, Tensor) else values
    return np.asarray(on_cpu, np.float64)


def _checked(values: Values, *, level: float, num_resamples: int, method: str) -> np.ndarray:
    """Return the values as float64, or raise ValueError for them or for the settings."""
    numbers = _numbers(values)
    _check_level(level)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if num_resamples < 100:
        raise ValueError(f"num_resamples is {num_resamples}; 100 are too few for an interval's end")
    if numbers.ndim < 1 or len(numbers) < 2:
        raise ValueError(f"an interval needs 2 or more samples, got shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        bad = int((~np.isfinite(numbers)).sum())
        raise ValueError(f"{bad} of {numbers.size} values are not finite; leave them out knowingly")
    return numbers


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a probability between 0 and 1, say 0.95")
