"""Images that a model generates for captions, kept as PNG files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.png_metadata import save_png
from latentdiff.sampling.batch_sampler import generate_images
from latentdiff.sampling.resume_folder import write_image_table


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


def generate(
    pipe: LatentDiffPipeline,
    captions: Sequence[str],
    *,
    per_caption: int,
    num_inference_steps: int,
    guidance_scale: float,
    first_seed: int,
    batch_size: int,
    folder: Path,
) -> GeneratedImages:
    """Generate `per_caption` images of each caption, every image from its own seed.

    They are saved as folder/0000-0.png, numbered by caption and image, with their settings.
    """
    prompts = [caption for caption in captions for _ in range(per_caption)]
    images = [
        image
        for _, image in generate_images(
            pipe,
            prompts,
            seeds=list(range(first_seed, first_seed + len(prompts))),
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            desc="images",
        )
    ]
    rows = []
    for number, image in enumerate(images):
        m, k = divmod(number, per_caption)
        path = save_png(image, folder / f"{m:04d}-{k}.png")
        rows.append({"file_name": path.name, "text": captions[m], "seed": first_seed + number})
    write_image_table(folder, rows)
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (M K, H, W, 3)
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    return GeneratedImages(
        tuple(captions), pixels.unflatten(0, (-1, per_caption)).contiguous(), first_seed
    )
