"""Which samples are copies of training images, by their features.

A sample is suspicious if its nearest training image is far nearer than the training images
around it (after Carlini et al. 2023, "Extracting training data from diffusion models"): relative
distances adapt to crowded and to sparse regions. The threshold is calibrated on held-out images,
which cannot be copies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.evaluation.metrics.bootstrap import Interval, proportion
from latentdiff.evaluation.metrics.fd_kid import nearest

QUANTILE = 0.01  # of held-out images: some may have a twin in the training set
MARGIN = 0.5


@dataclass(frozen=True)
class Memorization:
    """The nearest training image of each of N samples, and the rates of copies and false alarms."""

    indices: Tensor  # (N,) int64, the nearest training image
    distances: Tensor  # (N,) to the nearest training image
    scores: Tensor  # (N,) distances as a fraction of the usual distance around there
    is_copy: Tensor  # (N,) bool, scores <= threshold
    threshold: float
    copies: Interval  # the fraction of samples that are copies
    false_alarms: Interval  # the fraction of held-out images that would be called copies


def find_copies(
    samples: Tensor,
    train: Tensor,
    *,
    heldout: Tensor,
    num_neighbours: int = 50,
    level: float = 0.95,
) -> Memorization:
    """Compare samples (N, D) with the training images (M, D), and calibrate on held-out (H, D).

    A copy is at most half as far from its nearest training image, relative to the median of the
    num_neighbours nearest, as all but 1 % of the held-out images are. Copies of images that the
    training set repeats are found as long as less than half of the neighbours are repetitions.
    Raises ValueError for empty or unequal features, or fewer than 3 training images.
    """
    _check(samples, train, heldout)
    unseen, _, _ = relative_distances(heldout, train, num_neighbours=num_neighbours)
    threshold = MARGIN * float(unseen.quantile(QUANTILE))
    scores, distances, indices = relative_distances(samples, train, num_neighbours=num_neighbours)
    is_copy = scores <= threshold
    return Memorization(
        indices,
        distances,
        scores,
        is_copy,
        threshold,
        proportion(int(is_copy.sum()), len(samples), level=level),
        proportion(int((unseen <= threshold).sum()), len(heldout), level=level),
    )


def relative_distances(
    points: Tensor, train: Tensor, *, num_neighbours: int = 50
) -> tuple[Tensor, Tensor, Tensor]:
    """Return relative and plain distances to the nearest training image, and its index. (N,) each.

    Relative to the median distance to the num_neighbours nearest, or to all training images if
    there are fewer; in [0, 1].
    """
    k = min(num_neighbours, len(train))
    distances, indices = nearest(points, train, k=k)
    usual = distances.median(dim=1).values.clamp(min=torch.finfo(distances.dtype).tiny)
    return distances[:, 0] / usual, distances[:, 0], indices[:, 0]


def _check(samples: Tensor, train: Tensor, heldout: Tensor) -> None:
    for name, x, lowest in (
        ("samples", samples, 1),
        ("train", train, 3),
        ("heldout", heldout, 1),
    ):
        if x.ndim != 2 or len(x) < lowest or x.shape[1] != train.shape[1]:
            raise ValueError(
                f"{name} must be features (N, D) with N of {lowest} or more and one D for all, got "
                f"{tuple(x.shape)} next to train {tuple(train.shape)}"
            )
        if not x.isfinite().all():
            raise ValueError(f"{name} holds features that are not finite")
