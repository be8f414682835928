"""Explain a generated image: rank the training images of its run by an attribution method."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.audit.attribution.gradients import Measured, Sample, SampleGradients
from latentdiff.audit.attribution.methods import (
    Snapshot,
    feature_scores,
    kernel_scores,
    ranks,
    trace_scores,
)
from latentdiff.audit.attribution.traced_run import TracedRun
from latentdiff.config.options import ExplainOptions
from latentdiff.config.validation import check_ranges
from latentdiff.data.folder.folder import Folder
from latentdiff.data.images import resize_and_crop, to_pixels
from latentdiff.evaluation.eval_set import read_pixels
from latentdiff.image_io import load_image
from latentdiff.pipeline.png_metadata import read_image_settings
from latentdiff.training.text_to_image.export import averaged
from latentdiff.training.text_to_image.nearest_images import open_embedder

MEASURED: dict[str, Measured] = {"trak": "loss", "d_trak": "square", "tracin": "loss"}
EMBED_BATCH_SIZE = 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Training images and their scores for an image. folder: those that were ranked, N of them."""

    image: Image.Image
    prompt: str
    made_by: dict[str, object]  # the call that made the image, as far as it is known
    folder: Folder
    size: tuple[int, int]  # height and width in pixels at which images were read
    scores: Tensor  # (N,) of the method
    feature_scores: Tensor  # (N,) of the baseline

    @property
    def order(self) -> list[int]:
        """Indices of the ranked images, the highest score first."""
        return self.scores.argsort(descending=True, stable=True).tolist()

    @property
    def feature_ranks(self) -> list[int]:
        """The rank of each image by the baseline."""
        return ranks(self.feature_scores).tolist()

    @property
    def deviations(self) -> list[float]:
        """Each score in standard deviations above the mean over the training images."""
        spread = self.scores.std().clamp_min(1e-30)
        return ((self.scores - self.scores.mean()) / spread).tolist()


def explain(run: Path, image: Path, options: ExplainOptions) -> Explanation:
    """Rank a run's training images for an image. ValueError or OSError names what is wrong."""
    check_ranges(options)
    opened = load_image(image)
    prompt, made_by = _prompt_of(image, options)
    traced = TracedRun.open(run)
    num = len(traced.folder)
    chosen = np.linspace(0, num - 1, min(num, options.max_images)).round().astype(np.int64)
    folder = traced.folder.select(chosen)
    by_features = _feature_scores(traced, folder, opened, options)
    scores = by_features
    if options.method != "features":
        query = traced.query_sample(opened, prompt)
        logger.info(
            "%d training images are measured at %d timesteps each", len(folder), options.draws
        )
        scores = gradient_scores(traced, chosen, query, options)
    return Explanation(opened, prompt, made_by, folder, traced.size, scores, by_features)


def gradient_scores(
    traced: TracedRun, indices: np.ndarray, query: Sample, options: ExplainOptions
) -> Tensor:
    """Return the scores of the training images at `indices` by a method of gradients, (N,)."""
    gradients = SampleGradients(
        traced.run.train_step,
        draws=options.draws,
        size=options.projection_size,
        seed=options.seed,
    )
    measured = MEASURED[options.method]

    def measure() -> tuple[Tensor, Tensor]:
        samples = [query, *traced.training_samples(indices)]
        found = torch.stack([gradients.of(one, [measured])[measured] for one in samples])
        if not found[0].any():
            raise ValueError(
                "the image's loss under this prompt depends on no weight that the run trained: "
                "give a --prompt as its captions are, with the word that it learned"
            )
        return found[:1], found[1:]

    if options.method == "tracin":
        snapshots = (Snapshot(rate, *measure()) for rate in traced.snapshots())
        return trace_scores(snapshots)[0]
    with averaged(traced.run.train_step):  # the weights that made the image
        return kernel_scores(*measure(), damping=options.damping)[0]


def _prompt_of(image: Path, options: ExplainOptions) -> tuple[str, dict[str, object]]:
    """Return the caption under which an image is explained, and the call that its file holds."""
    try:
        call = read_image_settings(image)["call"]
    except ValueError as error:
        if not options.prompt:
            raise ValueError(f"{error}; or name its prompt by --prompt") from error
        call = {}
    return options.prompt or str(call.get("prompt") or ""), call


def _feature_scores(
    traced: TracedRun, folder: Folder, image: Image.Image, options: ExplainOptions
) -> Tensor:
    embed = open_embedder(options.features, device=traced.run.accelerator.device)
    height, width = traced.size
    query = to_pixels(resize_and_crop(image, height=height, width=width).image)[None]

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(folder), EMBED_BATCH_SIZE):
            part: Sequence[int] = range(start, min(start + EMBED_BATCH_SIZE, len(folder)))
            pixels = [read_pixels(folder, i, height=height, width=width) for i in part]
            yield embed(torch.stack(pixels))

    return feature_scores(embed(query), torch.cat([*batches()]))[0]
