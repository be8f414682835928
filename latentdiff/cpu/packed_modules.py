"""Forward passes of a U-Net's stock modules in packed layers, for sampling on a CPU.

Each class stands for one of diffusers' or PyTorch's modules, takes what its forward method takes
and returns the same up to rounding. Between modules images stay in channels_last. Text keys and
values and the projections of a timestep are computed once, and under guidance all that lies before
the first cross-attention is computed once for both prompts, which differ only from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from latentdiff.cpu.packed_layers import GroupNorm, LayerNorm, PackedConv, PackedLinear, attend

Forward: TypeAlias = Callable[..., Any]

MAX_TIMESTEPS = 1000  # whose projections are kept


class Shared:
    """Results that the packed modules of one U-Net share, within a pass and between passes.

    repeated: a tensor (2 B, ...) whose halves are equal, the newest of the pass, or None.
    """

    def __init__(self) -> None:
        self.repeated: Tensor | None = None
        self._timesteps: dict[tuple[float, int], Tensor] = {}
        self._of_timestep: dict[int, dict[object, Tensor]] = {}
        self._text: Tensor | None = None
        self._text_version = 0
        self._of_text: dict[object, tuple[Tensor, Tensor]] = {}

    def half(self, x: Tensor) -> Tensor:
        """Return the first half of x (2 B, ...) if it is known to be the same twice, else x."""
        if x is not self.repeated:
            return x
        first, second = x.chunk(2)
        return first if torch.equal(first, second) else x  # it may have been written to since

    def double(self, half: Tensor) -> Tensor:
        """Return a tensor twice, (2 B, ...), that is known to be so."""
        self.repeated = torch.cat([half, half])
        return self.repeated

    def rows_of(self, t: float, length: int, function: Callable[[], Tensor]) -> Tensor:
        """Return the row function() (1, D) `length` times, (length, D): one tensor a timestep."""
        if (t, length) not in self._timesteps:
            if len(self._timesteps) >= MAX_TIMESTEPS:
                self._timesteps.clear()
                self._of_timestep.clear()
            self._timesteps[t, length] = self.keep(function().expand(length, -1))
        return self._timesteps[t, length]

    def keep(self, rows: Tensor) -> Tensor:
        """Return rows (B, D), which are equal and depend on a timestep alone, to be known again."""
        self._of_timestep[id(rows)] = {self: rows}  # as long as it is kept, its id is its own
        return rows

    def of_timestep(self, rows: Tensor) -> dict[object, Tensor] | None:
        """Return the results kept by owner of rows (B, D) of a timestep, None of other rows."""
        return self._of_timestep.get(id(rows))

    def of_text(
        self, text: Tensor, owner: object, function: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return function(text), kept by owner until the text (B, L, D) is another."""
        if text.is_inference():
            return function(text)
        if not self._knows(text):
            self._text, self._text_version, self._of_text = text, text._version, {}
        if owner not in self._of_text:
            self._of_text[owner] = function(text)
        return self._of_text[owner]

    def _knows(self, text: Tensor) -> bool:
        """Return whether text is the one seen last, unchanged; views of it count as well."""
        seen = self._text
        if seen is None or self._text_version != text._version:
            return False
        return seen is text or (
            seen.data_ptr() == text.data_ptr()
            and seen.shape == text.shape
            and seen.stride() == text.stride()
        )


class PackedResnet:
    """ResnetBlock2D; a time's projection that all images share is its first convolution's bias."""

    def __init__(self, resnet: Any, shared: Shared) -> None:
        self._shared = shared
        self.norm1, self.norm2 = GroupNorm(resnet.norm1), GroupNorm(resnet.norm2)
        self.conv1, self.conv2 = PackedConv(resnet.conv1), PackedConv(resnet.conv2)
        shortcut = resnet.conv_shortcut
        self.shortcut = None if shortcut is None else PackedConv(shortcut)
        self.time = resnet.time_emb_proj

    def __call__(self, x: Tensor, temb: Tensor | None) -> Tensor:
        if self.time is None or temb is None:
            return self._run(x, self.conv1.bias)
        kept = self._shared.of_timestep(temb)
        if kept is None:
            return self._run(x, None, self._project(temb))
        if self not in kept:
            kept[self] = self._project(temb[:1])[0]
        half = self._shared.half(x)
        y = self._run(half, kept[self])
        return y if half is x else self._shared.double(y)

    def _project(self, temb: Tensor) -> Tensor:
        bias = self.time.bias if self.conv1.bias is None else self.time.bias + self.conv1.bias
        return F.linear(F.silu(temb), self.time.weight, bias)

    def _run(self, x: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> Tensor:
        y = self.conv1.with_bias(F.silu(self.norm1(x), inplace=True), bias)
        if rows is not None:
            y.add_(rows[:, :, None, None])
        if self.shortcut is None:
            total = x.clone(memory_format=torch.channels_last)
        else:
            total = self.shortcut(x)
        return self.conv2.add_to(total, F.silu(self.norm2(y), inplace=True))


class PackedTransformer:
    """Transformer2DModel; projections in and out are products, be they convolutions or not."""

    def __init__(self, transformer: Any, shared: Shared) -> None:
        self._stock, self._shared = transformer, shared
        self.norm = GroupNorm(transformer.norm)
        self.into, self.out = _linear(transformer.proj_in), _linear(transformer.proj_out)
        self.blocks = [_Block(block, shared) for block in transformer.transformer_blocks]

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
        **plain: Any,
    ) -> Any:
        x, text = hidden_states, encoder_hidden_states
        if text is None or return_dict or any(value is not None for value in plain.values()):
            forward = Transformer2DModel.forward
            return forward(self._stock, x, text, return_dict=return_dict, **plain)
        x = self._shared.half(x)
        rows = self.into(_rows(self.norm(x)))
        for block in self.blocks:
            rows = block(rows, text)
        rows = self.out(rows).add_(_copies(_rows(x), len(text)))
        return (rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2),)


class _Block:
    """BasicTransformerBlock: attention to itself, to the text, gated units."""

    def __init__(self, block: Any, shared: Shared) -> None:
        self.norms = [LayerNorm(norm) for norm in (block.norm1, block.norm2, block.norm3)]
        self.attend_to_itself = _SelfAttention(block.attn1)
        self.attend_to_text = _CrossAttention(block.attn2, shared)
        self.feed_forward = PackedFeedForward(block.ff)

    def __call__(self, x: Tensor, text: Tensor) -> Tensor:
        norm1, norm2, norm3 = self.norms
        x = self.attend_to_itself(norm1(x)).add_(x)
        x = _copies(x, len(text))
        x = self.attend_to_text(norm2(x), text).add_(x)
        return self.feed_forward(norm3(x)).add_(x)


class _SelfAttention:
    """Attention of rows (B, N, C) to themselves: one product for queries, keys and values."""

    def __init__(self, layer: Any) -> None:
        self.heads, self.scale = layer.heads, layer.scale
        weights = torch.cat([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight])
        self.to_qkv, self.out = PackedLinear(weights), _linear(layer.to_out[0])

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = _to_heads(self.to_qkv(x), 3, heads=self.heads)
        return self.out(attend(q, k, v, scale=self.scale))


class _CrossAttention:
    """Attention of rows (B, N, C) to the text (B, L, D)."""

    def __init__(self, layer: Any, shared: Shared) -> None:
        self._shared, self.heads, self.scale = shared, layer.heads, layer.scale
        self.to_q, self.out = _linear(layer.to_q), _linear(layer.to_out[0])
        self.to_k, self.to_v = layer.to_k.weight.detach(), layer.to_v.weight.detach()

    def __call__(self, x: Tensor, text: Tensor) -> Tensor:
        (q,) = _to_heads(self.to_q(x), 1, heads=self.heads)
        k, v = self._shared.of_text(text, self, self._keys_and_values)
        return self.out(attend(q, k, v, scale=self.scale))

    def _keys_and_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        parts = (F.linear(text, weight) for weight in (self.to_k, self.to_v))
        k, v = (_to_heads(part, 1, heads=self.heads)[0].contiguous() for part in parts)
        return k, v


class PackedFeedForward:
    """FeedForward of gated units (Shazeer 2020, Eq. 6): values and gates come from two products."""

    def __init__(self, feed_forward: Any) -> None:
        gate, _, out = feed_forward.net
        weights, biases = gate.proj.weight.chunk(2), gate.proj.bias.chunk(2)
        self.value, self.gate = (PackedLinear(*pair) for pair in zip(weights, biases, strict=True))
        self.out = _linear(out)

    def __call__(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.gate(x)).mul_(self.value(x)))


class PackedTimesteps:
    """Timesteps: the sinusoids of a timestep that all images share, in the U-Net's dtype."""

    def __init__(self, timesteps: Any, shared: Shared, dtype: torch.dtype) -> None:
        self._stock, self._shared, self._dtype = timesteps, shared, dtype

    def __call__(self, t: Tensor) -> Tensor:
        if len(t) > 1 and t.stride(0) > 0:
            rows: Tensor = Timesteps.forward(self._stock, t)
            return rows
        return self._shared.rows_of(
            float(t[0]), len(t), lambda: Timesteps.forward(self._stock, t[:1]).to(self._dtype)
        )


class PackedTimestepEmbedding:
    """TimestepEmbedding, kept by timestep where no condition is added."""

    def __init__(self, embedding: Any, shared: Shared) -> None:
        self._stock, self._shared = embedding, shared

    def __call__(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        kept = self._shared.of_timestep(sample)
        if kept is None or condition is not None:
            rows: Tensor = TimestepEmbedding.forward(self._stock, sample, condition)
            return rows
        if self not in kept:
            row = TimestepEmbedding.forward(self._stock, sample[:1])
            kept[self] = self._shared.keep(row.expand(len(sample), -1))
        return kept[self]


def _conv(conv: nn.Conv2d, shared: Shared) -> Forward:
    packed = PackedConv(conv)

    def forward(x: Tensor) -> Tensor:
        half = shared.half(x)
        y = packed(half)
        return y if half is x else shared.double(y)

    return forward


def _group_norm(norm: nn.GroupNorm) -> Forward:
    packed = GroupNorm(norm)
    return lambda x: packed(x) if x.ndim == 4 else nn.GroupNorm.forward(norm, x)


def _linear(layer: Any) -> PackedLinear:
    return PackedLinear(layer.weight, layer.bias)


PACKED: Final[dict[type[nn.Module], Callable[[Any, Shared, torch.dtype], Forward]]] = {
    ResnetBlock2D: lambda module, shared, _: PackedResnet(module, shared),
    Transformer2DModel: lambda module, shared, _: PackedTransformer(module, shared),
    FeedForward: lambda module, *_: PackedFeedForward(module),
    nn.Conv2d: lambda module, shared, _: _conv(module, shared),
    nn.Linear: lambda module, *_: _linear(module),
    nn.GroupNorm: lambda module, *_: _group_norm(module),
    Timesteps: PackedTimesteps,
    TimestepEmbedding: lambda module, shared, _: PackedTimestepEmbedding(module, shared),
}


def _copies(x: Tensor, length: int) -> Tensor:
    """Return as many copies of x (b, ...), one after the other, as make it (length, ...)."""
    return x if len(x) == length else torch.cat([x] * (length // len(x)))


def _rows(x: Tensor) -> Tensor:
    """View (B, C, h, w) as rows (B, h w, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_heads(rows: Tensor, parts: int, *, heads: int) -> tuple[Tensor, ...]:
    """Cut (B, N, parts H D) into `parts` of (B, H, N, D)."""
    batch, length, _ = rows.shape
    return rows.view(batch, length, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
