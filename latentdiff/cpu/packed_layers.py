"""Layers for sampling on a CPU: weights are laid out once, attention and norms suit the sizes.

PyTorch's plain kernels bring a weight into oneDNN's blocked layout anew at every call; at small
sizes that costs more than the product itself. These layers keep the blocked copy, as PyTorch's own
compiler does when it freezes a model. They pack at their first call, for the size of its input;
other sizes work, perhaps slower. An operation after a linear layer is left to PyTorch: done by
oneDNN while a result is written, it takes longer. Without gradients; the originals stay as they
are.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW_GROUP = 16  # groups of fewer channels are normed slowly in channels_last,
FEW_PIXELS = 1024  # where there are fewer latent pixels than this
FEW_SCORES = 1 << 15  # up to which torch's attention kernel is faster in bfloat16
MANY_KEYS = 256  # keys above which scores no longer fit the cache as a whole
MANY_QUERIES = 256  # queries above which heads are laid out one by one, worth the copy
QUERIES_AT_ONCE = 256  # whose scores do
LARGEST_SCORE = 64.0  # of which 10^10 exponentials sum up within bfloat16


class PackedConv:
    """A convolution whose output is in channels_last."""

    def __init__(self, conv: nn.Conv2d) -> None:
        padding: Any = conv.padding
        self.settings = [list(padding), list(conv.stride), list(conv.dilation), conv.groups]
        self.weight, self._is_packed = conv.weight.detach(), False
        self.bias = None if conv.bias is None else conv.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, h, w), in any layout."""
        return self.with_bias(x.contiguous(memory_format=torch.channels_last), self.bias)

    def with_bias(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve x (B, C, h, w) in channels_last with another bias (C_out,) or none."""
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._packed(x), bias, *self.settings, "none", [], ""
        )
        return y

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """Add the convolved x to `total` in its place, and return it; both in channels_last."""
        y: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            total, x, self._packed(x), self.bias, *self.settings, "add", 1.0, None, [], None
        )
        return y

    def _packed(self, x: Tensor) -> Tensor:
        if not self._is_packed:
            weight = self.weight.contiguous(memory_format=torch.channels_last)
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self.weight, self._is_packed = reorder(weight, *self.settings, list(x.shape)), True
        return self.weight


class PackedLinear:
    """A product with a weight (D_out, D_in) or that of a 1 x 1 convolution."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self._is_packed = weight.detach().flatten(1), False
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product of x (..., D_in) and the weight, (..., D_out)."""
        if not self._is_packed:
            reorder, num_rows = torch.ops.mkldnn._reorder_linear_weight, x.shape[:-1].numel()
            self.weight, self._is_packed = reorder(self.weight.contiguous(), num_rows), True
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class GroupNorm:
    """Group norm (Wu and He 2018) whose output is in channels_last.

    PyTorch's kernel for that layout is slow where groups of few channels meet few latent pixels.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight.detach(), norm.bias.detach()
        self._is_narrow = norm.num_channels < NARROW_GROUP * norm.num_groups

    def __call__(self, x: Tensor) -> Tensor:
        """Norm x (B, C, h, w), in any layout."""
        if self._is_narrow and x.shape[2] * x.shape[3] < FEW_PIXELS:
            x = x.contiguous()
        y = torch.group_norm(x, self.groups, self.weight, self.bias, self.eps, False)
        return y.contiguous(memory_format=torch.channels_last)


class LayerNorm:
    """Layer norm (Ba et al. 2016)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight.detach(), norm.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps, False)


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attend (Vaswani et al. 2017, Eq. 1); q (B, H, N, D), k and v (B, H, L, D) to (B, N, H D).

    In bfloat16 many scores are rounded to it, which is faster: the output is 0.4 to 1.2 % from the
    exact one, where torch's kernel is 0.2 %.
    """
    is_rounded = q.dtype == torch.bfloat16 and q.shape[:3].numel() * k.shape[2] > FEW_SCORES
    if is_rounded or q.shape[2] > MANY_QUERIES:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if not is_rounded:
        return _join_heads(F.scaled_dot_product_attention(q, k, v, scale=scale))
    k = k - k.mean(2, keepdim=True)  # what all scores of a query share cancels
    if k.shape[2] <= MANY_KEYS:
        rows, keys, values = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(q.new_empty(1, 1, 1), rows, keys.mT, beta=0, alpha=scale)
        return _join_heads((torch.softmax(scores, -1) @ values).view(q.shape))
    q = q * scale
    if _largest_norm(q) * _largest_norm(k) > LARGEST_SCORE:
        return _join_heads(F.scaled_dot_product_attention(q, k, v, scale=1.0))
    return _attend_in_blocks(q, k, v)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by bare exponentials, for scores q k^T that are small; shapes as for `attend`.

    A block's scores stay in the cache, keys by queries, which is the order that the products are
    fast in. A row of ones next to the values sums the exponentials up.
    """
    batch, heads, num, width = q.shape
    values = v.new_zeros(batch, heads, -(-(width + 1) // 16) * 16, k.shape[2])
    values[:, :, :width], values[:, :, width] = v.mT, 1
    mixed = q.new_empty(batch, num, heads, width)
    for b, h in itertools.product(range(batch), range(heads)):
        for start in range(0, num, QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            sums = values[b, h] @ (k[b, h] @ q[b, h, part].mT).exp_()
            mixed[b, part, h] = (sums[:width] / sums[width]).mT
    return mixed.flatten(2)


def _largest_norm(x: Tensor) -> float:
    return float(x.float().norm(dim=-1).max())


def _join_heads(x: Tensor) -> Tensor:
    """Lay (B, H, N, D) out as (B, N, H D)."""
    return x.transpose(1, 2).flatten(2)
