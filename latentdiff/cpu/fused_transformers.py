"""The U-Net's transformers in fewer and larger operations, for training; equal up to rounding.

The weights stay those of diffusers' modules, and so do state dict, config and class. Many small
kernels are saved: queries, keys and values come from one matrix product, short sequences attend by
two products and a softmax, a 1 x 1 convolution next to a change of layout is a product too. A
transformer that is not stock (stock.py: LoRA, hooks, dropout at work, another attention processor)
or that gets a mask goes the plain way. Measured on CPUs: docs/performance.md.

Attention and feed-forward each are one autograd function with a backward pass of its own. Both are
pre-norm branches with their residual, in autocast's dtype where it is on and with gradients in the
weights' dtype. The gradients follow from the forward pass by the chain rule; float64 agrees with
autograd to eight digits (tests/cpu/test_fused_transformers.py).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from latentdiff.cpu.stock import is_stock

LONG_SEQUENCE = 256  # latent pixels above which torch's own attention kernel is faster
EVEN_KEYS = 32  # softmax in bf16 is slow over rows that are no multiple of this


def fuse_transformers(unet: UNet2DConditionModel) -> None:
    """Let the U-Net's transformers take the fused operations, where stock; again is safe."""
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
    if text is None or is_asked_more or not all(map(is_stock, transformer.children())):
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
        x = _attention(x, None, norm=block.norm1, layer=block.attn1)
        x = _attention(x, text, norm=block.norm2, layer=block.attn2)
    else:
        x = block.attn1(block.norm1(x)) + x
        x = block.attn2(block.norm2(x), encoder_hidden_states=text) + x
    return _feed_forward(block, x)


def _feed_forward(block: BasicTransformerBlock, x: Tensor) -> Tensor:
    gate, _, out = block.ff.net
    normed = [block.norm3.weight, block.norm3.bias]
    weights = [gate.proj.weight, gate.proj.bias, out.weight, out.bias]
    y: Tensor = FusedFeedForward.apply(x, *normed, *weights, block.norm3.eps)
    return y


def _attention(x: Tensor, text: Tensor | None, *, norm: nn.LayerNorm, layer: Any) -> Tensor:
    out = layer.to_out[0]
    projections = [layer.to_q.weight, layer.to_k.weight, layer.to_v.weight, out.weight, out.bias]
    normed = [norm.weight, norm.bias]
    y: Tensor = FusedAttention.apply(x, text, *normed, *projections, layer.heads, norm.eps)
    return y


class FusedAttention(torch.autograd.Function):
    """x + attention of the normed x over itself, or over the text (Vaswani et al. 2017, Eq. 1)."""

    @staticmethod
    def forward(  # noqa: PLR0917 - apply() knows no keywords
        ctx: Any,
        x: Tensor,  # (B, N, C)
        text: Tensor | None,  # (B, L, D)
        norm_weight: Tensor,
        norm_bias: Tensor,
        to_q: Tensor,
        to_k: Tensor,
        to_v: Tensor,
        to_out: Tensor,
        out_bias: Tensor,
        heads: int,
        eps: float,
    ) -> Tensor:
        batch, dtype = len(x), _dtype(x)
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[2:], norm_weight, norm_bias, eps)
        rows = normed.view(-1, x.shape[2]).to(dtype)
        if text is None:
            source, weight = None, torch.cat([to_q, to_k, to_v]).to(dtype)
            q, k, v = _to_heads(rows @ weight.T, 3, batch=batch, heads=heads)
            weights = [weight]
        else:
            source = text.reshape(-1, text.shape[2]).to(dtype)
            weights = [to_q.to(dtype), torch.cat([to_k, to_v]).to(dtype)]
            (q,) = _to_heads(rows @ weights[0].T, 1, batch=batch, heads=heads)
            k, v = _to_heads(source @ weights[1].T, 2, batch=batch, heads=heads)
        scale = q.shape[-1] ** -0.5
        q = q.mul_(scale)
        probabilities = softmax(q @ k.transpose(1, 2))  # (B H, N, L)
        mixed = _from_heads((probabilities @ v)[None], batch=batch)  # (B N, C)
        out_weight = to_out.to(dtype)
        y = torch.addmm(out_bias.to(dtype), mixed, out_weight.T).view(x.shape)
        saved = [x, mean, rstd, norm_weight, norm_bias, rows, q, k, v, probabilities, mixed]
        ctx.save_for_backward(*saved, out_weight, source, *weights)
        ctx.batch, ctx.heads, ctx.scale, ctx.text = batch, heads, scale, _like(text)
        return x + y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, rows, q, k, v, p, mixed, *rest = ctx.saved_tensors
        out_weight, source, *weights = rest
        batch, heads = ctx.batch, ctx.heads
        dy = grad.reshape(-1, grad.shape[2]).to(rows.dtype)
        (d_mixed,) = _to_heads(dy @ out_weight, 1, batch=batch, heads=heads)
        ds = _softmax_backward(d_mixed @ v.transpose(1, 2), p)
        dk_dv = torch.stack([ds.transpose(1, 2) @ q, p.transpose(1, 2) @ d_mixed])
        dq = torch.bmm(ds, k).mul_(ctx.scale)[None]
        d_text = None
        if source is None:
            d_qkv = _from_heads(torch.cat([dq, dk_dv]), batch=batch)  # (B N, 3 C)
            d_weights = (d_qkv.T @ rows).to(norm_weight.dtype).chunk(3)
            d_rows = d_qkv @ weights[0]
        else:
            d_q, d_kv = _from_heads(dq, batch=batch), _from_heads(dk_dv, batch=batch)
            d_weights = (
                (d_q.T @ rows).to(norm_weight.dtype),
                *(d_kv.T @ source).to(norm_weight.dtype).chunk(2),
            )
            d_rows = d_q @ weights[0]
            if ctx.needs_input_grad[1]:
                shape, dtype = ctx.text
                d_text = (d_kv @ weights[1]).view(shape).to(dtype)
        norm = (mean, rstd, norm_weight, norm_bias)
        dx, d_norm, d_norm_bias = _norm_backward(d_rows, x, norm)
        d_out = (dy.T @ mixed).to(norm_weight.dtype)
        d_bias = dy.sum(0).to(norm_weight.dtype)
        return dx.add_(grad), d_text, d_norm, d_norm_bias, *d_weights, d_out, d_bias, None, None


class FusedFeedForward(torch.autograd.Function):
    """x + W2 (a * gelu(b)) of the normed x, where (a, b) = W1 x (Shazeer 2020, Eq. 6).

    Values and gates come from two products, so that neither is half of a wide row.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - apply() knows no keywords
        ctx: Any,
        x: Tensor,  # (B, N, C)
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,  # (8 C, C): the values' rows, then the gates'
        bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
        eps: float,
    ) -> Tensor:
        dtype = _dtype(x)
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[2:], norm_weight, norm_bias, eps)
        rows = normed.view(-1, x.shape[2]).to(dtype)
        w1, w2 = weight.to(dtype), out_weight.to(dtype)
        (value_weight, gate_weight), biases = w1.chunk(2), bias.to(dtype).chunk(2)
        value = torch.addmm(biases[0], rows, value_weight.T)  # (B N, 4 C)
        gate = torch.addmm(biases[1], rows, gate_weight.T)
        opened = F.gelu(gate)
        hidden = value * opened
        y = torch.addmm(out_bias.to(dtype), hidden, w2.T).view(x.shape)
        ctx.save_for_backward(
            x, mean, rstd, norm_weight, norm_bias, rows, value, gate, opened, hidden, w1, w2
        )
        return x + y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, norm_weight, norm_bias, rows, *rest = ctx.saved_tensors
        value, gate, opened, hidden, w1, w2 = rest
        dtype = norm_weight.dtype
        dy = grad.reshape(-1, grad.shape[2]).to(rows.dtype)
        d_out, d_out_bias = (dy.T @ hidden).to(dtype), dy.sum(0).to(dtype)
        d_hidden = dy @ w2
        d_gate = torch.ops.aten.gelu_backward(d_hidden * value, gate)
        d_value = d_hidden.mul_(opened)
        d_weight = torch.cat([d_value.T @ rows, d_gate.T @ rows]).to(dtype)
        d_bias = torch.cat([d_value.sum(0), d_gate.sum(0)]).to(dtype)
        value_weight, gate_weight = w1.chunk(2)
        d_rows = torch.addmm(d_value @ value_weight, d_gate, gate_weight)
        norm = (mean, rstd, norm_weight, norm_bias)
        dx, d_norm, d_norm_bias = _norm_backward(d_rows, x, norm)
        return dx.add_(grad), d_norm, d_norm_bias, d_weight, d_bias, d_out, d_out_bias, None


def _dtype(x: Tensor) -> torch.dtype:
    """Return what to compute in: autocast's dtype where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _like(text: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if text is None else (text.shape, text.dtype)


def _to_heads(rows: Tensor, parts: int, *, batch: int, heads: int) -> Tensor:
    """Cut (B N, parts C) into (parts, B heads, N, C / heads)."""
    cut = rows.view(batch, len(rows) // batch, parts, heads, -1).permute(2, 0, 3, 1, 4)
    return cut.reshape(parts, batch * heads, cut.shape[3], cut.shape[4])


def _from_heads(parts: Tensor, *, batch: int) -> Tensor:
    """Join (parts, B heads, N, C / heads) into (B N, parts C)."""
    num, _, length, width = parts.shape
    cut = parts.view(num, batch, -1, length, width).permute(1, 3, 0, 2, 4)
    return cut.reshape(batch * length, -1)


def softmax(scores: Tensor) -> Tensor:
    if scores.dtype.itemsize > 2 or scores.shape[-1] % EVEN_KEYS == 0:
        return torch.softmax(scores, -1)
    return torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)


def _softmax_backward(grad: Tensor, p: Tensor) -> Tensor:
    if p.dtype.itemsize > 2 or p.shape[-1] % EVEN_KEYS == 0:
        return torch._softmax_backward_data(grad, p, -1, p.dtype)
    dtype = torch.float32
    return torch._softmax_backward_data(grad.to(dtype), p.to(dtype), -1, dtype).to(p.dtype)


def _norm_backward(
    d_rows: Tensor, x: Tensor, norm: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias. norm: mean, 1 / std, weight, bias."""
    grad = d_rows.view(x.shape).to(x.dtype)
    wanted = [True, True, True]
    dx, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[2:], *norm, wanted
    )
    return dx, d_weight, d_bias
