"""Inpainting of the part around a mask alone, at the model's own size: `padding_mask_crop`.

As in diffusers' inpainting pipeline: a box around what is white, with padding and in the canvas's
proportions, is made as large as the canvas; the result is pasted back where the mask is white, and
every other pixel stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from diffusers.image_processor import VaeImageProcessor
from PIL import Image

Box: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom

PROCESSOR = VaeImageProcessor(vae_scale_factor=1)


@dataclass(frozen=True)
class MaskCrop:
    """Images, as many masks of their sizes, and the padding around what is white, in pixels."""

    images: Sequence[Image.Image] = field(repr=False)
    masks: Sequence[Image.Image] = field(repr=False)
    padding: int = 0

    def boxes(self, height: int, width: int) -> list[Box]:
        """Return the box of each image that becomes the canvas."""
        region = VaeImageProcessor.get_crop_region
        return [region(mask, width, height, pad=self.padding) for mask in self.masks]

    def cropped(self, height: int, width: int) -> tuple[list[Image.Image], list[Image.Image]]:
        """Return the parts of the images and masks in their boxes, as large as the canvas."""
        boxes = self.boxes(height, width)
        size = {"height": height, "width": width, "resize_mode": "fill"}

        def parts(of: Sequence[Image.Image]) -> list[Image.Image]:
            pairs = zip(of, boxes, strict=True)
            return [PROCESSOR.resize(image.crop(box), **size) for image, box in pairs]

        return parts(self.images), parts(self.masks)

    def pasted(self, made: Sequence[Image.Image]) -> list[Image.Image]:
        """Return each image with what was made of its box, where its mask is white."""
        boxes = self.boxes(made[0].height, made[0].width)
        times = len(made) // len(self.images)
        return [
            PROCESSOR.apply_overlay(
                self.masks[k // times], self.images[k // times], one, boxes[k // times]
            )
            for k, one in enumerate(made)
        ]
