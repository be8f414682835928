"""How well a model's losses tell training images from others of their kind: membership inference.

The loss on fixed timesteps and noise is lower on images that were trained on; the area under the
ROC curve (AUC) is the chance that an image that was trained on has a lower one than another
(Carlini et al. 2022, "Membership inference attacks from first principles"; Duan et al. 2023, "Are
diffusion models vulnerable to membership inference attacks?"). Pure functions of losses.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

from scipy import optimize, stats
from torch import Tensor

from latentdiff.evaluation.metrics.bootstrap import Interval, proportion

FALSE_POSITIVE_RATE = 0.01
NEAR = 1e-9  # of the estimate, at which a search for its bounds begins


@dataclass(frozen=True)
class Membership:
    """How well scores tell members, which were trained on, from others.

    auc: 0.5 for a model that tells nothing; true_positives: the share of members whose score is
    above all but FALSE_POSITIVE_RATE of the others'; p_value: of AUC 0.5 against more.
    """

    auc: Interval
    true_positives: Interval
    threshold: float
    p_value: float


def membership_scores(losses: Tensor, *, base: Tensor | None = None) -> Tensor:
    """Return a score for each image, (N,), higher where its losses (N, K) at K draws are lower.

    base: the losses of the model that training started from, which take out how difficult an image
    is. Each draw counts alike: losses are divided by their mean over the images.
    """
    scale = losses.mean(0)
    if base is None:
        return -(losses / scale).mean(1)
    return ((base - losses) / scale).mean(1)


def membership(members: Tensor, others: Tensor, *, level: float = 0.95) -> Membership:
    """Compare the scores of members (M,) with those of others (N,), M and N of 2 or more."""
    if min(len(members), len(others)) < 2:
        raise ValueError(
            f"{len(members)} members and {len(others)} others, expected two of each or more"
        )
    x, y = members.double().numpy(), others.double().numpy()
    test = stats.mannwhitneyu(x, y, alternative="greater")
    auc = auc_interval(test.statistic / (len(x) * len(y)), len(x), len(y), level=level)
    allowed = math.floor(FALSE_POSITIVE_RATE * len(others))
    threshold = float(others.double().sort(descending=True).values[allowed])
    above = proportion(int((members.double() > threshold).sum()), len(members), level=level)
    return Membership(auc, above, threshold, float(test.pvalue))


def auc_interval(auc: float, num_members: int, num_others: int, *, level: float) -> Interval:
    """Return an AUC's interval by scores, which has a width even at 1 (Newcombe 2006, method 5)."""
    z, count = NormalDist().inv_cdf((1 + level) / 2), (num_members + num_others) / 2

    def outside(true: float) -> float:
        shape = 1 + (count - 1) * ((1 - true) / (2 - true) + true / (1 + true))
        variance = true * (1 - true) * shape / (num_members * num_others)
        return (auc - true) ** 2 - z**2 * variance

    low = optimize.brentq(outside, 0.0, auc * (1 - NEAR)) if auc > 0 else 0.0
    high = optimize.brentq(outside, auc + (1 - auc) * NEAR, 1.0) if auc < 1 else 1.0
    return Interval(auc, float(low), float(high), level, num_members + num_others)


def most_exposed(members: Tensor, others: Tensor, *, num: int) -> list[tuple[int, float]]:
    """Return the members of the highest scores: index, and the share of others that score less."""
    order = members.argsort(descending=True)[:num].tolist()
    return [(i, float((others < members[i]).double().mean())) for i in order]
