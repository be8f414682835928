"""The guidance embedding of a distilled U-Net: the guidance scale as an input (Meng et al. 2023).

A U-Net with `time_cond_proj_dim` reads sinusoidal features of scale - 1 through a projection that
is added to those of the timestep, as the latent consistency models of diffusers do; stock pipelines
then turn classifier-free guidance off and pass the scale on.
"""

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from latentdiff.models.conditioning import Conditioning
from latentdiff.models.unet.controlnet import control_residuals

WIDTH = 256  # features of a scale, as diffusers' distilled models have
PROJECTION = "time_embedding.cond_proj.weight"
FIRST_LAYER = "time_embedding.linear_1."


def guidance_features(unet: UNet2DConditionModel, scale: float | Tensor, *, num: int) -> Tensor:
    """Return the features of guidance scales that the U-Net reads, (num, D), in its dtype.

    scale: one number or (num,). ValueError for a U-Net without a guidance embedding.
    """
    width = unet.config.time_cond_proj_dim
    if width is None:
        raise ValueError("the U-Net has no guidance embedding: its time_cond_proj_dim is null")
    device = unet.device  # filled there: a copy of a number would make the host wait
    given = scale.to(device) if isinstance(scale, Tensor) else torch.full((), scale, device=device)
    scales = (given - 1) * 1000.0
    features: Tensor = get_timestep_embedding(scales.expand(num), width, downscale_freq_shift=1)
    return features.to(unet.dtype)


def predict(
    unet: UNet2DConditionModel,
    zt: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    scale: Tensor | None = None,
    *,
    controlnet: ControlNetModel | None = None,
) -> Tensor:
    """Return a U-Net's output for zt (B, C, h, w), t (B,) and the conditioning of B images.

    scale: (B,) guidance scales, for a U-Net that reads them. controlnet: reads its control.
    """
    features = None if scale is None else guidance_features(unet, scale, num=len(zt))
    named = conditioning.unet_kwargs()
    if conditioning.condition is not None:
        zt = torch.cat([zt, conditioning.condition.to(zt)], dim=1)  # (B, C + k, h, w)
    if controlnet is not None:
        named |= control_residuals(controlnet, zt, t, conditioning)
    output: Tensor = unet(zt, t, timestep_cond=features, return_dict=False, **named)[0]
    return output


def has_guidance_embedding(unet: UNet2DConditionModel) -> bool:
    """Tell whether a U-Net reads the guidance scale as an input."""
    return unet.config.time_cond_proj_dim is not None


def add_guidance_embedding(unet: UNet2DConditionModel, width: int = WIDTH) -> UNet2DConditionModel:
    """Return a copy of a U-Net that reads the guidance scale, at first without effect.

    The new projection is zero, so the outputs are the same. One that has the embedding is copied.
    """
    state = dict(unet.state_dict())
    if PROJECTION not in state:
        first = state[FIRST_LAYER + "weight"]
        state[PROJECTION] = first.new_zeros(unet.time_embedding.linear_1.in_features, width)
    return _with_state(unet, state, width=state[PROJECTION].shape[1])


def fold_guidance(unet: UNet2DConditionModel, scale: float) -> UNet2DConditionModel:
    """Return a copy of a U-Net with one guidance scale fixed, which reads no scale any more.

    The projected features of the scale go into the bias of the timestep's first layer, exactly.
    """
    state = dict(unet.state_dict())
    features = guidance_features(unet, scale, num=1)[0].double()
    shift = state[FIRST_LAYER + "weight"].double() @ (state.pop(PROJECTION).double() @ features)
    bias = state[FIRST_LAYER + "bias"]
    state[FIRST_LAYER + "bias"] = (bias.double() + shift).to(bias.dtype)
    return _with_state(unet, state, width=None)


def _with_state(
    unet: UNet2DConditionModel, state: dict[str, Tensor], *, width: int | None
) -> UNet2DConditionModel:
    """Return a U-Net of the same shape with other weights, which it does not share."""
    copy: UNet2DConditionModel = UNet2DConditionModel.from_config(
        unet.config, time_cond_proj_dim=width
    )
    copy.load_state_dict({name: one.clone() for name, one in state.items()}, assign=True)
    return copy
