"""The models of an SDXL of a few thousand parameters, and what its files hold by other programs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from fakes_pipeline import tiny_tokenizer, tiny_unet, tiny_vae
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WIDTHS = (16, 24)  # of the text encoders
POOLED = 20
TIME_IDS = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]])


def tiny_sdxl_unet(**changes: Any) -> Any:
    """A U-Net with SDXL's layout: no attention on the finest level, two blocks on a level."""
    return tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED,
        **changes,
    )


def tiny_sdxl_parts(**changes: Any) -> dict[str, Any]:
    """Return the components of StableDiffusionXLPipeline by name."""
    tokenizer, second = tiny_tokenizer(), tiny_tokenizer()
    second.pad_token = second.convert_ids_to_tokens(0)
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = []
    for k, cls in enumerate(classes):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTHS[k],
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act=("quick_gelu", "gelu")[k],
            projection_dim=POOLED,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=(tokenizer.pad_token_id, 0)[k],
        )
        torch.manual_seed(10 + k)
        encoders.append(cls(config).eval())
    parts: dict[str, Any] = {
        "unet": tiny_sdxl_unet(),
        "vae": tiny_vae(),
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
        "tokenizer": tokenizer,
        "tokenizer_2": second,
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    }
    return parts | changes


def stock_sdxl(**changes: Any) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline(**tiny_sdxl_parts(**changes), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sdxl_outputs(pipe: Any) -> Tensor:
    """Return what both text encoders and the U-Net make of fixed inputs, in one vector."""
    ids = torch.arange(16)[None]
    first = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    second = pipe.text_encoder_2(ids, output_hidden_states=True)
    embeds = torch.cat([first, second.hidden_states[-2]], dim=-1)
    xt = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    added = {"text_embeds": second.text_embeds, "time_ids": TIME_IDS}
    eps = pipe.unet(xt, 500, embeds, added_cond_kwargs=added).sample
    return torch.cat([embeds.flatten(), second.text_embeds.flatten(), eps.flatten()])


def layer_of(pipe: Any, part: str, path: str) -> nn.Linear | nn.Conv2d:
    """Return a layer by the path that it has in files, with text_model. in either text encoder."""
    module = getattr(pipe, part)
    bare = path.removeprefix("text_model.")
    return module.get_submodule(path if hasattr(module, "text_model") else bare)  # type: ignore[return-value]  # a layer with a weight
