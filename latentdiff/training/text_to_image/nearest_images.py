"""The training images nearest to samples, which show whether a model repeats training images.

A subsample of the training folder is embedded once, on the main process and for the first sheet, by
a network from a folder or as thumbnails. evaluation/metrics/memorization.py decides which samples
are copies, from the distances of held-out images where there are any.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.data.cache.decode_ahead import CropPlan, decode_ahead, load_item
from latentdiff.data.folder.folder import Folder
from latentdiff.data.images import to_pixels, uint8_to_pixels
from latentdiff.evaluation.metric_nets import load_features
from latentdiff.evaluation.metrics.features import thumbnail_features
from latentdiff.evaluation.metrics.memorization import find_copies, relative_distances

logger = logging.getLogger(__name__)
EMBED_BATCH_SIZE = 16
MIN_IMAGES = 3  # below which no distance is compared with others
Embed = Callable[[Tensor], Tensor]
PlanCrops = Callable[[Folder], CropPlan]


@dataclass(frozen=True)
class NearestImage:
    """The training image nearest to one sample.

    score: its distance relative to that of typical neighbours, in [0, 1]; is_copy: None without
    held-out images to calibrate it.
    """

    name: str
    image: Image.Image
    distance: float
    score: float
    is_copy: bool | None

    @property
    def label(self) -> str:
        """The caption in a sheet."""
        text = f"nearest: {self.name}, distance {self.distance:.3f}, {self.score:.0%} of usual"
        return f"{text}: A COPY" if self.is_copy else text


class NearestImages:
    """Finds the nearest of `num` training images, an even subsample of the folder.

    plan_crops: how a folder's images are cropped. features: folder of a network (see features.py),
    whose vectors are normalised; without it, thumbnails. Distances lie in [0, 2] for both.
    """

    def __init__(
        self,
        train: Folder,
        heldout: Folder,
        *,
        plan_crops: PlanCrops,
        num: int,
        features: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self.train, self.heldout = _subsample(train, num), _subsample(heldout, num)
        self.plan_crops, self.device = plan_crops, torch.device(device)
        self._embed = open_embedder(features, device=self.device)

    def find(self, samples: Sequence[Image.Image]) -> list[NearestImage]:
        """Return the nearest training image of each sample.

        Raises ValueError naming a training image that can no longer be read.
        """
        found = self.embed(samples)
        train, heldout = self._embedded
        copies: list[bool | None] = [None] * len(samples)
        if len(heldout) and len(train) >= MIN_IMAGES:
            result = find_copies(found, train, heldout=heldout)
            scores, distances, indices = result.scores, result.distances, result.indices
            copies = result.is_copy.tolist()
        else:
            scores, distances, indices = relative_distances(found, train)
        plan = self.plan_crops(self.train)
        return [
            NearestImage(
                self.train[index].id,
                Image.fromarray(
                    load_item(self.train, plan.item(index, u=0.5, flip=False), digest=None)
                ),
                distance,
                score,
                is_copy,
            )
            for index, distance, score, is_copy in zip(
                indices.tolist(), distances.tolist(), scores.tolist(), copies, strict=True
            )
        ]

    def embed(self, samples: Sequence[Image.Image]) -> Tensor:
        """Return the features of samples, (N, D)."""
        is_one_size = len({sample.size for sample in samples}) == 1
        batches = [samples] if is_one_size else [[sample] for sample in samples]
        return torch.cat([self._embed(torch.stack([*map(to_pixels, part)])) for part in batches])

    def similarities(self, samples: Sequence[Image.Image]) -> Tensor:
        """Return the mean cosine of each sample to the training images, (N,), by a network."""
        train, _ = self._embedded
        return (self.embed(samples) @ train.T).mean(1)

    @cached_property
    def _embedded(self) -> tuple[Tensor, Tensor]:
        """Features of training (M, D) and held-out images (H, D)."""
        train, heldout = self._features(self.train), self._features(self.heldout)
        logger.info("samples are compared with %d training images", len(train))
        return train, heldout

    def _features(self, folder: Folder) -> Tensor:
        plan = self.plan_crops(folder)
        items = (plan.item(index, u=0.5, flip=False) for index in range(len(folder)))
        batches = decode_ahead(
            folder, items, digests=None, batch_size=EMBED_BATCH_SIZE, num_threads=4
        )
        parts = [self._embed(uint8_to_pixels(pixels)) for _, pixels in batches]
        return torch.cat(parts) if parts else torch.zeros(0, 1)


def open_embedder(features: str, *, device: torch.device) -> Embed:
    """Return the function from pixels (B, 3, H, W) in [-1, 1] to features (B, D) on the CPU.

    features: a network's folder, or empty for thumbnails. FileNotFoundError or ValueError names
    what the folder lacks.
    """
    if not features:
        return thumbnail_features
    network = load_features(features, device=device)
    return lambda pixels: F.normalize(network.embed(pixels.to(device)), dim=1).cpu()


def summarize_nearest(found: Sequence[NearestImage]) -> dict[str, float]:
    """Return a sheet's figures for the log: means, the smallest score, the share of copies."""
    figures = {
        "nearest_distance": float(np.mean([one.distance for one in found])),
        "nearest_score": float(np.mean([one.score for one in found])),
        "nearest_score_min": min(one.score for one in found),
    }
    copies = [one.is_copy for one in found if one.is_copy is not None]
    return figures | ({"copies": float(np.mean(copies))} if copies else {})


def _subsample(folder: Folder, num: int) -> Folder:
    return folder.select(np.linspace(0, len(folder) - 1, min(len(folder), num)).astype(int))
