"""Layers for sampling on a CPU: weights are laid out once, and what follows is done in passing.

PyTorch's plain kernels bring a weight into oneDNN's blocked layout anew at every call; at small
sizes that costs more than the product itself. These layers keep the blocked copy, as PyTorch's own
compiler does when it freezes a model, and add, multiply or activate while a result is written.
Without gradients; the originals stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONG_SEQUENCE = 256  # cells above which torch's own attention kernel is faster


class PackedConv:
    """A convolution. size: (B, h, w) of its usual input; others work too."""

    def __init__(self, conv: nn.Conv2d, size: tuple[int, int, int]) -> None:
        batch, height, width = size
        padding: Any = conv.padding
        self.settings = [list(padding), list(conv.stride), list(conv.dilation), conv.groups]
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight.detach().contiguous(memory_format=torch.channels_last),
            *self.settings,
            [batch, conv.in_channels, height, width],
        )
        self.bias = None if conv.bias is None else conv.bias.detach()

    def __call__(self, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """Convolve x (B, C, h, w), with another bias (C_out,) where one is given."""
        bias = self.bias if bias is None else bias
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, bias, *self.settings, "none", [], ""
        )
        return y

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """Add the convolved x to `total` in its place, and return it."""
        y: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            total, x, self.weight, self.bias, *self.settings, "add", 1.0, None, [], None
        )
        return y


class PackedLinear:
    """A product with a weight (D_out, D_in), for about num_rows rows at once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, num_rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(
            weight.detach().contiguous(), num_rows
        )
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product of x (..., D_in) and the weight, (..., D_out)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """Return the product plus `other` (..., D_out)."""
        return self._with(x, other, "add")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """Return the product times `other` (..., D_out)."""
        return self._with(x, other, "mul")

    def gelu(self, x: Tensor) -> Tensor:
        """Return gelu of the product, the exact one."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "gelu", [], "none"
        )
        return y

    def _with(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self.weight, self.bias, operation
        )
        return y


class GroupNorm:
    """Group norm (Wu and He 2018)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight.detach(), norm.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)

    def silu(self, x: Tensor) -> Tensor:
        """Return SiLU of the normed x."""
        return F.silu(self(x), inplace=True)


class LayerNorm:
    """Layer norm (Ba et al. 2016)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight.detach(), norm.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attend (Vaswani et al. 2017, Eq. 1); q (B, H, N, D), k and v (B, H, L, D) to (B, N, H D)."""
    batch, heads, num, width = q.shape
    if num > LONG_SEQUENCE:
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        scores = (q * scale) @ k.transpose(-1, -2)
        mixed = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v
    return mixed.transpose(1, 2).reshape(batch, num, heads * width)
