"""The images that are judged: real ones from the folder, and those a model draws for captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.folder.splits import FOLDER_NAMES
from latentdiff.evaluation.eval_set import EvalModel, read_pixels
from latentdiff.image_grid import from_uint8, to_uint8
from latentdiff.pipeline.png_metadata import save_png
from latentdiff.sampling.sample import sample_each


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """N real images at the model's size."""

    captions: tuple[str, ...]
    ids: tuple[str, ...]
    classes: tuple[str, ...]  # "" where there are none
    bytes: Tensor  # (N, 3, H, W) uint8

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, places: Sequence[int]) -> "ImageArrays":
        """Return some of the images, in that order."""
        names = (self.captions, self.ids, self.classes)
        captions, ids, classes = (tuple(each[i] for i in places) for each in names)
        return ImageArrays(captions, ids, classes, self.bytes[list(places)])

    def spread(self, num: int) -> "ImageArrays":
        """Return at most num images of different captions, evenly spread."""
        places = {caption: i for i, caption in reversed(list(enumerate(self.captions)))}
        first = sorted(places.values())
        chosen = np.linspace(0, len(first) - 1, min(num, len(first))).round().astype(int)
        return self.select([first[i] for i in chosen])


@dataclass(frozen=True, eq=False)
class GeneratedImages:
    """K images for each of M captions."""

    captions: tuple[str, ...]
    bytes: Tensor  # (M, K, 3, H, W) uint8
    first_seed: int  # image k of caption m has first_seed + m K + k

    @property
    def flat(self) -> Tensor:
        """All images, (M K, 3, H, W) uint8."""
        return self.bytes.flatten(0, 1)

    @property
    def per_caption(self) -> int:
        """How many images a caption has."""
        return self.bytes.shape[1]


def read_real_images(
    folder: Folder, *, size: tuple[int, int], class_column: str = ""
) -> ImageArrays:
    """Read a folder's images, cut as in training; size: (height, width) in pixels.

    class_column: column of the metadata that names an image's class; by default its folder, where
    there are several below the split's.
    """
    height, width = size
    pixels = [read_pixels(folder, i, height=height, width=width) for i in range(len(folder))]
    stacked = torch.stack([to_uint8(one) for one in pixels])
    ids = tuple(record.id for record in folder)
    captions = tuple(record.captions[0] for record in folder)
    return ImageArrays(captions, ids, _classes(folder.root, ids, class_column), stacked)


def generate(
    subject: EvalModel,
    captions: Sequence[str],
    *,
    per_caption: int,
    num_steps: int,
    guidance_scale: float,
    first_seed: int,
    folder: Path,
) -> GeneratedImages:
    """Draw each caption `per_caption` times, every image from its own seed, and keep them as PNG.

    They are called folder/0000-0.png, caption and place, and hold what made them.
    """
    pipe = subject.pipeline()
    prompts = [caption for caption in captions for _ in range(per_caption)]
    seeds = list(range(first_seed, first_seed + len(prompts)))
    images = sample_each(
        pipe,
        prompts,
        seeds,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        at_once=subject.batch_size,
        desc="drawing",
    )
    for number, image in enumerate(images):
        m, k = divmod(number, per_caption)
        save_png(image, folder / f"{m:04d}-{k}.png")
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (M K, H, W, 3)
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    return GeneratedImages(
        tuple(captions), pixels.unflatten(0, (-1, per_caption)).contiguous(), first_seed
    )


def in_batches(
    function: Callable[[Tensor], Tensor], images: Tensor, *, size: int, device: torch.device
) -> Tensor:
    """Apply a function of pixels (B, 3, H, W) in [-1, 1] on a device to (N, 3, H, W) uint8.

    The result is on the CPU.
    """
    parts = (from_uint8(part.to(device)) for part in images.split(size))
    return torch.cat([function(pixels).cpu() for pixels in parts])


def shuffled_places(num: int, *, seed: int) -> Tensor:
    """Return for each of num >= 2 things another one, (num,) int64: a random circle through all."""
    circle = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(circle)
    other[circle] = circle.roll(1)
    return other


def _classes(root: Path, ids: Sequence[str], column: str) -> tuple[str, ...]:
    if column:
        named = read_folder(root, caption_column=column)
        known = {record.id: record.captions[0] for record in named}
        if not known:
            raise ValueError(f"{root} has no column {column!r}; check --class_column")
        return tuple(known.get(name, "") for name in ids)
    folders = [PurePosixPath(name).parent.parts for name in ids]
    below = [parts[1:] if parts and parts[0] in FOLDER_NAMES else parts for parts in folders]
    classes = tuple(parts[0] if parts else "" for parts in below)
    return classes if len(set(classes)) > 1 else ("",) * len(classes)
