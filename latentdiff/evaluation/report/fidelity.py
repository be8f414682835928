"""Fidelity and diversity: generated images against real ones, and against each other, in features.

Fidelity is FD, KID, precision and recall against held-out and against training images, by class
where there are classes; a perfect model would have the distance of the held-out images to the
training images. The same in DINO's class token, and CMMD in CLIP's embedding, are sections of their
own. Diversity is the distance between images of one caption, by features of length 1,
or by thumbnails where no network is given.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from latentdiff.evaluation.metrics.bootstrap import bootstrap_mean
from latentdiff.evaluation.metrics.fd_kid import (
    CMMD_SCALE,
    CMMD_SIGMA,
    clip_mmd,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from latentdiff.evaluation.metrics.features import FeatureSets
from latentdiff.evaluation.report.section import ReportRow, Section, interval_json

NEIGHBOURS = 3
MIN_IMAGES = NEIGHBOURS + 1
MIN_OF_CLASS = 10
TITLES = {
    "heldout": "generated to held-out images",
    "train": "generated to training images",
    "heldout_to_train": "held-out to training images, for comparison",
}


def fidelity_section(
    features: FeatureSets,
    *,
    classes: Sequence[str],
    real_classes: Sequence[str],
    is_heldout: bool = True,
) -> Section:
    """Compare the sets. classes: of the generated images (M K), real_classes: of the held-out (H).
    is_heldout: whether the real images are a held-out split, and are called so.

    ValueError for sets of fewer than four images.
    """
    titles = _titles(is_heldout=is_heldout)
    figures: dict[str, Any] = {"features": _facts(features)}
    rows = []
    for name, (reference, images) in _pairs(features).items():
        figures[name], some = _compare(reference, images, titles[name])
        rows += some
    by_class, some = _by_class(features, classes, real_classes)
    notes = [
        _note(features),
        f"{titles['heldout'].capitalize()}: {figures['heldout']['fd']['caution']}.",
        "KID is unbiased and may be negative; images count as independent of one another.",
    ]
    if by_class:
        figures["classes"] = by_class
        rows += some
    return Section("fidelity", "Fidelity", figures, rows, notes)


def dino_section(
    features: FeatureSets,
    *,
    classes: Sequence[str],
    real_classes: Sequence[str],
    is_heldout: bool = True,
) -> Section:
    """Compare the sets as `fidelity_section` does, in the class token of a DINO."""
    section = fidelity_section(
        features, classes=classes, real_classes=real_classes, is_heldout=is_heldout
    )
    rows = [replace(row, label=f"DINO: {row.label}") for row in section.rows]
    note = (
        "FD of DINOv2's class token is FD-DINOv2 (Stein et al. 2023), there of ViT-L/14 and of "
        "50,000 images."
    )
    notes = [*section.notes, note]
    return replace(section, name="dino", title="Fidelity by DINO", rows=rows, notes=notes)


def cmmd_section(features: FeatureSets, *, is_heldout: bool = True) -> Section:
    """Compare the sets by CMMD; features: a CLIP's image embeddings. ValueError as of fidelity."""
    titles = _titles(is_heldout=is_heldout)
    figures: dict[str, Any] = {"features": _facts(features)}
    rows = []
    for name, (real, generated) in _pairs(features).items():
        found = clip_mmd(real, generated)
        figures[name] = {
            "cmmd": interval_json(found.unbiased),
            "cmmd_biased": found.biased,
            "num_real": len(real),
            "num_generated": len(generated),
        }
        counts = f"{len(generated)} and {len(real)} images; biased {found.biased:.4g}"
        rows.append(ReportRow(f"CMMD, {titles[name]}", found.unbiased, counts))
    notes = [
        _note(features),
        f"{CMMD_SCALE:g} times the squared MMD under a Gaussian kernel of sigma {CMMD_SIGMA:g} "
        "(Jayasumana et al. 2024), unbiased, so it may be negative; its reference implementation "
        "has the biased one, by ViT-L/14 at 336 pixels.",
    ]
    return Section("cmmd", "Fidelity by CLIP (CMMD)", figures, rows, notes)


def _titles(*, is_heldout: bool) -> dict[str, str]:
    return TITLES | ({} if is_heldout else {"heldout": "generated to these images"})


def _pairs(features: FeatureSets) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the sets that are compared, by the names of TITLES."""
    generated, heldout, train = features.generated, features.heldout, features.train
    pairs = {"heldout": (heldout, generated)}
    if len(train) >= MIN_IMAGES:
        pairs |= {"train": (train, generated), "heldout_to_train": (train, heldout)}
    return pairs


def _facts(features: FeatureSets) -> dict[str, Any]:
    num = features.generated.shape[1]
    return {"name": features.name, "sha256": features.hash, "num_features": num}


def _note(features: FeatureSets) -> str:
    num = features.generated.shape[1]
    return f"Features: {features.name}, {num} of them, sha256 {features.hash[:16]}."


def _compare(real: Tensor, generated: Tensor, title: str) -> tuple[dict[str, Any], list[ReportRow]]:
    fd, kid = frechet_distance(real, generated), kernel_distance(real, generated)
    covered = precision_recall(real, generated, k=NEIGHBOURS)
    figures = {
        "fd": asdict(fd) | {"caution": fd.caution, "has_enough_samples": fd.has_enough_samples},
        "kid": interval_json(kid),
        "precision": interval_json(covered.precision),
        "recall": interval_json(covered.recall),
        "num_real": len(real),
        "num_generated": len(generated),
    }
    counts = f"{len(generated)} and {len(real)} images"
    doubt = "" if fd.has_enough_samples else ", too few for FD"
    rows = [
        ReportRow(f"KID, {title}", kid, counts),
        ReportRow(f"FD, {title}", f"{fd.value:.4g}", counts + doubt),
        ReportRow(f"Precision, {title}", covered.precision, is_share=True),
        ReportRow(f"Recall, {title}", covered.recall, is_share=True),
    ]
    return figures, rows


def _by_class(
    features: FeatureSets, classes: Sequence[str], real_classes: Sequence[str]
) -> tuple[dict[str, Any], list[ReportRow]]:
    """Compare class by class, those with enough images on both sides."""
    figures: dict[str, Any] = {}
    rows = []
    for name in sorted(set(real_classes) - {""}):
        real = features.heldout[torch.tensor([one == name for one in real_classes])]
        generated = features.generated[torch.tensor([one == name for one in classes])]
        if min(len(real), len(generated)) < MIN_OF_CLASS:
            continue
        kid = kernel_distance(real, generated)
        fd = frechet_distance(real, generated)
        figures[name] = {
            "kid": interval_json(kid),
            "fd": asdict(fd) | {"caution": fd.caution},
            "num_real": len(real),
            "num_generated": len(generated),
        }
        counts = f"{len(generated)} and {len(real)} images; FD {fd.value:.4g}"
        rows.append(ReportRow(f"KID, {name}", kid, counts))
    return figures, rows


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
