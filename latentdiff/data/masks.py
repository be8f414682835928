"""Loss masks, which part of an image counts: its own alpha channel, or a file next to it.

NAME.mask.png next to NAME.jpg has the size of the image as it is seen; white counts, black does
not, grey in part. A mask is resized, cropped and mirrored as its image is, and then averaged over
each latent pixel. Answers for faults of mask files; mask_cache.py keeps the averages.
"""

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.cache.decode_ahead import CropPlan, Item
from latentdiff.data.folder.content_hash import (
    file_digest,
    image_digest,
    image_hashes,
    mask_hashes,
)
from latentdiff.data.folder.folder import Folder
from latentdiff.data.images import resize_and_crop
from latentdiff.image_io import ImageError, load_alpha, load_mask

MaskKind = Literal["alpha", "file"]


@dataclass(frozen=True)
class Masks:
    """The masks of a folder's images, decoded and cropped by a plan when one is read.

    factor: the VAE's; a latent pixel covers factor x factor pixels.
    """

    folder: Folder
    plan: CropPlan
    factor: int
    kind: MaskKind
    channels: int = 1

    def __len__(self) -> int:
        return len(self.folder)

    def mask(self, index: int, *, flipped: bool, crop: float) -> Tensor:
        """Return the weight of each latent pixel of record `index`: (1, h, w) float32 in [0, 1].

        Raises ValueError naming a mask that cannot be read or is not as large as its image.
        """
        mask = self.latent_mask(self.plan.item(index, u=crop, flip=False), digest=None)
        return mask.flip(-1) if flipped else mask

    def latent_mask(self, item: Item, *, digest: bytes | None) -> Tensor:
        """Decode one crop, not mirrored: (1, h, w). digest: of the file, to notice a change."""
        record = self.folder[item.index]
        try:
            data = self._read(item.index)
            if digest is not None and self._digest(data) != digest:
                raise ValueError(f"the mask of {record.id} changes while it is read; start again")
            mask = _decoded(data, self.kind)
        except (ImageError, OSError) as error:
            raise ValueError(f"the mask of {record.path} cannot be read: {error}") from error
        if mask.size != (record.width, record.height):
            raise ValueError(
                f"the mask of {record.path} has {mask.width} x {mask.height} pixels, expected "
                f"{record.width} x {record.height} as the image has"
            )
        return downsample_to_latents(mask, item, factor=self.factor)

    def key_base(self) -> dict[str, Any]:
        """Return what the cache's keys of all masks share."""
        return {"mask": self.kind, "cell": self.factor, "interpolation": "bilinear"}

    def digests(self, index: ScanIndex) -> np.ndarray:
        """Return the hash of each mask's file: (N, 32) uint8."""
        read = mask_hashes if self.kind == "file" else image_hashes
        return read(self.folder, index=index)

    def _digest(self, data: bytes) -> bytes:
        return file_digest(data) if self.kind == "file" else image_digest(data)

    def _read(self, index: int) -> bytes:
        return (
            self.folder.read_mask(index) if self.kind == "file" else self.folder.read_bytes(index)
        )


def downsample_to_latents(mask: Image.Image, item: Item, *, factor: int) -> Tensor:
    """Crop a mask ("L") as its image and average it over latent pixels: (1, h, w) in [0, 1]."""
    crop = resize_and_crop(
        mask,
        height=item.height,
        width=item.width,
        crop=item.crop,
        resample=Image.Resampling.BILINEAR,  # bicubic would ring at the edges
    )
    pixels = torch.from_numpy(np.array(crop.image, dtype=np.float32)) / 255
    return pixels.unfold(0, factor, factor).unfold(1, factor, factor).mean((-2, -1))[None]


def _decoded(data: bytes, kind: MaskKind) -> Image.Image:
    return load_alpha(io.BytesIO(data)) if kind == "alpha" else load_mask(io.BytesIO(data))
