"""Which generated images are copies of training images.

By features of length 1, or by thumbnails where no network is given.
"""

from typing import Any

from latentdiff.evaluation.eval_set import RealImages
from latentdiff.evaluation.generate import GeneratedImages
from latentdiff.evaluation.metrics.features import FeatureSets
from latentdiff.evaluation.metrics.memorization import Memorization, find_copies
from latentdiff.evaluation.report.section import LabelledImage, ReportRow, Section, interval_json
from latentdiff.image_grid import to_pil

NUM_SHOWN = 8


def memorization_section(
    features: FeatureSets, generated: GeneratedImages, train: RealImages, *, num_train_in_all: int
) -> Section:
    """Look for copies among the features' training images, which are `train`.

    num_train_in_all: images of the training split, of which `train` may be a subsample.
    """
    found = find_copies(features.generated, features.train, heldout=features.heldout)
    order = found.scores.argsort()[:NUM_SHOWN].tolist()
    figures = {
        "copies": interval_json(found.copies),
        "false_alarms": interval_json(found.false_alarms),
        "threshold": found.threshold,
        "features": features.name,
        "num_train": len(train),
        "num_train_in_all": num_train_in_all,
        "nearest": [_nearest_json(found, generated, train, i) for i in order],
    }
    rows = [
        ReportRow("Copies among the generated images", found.copies, is_share=True),
        ReportRow(
            "Held-out images that would be called copies",
            found.false_alarms,
            "how often the figure above is a false alarm",
            is_share=True,
        ),
        ReportRow("Training images searched", f"{len(train):,} of {num_train_in_all:,}"),
    ]
    note = (
        f"By {features.name}. A copy lies at {found.threshold:.0%} or less of the usual distance "
        "between images around there: half of what all but 1 % of the held-out images keep. "
        "Shown are the nearest pairs, generated on the left, training on the right."
    )
    groups = [_pair(found, generated, train, i) for i in order]
    return Section("memorisation", "Copies of training images", figures, rows, [note], groups)


def _nearest_json(
    found: Memorization, generated: GeneratedImages, train: RealImages, i: int
) -> dict[str, Any]:
    """Return generated image i with the training image nearest to it as JSON values."""
    return {
        "caption": generated.captions[i // generated.per_caption],
        "seed": generated.first_seed + i,
        "training_image": train.ids[int(found.indices[i])],
        "distance": float(found.distances[i]),
        "score": float(found.scores[i]),
        "is_copy": bool(found.is_copy[i]),
    }


def _pair(
    found: Memorization, generated: GeneratedImages, train: RealImages, i: int
) -> list[LabelledImage]:
    """Return generated image i and the training image nearest to it."""
    nearest, m = int(found.indices[i]), i // generated.per_caption
    share = f"{found.scores[i]:.0%} of the usual distance"
    word = "A COPY of " if found.is_copy[i] else ""
    return [
        LabelledImage(to_pil(generated.flat[i]), generated.captions[m], share),
        LabelledImage(
            to_pil(train.bytes[nearest]), train.captions[nearest], word + train.ids[nearest]
        ),
    ]
