"""The real classes with a few thousand parameters, and the folder they make."""

from pathlib import Path

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff.models.build import build_text_encoder, build_unet, build_vae, make_ddpm_scheduler
from latentdiff.models.components import Components

CAPTIONS = [
    "a red circle on a blue background",
    "a green square on a white background",
    "two small yellow triangles",
    "a photo of a cat",
]
WORLD = [
    "",
    "naïve café — ½ price",
    "数字 7 🎈",
    "don't   STOP!!",
    "\t\n",
    "<b>&amp;</b>",
    "İstanbul",
]
LONG = "A Red circle, " * 10 + "and the END"


def make_vae(*, scaling_factor: float = 0.5) -> AutoencoderKL:
    """A VAE of factor 4 and 4 latent channels."""
    vae = build_vae(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4)
    vae.register_to_config(scaling_factor=scaling_factor)
    return vae.eval()


def make_tiny_vae() -> AutoencoderTiny:
    """An AutoencoderTiny of factor 4 and 4 latent channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()


def make_unet(*, channels: int = 4, cross_attention_dim: int = 16) -> UNet2DConditionModel:
    """A U-Net of factor 2, for latents of 8 x 8."""
    return build_unet(
        sample_size=8,
        in_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        head_dim=8,
        norm_num_groups=4,
    ).eval()


def make_text_encoder(tokenizer: CLIPTokenizer, *, width: int = 16) -> CLIPTextModel:
    """A text encoder of two layers."""
    return build_text_encoder(tokenizer, width=width, num_layers=2, num_heads=2).eval()


def make_components(tokenizer: CLIPTokenizer) -> Components:
    """A whole model, its images 32 x 32."""
    return Components(
        unet=make_unet(),
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=make_ddpm_scheduler(),
    )


def save_folder(components: Components, path: Path) -> None:
    """Write a folder in Stable Diffusion's format with stock diffusers alone."""
    pipeline = StableDiffusionPipeline(
        unet=components.unet,
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        scheduler=components.scheduler,
        safety_checker=components.safety_checker,
        feature_extractor=components.feature_extractor,
        image_encoder=components.image_encoder,
        requires_safety_checker=components.safety_checker is not None,
    )
    pipeline.save_pretrained(path)
