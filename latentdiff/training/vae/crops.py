"""Random square crops of images, as a function of the seed and their place in the run alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from latentdiff.config.vae import VaeConfig
from latentdiff.data.folder.folder import Folder
from latentdiff.data.images import resize_and_crop, to_pixels
from latentdiff.image_io import load_image
from latentdiff.training.inputs.workers import ignore_signals, start_workers


@dataclass(frozen=True)
class Crops(Dataset[Tensor]):
    """Random square crops of the images of several folders; item k is a function of (seed, k)."""

    folders: list[Folder]
    resolution: int
    seed: int

    def __getitem__(self, k: int) -> Tensor:
        """Return the k-th crop of the run, (3, H, W) in [-1, 1]; folders take turns evenly."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, k]))
        folder = self.folders[k % len(self.folders)]
        image = load_image(BytesIO(folder.read_bytes(int(rng.integers(len(folder))))))
        room = min(image.size) / self.resolution  # how much smaller the image may be made
        side = round(min(image.size) / max(1.0, rng.uniform(1.0, max(1.0, room))))
        whole = resize_and_crop(
            image,
            height=max(self.resolution, round(image.height * side / min(image.size))),
            width=max(self.resolution, round(image.width * side / min(image.size))),
        ).image
        y, x = (int(rng.integers(n - self.resolution + 1)) for n in (whole.height, whole.width))
        cut = whole.crop((x, y, x + self.resolution, y + self.resolution))
        pixels = to_pixels(cut)
        return pixels.flip(-1) if rng.random() < 0.5 else pixels

    def loader(self, config: VaeConfig, *, start: int) -> Iterator[Tensor]:
        """Yield batches (B, 3, H, W) from step `start` on, without end."""
        order = _Counting(start * config.batch_size)
        loader = DataLoader(
            self,
            config.batch_size,
            sampler=order,
            num_workers=config.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals,
        )
        return start_workers(loader)

    def some(self, config: VaeConfig) -> Iterator[Tensor]:
        """Yield the first twenty batches, to measure latents on."""
        return (batch for _, batch in zip(range(20), self.loader(config, start=0), strict=False))


class _Counting(Sampler[int]):
    """0, 1, 2, ... from `start`."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        k = self.start
        while True:
            yield k
            k += 1
