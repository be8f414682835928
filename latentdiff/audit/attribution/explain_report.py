"""The training images behind an image as explain.json, as a page and as lines for the terminal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.atomic import write_text
from latentdiff.audit.attribution.explain import Explanation
from latentdiff.evaluation.eval_set import read_real_images
from latentdiff.evaluation.report.html_report import write_evaluation_report
from latentdiff.evaluation.report.section import LabelledImage, Section
from latentdiff.image_grid import to_pil

NUM_LINES = 5  # on the terminal
NOTE = (
    "Scores are in standard deviations above the mean over the training images. A ranking is an "
    "estimate from one model; what an image changed is known only from a twin trained without it, "
    "next to twins without other images: latentdiff twin RUN --without NAME. docs/attribution.md "
    "says how far each method agreed with twins."
)


def write_explanation(
    found: Explanation, out: Path, *, facts: dict[str, str], num_shown: int
) -> Path:
    """Write out/explain.json, with every rank, and out/explain.html; return the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    figures = to_json(found) | {"settings": facts}
    write_text(out / "explain.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    return write_evaluation_report(
        out / "explain.html",
        title="The training images behind an image",
        facts=facts,
        sections=[_query(found), _ranked(found, num_shown)],
        skipped={},
    )


def to_json(found: Explanation) -> dict[str, Any]:
    """Return the prompt, the call that made the image, and all training images by rank."""
    by_features, deviations = found.feature_ranks, found.deviations
    ranked = [
        {
            "id": found.folder[i].id,
            "rank": rank,
            "score": float(found.scores[i]),
            "deviations": deviations[i],
            "feature_rank": by_features[i],
        }
        for rank, i in enumerate(found.order, start=1)
    ]
    return {"prompt": found.prompt, "made_by": found.made_by, "training_images": ranked}


def summary_lines(found: Explanation) -> Iterator[str]:
    """Yield a line for each of the first training images."""
    by_features, deviations = found.feature_ranks, found.deviations
    for rank, i in enumerate(found.order[:NUM_LINES], start=1):
        yield f"{rank}. {found.folder[i].id}  {_note(deviations[i], by_features[i])}"


def _note(deviations: float, feature_rank: int) -> str:
    return f"{deviations:+.1f} deviations, rank {feature_rank:,} by features"


def _query(found: Explanation) -> Section:
    group = [[LabelledImage(found.image, found.prompt)]]
    return Section("image", "The image", {}, (), (), group, has_headline=False)


def _ranked(found: Explanation, num: int) -> Section:
    first, by_features, deviations = found.order[:num], found.feature_ranks, found.deviations
    images = read_real_images(found.folder.select(np.array(first)), size=found.size)
    groups = [
        [
            LabelledImage(
                to_pil(image), caption, f"{rank}. {name}: {_note(deviations[i], by_features[i])}"
            )
        ]
        for rank, (i, image, caption, name) in enumerate(
            zip(first, images.bytes, images.captions, images.ids, strict=True), start=1
        )
    ]
    title = f"The first {len(first)} of {len(found.folder):,} training images"
    return Section("ranked", title, {}, (), [NOTE], groups, has_headline=False)
