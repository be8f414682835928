"""Images and captions for contrastive training, as a function of (seed, step) alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from latentdiff.data.captions import may_flip
from latentdiff.data.folder.folder import Folder
from latentdiff.data.images import resize_and_crop, to_pixels
from latentdiff.image_io import load_image

TRIES_PER_PAIR = 8  # random ones, before a step has fewer pairs


@dataclass(frozen=True)
class PairKey:
    """One pair of one step: an image and one of its captions."""

    folder: int
    index: int
    caption: str
    number: int  # in the run: the crop and the mirror depend on it


@dataclass(frozen=True)
class Pairs(Dataset[tuple[Tensor, str]]):
    """The images of several folders, cropped and mirrored a little differently each time."""

    folders: list[Folder]
    resolution: int
    min_crop: float
    random_flip: bool
    seed: int

    def __getitem__(self, key: PairKey) -> tuple[Tensor, str]:
        """Return pixels (3, H, W) in [-1, 1] and the caption."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, key.number]))
        image = load_image(BytesIO(self.folders[key.folder].read_bytes(key.index)))
        side = min(image.size) * rng.uniform(self.min_crop, 1.0)
        x, y = (rng.uniform(0.0, size - side) for size in image.size)
        box = (round(x), round(y), round(x + side), round(y + side))
        cut = resize_and_crop(image.crop(box), height=self.resolution, width=self.resolution)
        pixels = to_pixels(cut.image)
        mirrored = self.random_flip and may_flip([key.caption]) and rng.random() < 0.5
        return (pixels.flip(-1) if mirrored else pixels), key.caption


@dataclass
class DistinctCaptions(Sampler[list[PairKey]]):
    """Batches without end in which no caption occurs twice: a right answer would count as wrong.

    A batch is sampled anew at each step, and is smaller than batch_size where captions are few.
    """

    folders: list[Folder]
    batch_size: int
    seed: int
    first_step: int = 0
    captions: list[tuple[int, int, tuple[str, ...]]] = field(init=False)  # folder, index, texts

    def __post_init__(self) -> None:
        """Read the captions once. ValueError when there are fewer than two to tell apart."""
        self.captions = [
            (place, index, tuple(record.captions))
            for place, folder in enumerate(self.folders)
            for index, record in enumerate(folder)
        ]
        distinct = {text for _, _, texts in self.captions for text in texts}
        if len(distinct) < 2:
            raise ValueError(
                f"the folders hold {len(distinct)} captions that differ, expected two or more"
            )

    def __iter__(self) -> Iterator[list[PairKey]]:
        """Yield the batches of first_step and those after it."""
        step = self.first_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> list[PairKey]:
        """Return the pairs of a step: random images, the first of each caption."""
        rng = np.random.default_rng([self.seed, step])
        chosen: dict[str, PairKey] = {}
        for place in rng.integers(len(self.captions), size=TRIES_PER_PAIR * self.batch_size):
            folder, index, texts = self.captions[place]
            caption = texts[int(rng.integers(len(texts)))]
            number = step * self.batch_size + len(chosen)
            chosen.setdefault(caption, PairKey(folder, index, caption, number))
            if len(chosen) == self.batch_size:
                break
        return list(chosen.values())


def collate_pairs(pairs: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    """Return pixels (B, 3, H, W) and B captions."""
    return torch.stack([pixels for pixels, _ in pairs]), [caption for _, caption in pairs]
