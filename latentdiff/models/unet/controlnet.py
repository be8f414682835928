"""A ControlNet (Zhang et al. 2023): a copy of a U-Net's encoder that reads an image of pixels.

Its outputs, zero at first, are added to what the frozen U-Net passes to its decoder. diffusers'
class, whose image is RGB in [0, 1], not normalised. Several together add up. Does not answer for:
its training (training/), nor where images come from (data/).
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from huggingface_hub import snapshot_download
from torch import Tensor

from latentdiff.models.compatibility import read_json
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.model_path import fetched, is_local, near_sibling
from latentdiff.models.weights import (
    check_weights,
    mismatched_shapes,
    refuse_bad_weights,
    stored_shapes,
    weight_files,
)

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
    controlnet: ControlNetModel | Sequence[ControlNetModel],
    zt: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    *,
    scales: Sequence[float] = (1.0,),
) -> dict[str, Any]:
    """Return what ControlNets add to a U-Net, as the keyword arguments of its forward.

    zt: (B, C, h, w); t: (B,); conditioning: of B images, with control (B, 3 n, H, W) in [0, 1], of
    n ControlNets in turn; scales: how much of each is added.
    """
    nets = list(controlnet) if isinstance(controlnet, Sequence) else [controlnet]
    assert conditioning.control is not None
    controls = conditioning.control.chunk(len(nets), dim=1)
    known = replace(conditioning, control=None, condition=None).unet_kwargs()
    total: list[Tensor] = []
    for net, control, scale in zip(nets, controls, scales, strict=True):
        down, mid = net(
            zt,
            t,
            controlnet_cond=control.to(zt),
            conditioning_scale=scale,
            return_dict=False,
            **known,
        )
        added = [*down, mid]
        total = added if not total else [a + b for a, b in zip(total, added, strict=True)]
    return {
        "down_block_additional_residuals": total[:-1],
        "mid_block_additional_residual": total[-1],
    }


CONFIG, OF_RUN = "config.json", "controlnet"


def open_controlnet(
    path_or_id: str | os.PathLike[str], *, torch_dtype: torch.dtype = torch.float32
) -> ControlNetModel:
    """Open a ControlNet: its folder, a training run's, or a hub id; safetensors only.

    FileNotFoundError or ValueError for what is no ControlNet, or one with missing weights.
    """
    folder = Path(path_or_id).expanduser()
    if (folder / OF_RUN / CONFIG).is_file() and not (folder / CONFIG).exists():
        folder /= OF_RUN
    if not folder.exists():
        name = os.fspath(path_or_id)
        if is_local(name):
            hint = near_sibling(folder) or "check the spelling"
            raise FileNotFoundError(f"there is no ControlNet {name}; {hint}")
        patterns = [CONFIG, "diffusion_pytorch_model*.safetensors*"]
        folder = fetched(lambda: snapshot_download(name, allow_patterns=patterns), name)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}, expected the folder of a ControlNet")
    if (kind := read_json(folder / CONFIG).get("_class_name")) != ControlNetModel.__name__:
        raise ValueError(f"{folder} holds a {kind}, expected a {ControlNetModel.__name__}")
    where = f"controlnet ({folder})"
    with torch.device("meta"):
        skeleton = ControlNetModel.from_config(ControlNetModel.load_config(folder))
    stored = stored_shapes(weight_files(folder, variant=None))
    refuse_bad_weights(where, mismatched=mismatched_shapes(skeleton, stored))
    net, info = ControlNetModel.from_pretrained(
        folder, torch_dtype=torch_dtype, use_safetensors=True, output_loading_info=True
    )
    refuse_bad_weights(where, missing=info["missing_keys"], unexpected=info["unexpected_keys"])
    check_weights(net, where)
    opened: ControlNetModel = net.eval()
    return opened


FITTING = ("in_channels", "cross_attention_dim", "block_out_channels", "addition_embed_type")


def check_controlnet(
    controlnet: ControlNetModel, unet: UNet2DConditionModel, *, factor: int
) -> None:
    """Raise ValueError where a ControlNet is of another model than a U-Net. factor: the VAE's."""
    if not isinstance(controlnet, ControlNetModel):
        kind = type(controlnet).__name__
        raise ValueError(f"controlnet is a {kind}, expected a {ControlNetModel.__name__}")
    own, of_unet = controlnet.config, unet.config
    problems = [
        f"its {name} is {own[name]} and the U-Net's {of_unet[name]}"
        for name in FITTING
        if _plain(own[name]) != _plain(of_unet[name])
    ]
    halvings = len(own["conditioning_embedding_out_channels"]) - 1
    if 1 << halvings != factor:
        problems.append(f"it shrinks images {1 << halvings} times and the VAE {factor} times")
    if problems:
        raise ValueError(
            f"this ControlNet is of another model: {'; '.join(problems)}; take one that was "
            "trained with this model"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
