"""Attention maps: the part of an image that each word attends to, over layers and steps.

After the heat maps of Tang et al. 2023 (DAAM): attention probabilities, averaged over heads,
enlarged to the latents' size, averaged over layers and steps. Recording runs in hooks and
changes nothing in the U-Net.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from latentdiff.image_grid import draw_grid
from latentdiff.pipeline.conditioning.encode import tokenize_prompt
from latentdiff.pipeline.conditioning.prompt import Prompt

HEAT_SHARE = 0.6
COLD, HOT = np.array([16.0, 16.0, 96.0]), np.array([255.0, 220.0, 0.0])


@dataclass
class AttentionMaps:
    """Running mean of the conditional pass' cross-attention over layers and steps."""

    num_images: int
    size: tuple[int, int] = (0, 0)
    num_added: int = 0
    total: Tensor | None = None

    def add(self, probabilities: Tensor) -> None:
        """Add one layer's probabilities (passes * B, queries, L), the conditional pass last."""
        cond = probabilities[-self.num_images :].float()  # (B, queries, L)
        grid = _grid(self.size, queries=cond.shape[1])
        maps = cond.transpose(1, 2).unflatten(2, grid)  # (B, L, h_layer, w_layer)
        maps = F.interpolate(maps, size=self.size, mode="bilinear").cpu()
        self.total = maps if self.total is None else self.total + maps
        self.num_added += 1

    def mean(self) -> Tensor:
        """Return (B, L, h, w); over all tokens the maps add up to one at each place."""
        if self.total is None:
            raise ValueError("no cross-attention was recorded; sample inside record_attention")
        return self.total / self.num_added


@contextlib.contextmanager
def record_attention(unet: UNet2DConditionModel, *, num_images: int) -> Iterator[AttentionMaps]:
    """Record the cross-attention of a call that makes num_images images."""
    maps = AttentionMaps(num_images)

    def note_size(unet: Any, args: tuple[Any, ...]) -> None:
        maps.size = (args[0].shape[-2], args[0].shape[-1])

    def note_attention(attn: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        maps.add(attention_probabilities(attn, args[0], named["encoder_hidden_states"]))

    hooks = [unet.register_forward_pre_hook(note_size)]
    hooks += [
        module.register_forward_pre_hook(note_attention, with_kwargs=True)
        for name, module in unet.named_modules()
        if name.endswith(".attn2")
    ]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def heat_map_grid(
    image: Image.Image, heat: Tensor, *, tokenizer: CLIPTokenizer, prompt: Prompt, columns: int = 6
) -> Image.Image:
    """Return a grid of one panel a token: its heat over the image, scaled from its own min to max.

    heat: (L, h, w) of `AttentionMaps.mean()`.
    """
    window = tokenizer.model_max_length - 2
    panels, labels = [image.convert("RGB")], [prompt.text]
    for index, token in enumerate(tokenize_prompt(tokenizer, prompt).ids):
        position = 1 + index + 2 * (index // window)  # each window has a start and an end token
        if position >= len(heat):
            break
        panels.append(_overlaid(image, heat[position]))
        labels.append(str(tokenizer.decode([token])).strip() or "·")
    return draw_grid(panels, labels, columns=columns)


def attention_probabilities(attn: Any, hidden_states: Tensor, prompt_embeds: Tensor) -> Tensor:
    """Return a cross-attention layer's probabilities, averaged over heads, (B, queries, L)."""
    query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    key = attn.to_k(prompt_embeds).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    scores = query.float() @ key.float().transpose(-1, -2) * attn.scale  # (B, heads, queries, L)
    return torch.softmax(scores, dim=-1).mean(1)


def _grid(size: tuple[int, int], *, queries: int) -> tuple[int, int]:
    """Return the (h, w) of a layer, the latents' size halved until it has that many queries."""
    height, width = size
    while height * width > queries:
        height, width = -(-height // 2), -(-width // 2)
    assert height * width == queries
    return height, width


def _overlaid(image: Image.Image, heat: Tensor) -> Image.Image:
    scaled = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    share = Image.fromarray((scaled.numpy() * 255).astype(np.uint8))
    weight = np.asarray(share.resize(image.size, Image.Resampling.BICUBIC))[..., None] / 255.0
    colours = COLD + weight * (HOT - COLD)
    mixed = (1 - HEAT_SHARE) * np.asarray(image.convert("RGB")) + HEAT_SHARE * colours
    return Image.fromarray(mixed.round().astype(np.uint8))
