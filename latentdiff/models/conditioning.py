"""The conditioning of a U-Net: all that it reads besides noisy latents and timestep, in one object.

Made once from prompts or from the cache, then handed to the U-Net as keyword arguments. Stable
Diffusion 1.x / 2.x reads prompt embeddings; SDXL also pooled embeddings and micro-conditioning
(Podell et al. 2023, 2.2). Another kind is a field here, made where its values are known.
Does not answer for: encoding prompts (text.py), nor the guidance scale (guidance_embedding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

TEXT = ("input_ids", "prompt_embeds", "pooled_embeds")  # fields that come from the prompt
Size: TypeAlias = tuple[int, int]  # (height, width), or (top, left)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The conditioning of B images; None for what the model does not read.

    input_ids: token ids that a text encoder in training has yet to turn into embeddings.
    """

    prompt_embeds: Tensor | None = None  # (B, L, D)
    pooled_embeds: Tensor | None = None  # (B, P), of the second text encoder
    time_ids: Tensor | None = None  # (B, 6) int64, of `make_time_ids`
    class_labels: Tensor | None = None  # (B,) int64
    condition: Tensor | None = None  # (B, k, h, w), of image_conditions.py
    control: Tensor | None = None  # (B, 3, H, W) in [0, 1], of a ControlNet
    input_ids: Tensor | None = None  # (B, L) int64, or (B, 2, L) of two tokenizers

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Conditioning:
        """Return the conditioning among the tensors of a batch, by the names of its fields."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: tensors[name] for name in names if name in tensors})

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Return the images of all parts in turn; ValueError where they differ in their fields."""
        names = {tuple(part.tensors()) for part in parts}
        if len(names) != 1:
            raise ValueError(f"parts of a conditioning must have the same fields, got {names}")
        tensors = {name: [part.tensors()[name] for part in parts] for name in names.pop()}
        return cls(**{name: torch.cat(values) for name, values in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that there are, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Return a conditioning of the results of a function of each tensor."""
        return Conditioning(**{name: function(value) for name, value in self.tensors().items()})

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Conditioning:
        """Return the conditioning of some of the images."""
        return self.map(lambda x: x[index])

    def expand(self, num: int) -> Conditioning:
        """Return the conditioning of one image, or of num ones, as that of num ones."""
        return self.map(lambda x: x.expand(num, *x.shape[1:]))

    def repeat_interleave(self, num: int) -> Conditioning:
        """Return each image's conditioning num times in a row."""
        return self.map(lambda x: x.repeat_interleave(num, dim=0))

    def to(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Conditioning:
        """Return the conditioning on a device, its embeddings in a dtype; others keep theirs."""
        moved = self.map(lambda x: x.to(device))
        embeds = {"prompt_embeds": moved.prompt_embeds, "pooled_embeds": moved.pooled_embeds}
        cast = {name: x.to(dtype) for name, x in embeds.items() if x is not None}
        return Conditioning(**(moved.tensors() | cast))

    def with_text(self, other: Conditioning, where: Tensor | None = None) -> Conditioning:
        """Return the conditioning with the text of another one, of one image or of as many.

        where: (B,) bool, the images that get it; all by default. Sizes and labels stay.
        """
        own, given = self.tensors(), other.tensors()
        names = [name for name in TEXT if name in own]
        replaced = {name: given[name].to(own[name]).expand_as(own[name]) for name in names}
        if where is not None:
            replaced = {
                name: torch.where(where.view(-1, *[1] * (x.ndim - 1)), x, own[name])
                for name, x in replaced.items()
            }
        return Conditioning(**(own | replaced))

    def lerp(self, other: Conditioning, share: Tensor) -> Conditioning:
        """Return this image's conditioning with the text mixed with another's, by shares (B,)."""
        mixed = {
            name: torch.lerp(x, other.tensors()[name], share.to(x).view(-1, *[1] * (x.ndim - 1)))
            for name, x in self.tensors().items()
            if name in TEXT
        }
        return Conditioning(**(self.expand(len(share)).tensors() | mixed))

    def unet_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments by which a UNet2DConditionModel reads the conditioning."""
        named: dict[str, Any] = {"encoder_hidden_states": self.prompt_embeds}
        if self.class_labels is not None:
            named["class_labels"] = self.class_labels
        if self.pooled_embeds is not None:
            added = {"text_embeds": self.pooled_embeds, "time_ids": self.time_ids}
            named["added_cond_kwargs"] = added
        return named

    @staticmethod
    def from_unet_kwargs(named: Mapping[str, Any]) -> Conditioning:
        """Return the conditioning that `unet_kwargs` named so, as a hook of the U-Net sees them."""
        added = named.get("added_cond_kwargs") or {}
        return Conditioning(
            prompt_embeds=named.get("encoder_hidden_states"),
            pooled_embeds=added.get("text_embeds"),
            time_ids=added.get("time_ids"),
            class_labels=named.get("class_labels"),
        )


def make_time_ids(
    original_size: Size, crop_top_left: Size = (0, 0), target_size: Size | None = None
) -> Tensor:
    """Return SDXL's micro-conditioning of one image, (6,) int64 (Podell et al. 2023, 2.2).

    Pixels, in this order: height and width of the original image, top and left of the crop within
    it once it is resized, height and width of the crop; by default those of the original. Integers,
    so that no precision rounds them.
    """
    return torch.tensor([*original_size, *crop_top_left, *(target_size or original_size)])
