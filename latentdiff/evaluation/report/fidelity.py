"""How like real images the drawn ones are, in a network's features: FD, KID, precision, recall.

Against held-out images and against training ones, by class where there are classes. The distance
between held-out and training images themselves is what a perfect model would have.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.evaluation.generate import GeneratedImages, ImageArrays, in_batches
from latentdiff.evaluation.metrics.fd_kid import frechet_distance, kernel_distance, precision_recall
from latentdiff.evaluation.metrics.features import Features
from latentdiff.evaluation.report.section import Row, Section, plain_interval

NEIGHBOURS = 3
FEWEST = NEIGHBOURS + 1
FEWEST_OF_CLASS = 10


@dataclass(frozen=True, eq=False)
class Embedded:
    """Features of the drawn (M K, D), held-out (H, D) and training (T, D) images."""

    name: str
    hash: str
    drawn: Tensor
    heldout: Tensor
    train: Tensor  # (0, D) where there are none


def embed_images(
    features: Features,
    drawn: GeneratedImages,
    heldout: ImageArrays,
    train: ImageArrays | None,
    *,
    batch_size: int,
    device: torch.device,
) -> Embedded:
    """Send all images through a network."""
    sets = [drawn.flat, heldout.bytes] + ([] if train is None else [train.bytes])
    found = [in_batches(features.embed, x, size=batch_size, device=device) for x in sets]
    of_train = found[2] if train is not None else torch.zeros(0, found[0].shape[1])
    return Embedded(features.name, features.hash, found[0], found[1], of_train)


def fidelity_section(
    embedded: Embedded, *, classes: Sequence[str], real_classes: Sequence[str]
) -> Section:
    """Compare the sets. classes: of the drawn images (M K), real_classes: of the held-out (H).

    ValueError for sets of fewer than four images.
    """
    drawn, heldout, train = embedded.drawn, embedded.heldout, embedded.train
    pairs = {"heldout": (heldout, drawn)}
    if len(train) >= FEWEST:
        pairs |= {"train": (train, drawn), "heldout_to_train": (train, heldout)}
    figures: dict[str, Any] = {
        "features": {
            "name": embedded.name,
            "sha256": embedded.hash,
            "num_features": drawn.shape[1],
        }
    }
    rows, titles = (
        [],
        {
            "heldout": "drawn to held-out images",
            "train": "drawn to training images",
            "heldout_to_train": "held-out to training images, for comparison",
        },
    )
    for name, (real, generated) in pairs.items():
        figures[name], some = _compare(real, generated, titles[name])
        rows += some
    by_class, some = _by_class(embedded, classes, real_classes)
    notes = [f"Features: {embedded.name}, {drawn.shape[1]} of them, sha256 {embedded.hash[:16]}."]
    notes += [
        f"{titles['heldout'].capitalize()}: {figures['heldout']['fd']['caution']}.",
        "KID is unbiased and may be negative; images count as independent of one another.",
    ]
    if by_class:
        figures["classes"] = by_class
        rows += some
    return Section("fidelity", "Fidelity", figures, rows, notes)


def _compare(real: Tensor, generated: Tensor, title: str) -> tuple[dict[str, Any], list[Row]]:
    fd, kid = frechet_distance(real, generated), kernel_distance(real, generated)
    covered = precision_recall(real, generated, k=NEIGHBOURS)
    figures = {
        "fd": asdict(fd) | {"caution": fd.caution, "has_enough_samples": fd.has_enough_samples},
        "kid": plain_interval(kid),
        "precision": plain_interval(covered.precision),
        "recall": plain_interval(covered.recall),
        "num_real": len(real),
        "num_generated": len(generated),
    }
    counts = f"{len(generated)} and {len(real)} images"
    doubt = "" if fd.has_enough_samples else ", too few for FD"
    rows = [
        Row(f"KID, {title}", kid, counts),
        Row(f"FD, {title}", f"{fd.value:.4g}", counts + doubt),
        Row(f"Precision, {title}", covered.precision, is_share=True),
        Row(f"Recall, {title}", covered.recall, is_share=True),
    ]
    return figures, rows


def _by_class(
    embedded: Embedded, classes: Sequence[str], real_classes: Sequence[str]
) -> tuple[dict[str, Any], list[Row]]:
    """Compare class by class, those with enough images on both sides."""
    figures: dict[str, Any] = {}
    rows = []
    for name in sorted(set(real_classes) - {""}):
        real = embedded.heldout[torch.tensor([one == name for one in real_classes])]
        generated = embedded.drawn[torch.tensor([one == name for one in classes])]
        if min(len(real), len(generated)) < FEWEST_OF_CLASS:
            continue
        kid = kernel_distance(real, generated)
        fd = frechet_distance(real, generated)
        figures[name] = {
            "kid": plain_interval(kid),
            "fd": asdict(fd) | {"caution": fd.caution},
            "num_real": len(real),
            "num_generated": len(generated),
        }
        counts = f"{len(generated)} and {len(real)} images; FD {fd.value:.4g}"
        rows.append(Row(f"KID, {name}", kid, counts))
    return figures, rows
