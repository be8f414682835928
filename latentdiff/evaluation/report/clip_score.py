"""How well drawn images fit their captions by a CLIP, beside real images and chance."""

from typing import Any

import torch

from latentdiff.evaluation.generate import GeneratedImages, ImageArrays, in_batches, shuffled_places
from latentdiff.evaluation.metrics.bootstrap import bootstrap_difference, bootstrap_mean
from latentdiff.evaluation.metrics.clip import Clip, recall_at
from latentdiff.evaluation.report.section import Row, Score, Section, plain_interval

SCALE = 100.0  # the score is 100 times the cosine (Hessel et al. 2021 without the floor at 0)
RECALLS = (1, 5)


@torch.no_grad()
def clip_section(
    clip: Clip,
    drawn: GeneratedImages,
    asked: ImageArrays,
    *,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> tuple[Section, Score]:
    """Score the images of M captions; asked: the M real images of these captions."""
    texts = torch.cat(
        [
            clip.embed_texts(drawn.captions[start : start + batch_size]).cpu()
            for start in range(0, len(drawn.captions), batch_size)
        ]
    )  # (M, D)
    images = in_batches(clip.embed_pixels, drawn.flat, size=batch_size, device=device)
    real = in_batches(clip.embed_pixels, asked.bytes, size=batch_size, device=device)
    by_caption = images.unflatten(0, (-1, drawn.per_caption))  # (M, K, D)
    other = texts[shuffled_places(len(texts), seed=seed)]
    scores, chance = (SCALE * (by_caption * t[:, None]).sum(2).mean(1) for t in (texts, other))
    of_real = SCALE * (real * texts).sum(1)
    intervals = {
        "score": bootstrap_mean(scores),
        "shuffled_captions": bootstrap_mean(chance),
        "real_images": bootstrap_mean(of_real),
        "over_chance": bootstrap_difference(scores, chance),
    }
    labels = ("drawn images", "the same under other captions", "real images", "over chance")
    rows = [
        Row(f"CLIP score, {label}", interval)
        for label, interval in zip(labels, intervals.values(), strict=True)
    ]
    figures: dict[str, Any] = {name: plain_interval(value) for name, value in intervals.items()}
    first = by_caption[:, 0]
    for k in RECALLS:
        if k <= len(set(drawn.captions)):
            found, _ = recall_at(first, texts, drawn.captions, k=k)
            figures[f"recall_at_{k}"] = plain_interval(found)
            note = f"chance is {k / len(texts):.1%}"
            label = f"The caption is among the {k} nearest" if k > 1 else "The caption is nearest"
            rows.append(Row(f"{label} of {len(texts)}", found, note, is_share=True))
    notes = [
        f"100 times the cosine, by {clip.name or 'a CLIP'}, sha256 {clip.hash[:16]}. Scores of "
        "different CLIPs do not compare. Intervals are over captions."
    ]
    figures |= {"clip": {"name": clip.name, "sha256": clip.hash}, "num_images": len(images)}
    section = Section("clip_score", "Fit to the caption (CLIP)", figures, rows, notes)
    return section, Score("CLIP score", scores, higher_is_better=True)
