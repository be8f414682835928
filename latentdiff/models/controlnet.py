"""A ControlNet (Zhang et al. 2023): a copy of a U-Net's encoder that reads an image of pixels.

Its outputs, zero at first, are added to what the frozen U-Net passes to its decoder. diffusers'
class, whose image is RGB in [0, 1], not normalised. Does not answer for: its training (training/),
nor where images come from (data/).
"""

from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from latentdiff.models.conditioning import Conditioning

EMBEDDING_WIDTHS = (16, 32, 96, 256)  # one more than halvings of the image, as diffusers has it


def make_controlnet(unet: UNet2DConditionModel, *, factor: int, seed: int) -> ControlNetModel:
    """Return a new ControlNet for a U-Net, whose weights it starts from.

    factor: image pixels along one side of a latent pixel, a power of 2. Where it reads the image
    its weights are random, by the seed, up to a last layer of zeros.
    """
    num = factor.bit_length()
    widths = (*EMBEDDING_WIDTHS, *EMBEDDING_WIDTHS[-1:] * num)[:num]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controlnet: ControlNetModel = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=widths
        )
    return controlnet


def control_residuals(
    controlnet: ControlNetModel, zt: Tensor, t: Tensor, conditioning: Conditioning
) -> dict[str, Any]:
    """Return what a ControlNet adds to a U-Net, as the keyword arguments of its forward.

    zt: (B, C, h, w); t: (B,); conditioning: of B images, with control (B, 3, H, W) in [0, 1].
    """
    down, mid = controlnet(
        zt, t, controlnet_cond=conditioning.control, return_dict=False, **conditioning.unet_kwargs()
    )
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
