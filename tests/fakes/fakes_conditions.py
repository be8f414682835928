"""Images, maps and ControlNets, for models that read an image besides the prompt."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from fakes_pipeline import SIZE
from PIL import Image

from latentdiff.models.unet.controlnet import make_controlnet


def photo(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def controlnet_of(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    """A ControlNet that has learned something."""
    net = make_controlnet(unet, factor=4, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not parameter.any():
                parameter.normal_(std=0.3 if "cond_embedding" in name else 0.1)
    return net.eval()


def depth_map(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> torch.Tensor:
    return torch.rand(1, *size, generator=torch.Generator().manual_seed(seed)) * 7 - 2
