"""An SDXL-shaped model of a few thousand parameters, made by diffusers: two text encoders, a pooled
projection, and sizes next to the prompt.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from fakes_pipeline import tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from latentdiff.pipeline import LatentDiffPipeline

WIDTHS = (16, 24)  # of the two text encoders
POOLED = 20


def tiny_tokenizer_2() -> CLIPTokenizer:
    """The same vocabulary, padded by token 0 as SDXL's second tokenizer is."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def tiny_text_encoder_2(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTHS[1],
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=POOLED,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    return CLIPTextModelWithProjection(config).eval()


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": sum(WIDTHS),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED + 6 * 8,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
    }
    return tiny_unet(**settings | changes)


def sdxl_components(**changes: Any) -> dict[str, Any]:
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer_2()
    parts: dict[str, Any] = {
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "text_encoder_2": tiny_text_encoder_2(tokenizer_2),
        "tokenizer_2": tokenizer_2,
        "unet": sdxl_unet(),
        "scheduler": sdxl_scheduler(),
    }
    return parts | changes


def sdxl_scheduler(name: str = "EulerDiscreteScheduler", **settings: Any) -> Any:
    """One of diffusers' schedulers with the noise schedule of SDXL."""
    config = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    ).config
    more = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    return getattr(diffusers, name).from_config(config, **more | settings)


def sdxl_pipeline(**changes: Any) -> LatentDiffPipeline:
    pipe = LatentDiffPipeline(**sdxl_components(**changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_sdxl(cls: Any = StableDiffusionXLPipeline, **changes: Any) -> Any:
    pipe = cls(**sdxl_components(**changes), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


STOCK_BY_KIND = {
    "text": StableDiffusionXLPipeline,
    "image": StableDiffusionXLImg2ImgPipeline,
    "mask": StableDiffusionXLInpaintPipeline,
}
