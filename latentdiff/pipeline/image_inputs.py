"""The caller's images and masks, checked and read before any compute.

PIL images (turned upright by their EXIF tag, colors converted to sRGB by their profile,
transparency on white), arrays (H, W, 3) or
(B, H, W, 3) and tensors (3, H, W) or (B, 3, H, W), floating in [0, 1] as `output_type="np"` and
`"pt"` give them or in [-1, 1] as a VAE does, arrays of uint8 too; masks have one channel or none,
lie in [0, 1] and are white where to paint.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor

from latentdiff.icc import profile_fault, to_srgb
from latentdiff.image_io import ImageError, to_rgb
from latentdiff.pipeline import checks
from latentdiff.pipeline.conditioning.mask_crop import MaskCrop

ImageList: TypeAlias = list[Image.Image] | Tensor
Color: TypeAlias = tuple[int, int, int]

DEFAULT_STRENGTH = 0.8
MAX_PADDING = 4096  # pixels
OVERSHOOT = 0.1  # pixels that lie less below 0 may be those of an image in [0, 1] that was resized
WHITE, BLACK = (255, 255, 255), (0, 0, 0)  # behind images to start from, and behind conditions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageInputs:
    """The images and masks of a call, each a list of PIL images or a tensor (B, C, H, W).

    strength: the part of the chain that is denoised, None without an image. padding_mask_crop: the
    part around the mask alone is made, with so many pixels around it, and pasted back.
    keep_unmasked: a U-Net that reads the mask keeps the latents of what is not masked.
    """

    image: ImageList | None = None
    mask: ImageList | None = None
    strength: float | None = None
    padding_mask_crop: int | None = None
    keep_unmasked: bool = False

    def size(self, *, multiple: int) -> tuple[int, int] | None:
        """Return (height, width) of the first image, cut to a multiple; None for the trained."""
        if self.image is None or self.padding_mask_crop is not None:
            return None
        height, width = self.all_sizes()[0]
        return height // multiple * multiple, width // multiple * multiple

    def all_sizes(self) -> list[tuple[int, int]]:
        """Return (height, width) of each image."""
        return _sizes(self.image)

    def digests(self) -> dict[str, list[str]]:
        """Return 16 hex digits of each image and mask as it was read, by argument; {} for none."""
        given = {"image": self.image, "mask_image": self.mask}
        return {
            name: [_digest(one) for one in images]
            for name, images in given.items()
            if images is not None
        }

    def pixels(self, height: int, width: int, *, num_images: int) -> Tensor:
        """Return images as (num_images, 3, height, width) in [-1, 1], resized where needed."""
        processor = VaeImageProcessor(vae_scale_factor=1, vae_latent_channels=0)
        image = self.image if (crop := self._crop) is None else crop.cropped(height, width)[0]
        pixels: Tensor = processor.preprocess(image, height=height, width=width)
        return _repeat(pixels.float(), num_images)

    def values(self, *, num_images: int) -> Tensor:
        """Return tensors as they are, (num_images, C, H, W)."""
        assert isinstance(self.image, Tensor)
        return _repeat(self.image, num_images)

    def binary_mask(self, height: int, width: int, *, num_images: int) -> Tensor | None:
        """Return masks as (num_images, 1, height, width) of 0 and 1."""
        if self.mask is None:
            return None
        processor = VaeImageProcessor(
            vae_scale_factor=1,
            vae_latent_channels=0,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )
        mask = self.mask[:, 0] if isinstance(self.mask, Tensor) else self.mask
        mask = mask if (crop := self._crop) is None else crop.cropped(height, width)[1]
        return _repeat(processor.preprocess(mask, height=height, width=width).float(), num_images)

    def pasted(self, made: list[Image.Image]) -> list[Image.Image]:
        """Return images as they were made, or what was made around masks pasted into its image."""
        return made if (crop := self._crop) is None else crop.pasted(made)

    @property
    def _crop(self) -> MaskCrop | None:
        """The parts around the masks, None where whole images are made."""
        if self.padding_mask_crop is None:
            return None
        assert isinstance(self.image, list)
        assert isinstance(self.mask, list)
        num = max(len(self.image), len(self.mask))
        images = [self.image[k * len(self.image) // num] for k in range(num)]
        masks = [self.mask[k * len(self.mask) // num] for k in range(num)]
        pairs = zip(images, masks, strict=True)
        alike = [mask.resize(image.size) for image, mask in pairs]
        return MaskCrop(images, alike, self.padding_mask_crop)


def read_image_inputs(
    image: object,
    mask_image: object,
    *,
    strength: object,
    num_prompts: int,
    num_images: int,
    needs_mask: bool,
    padding_mask_crop: object = None,
    keep_unmasked: object = False,
) -> ImageInputs:
    """Read images and masks: one for all, one a prompt, or one for each image to be made.

    strength: in (0, 1]; None is 1 with a mask and 0.8 without. padding_mask_crop: pixels around
    masks, None for whole images. keep_unmasked: True or False. Raises ValueError naming what is
    missing, of the wrong kind, shape or range.
    """
    if padding_mask_crop is not None and mask_image is None:
        raise ValueError("padding_mask_crop needs mask_image, around which it crops; pass both")
    keeps = checks.true_or_false("keep_unmasked", keep_unmasked)
    if keeps and mask_image is None:
        raise ValueError("keep_unmasked needs mask_image, whose black part it keeps; pass both")
    if mask_image is not None and image is None:
        raise ValueError("mask_image needs the image that it belongs to; pass image too")
    if needs_mask and (image is None or mask_image is None):
        missing = "image and mask_image" if image is None else "mask_image"
        raise ValueError(f"this is an inpainting model: its U-Net also reads {missing}; pass both")
    if image is None:
        if strength is not None:
            raise ValueError(f"strength={strength!r} needs an image to start from; pass image too")
        return ImageInputs()
    if strength is None:
        strength = DEFAULT_STRENGTH if mask_image is None else 1.0
    given = ImageInputs(
        read_images("image", image),
        _read("mask_image", mask_image, 1),
        checks.in_range("strength", strength, low=0.0, high=1.0),
        keep_unmasked=keeps,
    )
    for name, images in (("image", given.image), ("mask_image", given.mask)):
        check_number(name, images, num_prompts=num_prompts, num_images=num_images)
    _check_mask_shape(given)
    if padding_mask_crop is None:
        return given
    return replace(given, padding_mask_crop=_read_padding(padding_mask_crop, given))


def _read_padding(value: object, given: ImageInputs) -> int:
    """Return padding_mask_crop; ValueError for a bad one, for arrays and for masks of black."""
    padding = checks.in_range("padding_mask_crop", value, low=0, high=MAX_PADDING)
    if padding != int(padding):
        raise ValueError(f"padding_mask_crop must be a whole number of pixels, got {value!r}")
    if isinstance(given.image, Tensor) or isinstance(given.mask, Tensor):
        raise ValueError(
            "padding_mask_crop crops PIL images, and image or mask_image is an array; pass both as "
            "PIL images"
        )
    if any(mask.convert("L").getextrema()[1] == 0 for mask in given.mask or []):
        raise ValueError("mask_image is black all over: nothing is to be painted there")
    return int(padding)


def read_images(name: str, value: object, *, background: Color = WHITE) -> ImageList | None:
    """Read images as PIL images in sRGB, or tensors in [0, 1]; ValueError names a bad one."""
    return _to_unit_range(_read(name, value, 3, background=background))


def check_number(name: str, images: ImageList | None, *, num_prompts: int, num_images: int) -> None:
    """Raise ValueError unless there is one for all, one a prompt, or one for each image to make."""
    if images is not None and len(images) not in (1, num_prompts, num_images):
        raise ValueError(
            f"{name} has {len(images)} images for {num_prompts} prompts and {num_images} "
            "images to make; pass one for all, one a prompt, or one for each"
        )


def _check_mask_shape(given: ImageInputs) -> None:
    """Raise ValueError for a mask of another shape than its image; a smaller one may be alike."""
    images, masks = _sizes(given.image), _sizes(given.mask)
    num = max(len(images), len(masks)) if masks else 0
    for k in range(num):
        height, width = images[k * len(images) // num]
        rows, columns = masks[k * len(masks) // num]
        if abs(height * columns - width * rows) > max(height, width, rows, columns):
            name = "mask_image" if len(masks) == 1 else f"mask_image[{k * len(masks) // num}]"
            raise ValueError(
                f"{name} is {rows} x {columns} pixels (height x width), expected the size of "
                f"image, {height} x {width}; crop both alike"
            )


def _sizes(images: ImageList | None) -> list[tuple[int, int]]:
    if images is None:
        return []
    if isinstance(images, Tensor):
        return [(int(images.shape[-2]), int(images.shape[-1]))] * len(images)
    return [(one.height, one.width) for one in images]


def _read(
    name: str, value: object, channels: int, *, background: Color = WHITE
) -> ImageList | None:
    if value is None:
        return None
    if isinstance(value, Image.Image):
        return [_as_seen(name, value, is_mask=channels == 1, background=background)]
    if isinstance(value, (list, tuple)):
        return _read_list(name, list(value), channels, background=background)
    if isinstance(value, np.ndarray):
        value = _from_array(name, value, channels)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a PIL image, an array, a tensor or a list of one of them, got "
            f"{type(value).__name__}"
        )
    return _check_tensor(name, value, channels)


def _read_list(name: str, values: list[Any], channels: int, *, background: Color) -> ImageList:
    if not values:
        raise ValueError(f"{name} is an empty list; pass at least one image")
    parts = [
        _read(f"{name}[{index}]", value, channels, background=background)
        for index, value in enumerate(values)
    ]
    if all(isinstance(part, list) for part in parts):
        return [image for part in parts if part is not None for image in part]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if channels == 3 and 0 < sum(bool(tensor.min() < 0) for tensor in tensors) < len(tensors):
        raise ValueError(
            f"{name} must hold images of one range: some have values below 0, as in [-1, 1], and "
            "others none, as in [0, 1]; convert all to [0, 1]"
        )
    if len(tensors) < len(parts) or len({tensor.shape[-2:] for tensor in tensors}) > 1:
        raise ValueError(f"{name} must hold images of one kind, and arrays of one size")
    return torch.cat(tensors)


def _as_seen(name: str, image: Image.Image, *, is_mask: bool, background: Color) -> Image.Image:
    """Return an image in sRGB; the values of a mask are no colors and stay as they are."""
    if 0 in image.size:
        raise ValueError(f"{name} is {image.width} x {image.height} pixels, expected some")
    try:
        upright = ImageOps.exif_transpose(image)
        if is_mask:
            return to_rgb(upright, background=background)
        if fault := profile_fault(upright):
            logger.warning("%s is read as sRGB: %s", name, fault)
        return to_rgb(to_srgb(upright), background=background)
    except (ImageError, OSError) as error:
        raise ValueError(f"{name} cannot be used: {error}") from error


def _from_array(name: str, value: np.ndarray[Any, Any], channels: int) -> Tensor:
    """Return (B, C, H, W) in [0, 1] for (H, W, C), (B, H, W, C), a mask's (H, W) or (B, H, W)."""
    if value.dtype == np.uint8:
        value = value.astype(np.float32) / 255
    if value.dtype.kind != "f":
        raise ValueError(f"{name} must be an array of uint8 or floating point, got {value.dtype}")
    if channels == 1 and value.ndim in (2, 3) and (value.ndim == 2 or value.shape[-1] != 1):
        value = value[..., None]
    if value.ndim == 3:
        value = value[None]
    if value.ndim != 4:
        raise ValueError(f"{name} must have shape (H, W, {channels}), got {value.shape}")
    return torch.from_numpy(np.ascontiguousarray(value.transpose(0, 3, 1, 2)))


def _check_tensor(name: str, value: Tensor, channels: int) -> Tensor:
    """Return (B, C, H, W), floating, in [0, 1], or an image's in [-1, 1]."""
    got = f"got {value.dtype} of shape {tuple(value.shape)}"
    if channels == 1 and value.ndim == 2:
        value = value[None]
    if value.ndim == 3:
        value = value[:, None] if channels == 1 else value[None]
    if not value.is_floating_point() or value.ndim != 4 or 0 in value.shape:
        raise ValueError(f"{name} must be a floating tensor (B, {channels}, H, W), {got}")
    if value.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, {got}")
    low, high = value.min().item(), value.max().item()
    ranges = "[0, 1] or [-1, 1]" if channels == 3 else "[0, 1]"
    if not (low >= (-1 if channels == 3 else 0) and high <= 1):  # NaN too
        raise ValueError(f"{name} must lie in {ranges}, got values from {low:g} to {high:g}")
    if -OVERSHOOT < low < 0:
        raise ValueError(
            f"{name} must lie in {ranges}, and its least value {low:g} fits both: clamp it to "
            "[0, 1], or if it is an image in [-1, 1] pass image / 2 + 0.5"
        )
    return value.detach().cpu()


def _to_unit_range(images: ImageList | None) -> ImageList | None:
    """Return images in [0, 1]; a tensor with values below 0 is one in [-1, 1]."""
    if isinstance(images, Tensor) and bool(images.min() < 0):
        return images / 2 + 0.5
    return images


def _digest(image: Image.Image | Tensor) -> str:
    if isinstance(image, Tensor):
        kind, content = tuple(image.shape), image.float().numpy().tobytes()
    else:
        kind, content = image.size, image.tobytes()
    return hashlib.sha256(f"{kind}|".encode() + content).hexdigest()[:16]


def _repeat(batch: Tensor, num_images: int) -> Tensor:
    return batch.repeat_interleave(num_images // len(batch), dim=0)
