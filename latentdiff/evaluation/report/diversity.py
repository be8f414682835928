"""How far the images of one caption lie apart, compared with images of different captions.

By features of length 1, or by thumbnails where no network is given.
"""

import torch
from torch import Tensor

from latentdiff.evaluation.metrics.bootstrap import bootstrap_mean
from latentdiff.evaluation.metrics.features import FeatureSets
from latentdiff.evaluation.report.section import ReportRow, Section, interval_json


def diversity_section(features: FeatureSets, *, per_caption: int) -> Section:
    """Measure the distance between images of one caption; per_caption: images of each, 2 or more.

    The relative distance is 1 where images of one caption are as far apart as those of different
    captions.
    """
    x = features.generated.double().unflatten(0, (-1, per_caption))  # (M, K, D)
    within = mean_distance(x)  # (M,)
    across = float(mean_distance(x[:, 0][None])[0])
    relative = bootstrap_mean(within / across) if across > 0 else None
    distance = bootstrap_mean(within)
    figures = {
        "distance": interval_json(distance),
        "between_captions": across,
        "relative": None if relative is None else interval_json(relative),
        "images_per_caption": per_caption,
        "features": features.name,
    }
    rows = [] if relative is None else [ReportRow("Diversity of a caption's images", relative)]
    rows += [ReportRow("Distance between images of one caption", distance)]
    rows += [ReportRow("Distance between images of different captions", f"{across:.4g}")]
    note = (
        f"By {features.name}, {per_caption} images a caption, intervals over captions. The "
        "diversity is the first distance over the second: 0 where a caption always gives one "
        "image, 1 where the caption makes no difference."
    )
    return Section("diversity", "Diversity", figures, rows, [note])


def mean_distance(x: Tensor) -> Tensor:
    """Return the mean Euclidean distance over the pairs of each set. (M, K, D) -> (M,)"""
    k = x.shape[1]
    total = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2))
    return total / (k * (k - 1))
