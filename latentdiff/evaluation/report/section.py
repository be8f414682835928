"""What a part of the evaluation hands over: figures for metrics.json, and what the report shows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from latentdiff.evaluation.metrics.bootstrap import Interval, bootstrap_mean, proportion


@dataclass(frozen=True)
class Row:
    """A line of a table: a figure with its interval, or words."""

    label: str
    value: Interval | str
    note: str = ""
    is_share: bool = False  # of a whole, shown in percent


@dataclass(frozen=True)
class LabelledImage:
    """An image and what stands under it."""

    image: Image.Image
    label: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One part of the evaluation. `figures` holds JSON values.

    The first row is what stands at the page's top, unless there is no headline.
    """

    name: str  # in metrics.json
    title: str
    figures: dict[str, Any]
    rows: Sequence[Row] = ()
    notes: Sequence[str] = ()
    groups: Sequence[Sequence[LabelledImage]] = ()  # images that belong side by side
    plots: Sequence[Path] = ()
    has_headline: bool = True


@dataclass(frozen=True, eq=False)
class Score:
    """A measure of N independent things, prompts or images, by which models are compared."""

    name: str
    values: Tensor  # (N,)
    higher_is_better: bool


def plain_interval(value: Interval) -> dict[str, Any]:
    """Return an interval as JSON values."""
    return asdict(value)


def share_by_caption(answers: Tensor) -> Interval:
    """Estimate how often images of M captions do something. answers: (M, K) bool.

    Images of one caption are alike, so the captions are what is sampled; where all of them agree,
    the interval is that of M answers.
    """
    if len(answers) == 1:
        return proportion(int(answers.sum()), answers.numel())
    shares = answers.double().mean(1)
    if answers.shape[1] == 1 or bool((shares == shares[0]).all() and shares[0] in (0, 1)):
        return proportion(int(shares.sum()), len(shares))
    return bootstrap_mean(shares)
