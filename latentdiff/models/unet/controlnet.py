"""A ControlNet (Zhang et al. 2023): a copy of a U-Net's encoder that reads an image of pixels.

Its outputs, zero at first, are added to what the frozen U-Net passes to its decoder. diffusers'
class, whose image is RGB in [0, 1], not normalised. Several together add up. Does not answer for:
its training (training/), nor where images come from (data/).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from huggingface_hub import snapshot_download
from torch import Tensor

from latentdiff.models.compatibility import CONTROLNET, read_json
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.model_path import fetched, is_local, near_sibling
from latentdiff.models.weights import load_diffusers_model, weight_patterns

CONFIG = "config.json"
FITTING = (  # settings of a ControlNet that are the U-Net's
    *("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block"),
    *("addition_embed_type", "projection_class_embeddings_input_dim"),
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
    num_negative: int = 0,
) -> dict[str, Any]:
    """Return what ControlNets add to a U-Net, as the keyword arguments of its forward.

    zt: (B, C, h, w); t: (B,); conditioning: of B images, with control (B, 3 n, H, W) in [0, 1], of
    n ControlNets in turn; scales: how much of each is added. num_negative: how many of the B, which
    come first, have negative prompts: to these a ControlNet that pools its image adds nothing.
    """
    nets = list(controlnet) if isinstance(controlnet, Sequence) else [controlnet]
    assert conditioning.control is not None
    controls = conditioning.control.chunk(len(nets), dim=1)
    bare = replace(conditioning, control=None, condition=None)
    total: list[Tensor] = []
    for net, control, scale in zip(nets, controls, scales, strict=True):
        skipped = num_negative if net.config.global_pool_conditions else 0
        down, mid = net(
            zt[skipped:],
            t,
            controlnet_cond=control[skipped:].to(zt),
            conditioning_scale=scale,
            return_dict=False,
            **bare[skipped:].unet_kwargs(),
        )
        added = [*down, mid]
        if skipped:
            added = [torch.cat([x.new_zeros(skipped, *x.shape[1:]), x]) for x in added]
        total = added if not total else [a + b for a, b in zip(total, added, strict=True)]
    return {
        "down_block_additional_residuals": total[:-1],
        "mid_block_additional_residual": total[-1],
    }


def open_controlnet(
    path_or_id: str | os.PathLike[str],
    *,
    torch_dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    hub: Mapping[str, Any] | None = None,
) -> ControlNetModel:
    """Open a ControlNet: its folder, a training run's, or a hub id; safetensors only.

    variant: of the weight files, such as "fp16". hub: options of fetching it, such as token.
    FileNotFoundError or ValueError for what is no ControlNet, or one with missing weights.
    """
    folder = _controlnet_folder(path_or_id, variant=variant, hub=hub or {})
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}, expected the folder of a ControlNet")
    if (kind := read_json(folder / CONFIG).get("_class_name")) != ControlNetModel.__name__:
        raise ValueError(f"{folder} holds a {kind}, expected a {ControlNetModel.__name__}")
    where = f"controlnet ({folder})"
    opened: ControlNetModel = load_diffusers_model(
        ControlNetModel, folder, where, torch_dtype=torch_dtype, variant=variant
    )
    return opened


def _controlnet_folder(
    path_or_id: str | os.PathLike[str], *, variant: str | None, hub: Mapping[str, Any]
) -> Path:
    """Return the local folder of a ControlNet, of a run's, or fetched from the hub."""
    folder = Path(path_or_id).expanduser()
    if (folder / CONTROLNET / CONFIG).is_file() and not (folder / CONFIG).exists():
        return folder / CONTROLNET
    if folder.exists():
        return folder
    name = os.fspath(path_or_id)
    if is_local(name):
        hint = near_sibling(folder) or "check the spelling"
        raise FileNotFoundError(f"there is no ControlNet {name}; {hint}")
    patterns = [CONFIG, *weight_patterns(variant)]
    return fetched(lambda: snapshot_download(name, allow_patterns=patterns, **hub), name)


def check_controlnet(
    controlnet: ControlNetModel, unet: UNet2DConditionModel, *, factor: int
) -> None:
    """Raise ValueError where a ControlNet is of another model than a U-Net. factor: the VAE's."""
    if not isinstance(controlnet, ControlNetModel):
        kind = type(controlnet).__name__
        raise ValueError(f"controlnet is a {kind}, expected a {ControlNetModel.__name__}")
    own, of_unet = controlnet.config, unet.config
    if (channels := own["conditioning_channels"]) != 3:
        raise ValueError(
            f"this ControlNet reads {channels} channels (conditioning_channels), expected the 3 of "
            "an RGB image"
        )
    problems = [
        f"its {name} is {own[name]} and the U-Net's {of_unet[name]}"
        for name in FITTING
        if not _is_same(own[name], of_unet[name])
    ]
    halvings = len(own["conditioning_embedding_out_channels"]) - 1
    if 1 << halvings != factor:
        problems.append(f"it shrinks images {1 << halvings} times and the VAE {factor} times")
    if problems:
        raise ValueError(
            f"this ControlNet is of another model: {'; '.join(problems)}; take one that was "
            "trained with this model"
        )


def _is_same(own: Any, other: Any) -> bool:
    """Return whether two settings are one; a number stands for a list of it, one a level."""
    lists = [value for value in (own, other) if isinstance(value, (list, tuple))]
    if len(lists) == 1:
        (number,) = (value for value in (own, other) if not isinstance(value, (list, tuple)))
        return all(one == number for one in lists[0])
    return [*lists[0]] == [*lists[1]] if lists else bool(own == other)
