"""The sizes that SDXL reads besides the prompt: its micro-conditioning (Podell et al. 2023, 2.2).

A caller's sizes in pixels, checked, and the time_ids that they become. By default an image is said
to be uncropped and of the size that is made; the negative prompt has the sizes of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.models.conditioning import Size, make_time_ids
from latentdiff.pipeline import checks

MAX_SIDE = 1 << 20  # pixels


@dataclass(frozen=True)
class SizeInputs:
    """The sizes of one call as (height, width), crops as (top, left); None for the default.

    Of a caller they may be anything until `checked`.
    """

    original_size: Size | None = None
    crops_coords_top_left: Size | None = None
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size | None = None
    negative_target_size: Size | None = None

    def checked(self, *, is_sdxl: bool) -> SizeInputs:
        """Return the sizes as pairs of int; ValueError for a bad one.

        ValueError too for any size where the model, which is not SDXL, reads none.
        """
        asked = {name: value for name, value in vars(self).items() if value is not None}
        if asked and not is_sdxl:
            raise ValueError(
                f"{next(iter(asked))} is read by SDXL alone, and this model is not SDXL; leave it "
                "out"
            )
        pairs = {
            name: checks.pair_px(name, value, low=0 if "crops" in name else 1, high=MAX_SIDE)
            for name, value in asked.items()
        }
        return SizeInputs(**pairs)

    def time_ids(self, made: Size, *, num: int, is_guided: bool) -> Tensor:
        """Return time_ids of num images of a size (height, width), (num, 6) int64.

        is_guided: (2 num, 6), those of the negative prompts first.
        """
        sizes = self.original_size or made, self.crops_coords_top_left or (0, 0)
        target = self.target_size or made
        own = make_time_ids(*sizes, target).expand(num, -1)
        if not is_guided:
            return own
        negative = make_time_ids(
            self.negative_original_size or sizes[0],
            self.negative_crops_coords_top_left or sizes[1],
            self.negative_target_size or target,
        )
        return torch.cat([negative.expand(num, -1), own])

    def settings(self) -> dict[str, list[int] | None]:
        """Return the sizes that were given, by argument, as JSON values; None for the others."""
        return {name: size and list(size) for name, size in vars(self).items()}
