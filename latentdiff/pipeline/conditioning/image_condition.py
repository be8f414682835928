"""The image condition of a call: read, checked, and made into what a U-Net or a ControlNet reads.

Each kind takes one image, an image to edit, in low resolution, or a map; ControlNets take one each.
Its channels are those of models/unet/image_conditions.py. Does not answer for: inpainting, whose
image and mask are also what the chain starts from (initial_latents.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageOps
from torch import Tensor

from latentdiff.diffusion.ddpm import Generators
from latentdiff.icc import to_srgb
from latentdiff.image_io import to_rgb
from latentdiff.models.compatibility import CONDITION_KINDS, CONTROLNET
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.models.unet.controlnet import control_residuals
from latentdiff.models.unet.image_conditions import (
    depth_channels,
    instruct_pix2pix_channels,
    upscale_channels,
)
from latentdiff.pipeline import checks
from latentdiff.pipeline.files.model_info import (
    DEFAULT_NOISE_LEVEL,
    MAX_NOISE_LEVEL,
    ModelInfo,
)
from latentdiff.pipeline.image_inputs import (
    BLACK,
    ImageInputs,
    ImageList,
    check_number,
    read_images,
)
from latentdiff.pipeline.initial_latents import randn

MAX_CONTROL_SCALE = 10.0


@dataclass(frozen=True)
class ConditionInputs:
    """The condition of a call. kind: of CONDITION_KINDS, "controlnet" or "none".

    images: one a ControlNet, or one. noise_level: of an image in low resolution. scales: how much
    of each ControlNet is added.
    """

    kind: str = "none"
    images: tuple[ImageInputs, ...] = ()
    noise_level: int | None = None
    scales: tuple[float, ...] = ()

    def size(self, *, multiple: int) -> tuple[int, int] | None:
        """Return (height, width) of the image that it asks for, None where there is none."""
        if not self.images:
            return None
        if self.kind != "upscale":
            return self.images[0].size(multiple=multiple)
        height, width = self.images[0].all_sizes()[0]
        return height * multiple, width * multiple

    def check_size(self, height: int, width: int, *, factor: int) -> None:
        """Raise ValueError where a condition has another shape than the image, in pixels."""
        for k, images in enumerate(self.images):
            name = "condition" if len(self.images) == 1 else f"condition[{k}]"
            scale = factor if self.kind == "upscale" else 1
            for own in images.all_sizes():
                is_same = own == (height // scale, width // scale)
                if is_same or (scale == 1 and _is_of_shape(own, (height, width), factor=factor)):
                    continue
                expected = f"{height // scale} x {width // scale}, for an image of"
                raise ValueError(
                    f"{name} is {own[0]} x {own[1]} pixels (height x width), expected "
                    f"{expected if scale > 1 else 'the shape of'} {height} x {width}; leave out "
                    "height and width, or crop it"
                )

    def settings(self) -> dict[str, Any]:
        """Return the arguments that PNG files state."""
        scales = list(self.scales) if len(self.scales) > 1 else (*self.scales, None)[0]
        return {"noise_level": self.noise_level, "controlnet_conditioning_scale": scales}

    def digests(self) -> dict[str, list[str]]:
        """Return digests of the images, as ImageInputs.digests does."""
        names = ["condition", *(f"condition_{k}" for k in range(1, len(self.images)))]
        pairs = zip(names, self.images, strict=False)
        return {name: one.digests()["image"] for name, one in pairs}

    def tensors(
        self, codec: LatentCodec, *, shape: Sequence[int], generator: Generators, device: Any
    ) -> dict[str, Tensor]:
        """Return fields of a Conditioning of B images: condition, class_labels or control.

        shape: (B, C, h, w) of the latents.
        """
        if not self.images:
            return {}
        num, latent_size = shape[0], (int(shape[-2]), int(shape[-1]))
        rows, columns = (side * codec.factor for side in latent_size)
        if self.kind == CONTROLNET:
            given = [one.pixels(rows, columns, num_images=num) for one in self.images]
            return {"control": torch.cat(given, dim=1).to(device) / 2 + 0.5}
        (images,) = self.images
        if self.kind == "depth":
            maps = _map_values(images, (rows, columns), num_images=num)
            return {"condition": depth_channels(maps.to(device), latent_size)}
        if self.kind == "instruct_pix2pix":
            pixels = images.pixels(rows, columns, num_images=num).to(device)
            return {"condition": instruct_pix2pix_channels(codec, pixels)}
        low_res = images.pixels(*latent_size, num_images=num).to(device)
        level = torch.full((num,), self.noise_level or 0, device=device)
        noise = randn(low_res.shape, generator, device=device)
        return {"condition": upscale_channels(low_res, noise, level), "class_labels": level}


@dataclass(frozen=True)
class EncodedCondition(ConditionInputs):
    """The condition of one image, encoded already. fields: of a Conditioning, tensors (1, ...)."""

    fields: dict[str, Tensor] = field(default_factory=dict)

    def tensors(
        self, codec: LatentCodec, *, shape: Sequence[int], generator: Generators, device: Any
    ) -> dict[str, Tensor]:
        """Return the fields, each for B images."""
        return {name: torch.cat([x.to(device)] * shape[0]) for name, x in self.fields.items()}


@dataclass(frozen=True)
class ControlNets:
    """The ControlNets of one call and how much of each is added."""

    nets: tuple[ControlNetModel, ...] = ()
    scales: tuple[float, ...] = ()

    def residuals(
        self, xt: Tensor, t: Tensor, conditioning: Conditioning, *, num_images: int
    ) -> dict[str, Any]:
        """Return what they add to a U-Net's pass, as its keyword arguments.

        num_images: B; further rows before those have negative prompts.
        """
        if not self.nets:
            return {}
        num = len(xt) - num_images
        return control_residuals(
            self.nets, xt, t, conditioning, scales=self.scales, num_negative=num
        )


def read_condition(
    condition: object,
    *,
    kind: str,
    info: ModelInfo,
    num_controlnets: int,
    noise_level: object,
    scale: object,
    num_prompts: int,
    num_images: int,
    has_image: bool,
) -> ConditionInputs:
    """Read and check the condition of a model of a kind, with num_controlnets ControlNets.

    scale: controlnet_conditioning_scale. has_image: an image to start from is given. Raises
    ValueError naming what is missing, has no use, or is of the wrong kind, shape or range.
    """
    kind = CONTROLNET if num_controlnets else kind
    _check_use(condition, kind, noise_level=noise_level, scale=scale)
    if kind in ("none", "inpaint"):
        return ConditionInputs()
    if condition is None:
        hint = ", next to image, which is where the chain starts" if has_image else ""
        raise ValueError(f"condition is missing: {describe_kind(kind)}; pass condition{hint}")
    parts = [condition] if num_controlnets < 2 else _one_each(condition, num_controlnets)
    read = []
    for k, part in enumerate(parts):
        name = "condition" if len(parts) == 1 else f"condition[{k}]"
        images = read_maps(name, part) if kind == "depth" else read_rgb(name, part)
        check_number(name, images, num_prompts=num_prompts, num_images=num_images)
        read.append(ImageInputs(images))
    level = _read_level(noise_level, info) if kind == "upscale" else None
    scales = _read_scales(scale, num_controlnets) if kind == CONTROLNET else ()
    return ConditionInputs(kind, tuple(read), level, scales)


def _check_use(condition: object, kind: str, *, noise_level: object, scale: object) -> None:
    """Raise ValueError for an argument that a kind has no use for."""
    if noise_level is not None and kind != "upscale":
        raise ValueError(f"noise_level is read by upscalers alone, and {describe_kind(kind)}")
    if scale is not None and kind != CONTROLNET:
        raise ValueError(
            "controlnet_conditioning_scale needs a ControlNet, and none is loaded; leave it out, "
            "or load one"
        )
    if condition is not None and kind in ("none", "inpaint"):
        is_text = kind == "none"
        hint = "image to start from, or load a ControlNet" if is_text else "image and mask_image"
        raise ValueError(f"condition has no use here: {describe_kind(kind)}; pass {hint}")


def read_rgb(name: str, value: object) -> ImageList:
    """Read images in color as read_images does, clear parts black, as training reads them."""
    images = read_images(name, value, background=BLACK)
    assert images is not None
    return images


def read_maps(name: str, value: object) -> ImageList:
    """Read maps of one channel of any range, such as depth: tensors (B, 1, H, W), or PIL images.

    PIL images, arrays or tensors (H, W), (B, H, W) or (B, 1, H, W), arrays (H, W, 1) and
    (B, H, W, 1) too, or a list of one of these. ValueError names a bad one; three values a pixel
    are taken for colors, not for three maps.
    """
    if isinstance(value, Image.Image):
        return [_grey(name, value)]
    if isinstance(value, (list, tuple)) and value:
        maps = [read_maps(f"{name}[{k}]", one) for k, one in enumerate(value)]
        if all(isinstance(one, list) for one in maps):
            return [image for one in maps for image in one if isinstance(image, Image.Image)]
        tensors = [one for one in maps if isinstance(one, Tensor)]
        if len(tensors) < len(maps) or len({one.shape[-2:] for one in tensors}) > 1:
            raise ValueError(f"{name} must hold maps of one kind, and arrays of one size")
        return torch.cat(tensors)
    if isinstance(value, np.ndarray):
        _refuse_color(name, value.shape, axis=-1)
        value = value[..., 0] if value.ndim > 2 and value.shape[-1] == 1 else value
        value = torch.from_numpy(np.array(value, np.float32))
    elif isinstance(value, Tensor):
        _refuse_color(name, value.shape, axis=0)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a map of one channel: a PIL image, an array, a tensor or a list of "
            f"one of them, got {checks.kind(value)}"
        )
    read = value[None] if value.ndim == 2 else value
    read = read[:, None] if read.ndim == 3 else read
    if read.ndim != 4 or read.shape[1] != 1 or 0 in read.shape:
        raise ValueError(
            f"{name} must have one channel, (B, H, W) or (B, 1, H, W), got {tuple(value.shape)}"
        )
    if not bool(torch.isfinite(read).all()):
        raise ValueError(f"{name} holds NaN or Inf")
    return read.detach().cpu().float()


def _refuse_color(name: str, shape: Sequence[int], *, axis: int) -> None:
    """Raise ValueError for three dimensions that are those of an image in color."""
    if len(shape) == 3 and shape[axis] in ((3, 4) if axis else (3,)):
        raise ValueError(
            f"{name} has shape {tuple(shape)}, as an image in color, expected a map of one channel;"
            " make it grey, or pass maps as (B, 1, H, W)"
        )


def _grey(name: str, image: Image.Image) -> Image.Image:
    """Return a map in mode "L" or "F"; an image in color is read in grey, clear parts black."""
    if 0 in image.size:
        raise ValueError(f"{name} is {image.width} x {image.height} pixels, expected some")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return Image.fromarray(np.array(upright, np.float32))
    return to_rgb(to_srgb(upright), background=BLACK).convert("L")


def _map_values(images: ImageInputs, size: tuple[int, int], *, num_images: int) -> Tensor:
    """Return the values of maps (num_images, 1, H, W).

    PIL images are first made as large as the image, size (height, width), as in training; tensors
    stay as they are, as stock's depth_map does.
    """
    if isinstance(images.image, Tensor):
        return images.values(num_images=num_images)
    assert images.image is not None
    cubic = Image.Resampling.BICUBIC
    maps = [np.array(one.resize(size[::-1], cubic), np.float32) for one in images.image]
    return ImageInputs(torch.from_numpy(np.stack(maps))[:, None]).values(num_images=num_images)


def _one_each(condition: object, num: int) -> list[Any]:
    """Return the images of each ControlNet: one each, or of each prompt a list of one each.

    That is how diffusers nests lists.
    """
    parts = condition if isinstance(condition, (list, tuple)) else ()
    if not any(isinstance(part, (list, tuple)) for part in parts):
        return _of_length("condition", condition, num)
    rows = [
        _of_length(f"condition[{k}], of one prompt,", part, num) for k, part in enumerate(parts)
    ]
    return [list(images) for images in zip(*rows, strict=True)]


def _of_length(name: str, images: object, num: int) -> list[Any]:
    is_list = isinstance(images, (list, tuple))
    found = list(images) if isinstance(images, (list, tuple)) else []
    if len(found) != num:
        got = len(found) if is_list else checks.kind(images)
        raise ValueError(
            f"{name} must be a list of {num} images, one for each ControlNet, got {got}"
        )
    return found


def _read_level(value: object, info: ModelInfo) -> int:
    maximum = MAX_NOISE_LEVEL if info.max_noise_level is None else info.max_noise_level
    level = min(DEFAULT_NOISE_LEVEL, maximum) if value is None else value
    number = checks.in_range("noise_level", level, low=0, high=maximum)
    if number != int(number):
        raise ValueError(f"noise_level must be a whole number, got {value!r}")
    return int(number)


def _read_scales(value: object, num: int) -> tuple[float, ...]:
    values = list(value) if isinstance(value, (list, tuple)) else [1.0 if value is None else value]
    values = values * num if len(values) == 1 else values
    name = "controlnet_conditioning_scale"
    if len(values) != num:
        raise ValueError(f"{name} has {len(values)} numbers for {num} ControlNets; pass one each")
    limits = {"low": -MAX_CONTROL_SCALE, "high": MAX_CONTROL_SCALE}
    return tuple(checks.in_range(name, one, **limits) for one in values)


def _is_of_shape(own: tuple[int, int], size: tuple[int, int], *, factor: int) -> bool:
    """Return whether an image is of a shape, but for what is cut to a multiple of the factor."""
    times = own[1] * size[0] / size[1]
    return abs(times - own[0]) <= max(1.0, factor * own[0] / size[0])


def describe_kind(kind: str) -> str:
    """Return the start of a sentence on what a kind of CONDITION_KINDS reads, for messages."""
    if kind == CONTROLNET:
        return "a ControlNet reads an image"
    if kind == "none":
        return "this model reads text alone"
    return f"this model is of the kind {kind}: its U-Net also reads {CONDITION_KINDS[kind].reads}"


def with_condition(conditioning: Conditioning, given: dict[str, Tensor]) -> Conditioning:
    """Return the conditioning of B images, or of 2 B, with the condition of B images."""
    if not given:
        return conditioning
    times = len(conditioning) // len(next(iter(given.values())))
    return replace(conditioning, **{name: torch.cat([x] * times) for name, x in given.items()})
