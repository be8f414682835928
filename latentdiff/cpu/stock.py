"""The one test of whether a module of a U-Net is stock, so that faster code may stand for it.

A module is stock if its class is one of diffusers' or PyTorch's that the fast paths know, with the
settings they know, and if the same holds for all modules below it. LoRA layers, hooks, foreign
attention processors, dropout at work and replaced forward methods make a module other than stock.
"""

from __future__ import annotations

from typing import Any, Final

from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn

# The settings that a known module must have; a missing attribute counts as None.
ATTENTION: Final = {
    "residual_connection": False,
    "rescale_output_factor": 1.0,
    "scale_qk": True,
    "use_bias": False,
    "fused_projections": False,
    "group_norm": None,
    "spatial_norm": None,
    "norm_q": None,
    "norm_cross": None,
    "added_kv_proj_dim": None,
}
TRANSFORMER_BLOCK: Final = {
    "norm_type": "layer_norm",
    "only_cross_attention": False,
    "double_self_attention": False,
    "pos_embed": None,
    "fuser": None,
    "_chunk_size": None,
}
RESNET: Final = {
    "time_embedding_norm": "default",
    "skip_time_act": False,
    "output_scale_factor": 1.0,
    "upsample": None,
    "downsample": None,
}
KNOWN: Final[dict[type[nn.Module], dict[str, Any]]] = {
    UNet2DConditionModel: {},
    CrossAttnDownBlock2D: {},
    DownBlock2D: {},
    UNetMidBlock2DCrossAttn: {},
    CrossAttnUpBlock2D: {},
    UpBlock2D: {},
    ResnetBlock2D: RESNET,
    Transformer2DModel: {"is_input_continuous": True},
    BasicTransformerBlock: TRANSFORMER_BLOCK,
    Attention: ATTENTION,
    FeedForward: {},
    GEGLU: {},
    Downsample2D: {},
    Upsample2D: {},
    Timesteps: {},
    TimestepEmbedding: {},
    nn.ModuleList: {},
    nn.Conv2d: {"padding_mode": "zeros"},
    nn.Linear: {},
    nn.Embedding: {},
    nn.GroupNorm: {"affine": True},
    nn.LayerNorm: {"elementwise_affine": True},
    nn.SiLU: {},
    nn.Dropout: {},
}


def is_stock(module: nn.Module) -> bool:
    """Return whether a module and all modules below it are known and unchanged."""
    return all(_is_unchanged(one) for one in module.modules())


def _is_unchanged(module: Any) -> bool:
    wanted = KNOWN.get(type(module))
    if wanted is None or any(getattr(module, key, None) != value for key, value in wanted.items()):
        return False
    if module._forward_pre_hooks or module._forward_hooks or module._compiled_call_impl:
        return False
    if isinstance(module, nn.Dropout):
        return not (module.training and module.p > 0)
    if isinstance(module, FeedForward):
        return len(module.net) == 3 and type(module.net[0]) is GEGLU
    if isinstance(module, Attention) and not _attends_plainly(module):
        return False
    is_text_missing = isinstance(module, BasicTransformerBlock) and module.attn2 is None
    return not is_text_missing and "forward" not in vars(module)


def _attends_plainly(layer: Attention) -> bool:
    """Return whether a layer's attention is softmax(q k^T / sqrt(d)) v in the layer's dtype."""
    upcasts = layer.upcast_attention or layer.upcast_softmax
    processor = type(layer.processor)
    is_plain = processor is AttnProcessor2_0 or (processor is AttnProcessor and not upcasts)
    return is_plain and layer.to_out[0].bias is not None
