"""Which samples are copies of training images, told from features. Nothing is loaded here.

A sample is suspicious if its nearest training image is far nearer than the training images
around it (after Carlini et al. 2023, "Extracting training data from diffusion models"): relative
distances adapt to crowded and to sparse regions. What is far nearer is learned from held-out
images, which cannot be copies.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.evaluation.metrics.bootstrap import Interval, proportion
from latentdiff.evaluation.metrics.fd_kid import nearest

QUANTILE = 0.01  # of held-out images: some may have a twin in the training set
MARGIN = 0.5
THUMBNAIL = 16  # pixels a side


@dataclass(frozen=True)
class Memorisation:
    """What was found for each of N samples, and how far it is to be believed."""

    places: Tensor  # (N,) int64, the nearest training image
    distances: Tensor  # (N,) to it
    scores: Tensor  # (N,) the same as a fraction of the usual distance around there
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
) -> Memorisation:
    """Compare samples (N, D) with the training images (M, D), and calibrate on held-out (H, D).

    A copy is at most half as far from its nearest training image, relative to the median of the
    num_neighbours nearest, as all but 1 % of the held-out images are. Copies of images that the
    training set repeats are found as long as less than half of the neighbours are repetitions.
    Raises ValueError for empty or unequal features, or fewer than 3 training images.
    """
    _check(samples, train, heldout)
    unseen, _, _ = relative_distances(heldout, train, num_neighbours=num_neighbours)
    threshold = MARGIN * float(unseen.quantile(QUANTILE))
    scores, distances, places = relative_distances(samples, train, num_neighbours=num_neighbours)
    is_copy = scores <= threshold
    return Memorisation(
        places,
        distances,
        scores,
        is_copy,
        threshold,
        proportion(int(is_copy.sum()), len(samples), level=level),
        proportion(int((unseen <= threshold).sum()), len(heldout), level=level),
    )


def thumbnail_features(pixels: Tensor) -> Tensor:
    """Return thumbnails of pixels (B, 3, H, W) in [-1, 1] as features (B, 768) on the CPU.

    The distance of two is the root mean square difference of their values, in [0, 2]. They need no
    network, and find copies and near copies, not images of the same thing.
    """
    small = F.adaptive_avg_pool2d(pixels.float(), THUMBNAIL).flatten(1).cpu()
    return small / small.shape[1] ** 0.5


def relative_distances(
    points: Tensor, train: Tensor, *, num_neighbours: int = 50
) -> tuple[Tensor, Tensor, Tensor]:
    """Return relative and plain distances to the nearest training image, and its place. (N,) all.

    Relative to the median distance to the num_neighbours nearest, or to all if they are fewer; in
    [0, 1].
    """
    k = min(num_neighbours, len(train))
    distances, places = nearest(points, train, k=k)
    usual = distances.median(dim=1).values.clamp(min=torch.finfo(distances.dtype).tiny)
    return distances[:, 0] / usual, distances[:, 0], places[:, 0]


def _check(samples: Tensor, train: Tensor, heldout: Tensor) -> None:
    for name, x, fewest in (
        ("samples", samples, 1),
        ("train", train, 3),
        ("heldout", heldout, 1),
    ):
        if x.ndim != 2 or len(x) < fewest or x.shape[1] != train.shape[1]:
            raise ValueError(
                f"{name} must be features (N, D) with N of {fewest} or more and one D for all, got "
                f"{tuple(x.shape)} beside train {tuple(train.shape)}"
            )
        if not x.isfinite().all():
            raise ValueError(f"{name} holds features that are not finite")
