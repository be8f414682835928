"""A whole open_clip CLIP as transformers' CLIPModel: both towers, the projections, the scale.

Answers for the exact renaming of the weights of a vision transformer (Radford et al. 2021). The
text tower is text_open_clip's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from latentdiff.text_open_clip import block_weights, from_open_clip


def clip_from_open_clip(model: Any, *, eos_token_id: int | None = None) -> CLIPModel:
    """Convert an open_clip model; its pictures' and texts' embeddings equal open_clip's own.

    eos_token_id: the end token of the tokenizer, as for `from_open_clip`. ValueError names what
    makes either tower unfit: no plain vision transformer with a class token, for one.
    """
    text = from_open_clip(model, eos_token_id=eos_token_id)
    tower = model.visual
    if problem := _problem(tower):
        raise ValueError(
            f"the picture tower ({type(tower).__name__}) cannot become a CLIPVisionModel: {problem}"
        )
    config = CLIPConfig(
        text_config=text.config.to_dict(),
        vision_config=_vision_config(tower).to_dict(),
        projection_dim=tower.proj.shape[1],
    )
    converted = CLIPModel(config).eval()
    weights = {f"vision_model.{name}": tensor for name, tensor in _vision_weights(tower).items()}
    for name, tensor in text.state_dict().items():
        weights[f"text_model.{name.removeprefix('text_model.')}"] = tensor
    weights["visual_projection.weight"] = tower.proj.T
    weights["text_projection.weight"] = getattr(model, "text", model).text_projection.T
    weights["logit_scale"] = model.logit_scale
    weights = {
        name.replace("text_model.text_model.", "text_model."): w for name, w in weights.items()
    }
    with torch.no_grad():
        converted.load_state_dict({name: w.detach().clone() for name, w in weights.items()})
    return converted


def _problem(tower: Any) -> str:
    """Say what a CLIPVisionModel cannot compute; empty when it can."""
    if not hasattr(tower, "conv1") or getattr(tower, "proj", None) is None:
        return "it is no vision transformer with a linear projection"
    if isinstance(tower.ln_pre, nn.Identity):
        return "it has no norm before its first layer"
    if tower.attn_pool is not None or tower.pool_type != "tok" or tower.final_ln_after_pool:
        return f"it pools by {tower.pool_type} and not by its class token"
    kinds = {type(block).__name__ for block in tower.transformer.resblocks}
    return "" if kinds == {"ResidualAttentionBlock"} else f"its blocks are {sorted(kinds)}"


def _vision_config(tower: Any) -> CLIPVisionConfig:
    block = tower.transformer.resblocks[0]
    quick = type(block.mlp.gelu).__name__ == "QuickGELU"
    return CLIPVisionConfig(
        hidden_size=tower.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(tower.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=tower.image_size[0],
        patch_size=tower.conv1.kernel_size[0],
        projection_dim=tower.proj.shape[1],
        hidden_act="quick_gelu" if quick else "gelu",
        layer_norm_eps=tower.ln_post.eps,
    )


def _vision_weights(tower: Any) -> dict[str, Tensor]:
    weights = {
        "embeddings.class_embedding": tower.class_embedding,
        "embeddings.patch_embedding.weight": tower.conv1.weight,
        "embeddings.position_embedding.weight": tower.positional_embedding,
        "pre_layrnorm.weight": tower.ln_pre.weight,  # transformers spells it so
        "pre_layrnorm.bias": tower.ln_pre.bias,
        "post_layernorm.weight": tower.ln_post.weight,
        "post_layernorm.bias": tower.ln_post.bias,
    }
    for index, block in enumerate(tower.transformer.resblocks):
        prefix = f"encoder.layers.{index}."
        weights |= {prefix + name: tensor for name, tensor in block_weights(block).items()}
    return weights
