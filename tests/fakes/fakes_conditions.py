"""Images, maps and tiny models of the kinds that read an image besides the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from fakes_pipeline import SIZE, ddim, tiny_pipeline, tiny_unet
from PIL import Image

from latentdiff.models.unet.controlnet import make_controlnet
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.model_info import ModelInfo

CHANNELS = {"inpaint": 9, "instruct_pix2pix": 8, "upscale": 7, "depth": 5}


def photo(seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pipeline_of(kind: str, **info: Any) -> LatentDiffPipeline:
    changes: dict[str, Any] = {"num_class_embeds": 1000} if kind == "upscale" else {}
    unet = tiny_unet(in_channels=CHANNELS[kind], **changes)
    pipe = tiny_pipeline(unet=unet, scheduler=ddim())
    pipe.model_info = ModelInfo(condition_kind=kind, **info)
    return pipe


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
