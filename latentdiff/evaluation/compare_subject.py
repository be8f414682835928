"""Compare a model before and after fine-tuning on a subject: similarity to photographs, and drift.

Similarity of an image is the mean cosine of its features to those of the photographs (as CLIP-I
in Ruiz et al. 2023), base and tuned model being given the same seeds. Drift of an unrelated prompt
is 1 - cosine between the two models' images of it from one seed; the same between the base's
images of two unlike prompts gives the scale.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from latentdiff.atomic import atomic_file, write_text
from latentdiff.config.options import CompareSubjectOptions
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.images import to_pixels
from latentdiff.device import choose_device
from latentdiff.evaluation.metric_nets import load_features
from latentdiff.evaluation.metrics.bootstrap import Interval, bootstrap_mean
from latentdiff.evaluation.metrics.features import Features
from latentdiff.evaluation.report.comparison import Comparison, compare
from latentdiff.image_grid import draw_grid
from latentdiff.image_io import load_image
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.model_info import default_steps
from latentdiff.sampling.batch_sampler import generate_images

COLUMNS = 8
BATCH_SIZE = 4
NUM_STEPS = 30  # of a model that is not distilled


@dataclass(frozen=True)
class SubjectReport:
    """Before and after: similarity to the photographs, and drift on unrelated prompts."""

    similarity_before: float
    similarity_after: float
    gain: Comparison  # after less before, seed by seed
    drift: Interval  # over the unrelated prompts
    unlike: float  # mean 1 - cosine between the base's images of two unlike prompts
    num_photos: int


def compare_subject(
    base: str, tuned: str, photos: str, out: Path, *, features: str, options: CompareSubjectOptions
) -> SubjectReport:
    """Generate, measure, write out/subject.json and out/subject.png; return the figures.

    base, tuned: model folders. photos: a folder of the subject's photographs. features: a folder
    that load_features reads. Raises ValueError or FileNotFoundError for a missing part.
    """
    if options.num_seeds < 2 or len(options.unrelated) < 2:
        raise ValueError(
            f"{options.num_seeds} seeds and {len(options.unrelated)} unrelated prompts, expected "
            "at least 2 of each (10 or more for a useful interval)"
        )
    network = load_features(features)
    folder = read_folder(photos, missing_caption="empty")
    folder.check()
    prompts = [options.base_prompt or options.prompt, options.prompt]
    images = [
        _generate_all(path, p, options) for path, p in zip((base, tuned), prompts, strict=True)
    ]
    real = _photographs(folder, size=images[0][0][0].size)
    report = measure_subject([_features(network, some) for some in (real, *images[0], *images[1])])
    out.mkdir(parents=True, exist_ok=True)
    _write_sheet(out / "subject.png", real, images, options)
    figures = asdict(report) | {"base": base, "tuned": tuned, "options": asdict(options)}
    write_text(out / "subject.json", json.dumps(figures, indent=2) + "\n")
    return report


def measure_subject(features: Sequence[Tensor]) -> SubjectReport:
    """Compare features (n, D) of: photographs; the base's subject (S, D) and unrelated images
    (U, D); the tuned model's subject (S, D) and unrelated images (U, D).
    """
    real, before, before_other, after, after_other = (F.normalize(x.double()) for x in features)
    similar = [(x @ real.T).mean(1) for x in (before, after)]  # (S,) each
    drift = 1 - (before_other * after_other).sum(1)  # (U,)
    unlike = 1 - (before_other * before_other.roll(1, 0)).sum(1)
    return SubjectReport(
        similarity_before=similar[0].mean().item(),
        similarity_after=similar[1].mean().item(),
        gain=compare(similar[1], similar[0], higher_is_better=True),
        drift=bootstrap_mean(drift),
        unlike=unlike.mean().item(),
        num_photos=len(real),
    )


def _generate_all(
    path: str, prompt: str, options: CompareSubjectOptions
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Generate the subject from each seed, and each unrelated prompt from a seed of its own."""
    pipe = LatentDiffPipeline.from_pretrained(path)
    pipe.to(choose_device())
    pipe.set_progress_bar_config(disable=True)
    num = options.num_seeds
    subject = _generate(pipe, [prompt] * num, range(num), options)
    others = list(options.unrelated)
    return subject, _generate(pipe, others, range(num, num + len(others)), options)


def _generate(
    pipe: LatentDiffPipeline, prompts: list[str], seeds: range, options: CompareSubjectOptions
) -> list[Image.Image]:
    return [
        image
        for _, image in generate_images(
            pipe,
            prompts,
            seeds=seeds,
            batch_size=BATCH_SIZE,
            num_inference_steps=options.num_inference_steps
            or default_steps(pipe.model_info, NUM_STEPS),
            guidance_scale=options.guidance_scale,
        )
    ]


def _photographs(folder: Folder, *, size: tuple[int, int]) -> list[Image.Image]:
    """Return the photographs, scaled and cut about the centre to the models' size."""
    files = (io.BytesIO(folder.read_bytes(index)) for index in range(len(folder)))
    images = (load_image(file, background=(255, 255, 255)) for file in files)
    return [ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in images]


def _features(network: Features, images: Sequence[Image.Image]) -> Tensor:
    """Return features (n, D) of images."""
    return network.embed(torch.stack([to_pixels(one.convert("RGB")) for one in images]))


def _write_sheet(
    path: Path, real: list[Image.Image], generated: Any, options: CompareSubjectOptions
) -> None:
    """Lay out photographs, then the subject and unrelated images before and after."""
    (before, before_other), (after, after_other) = generated
    rows: list[tuple[list[Image.Image], list[str]]] = [
        ([real[k % len(real)] for k in range(COLUMNS)], ["photograph"] * COLUMNS),
        (before[:COLUMNS], [f"before: {options.base_prompt or options.prompt}"] * COLUMNS),
        (after[:COLUMNS], [f"after: {options.prompt}"] * COLUMNS),
        (before_other[:COLUMNS], [f"before: {one}" for one in options.unrelated[:COLUMNS]]),
        (after_other[:COLUMNS], [f"after: {one}" for one in options.unrelated[:COLUMNS]]),
    ]
    columns = min(len(images) for images, _ in rows)
    images = [image for row, _ in rows for image in row[:columns]]
    labels = [label for _, names in rows for label in names[:columns]]
    with atomic_file(path) as temporary:
        draw_grid(images, labels, columns=columns).save(temporary, format="PNG")
