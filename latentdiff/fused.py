"""The U-Net's transformers in a few large steps, the same as diffusers' own up to rounding.

The weights stay theirs, and so do state dict, config and class. What is saved is many small
kernels: queries, keys and values come from one matrix product, short sequences attend by two
products and a softmax, a 1 x 1 convolution beside a change of layout is a product too
(fused_steps.py has the mathematics). A transformer that is not stock (LoRA, hooks, dropout at work,
another attention processor, a mask) goes the plain way. Measured on CPUs: docs/performance.md.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from latentdiff.fused_steps import Attend, FeedForward

LONG_SEQUENCE = 256  # cells above which torch's own attention kernel is faster


def fuse_transformers(unet: UNet2DConditionModel) -> None:
    """Let the U-Net's transformers take the large steps, wherever they are stock; again is safe."""
    for module in unet.modules():
        if type(module) is Transformer2DModel and module.is_input_continuous:
            vars(module).setdefault("forward", MethodType(_transform, module))


def unfuse_transformers(unet: UNet2DConditionModel) -> None:
    """Go back to diffusers' own modules."""
    for module in unet.modules():
        if type(module) is Transformer2DModel:
            vars(module).pop("forward", None)


def _transform(
    transformer: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    return_dict: bool = True,
    **plain: Any,
) -> Any:
    """Do what Transformer2DModel.forward does: x (B, C, h, w), text states (B, L, D)."""
    x, text = hidden_states, encoder_hidden_states
    is_asked_more = return_dict or any(value is not None for value in plain.values())
    if text is None or is_asked_more or not _is_stock(transformer):
        return Transformer2DModel.forward(transformer, x, text, return_dict=return_dict, **plain)
    batch, channels, height, width = x.shape
    rows = transformer.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    rows = _project(transformer.proj_in, rows)  # (B, h w, C)
    for block in transformer.transformer_blocks:
        if torch.is_grad_enabled() and transformer.gradient_checkpointing:
            rows = transformer._gradient_checkpointing_func(_block, block, rows, text)
        else:
            rows = _block(block, rows, text)
    rows = _project(transformer.proj_out, rows)
    return (rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous() + x,)


def _project(layer: Any, rows: Tensor) -> Tensor:
    """Apply a linear layer, or a 1 x 1 convolution as one."""
    return F.linear(rows, layer.weight.flatten(1), layer.bias)


def _block(block: BasicTransformerBlock, x: Tensor, text: Tensor) -> Tensor:
    """Attend to itself, then to the text, then go through the gated units; x (B, N, C)."""
    if x.shape[1] <= LONG_SEQUENCE:
        x = _attend(x, None, norm=block.norm1, layer=block.attn1)
        x = _attend(x, text, norm=block.norm2, layer=block.attn2)
    else:
        x = block.attn1(block.norm1(x)) + x
        x = block.attn2(block.norm2(x), encoder_hidden_states=text) + x
    return _feed_forward(block, x)


def _feed_forward(block: BasicTransformerBlock, x: Tensor) -> Tensor:
    gate, _, out = block.ff.net
    normed = [block.norm3.weight, block.norm3.bias]
    weights = [gate.proj.weight, gate.proj.bias, out.weight, out.bias]
    y: Tensor = FeedForward.apply(x, *normed, *weights, block.norm3.eps)
    return y


def _attend(x: Tensor, text: Tensor | None, *, norm: nn.LayerNorm, layer: Any) -> Tensor:
    out = layer.to_out[0]
    projections = [layer.to_q.weight, layer.to_k.weight, layer.to_v.weight, out.weight, out.bias]
    normed = [norm.weight, norm.bias]
    y: Tensor = Attend.apply(x, text, *normed, *projections, layer.heads, norm.eps)
    return y


def _is_stock(transformer: Any) -> bool:
    """Return whether a transformer is made of what the large steps stand for, and of no more."""
    projections = (transformer.proj_in, transformer.proj_out)
    return (
        all(type(layer) in (nn.Conv2d, nn.Linear) for layer in projections)
        and not any(_is_watched(layer) for layer in projections)
        and all(_is_stock_block(block) for block in transformer.transformer_blocks)
    )


def _is_stock_block(block: Any) -> bool:
    gate, drop, out = block.ff.net[:3]
    layers = (block, block.norm1, block.norm2, block.norm3, block.ff, gate, gate.proj, out)
    return (
        type(block) is BasicTransformerBlock
        and type(gate) is GEGLU
        and type(gate.proj) is type(out) is nn.Linear
        and len(block.ff.net) == 3
        and block.norm_type == "layer_norm"
        and block.pos_embed is None
        and not block.only_cross_attention
        and not (block.training and drop.p)
        and not any(_is_watched(layer) for layer in layers)
        and block.attn2.is_cross_attention
        and _is_stock_attention(block.attn1)
        and _is_stock_attention(block.attn2)
    )


def _is_stock_attention(layer: Attention) -> bool:
    out, drop = layer.to_out
    projections = (layer.to_q, layer.to_k, layer.to_v, out)
    return (
        type(layer.processor) in (AttnProcessor, AttnProcessor2_0)
        and all(type(projection) is nn.Linear for projection in projections)
        and layer.to_q.bias is None
        and out.bias is not None
        and layer.group_norm is layer.spatial_norm is layer.norm_q is None
        and not (layer.norm_cross or layer.upcast_attention or layer.upcast_softmax)
        and not (layer.residual_connection or layer.rescale_output_factor != 1)
        and not (layer.training and drop.p)
        and not any(_is_watched(module) for module in (layer, *projections))
    )


def _is_watched(module: nn.Module) -> bool:
    """Return whether somebody hangs on a module's own forward pass."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))
