"""Sample sheets of a model that reads an image: its condition next to what the model makes of it.

A hook gives the U-Net the condition, so that the pipeline samples as from a model of text alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor, nn

from latentdiff.image_grid import to_pil
from latentdiff.models.components import Components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.controlnet import control_residuals
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


@contextmanager
def controlled(
    components: Components, sample: FixedCondition, controlnet: ControlNetModel
) -> Iterator[None]:
    """Let a ControlNet read this condition (3, H, W) and steer the U-Net inside the block."""
    unet = components.unet
    control = sample.condition[None].to(unet.device)

    def steer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        zt, t = args
        given = {"control": control.expand(len(zt), -1, -1, -1).to(zt)}
        names = {"encoder_hidden_states": "prompt_embeds", "class_labels": "class_labels"}
        given |= {names[name]: kwargs[name] for name in names.keys() & kwargs.keys()}
        if added := kwargs.get("added_cond_kwargs"):
            given |= {"pooled_embeds": added["text_embeds"], "time_ids": added["time_ids"]}
        times = torch.as_tensor(t, device=zt.device).expand(len(zt))
        residuals = control_residuals(controlnet, zt, times, Conditioning(**given))
        return args, kwargs | residuals

    hook = unet.register_forward_pre_hook(steer, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def shown_condition(components: Components, kind: str, condition: Tensor) -> Image.Image:
    """Show a condition (k, h, w) as an image; a ControlNet's is one."""
    if kind == "controlnet":
        return to_pil(condition * 2 - 1)
    codec = LatentCodec(components.vae)
    with torch.no_grad():
        pixels = condition_pixels(kind, codec, condition[None].to(components.vae.device))
    return to_pil(pixels[0])
