"""One part of the evaluation: figures for metrics.json, rows and images for the report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.evaluation.metrics.bootstrap import Interval, bootstrap_mean, proportion


@dataclass(frozen=True)
class ReportRow:
    """A line of a table: a figure with its interval, or text."""

    label: str
    value: Interval | str
    note: str = ""
    is_share: bool = False  # of a whole, shown in percent


@dataclass(frozen=True)
class LabelledImage:
    """An image with its label and note."""

    image: Image.Image
    label: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the evaluation. `figures` holds JSON values.

    The first row appears at the top of the page, unless the section has no headline.
    """

    name: str  # in metrics.json
    title: str
    figures: dict[str, Any]
    rows: Sequence[ReportRow] = ()
    notes: Sequence[str] = ()
    groups: Sequence[Sequence[LabelledImage]] = ()  # images that belong side by side
    plots: Sequence[Path] = ()
    has_headline: bool = True


@dataclass(frozen=True, eq=False)
class PairedScore:
    """The values of N independent prompts or images, by which models are compared."""

    name: str
    values: Tensor  # (N,)
    higher_is_better: bool


def interval_json(value: Interval) -> dict[str, Any]:
    """Return an interval as JSON values."""
    return asdict(value)


def row_value(estimate: dict[str, Any], num_samples: int) -> Interval | str:
    """Read an estimate of vlb.to_json as an interval, or as text where it has none."""
    if estimate["interval_95"] is None:
        return f"{estimate['mean']:.4g}"
    low, high = estimate["interval_95"]
    return Interval(estimate["mean"], low, high, 0.95, num_samples)


def share_by_caption(answers: Tensor) -> Interval:
    """Estimate the share of true answers over the images of M captions. answers: (M, K) bool.

    Images of one caption are alike, so the interval is over captions; where all of them agree, it
    is the interval of M answers.
    """
    if len(answers) == 1:
        return proportion(int(answers.sum()), answers.numel())
    shares = answers.double().mean(1)
    if answers.shape[1] == 1 or bool((shares == shares[0]).all() and shares[0] in (0, 1)):
        return proportion(int(shares.sum()), len(shares))
    return bootstrap_mean(shares)


def derangement(num: int, *, seed: int) -> Tensor:
    """Return a random cycle through num >= 2 indices, (num,) int64: no index maps to itself."""
    circle = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(circle)
    other[circle] = circle.roll(1)
    return other
