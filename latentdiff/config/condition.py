"""Settings of image conditions: what the U-Net reads besides the noisy latents, and how it is made.

The names are those of diffusers' pipelines. What each kind reads is in models/image_conditions.py.
"""

from dataclasses import dataclass
from typing import Literal

from latentdiff.config.choices import ConditionKind, Degradation, InpaintMasks
from latentdiff.config.validation import between, share

ConditionFiles = Literal["none", "size", "aspect"]


@dataclass(frozen=True)
class ConditionConfig:
    """An image that conditions the model, as further channels of the U-Net's input."""

    kind: ConditionKind = "none"
    """none: text alone; inpaint: a mask and the rest of the image; instruct_pix2pix: an image to
    edit, with the caption as instruction; upscale: the image in low resolution; depth: a map of one
    channel, such as depth, edges or a layout. The widened U-Net begins as the model without it"""
    source: Literal["image", "file"] = "image"
    """upscale: low-resolution images are made from the images, by degradations, or are files"""
    masks: InpaintMasks = "random"
    """inpaint: what is hidden: boxes, strokes, either of them at random, or given files"""
    whole_masks: float = share(default=0.25)
    """inpaint: share of samples that are hidden whole, as Stable Diffusion's were"""
    degradations: tuple[Degradation, ...] = ("bicubic",)
    """upscale: how an image is made small, one of these at random each time: bicubic, area, jpeg
    (bicubic, then compressed) or blur (blurred, then bicubic)"""
    max_noise_level: int = between(0, 999, default=350)
    """upscale: the most noise that is added to the low-resolution image; the level is random, and
    the model is told"""
    dropout: float = share(default=0.1)
    """instruct_pix2pix: share of samples whose image is dropped, which image_guidance_scale needs;
    with diffusion.caption_dropout=0.1, 5 % lose the caption alone, 5 % the image and 5 % both"""

    @property
    def is_on(self) -> bool:
        """Whether the model reads an image condition."""
        return self.kind != "none"

    @property
    def dropout_share(self) -> float:
        """Share of samples whose condition is dropped."""
        return self.dropout if self.kind == "instruct_pix2pix" else 0.0

    @property
    def files(self) -> ConditionFiles:
        """How a condition file must fit its image; "none" where none is read."""
        if self.kind == "instruct_pix2pix":
            return "size"
        reads_any = self.kind == "depth" or (self.kind == "upscale" and self.source == "file")
        return "aspect" if reads_any else "none"

    @property
    def reads_mask_files(self) -> bool:
        """Whether inpainting masks come from files."""
        return self.kind == "inpaint" and self.masks == "file"

    def check(self) -> None:
        """Raise ValueError for settings that exclude each other."""
        if self.kind == "upscale" and self.source == "image" and not self.degradations:
            raise ValueError(
                'condition.degradations is empty, expected names such as ["bicubic", "jpeg"]'
            )
