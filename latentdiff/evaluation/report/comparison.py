"""Is one model better than another? Their scores on the same captions and seeds, pair by pair."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from latentdiff.evaluation.generate import GeneratedImages
from latentdiff.evaluation.metrics.bootstrap import Interval, Values, bootstrap_difference
from latentdiff.evaluation.report.section import (
    LabelledImage,
    PairedScore,
    ReportRow,
    Section,
    interval_json,
)
from latentdiff.image_grid import to_pil

NUM_SHOWN = 12
MIN_PAIRS = 10  # with fewer, bootstrap intervals are too narrow


def comparison_section(
    name: str,
    first: Mapping[str, PairedScore],
    second: Mapping[str, PairedScore],
    *,
    images: tuple[GeneratedImages, GeneratedImages] | None,
    skipped: Mapping[str, str],
) -> Section:
    """Compare the first model's scores with those of the second, which is called `name`.

    skipped: why a score cannot be compared, by its key.
    """
    figures: dict[str, Any] = {"other": name, "left_out": dict(skipped)}
    rows = []
    for key, score in first.items():
        if key in skipped or key not in second:
            continue
        result = compare(score.values, second[key].values, higher_is_better=score.higher_is_better)
        figures[key] = asdict(result) | {"difference": interval_json(result.difference)}
        note = f"{result.num_wins} won, {result.num_losses} lost of {len(score.values)}"
        better = "more" if score.higher_is_better else "less"
        label = f"Against the other, {score.name}: {result.verdict}"
        rows.append(ReportRow(label, result.difference, f"{note}; {better} is better"))
    notes = [
        f"This model less {name}, pair by pair on the same captions, seeds, timesteps and noise. "
        "“Cannot tell” where the interval holds 0, or where there are fewer than "
        f"{MIN_PAIRS} pairs."
    ]
    notes += [f"Not compared: {key}, because {why}." for key, why in skipped.items()]
    groups = [] if images is None else _pairs(*images)
    return Section("compare", f"Against {name}", figures, rows, notes, groups)


def _pairs(first: GeneratedImages, second: GeneratedImages) -> list[list[LabelledImage]]:
    count = len(first.captions)
    indices = sorted({round(i * (count - 1) / (NUM_SHOWN - 1)) for i in range(NUM_SHOWN)})
    return [
        [
            LabelledImage(to_pil(generated.bytes[m, 0]), first.captions[m], label)
            for generated, label in ((first, "this model"), (second, "the other"))
        ]
        for m in indices
    ]


@dataclass(frozen=True)
class Comparison:
    """The verdict on the first model: "better", "worse" or "cannot tell"."""

    verdict: str
    difference: Interval  # first less second, in the score's unit
    num_wins: int  # pairs where the first is strictly better
    num_losses: int

    def __str__(self) -> str:
        """Return the verdict with its figures."""
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
