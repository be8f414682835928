"""Condition files, cropped and mirrored as their images: pixels, or maps at the latents' size.

A condition of another size than its image is resized to it first, so that one crop fits both. Which
files belong to an image is folder/companion_files.py's business, what a model reads of them
models/unet/image_conditions.py's.
"""

import hashlib
import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.cache.decode_ahead import CropPlan, Item
from latentdiff.data.folder.content_hash import image_digest, image_hashes
from latentdiff.data.folder.folder import Companion, Folder
from latentdiff.data.images import resize_and_crop
from latentdiff.image_io import ImageError, load_image, load_mask

MapKind = Literal["depth", "upscale"]
BLACK = (0, 0, 0)


@dataclass(frozen=True)
class Companions:
    """The conditions or inpainting masks of a folder's images, and the crops of their images.

    folder: as of `Folder.companions`; starts: (N + 1,) where each image's begin; plan: a row each.
    """

    folder: Folder
    starts: np.ndarray
    plan: CropPlan

    @classmethod
    def of(cls, folder: Folder, plan: CropPlan, name: Companion) -> "Companions":
        """Find them. plan: of the folder's images."""
        files, starts = folder.companions(name)
        owners = np.repeat(np.arange(len(folder)), np.diff(starts))
        has_room = None if plan.has_room is None else plan.has_room[owners]
        own = CropPlan(plan.sizes[owners], plan.places, has_room, plan.background)
        return cls(files, starts, own)

    def choose(self, index: int, u: float) -> int:
        """Return one of image `index`'s own, as a place in `folder`; u: in [0, 1)."""
        first, end = self.starts[index : index + 2].tolist()
        return int(first + u * (end - first))

    def pixels(self, place: int, *, flipped: bool, crop: float) -> Tensor:
        """Read a condition: (H, W, 3) uint8. ValueError names a damaged one."""
        item = self.plan.item(place, u=crop, flip=flipped)
        return torch.from_numpy(np.array(load_companion(self.folder, item, is_mask=False)))

    def mask(self, place: int, *, flipped: bool, crop: float) -> np.ndarray:
        """Read an inpainting mask: (H, W) uint8, 1 where hidden. ValueError names a damaged one."""
        item = self.plan.item(place, u=crop, flip=flipped)
        mask = load_companion(self.folder, item, is_mask=True)
        return (np.asarray(mask) >= 128).astype(np.uint8)


@dataclass(frozen=True)
class ConditionMaps:
    """Conditions at the size of latents, decoded and cropped when one is read; as masks.Masks.

    kind: "depth" has one channel in [0, 1], "upscale" RGB in [-1, 1]. factor: the VAE's.
    """

    folder: Folder
    plan: CropPlan
    factor: int
    kind: MapKind

    @property
    def channels(self) -> int:
        """Channels of a map."""
        return 1 if self.kind == "depth" else 3

    def __len__(self) -> int:
        return len(self.folder)

    def mask(self, index: int, *, flipped: bool, crop: float) -> Tensor:
        """Return the map of record `index`: (k, h, w) float32. ValueError names a damaged file."""
        found = self.latent_mask(self.plan.item(index, u=crop, flip=False), digest=None)
        return found.flip(-1) if flipped else found

    def latent_mask(self, item: Item, *, digest: bytes | None) -> Tensor:
        """Decode one crop, not mirrored: (k, h, w). digest: of `digests`, to notice a change."""
        image = load_companion(
            self.folder, item, is_mask=False, digest=digest, enlarges_by_pixels=self.channels == 3
        )
        pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)  # (3, H, W)
        if self.kind == "upscale":
            return F.avg_pool2d(pixels / 127.5 - 1, self.factor)
        grey = torch.from_numpy(np.array(image.convert("L"), np.float32)) / 255
        size = (item.height // self.factor, item.width // self.factor)
        small = F.interpolate(grey[None, None], size=size, mode="bicubic", align_corners=False)
        return small[0]

    def key_base(self) -> dict[str, Any]:
        """Return what the cache's keys of all maps share."""
        return {"condition": self.kind, "cell": self.factor}

    def digests(self, index: ScanIndex) -> np.ndarray:
        """Return a hash of each map's file and of its image's size: (N, 32) uint8."""
        found = image_hashes(self.folder, index=index)
        both = zip(found, self.folder.widths, self.folder.heights, strict=True)
        keys = b"".join(_with_size(digest.tobytes(), int(w), int(h)) for digest, w, h in both)
        return np.frombuffer(keys, np.uint8).reshape(-1, 32)


def load_companion(
    folder: Folder,
    item: Item,
    *,
    is_mask: bool,
    digest: bytes | None = None,
    enlarges_by_pixels: bool = False,
) -> Image.Image:
    """Decode a file that belongs to an image, as large as that is, and crop it: RGB, or "L".

    digest: as of `ConditionMaps.digests`. enlarges_by_pixels: repeat the pixels of a smaller file,
    so that their means are the file's again. ValueError names a file that cannot be read.
    """
    record = folder[item.index]
    size = (record.width, record.height)
    try:
        data = folder.read_bytes(item.index)
        if digest is not None and _with_size(image_digest(data), *size) != digest:
            raise ValueError(f"{record.path} changes while it is read; start again")
        file = io.BytesIO(data)
        image = load_mask(file) if is_mask else load_image(file, background=BLACK)
    except (ImageError, OSError) as error:
        raise ValueError(f"{record.path} cannot be read: {error}") from error
    smooth = Image.Resampling.BILINEAR if is_mask else Image.Resampling.BICUBIC
    if image.size != size:
        repeats = enlarges_by_pixels and image.width < size[0]
        image = image.resize(size, Image.Resampling.BOX if repeats else smooth)
    height, width = item.height, item.width
    return resize_and_crop(
        image, height=height, width=width, crop=item.crop, flip=item.flip, resample=smooth
    ).image


def _with_size(digest: bytes, width: int, height: int) -> bytes:
    return hashlib.sha256(digest + f"{width} x {height}".encode()).digest()
