"""What a call returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor


@dataclass
class LatentDiffOutput(BaseOutput):
    """Pictures, the safety checker's verdicts (None without one), and what made each picture.

    images: a list of PIL images, an array (B, H, W, 3) in [0, 1], a tensor (B, 3, H, W) in [0, 1],
    or latents (B, C, h, w). seeds: None when the caller passed generators.
    settings: one JSON object a picture, which PNG files carry too.
    """

    images: list[Image.Image] | np.ndarray[Any, Any] | Tensor
    nsfw_content_detected: list[bool] | None
    seeds: list[int] | None = None
    settings: list[dict[str, Any]] | None = None
