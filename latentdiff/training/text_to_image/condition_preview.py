"""Sample sheets of a model that reads an image: its condition next to what the model makes of it.

A hook gives the U-Net the condition, so that the pipeline samples as from a model of text alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from latentdiff.image_grid import to_pil
from latentdiff.models.components import Components
from latentdiff.models.image_conditions import condition_pixels
from latentdiff.models.latents import LatentCodec
from latentdiff.training.inputs.conditions import FixedCondition


@contextmanager
def conditioned(components: Components, sample: FixedCondition) -> Iterator[None]:
    """Let the U-Net read this condition inside the block, whatever else it is given.

    It then takes noisy latents alone, as a model of text does.
    """
    unet = components.unet
    channels = int(unet.config["in_channels"])
    condition = sample.condition[None].to(unet.device)

    def append(module: nn.Module, inputs: Any) -> Any:
        (zt,) = inputs
        return torch.cat([zt, condition.to(zt).expand(len(zt), -1, -1, -1)], dim=1)

    def label(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if sample.class_label is not None:
            kwargs["class_labels"] = sample.class_label.to(unet.device).expand(len(args[0]))
        return args, kwargs

    hooks = [
        unet.conv_in.register_forward_pre_hook(append),
        unet.register_forward_pre_hook(label, with_kwargs=True),
    ]
    unet.register_to_config(in_channels=channels - len(sample.condition))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        unet.register_to_config(in_channels=channels)


def shown_condition(components: Components, kind: str, condition: Tensor) -> Image.Image:
    """Show a condition (k, h, w) as an image."""
    codec = LatentCodec(components.vae)
    with torch.no_grad():
        pixels = condition_pixels(kind, codec, condition[None].to(components.vae.device))
    return to_pil(pixels[0])
