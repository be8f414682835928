"""Which drawn images are copies of training images, and how unlike images of a caption are.

Both from the same features of length 1, or from thumbnails where no network is given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.evaluation.generate import GeneratedImages, ImageArrays
from latentdiff.evaluation.metrics.bootstrap import bootstrap_mean
from latentdiff.evaluation.metrics.features import Features
from latentdiff.evaluation.metrics.memorization import Memorisation, find_copies, thumbnail_features
from latentdiff.evaluation.report.fidelity import Embedded, embed_images
from latentdiff.evaluation.report.section import LabelledImage, Row, Section, plain_interval
from latentdiff.image_grid import to_pil

NUM_SHOWN = 8
THUMBNAILS = Features(thumbnail_features, "thumbnails of 16 pixels", "")


def unit_length(embedded: Embedded) -> Embedded:
    """Bring a network's features to length 1."""
    sets = (F.normalize(x, dim=1) for x in (embedded.drawn, embedded.heldout, embedded.train))
    return Embedded(embedded.name, embedded.hash, *sets)


def as_thumbnails(
    drawn: GeneratedImages, heldout: ImageArrays, train: ImageArrays | None
) -> Embedded:
    """Return thumbnails as features, which need no network."""
    cpu = torch.device("cpu")
    return embed_images(THUMBNAILS, drawn, heldout, train, batch_size=64, device=cpu)


def copies_section(
    embedded: Embedded, drawn: GeneratedImages, train: ImageArrays, *, num_train_in_all: int
) -> Section:
    """Look for copies; num_train_in_all: images of the training split, looked at or not."""
    found = find_copies(embedded.drawn, embedded.train, heldout=embedded.heldout)
    order = found.scores.argsort()[:NUM_SHOWN].tolist()
    nearest = [
        {
            "caption": drawn.captions[i // drawn.per_caption],
            "seed": drawn.first_seed + i,
            "training_image": train.ids[int(found.places[i])],
            "distance": float(found.distances[i]),
            "score": float(found.scores[i]),
            "is_copy": bool(found.is_copy[i]),
        }
        for i in order
    ]
    figures = {
        "copies": plain_interval(found.copies),
        "false_alarms": plain_interval(found.false_alarms),
        "threshold": found.threshold,
        "features": embedded.name,
        "num_train": len(train),
        "num_train_in_all": num_train_in_all,
        "nearest": nearest,
    }
    rows = [
        Row("Copies among the drawn images", found.copies, is_share=True),
        Row(
            "Held-out images that would be called copies",
            found.false_alarms,
            "how often the figure above is a false alarm",
            is_share=True,
        ),
        Row("Training images looked at", f"{len(train):,} of {num_train_in_all:,}"),
    ]
    notes = [
        f"By {embedded.name}. A copy lies at {found.threshold:.0%} or less of the usual distance "
        "between images around there: half of what all but 1 % of the held-out images keep. "
        "Shown are the nearest pairs, drawn on the left, training on the right."
    ]
    groups = [_pair(found, drawn, train, i) for i in order]
    return Section("memorisation", "Copies of training images", figures, rows, notes, groups)


def diversity_section(embedded: Embedded, drawn: GeneratedImages) -> Section:
    """Measure how far images of one caption lie apart, with two or more of each.

    Relative: 1 is as far as images of different captions.
    """
    x = embedded.drawn.double().unflatten(0, (-1, drawn.per_caption))  # (M, K, D)
    within = mean_distance(x)  # (M,)
    across = float(mean_distance(x[:, 0][None])[0])
    relative = bootstrap_mean(within / across) if across > 0 else None
    apart = bootstrap_mean(within)
    figures = {
        "distance": plain_interval(apart),
        "between_captions": across,
        "relative": None if relative is None else plain_interval(relative),
        "images_per_caption": drawn.per_caption,
        "features": embedded.name,
    }
    rows = [] if relative is None else [Row("Diversity of a caption's images", relative)]
    rows += [Row("Distance between images of one caption", apart)]
    rows += [Row("Distance between images of different captions", f"{across:.4g}")]
    notes = [
        f"By {embedded.name}, {drawn.per_caption} images a caption, intervals over captions. The "
        "diversity is the first distance over the second: 0 where a caption always gives one "
        "image, 1 where it says nothing."
    ]
    return Section("diversity", "Diversity", figures, rows, notes)


def mean_distance(x: Tensor) -> Tensor:
    """Return the mean Euclidean distance over the pairs of each set. (M, K, D) -> (M,)"""
    k = x.shape[1]
    total = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2))
    return total / (k * (k - 1))


def _pair(
    found: Memorisation, drawn: GeneratedImages, train: ImageArrays, i: int
) -> list[LabelledImage]:
    """Return drawn image i and the training image nearest to it."""
    place = int(found.places[i])
    told = f"{found.scores[i]:.0%} of the usual distance"
    word = "A COPY of " if found.is_copy[i] else ""
    return [
        LabelledImage(to_pil(drawn.flat[i]), drawn.captions[i // drawn.per_caption], told),
        LabelledImage(to_pil(train.bytes[place]), train.captions[place], word + train.ids[place]),
    ]
