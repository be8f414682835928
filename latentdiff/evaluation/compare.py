"""Is one model better than another? Their scores on the same prompts and seeds, pair by pair."""

from dataclasses import dataclass

import numpy as np

from latentdiff.evaluation.bootstrap import Interval, Values, bootstrap_difference

MIN_PAIRS = 10  # fewer say nothing: their bootstrap intervals are too narrow


@dataclass(frozen=True)
class Comparison:
    """The verdict on the first model: "better", "worse" or "cannot tell"."""

    verdict: str
    difference: Interval  # first less second, in the score's unit
    num_wins: int  # pairs where the first is strictly better
    num_losses: int

    def __str__(self) -> str:
        """Say the verdict with the figures it rests on."""
        d = self.difference
        return (
            f"{self.verdict}: {d.estimate:+.4g} [{d.low:+.4g}, {d.high:+.4g}] at {d.level:.0%}, "
            f"{d.num_samples} pairs, {self.num_wins} won, {self.num_losses} lost"
        )


def compare(
    first: Values,
    second: Values,
    *,
    higher_is_better: bool,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two models' scores of the same N independent things, (N,) each in the same order.

    The verdict is "cannot tell" where the interval of the mean difference holds 0, or N is below
    10. Several seeds of one prompt are not independent: average them first, so that N counts
    prompts. Raises ValueError for scores that are not paired or not finite.
    """
    difference = bootstrap_difference(
        first, second, level=level, num_resamples=num_resamples, seed=seed
    )
    gain = 1 if higher_is_better else -1
    signs = gain * np.sign([float(a) - float(b) for a, b in zip(first, second, strict=True)])
    verdict = "cannot tell"
    if difference.num_samples >= MIN_PAIRS and not difference.contains(0):
        verdict = "better" if gain * difference.estimate > 0 else "worse"
    return Comparison(verdict, difference, int((signs > 0).sum()), int((signs < 0).sum()))
