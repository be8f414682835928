"""Settings of the networks: which to load, their shape from scratch, and the image they read.

The names of image conditions are those of diffusers' pipelines; what each kind reads is in
models/unet/image_conditions.py.
"""

from dataclasses import dataclass, field
from typing import Literal

from latentdiff.config.choices import ConditionKind, Degradation, InpaintMasks
from latentdiff.config.validation import (
    at_least,
    at_least_if_given,
    between,
    check_multiples,
    share,
    widths,
)

ConditionFiles = Literal["none", "size", "aspect"]

GROUPS = 32  # of the U-Net's group norms


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net trained from scratch."""

    block_out_channels: tuple[int, ...] = widths(default=(320, 640, 1280, 1280))
    """width of each level, finest first"""
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """which levels attend to the text"""
    layers_per_block: int = at_least(1, default=2)
    """residual blocks a level"""
    head_dim: int = at_least(1, default=64)
    """channels of one attention head"""
    dropout: float = share(default=0.0)
    """dropout inside the residual blocks"""


@dataclass(frozen=True)
class TextConfig:
    """A text encoder trained from scratch together with the U-Net."""

    width: int = at_least(1, default=256)
    """width of the prompt embeddings"""
    num_layers: int = at_least(1, default=4)
    """transformer layers"""
    num_heads: int = at_least(1, default=4)
    """attention heads"""
    vocab_size: int = at_least(514, default=2048)
    """entries of the byte-pair vocabulary trained on the captions (at least 514)"""
    max_tokens: int = at_least(3, default=32)
    """tokens a caption may have, start and end included"""


@dataclass(frozen=True)
class ModelConfig:
    """Sources of the components. `pretrained` fine-tunes; without it the U-Net is new."""

    pretrained: str = ""
    """a Stable-Diffusion-format folder or hub id to fine-tune, or "latentdiff-mini", the small
    model that ships; empty trains from scratch"""
    vae: str = ""
    """a VAE's folder; "latentdiff-mini" is that of the small model that ships with the package,
    with 8 latent channels; "latentdiff-vae" is the one it was made from, "latentdiff-vae-4ch" one
    with 4 for images of 64 px"""
    text_encoder: str = ""
    """a folder with text_encoder/ and tokenizer/, frozen unless train.train_text_encoder is true;
    empty trains a new text encoder"""
    clip_skip: int | None = at_least_if_given(0)
    """last layers of the text encoder that are skipped when captions are encoded, as diffusers
    counts: 1 is what A1111 and kohya call clip skip 2. null: as model.pretrained was trained, else
    0"""
    safety_checker: bool = True
    """with pretrained: keep the model's safety checker, if any; false leaves it out, unread"""
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextConfig = field(default_factory=TextConfig)
    fit_scaling_factor: bool = True
    """from scratch: set the VAE's scaling_factor to 1 / the measured std of the latents"""

    def check(self) -> None:
        """Raise ValueError for settings that exclude each other."""
        unet = self.unet
        if len(unet.block_out_channels) != len(unet.attention_levels):
            raise ValueError(
                f"model.unet.attention_levels has {len(unet.attention_levels)} entries, expected "
                f"one for each of the {len(unet.block_out_channels)} model.unet.block_out_channels"
            )
        if not self.pretrained:
            check_multiples("model.unet.block_out_channels", unet.block_out_channels, GROUPS)
            check_multiples("model.unet.block_out_channels", unet.block_out_channels, unet.head_dim)
            check_multiples("model.text.width", [self.text.width], self.text.num_heads)
        if self.clip_skip and not (self.pretrained or self.text_encoder):
            raise ValueError(
                f"model.clip_skip={self.clip_skip} skips layers of a text encoder that is trained "
                "already, and a new one has none to spare: set model.text.num_layers instead"
            )
        if self.pretrained and (self.vae or self.text_encoder):
            raise ValueError(
                "model.pretrained brings its own VAE and text encoder; leave model.vae and "
                "model.text_encoder empty, or model.pretrained for training from scratch"
            )


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
