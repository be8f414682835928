"""A Stable-Diffusion-shaped model of a few thousand parameters, for the pipeline's tests."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from latentdiff.models.build import make_ddpm_scheduler
from latentdiff.models.text import train_tokenizer
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.model_info import ModelInfo

WORDS = ["a red heart", "a green apple on a table", "the yellow face of a cat", "blue sea, sky"]
SIZE = 32


@functools.cache
def _trained_tokenizer() -> CLIPTokenizer:
    return train_tokenizer(WORDS, vocab_size=600, max_length=16)


def tiny_tokenizer() -> CLIPTokenizer:
    return copy.deepcopy(_trained_tokenizer())


def tiny_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return CLIPTextModel(config).eval()


def tiny_unet(
    *, in_channels: int = 4, out_channels: int = 4, **changes: Any
) -> UNet2DConditionModel:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "sample_size": SIZE // 4,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**settings | changes).eval()


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=0.5,
    ).eval()


def tiny_safety_checker() -> dict[str, Any]:
    """Return a safety checker and its feature extractor by their component names."""
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = CLIPConfig(
        vision_config=layers | {"num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        text_config=layers | {"num_attention_heads": 2, "vocab_size": 8},
        projection_dim=8,
    )
    size = {"height": 32, "width": 32}
    return {
        "safety_checker": StableDiffusionSafetyChecker(config).eval(),
        "feature_extractor": CLIPImageProcessor(size=size, crop_size=size),
    }


def tiny_components(**changes: Any) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    components: dict[str, Any] = {
        "vae": tiny_vae(),
        "text_encoder": tiny_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": tiny_unet(),
        "scheduler": make_ddpm_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
    }
    return components | changes


def tiny_pipeline(**changes: Any) -> LatentDiffPipeline:
    pipe = LatentDiffPipeline(**tiny_components(**changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler.from_config(make_ddpm_scheduler().config, **changes)


def lora_weights():
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = tiny_unet()
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet).items()}


def sd1_shaped(**changes):
    """A pipeline of Stable Diffusion 1's layout and the tiny fakes' widths."""
    parts = tiny_components(unet=tiny_unet(attention_head_dim=2), **changes)
    parts["text_encoder"].config.hidden_act = "quick_gelu"
    return LatentDiffPipeline(**parts)


CHANNELS = {"inpaint": 9, "instruct_pix2pix": 8, "upscale": 7, "depth": 5}


def pipeline_of(kind: str, **info: Any) -> LatentDiffPipeline:
    """A model of a kind of image condition."""
    changes = {"num_class_embeds": 1000} if kind == "upscale" else {}
    unet = tiny_unet(in_channels=CHANNELS[kind], **changes)
    pipe = tiny_pipeline(unet=unet, scheduler=ddim())
    pipe.model_info = ModelInfo(condition_kind=kind, **info)
    return pipe
