"""A stock U-Net's forward pass in packed layers, for sampling on a CPU.

The same function as UNet2DConditionModel's up to rounding, of a U-Net that fast_cpu.py has found
stock. Beside packing, keys and values of the text and the time's projections of a timestep are
computed once a call, nothing is converted to and fro, and under guidance all that lies before the
first cross-attention is computed once for both captions, which differ only from there on.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from latentdiff.cpu.packed_layers import GroupNorm, LayerNorm, PackedConv, PackedLinear, attend

Size: TypeAlias = tuple[int, int, int]  # (B, h, w)
MAX_TIMESTEPS = 1000  # whose projections are kept


class Condition(NamedTuple):
    """What a pass depends on beside the latents: by resnet and by cross-attention."""

    biases: tuple[Tensor, ...]  # (C,) each: the time's projection and the convolution's bias
    texts: list[tuple[Tensor, ...]]  # keys and values (B, H, L, D) each


class PackedUNet:
    """A U-Net packed for outputs of one shape (B, C, h, w); other shapes work, perhaps slower.

    Weights are copied: later changes of the U-Net's own do not show here.
    """

    def __init__(self, unet: UNet2DConditionModel, shape: torch.Size) -> None:
        self._time, self._text = _Time(unet), _Text()
        batch, _, height, width = shape
        size = (batch, height, width)
        self._conv_in = PackedConv(unet.conv_in, size)
        self._down: list[_Block] = []
        self._up: list[_Block] = []
        for block in unet.down_blocks:
            convs = block.downsamplers
            self._down.append(self._block(block, convs, size))
            size = size if convs is None else (batch, -(-size[1] // 2), -(-size[2] // 2))
        self._mid = self._block(unet.mid_block, None, size)
        for block in unet.up_blocks:
            convs = block.upsamplers
            larger = size if convs is None else (batch, size[1] * 2, size[2] * 2)
            self._up.append(self._block(block, convs, size, larger))
            size = larger
        self._norm_out = GroupNorm(unet.conv_norm_out)
        self._conv_out = PackedConv(unet.conv_out, size)
        self._time.pack()
        self._text.pack()

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Return the U-Net's output (B, C_out, h, w) of x (B, C, h, w) and text states (B, L, D).

        x may be shorter, (B / n, C, h, w): it stands for n copies of itself, one after the other.
        t: one timestep, (). h and w are multiples of what the U-Net halves.
        """
        given = Condition(self._time(t), self._text(states))
        x = self._conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self._down:
            for resnet, transformer in block.layers:
                x = resnet(x, given)
                x = x if transformer is None else transformer(x, given)
                skips.append(x)
            if block.conv is not None:
                x = block.conv(x)
                skips.append(x)
        for resnet, transformer in self._mid.layers:
            x = resnet(x, given)
            x = x if transformer is None else transformer(x, given)
        for block in self._up:
            for resnet, transformer in block.layers:
                x = resnet(torch.cat([x, _copies(skips.pop(), len(x))], 1), given)
                x = x if transformer is None else transformer(x, given)
            if block.conv is not None:
                x = block.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self._conv_out(self._norm_out.silu(x))

    def _block(self, block: Any, convs: Any, size: Size, conv_size: Size | None = None) -> _Block:
        """Pack a block: (resnet, transformer or None) in turn, then what changes its size."""
        resnets = [_Resnet(resnet, size, self._time) for resnet in block.resnets]
        attentions = getattr(block, "attentions", [])
        transformers: list[_Transformer | None] = [
            _Transformer(transformer, size, self._text) for transformer in attentions
        ]
        transformers += [None] * (len(resnets) - len(transformers))
        conv = None if convs is None else PackedConv(convs[0].conv, conv_size or size)
        return _Block(list(zip(resnets, transformers, strict=True)), conv)


class _Block(NamedTuple):
    layers: list[tuple[_Resnet, _Transformer | None]]
    conv: PackedConv | None


class _Resnet:
    """ResnetBlock2D; the time's projection comes as its first convolution's bias."""

    def __init__(self, resnet: Any, size: Size, time: _Time) -> None:
        self.norm1, self.norm2 = GroupNorm(resnet.norm1), GroupNorm(resnet.norm2)
        self.conv1, self.conv2 = PackedConv(resnet.conv1, size), PackedConv(resnet.conv2, size)
        shortcut = resnet.conv_shortcut
        self.shortcut = None if shortcut is None else PackedConv(shortcut, size)
        self.index = time.add(resnet.time_emb_proj, resnet.conv1.bias)

    def __call__(self, x: Tensor, given: Condition) -> Tensor:
        y = self.conv1(self.norm1.silu(x), bias=given.biases[self.index])
        total = x.clone() if self.shortcut is None else self.shortcut(x)
        return self.conv2.add_to(total, self.norm2.silu(y))


class _Transformer:
    """Transformer2DModel; projections in and out are products, be they convolutions or not."""

    def __init__(self, transformer: Any, size: Size, text: _Text) -> None:
        num_rows = size[0] * size[1] * size[2]
        into, out = transformer.proj_in, transformer.proj_out
        self.norm = GroupNorm(transformer.norm)
        self.into = PackedLinear(into.weight.flatten(1), into.bias, num_rows=num_rows)
        self.out = PackedLinear(out.weight.flatten(1), out.bias, num_rows=num_rows)
        self.blocks = [
            _TransformerBlock(block, num_rows, text) for block in transformer.transformer_blocks
        ]

    def __call__(self, x: Tensor, given: Condition) -> Tensor:
        rows = self.into(_rows(self.norm(x)))
        for block in self.blocks:
            rows = block(rows, given)
        rows = self.out(rows).add_(_copies(_rows(x), len(rows)))
        return rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class _TransformerBlock:
    """BasicTransformerBlock: attention to itself, to the text, gated units."""

    def __init__(self, block: Any, num_rows: int, text: _Text) -> None:
        own, cross, (gate, _, out) = block.attn1, block.attn2, block.ff.net
        self.norms = [LayerNorm(norm) for norm in (block.norm1, block.norm2, block.norm3)]
        self.heads, self.scale = own.heads, own.scale
        weights = torch.cat([own.to_q.weight, own.to_k.weight, own.to_v.weight])
        self.to_qkv = PackedLinear(weights, None, num_rows=num_rows)
        self.to_q = PackedLinear(cross.to_q.weight, None, num_rows=num_rows)
        self.own_out, self.cross_out = (
            PackedLinear(one.to_out[0].weight, one.to_out[0].bias, num_rows=num_rows)
            for one in (own, cross)
        )
        self.index = text.add(cross)
        halves = zip(gate.proj.weight.chunk(2), gate.proj.bias.chunk(2), strict=True)
        self.value, self.gate = (PackedLinear(w, b, num_rows=num_rows) for w, b in halves)
        self.out = PackedLinear(out.weight, out.bias, num_rows=num_rows)

    def __call__(self, x: Tensor, given: Condition) -> Tensor:
        norm1, norm2, norm3 = self.norms
        q, k, v = _to_heads(self.to_qkv(norm1(x)), 3, heads=self.heads)
        x = self.own_out(attend(q, k, v, scale=self.scale)).add_(x)
        keys, values = given.texts[self.index]
        x = _copies(x, len(keys))
        (q,) = _to_heads(self.to_q(norm2(x)), 1, heads=self.heads)
        x = self.cross_out(attend(q, keys, values, scale=self.scale)).add_(x)
        rows = norm3(x)
        gated = F.gelu(self.gate(rows)).mul_(self.value(rows))
        return self.out(gated).add_(x)


class _Time:
    """The biases of all resnets at a timestep, from one product, kept by timestep."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._proj, self._embedding = unet.time_proj, unet.time_embedding
        self._weights: list[Tensor] = []
        self._biases: list[Tensor] = []
        self._known: dict[float, tuple[Tensor, ...]] = {}

    def add(self, projection: Any, conv_bias: Tensor) -> int:
        self._weights.append(projection.weight.detach())
        self._biases.append((projection.bias + conv_bias).detach())
        return len(self._weights) - 1

    def pack(self) -> None:
        self._widths = [len(weight) for weight in self._weights]
        self._weight, self._bias = torch.cat(self._weights), torch.cat(self._biases)
        self._weights, self._biases = [], []

    def __call__(self, t: Tensor) -> tuple[Tensor, ...]:
        step = float(t)
        if step not in self._known:
            if len(self._known) >= MAX_TIMESTEPS:
                self._known.clear()
            embedding = self._embedding(self._proj(t.reshape(1)).to(self._weight.dtype))
            rows = F.linear(F.silu(embedding), self._weight, self._bias)
            self._known[step] = rows[0].split(self._widths)
        return self._known[step]


class _Text:
    """Keys and values of the text in all cross-attentions, kept until it changes."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._heads: list[int] = []
        self._seen: Tensor | None = None
        self._version = 0
        self._found: list[tuple[Tensor, ...]] = []

    def add(self, attention: Any) -> int:
        self._weights.append(torch.cat([attention.to_k.weight, attention.to_v.weight]).detach())
        self._heads.append(attention.heads)
        return len(self._weights) - 1

    def pack(self) -> None:
        self._widths = [len(weight) for weight in self._weights]
        self._weight = torch.cat(self._weights)
        self._weights = []

    def __call__(self, states: Tensor) -> list[tuple[Tensor, ...]]:
        if not self._knows(states):
            parts = F.linear(states, self._weight).split(self._widths, -1)
            self._found = [
                _to_heads(part, 2, heads=heads)
                for part, heads in zip(parts, self._heads, strict=True)
            ]
            self._seen = None if states.is_inference() else states
            self._version = 0 if self._seen is None else states._version
        return self._found

    def _knows(self, states: Tensor) -> bool:
        """Say whether these are the states seen last, unchanged; views of them count as well."""
        seen = self._seen
        return (
            seen is not None
            and seen.data_ptr() == states.data_ptr()
            and self._version == states._version
            and seen.shape == states.shape
            and seen.stride() == states.stride()
        )


def _copies(x: Tensor, length: int) -> Tensor:
    """Return as many copies of x (b, ...), one after the other, as make it (length, ...)."""
    return x if len(x) == length else torch.cat([x] * (length // len(x)))


def _rows(x: Tensor) -> Tensor:
    """View (B, C, h, w) as rows (B, h w, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_heads(rows: Tensor, parts: int, *, heads: int) -> tuple[Tensor, ...]:
    """Cut (B, N, parts H D) into `parts` of (B, H, N, D), contiguous."""
    return rows.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
