"""A U-Net that also predicts the variance of each reverse step (Nichol & Dhariwal 2021, Sec. 3.1).

Its second half of output channels interpolates between the two fixed log-variances. Only ancestral
sampling uses it, so a model is exported twice: whole, with a DDPMScheduler, and without the
variance channels, for any scheduler. The loss is in diffusion/losses.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from latentdiff.models.components import Components

VLB_WEIGHT = 0.001  # lambda of L_hybrid (Eq. 16)


def has_learned_variance(components: Components) -> bool:
    """Return whether the U-Net has variance channels."""
    return int(components.unet.config["out_channels"]) == 2 * _channels(components)


def fit_variance(components: Components, *, learned: bool) -> None:
    """Add variance channels to the U-Net where they are to be learned and it has none.

    The variance starts halfway between the two fixed ones; the prediction stays as it is.
    ValueError where the model has variance channels and they are not to be trained.
    """
    has = has_learned_variance(components)
    if has and not learned:
        raise ValueError(
            "the model has a learned variance, which this run would drop; set "
            "diffusion.learned_variance=true, or start from its pipeline/ without it"
        )
    if learned and not has:
        _widen(components.unet, 2 * _channels(components))


def without_variance(components: Components) -> Components:
    """Return the model with the prediction as its only output, for any scheduler.

    The weights are shared, and the scheduler stays: any but that of a learned variance will do.
    """
    unet, channels = components.unet, _channels(components)
    with torch.device("meta"):
        cut = UNet2DConditionModel.from_config(unet.config, out_channels=channels)
    weights = {
        name: tensor[:channels].clone() if name.startswith("conv_out.") else tensor
        for name, tensor in unet.state_dict().items()
    }
    cut.load_state_dict(weights, assign=True)
    return replace(components, unet=cut.train(unet.training))


@contextmanager
def prediction_only(components: Components) -> Iterator[None]:
    """Let the U-Net give its prediction alone inside the block, as `without_variance` does."""
    unet, channels = components.unet, _channels(components)
    has = int(unet.config["out_channels"])

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output[:, :channels]

    hook = unet.conv_out.register_forward_hook(cut)
    unet.register_to_config(out_channels=channels)
    try:
        yield
    finally:
        hook.remove()
        unet.register_to_config(out_channels=has)


@torch.no_grad()
def _widen(unet: UNet2DConditionModel, num_outputs: int) -> None:
    old = unet.conv_out
    new = nn.Conv2d(
        old.in_channels,
        num_outputs,
        old.kernel_size,
        padding=old.padding,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    for name, weight in new.named_parameters():
        weight.zero_()
        weight[: old.out_channels] = getattr(old, name)
    unet.conv_out = new
    unet.register_to_config(out_channels=num_outputs)


def _channels(components: Components) -> int:
    return int(components.vae.config["latent_channels"])
