"""How well generated images fit their captions by a CLIP, next to real images and chance."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.evaluation.eval_set import RealImages
from latentdiff.evaluation.generate import GeneratedImages
from latentdiff.evaluation.metrics.bootstrap import bootstrap_difference, bootstrap_mean
from latentdiff.evaluation.metrics.clip import Clip, recall_at
from latentdiff.evaluation.metrics.features import embed_in_batches
from latentdiff.evaluation.report.section import (
    PairedScore,
    ReportRow,
    Section,
    derangement,
    interval_json,
)

SCALE = 100.0  # the score is 100 times the cosine (Hessel et al. 2021 without the floor at 0)
RECALLS = (1, 5)


@torch.no_grad()
def clip_section(
    clip: Clip,
    generated: GeneratedImages,
    real_images: RealImages,
    *,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> tuple[Section, PairedScore]:
    """Score the images of M captions; real_images: the M real images of these captions."""
    captions = generated.captions
    parts = (captions[i : i + batch_size] for i in range(0, len(captions), batch_size))
    texts = torch.cat([clip.embed_texts(part).cpu() for part in parts])  # (M, D)
    images = embed_in_batches(clip.embed_pixels, generated.flat, size=batch_size, device=device)
    real = embed_in_batches(clip.embed_pixels, real_images.bytes, size=batch_size, device=device)
    by_caption = images.unflatten(0, (-1, generated.per_caption))  # (M, K, D)
    other = texts[derangement(len(texts), seed=seed)]
    scores, chance = (SCALE * (by_caption * t[:, None]).sum(2).mean(1) for t in (texts, other))
    intervals = {
        "score": bootstrap_mean(scores),
        "shuffled_captions": bootstrap_mean(chance),
        "real_images": bootstrap_mean(SCALE * (real * texts).sum(1)),
        "over_chance": bootstrap_difference(scores, chance),
    }
    labels = ("generated images", "the same under other captions", "real images", "over chance")
    rows = [
        ReportRow(f"CLIP score, {label}", interval)
        for label, interval in zip(labels, intervals.values(), strict=True)
    ]
    recalls, more = _recalls(by_caption[:, 0], texts, captions)
    figures: dict[str, Any] = {name: interval_json(value) for name, value in intervals.items()}
    figures |= recalls | {"clip": {"name": clip.name, "sha256": clip.hash}}
    figures["num_images"] = len(images)
    note = (
        f"100 times the cosine, by {clip.name or 'a CLIP'}, sha256 {clip.hash[:16]}. Scores of "
        "different CLIPs do not compare. Intervals are over captions."
    )
    section = Section("clip_score", "Fit to the caption (CLIP)", figures, rows + more, [note])
    return section, PairedScore("CLIP score", scores, higher_is_better=True)


def _recalls(
    images: Tensor, texts: Tensor, captions: Sequence[str]
) -> tuple[dict[str, Any], list[ReportRow]]:
    """Return how often an image's caption is among the k nearest, for each k of RECALLS."""
    figures, rows = {}, []
    for k in RECALLS:
        if k <= len(set(captions)):
            found, _ = recall_at(images, texts, captions, k=k)
            figures[f"recall_at_{k}"] = interval_json(found)
            note = f"chance is {k / len(texts):.1%}"
            label = f"The caption is among the {k} nearest" if k > 1 else "The caption is nearest"
            rows.append(ReportRow(f"{label} of {len(texts)}", found, note, is_share=True))
    return figures, rows
