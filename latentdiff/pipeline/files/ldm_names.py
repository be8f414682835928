"""The weights of a model in one file: their names and their layout there.

U-Net and VAE have CompVis' names (Rombach et al. 2022). Text encoders have those of transformers
or of open_clip, which keeps query, key and value of a layer in one matrix and the projection
transposed. CLIPTextModel lost the prefix "text_model." of its weights in transformers 5.6 and
CLIPTextModelWithProjection did not: files have it, and names here mean the same with and without.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from latentdiff.models.weights import Shape, refuse_bad_weights

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_MODEL = "text_model."

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",  # of SDXL's pooled embeddings and sizes
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "final_layer_norm.": "ln_final.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
PROJECTION = "text_projection.weight"
THIRDS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Stored:
    """A weight in a file: its name and shape there, and what of that tensor the weight is.

    third: 0, 1 or 2, the part of open_clip's matrix of query, key and value; None for all of it.
    """

    name: str
    shape: Shape
    third: int | None = None
    is_transposed: bool = False


def unet_weights(unet: nn.Module, *, prefix: str = UNET_PREFIX) -> dict[str, Stored]:
    """Return a U-Net's weights in a file, by its own names."""
    config: Any = unet.config
    return {
        key: Stored(prefix + unet_name(key, config), tuple(tensor.shape))
        for key, tensor in unet.state_dict().items()
    }


def vae_weights(vae: nn.Module, *, prefix: str = VAE_PREFIX) -> dict[str, Stored]:
    """Return an AutoencoderKL's weights in a file, by its own names.

    Its attention's linear layers are 1x1 convolutions there.
    """
    config: Any = vae.config
    levels = len(config.block_out_channels)
    found = {}
    for key, tensor in vae.state_dict().items():
        is_linear = ".attentions." in key and tensor.ndim == 2
        shape = (*tensor.shape, 1, 1) if is_linear else tuple(tensor.shape)
        found[key] = Stored(prefix + vae_name(key, levels=levels), shape)
    return found


def clip_weights(text_encoder: nn.Module, *, prefix: str) -> dict[str, Stored]:
    """Return a text encoder's weights in a file that has transformers' names."""
    return {
        key: Stored(prefix + text_name(key), tuple(tensor.shape))
        for key, tensor in text_encoder.state_dict().items()
    }


def open_clip_weights(text_encoder: nn.Module, *, prefix: str) -> dict[str, Stored]:
    """Return a text encoder's weights in a file that has open_clip's names and layout."""
    found = {}
    for key, tensor in text_encoder.state_dict().items():
        name, shape = bare_text_name(key), tuple(tensor.shape)
        if match := re.fullmatch(r"(.+)self_attn\.([qkv])_proj\.(weight|bias)", name):
            whole = _open_clip_name(f"{match[1]}attn.in_proj_{match[3]}")
            third = THIRDS[match[2]]
            found[key] = Stored(prefix + whole, (3 * shape[0], *shape[1:]), third=third)
        elif name == PROJECTION:
            found[key] = Stored(prefix + "text_projection", shape[::-1], is_transposed=True)
        else:
            found[key] = Stored(prefix + _open_clip_name(name), shape)
    return found


def to_file(module: nn.Module, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Return a module's weights by their names in a file, in its layout."""
    named: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for key, tensor in module.state_dict().items():
        place = stored[key]
        if place.third is not None:
            thirds.setdefault(place.name, {})[place.third] = tensor
        else:
            named[place.name] = tensor.T if place.is_transposed else tensor.reshape(place.shape)
    return named | {name: torch.cat([x[k] for k in range(3)]) for name, x in thirds.items()}


def from_file(
    path: Path, module: nn.Module, stored: Mapping[str, Stored], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Read a module's weights from a file, by its own names; dtype: by default the file's."""
    weights: dict[str, Tensor] = {}
    with safe_open(path, "pt") as file:
        for key, like in module.state_dict().items():
            place = stored[key]
            if place.third is None:
                tensor = file.get_tensor(place.name)
            else:
                first = place.third * len(like)
                tensor = file.get_slice(place.name)[first : first + len(like)]
            tensor = tensor.T if place.is_transposed else tensor
            weights[key] = tensor.to(dtype or tensor.dtype).reshape(like.shape).contiguous()
    return weights


def check_stored(name: str, stored: Mapping[str, Stored], shapes: Mapping[str, Shape]) -> None:
    """Raise ValueError naming the weights that a file lacks or has in another shape.

    A 1x1 convolution and a linear layer may stand for each other. shapes: of the file's tensors.
    """
    expected = {place.name: place.shape for place in stored.values()}
    refuse_bad_weights(
        name,
        missing=expected.keys() - shapes.keys(),
        mismatched=[
            (key, shapes[key], shape)
            for key, shape in expected.items()
            if key in shapes and not _fits(shapes[key], shape)
        ],
    )


def _fits(found: Shape, wanted: Shape) -> bool:
    return found[:2] == wanted[:2] and math.prod(found) == math.prod(wanted)


def unet_name(key: str, config: Any) -> str:
    """Return CompVis' name of a U-Net weight; config: the U-Net's, as attributes.

    Raises ValueError for a weight that no U-Net of theirs has.
    """
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    part, rest = _split(key)
    blocks = config.layers_per_block + 1  # on a level
    match part:
        case ["mid_block", kind, index]:
            place = "1" if kind == "attentions" else str(2 * int(index))
            return f"middle_block.{place}.{_inner(kind, rest)}"
        case ["down_blocks", level, "downsamplers", _]:
            return f"input_blocks.{(int(level) + 1) * blocks}.0.op.{rest.removeprefix('conv.')}"
        case ["down_blocks", level, kind, index]:
            block = int(level) * blocks + int(index) + 1
            return f"input_blocks.{block}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
        case ["up_blocks", level, "upsamplers", _]:
            has_attention = "Attn" in config.up_block_types[int(level)]
            return f"output_blocks.{(int(level) + 1) * blocks - 1}.{1 + has_attention}.{rest}"
        case ["up_blocks", level, kind, index]:
            block = int(level) * blocks + int(index)
            return f"output_blocks.{block}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
    raise ValueError(f"the U-Net has a weight {key} that Stable Diffusion's have not")


def vae_name(key: str, *, levels: int) -> str:
    """Return CompVis' name of a VAE weight; levels: number of resolutions."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
        for ours, theirs in VAE_ATTENTION.items():
            key = key.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    key = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", key)
    key = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", key)
    key = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", key)
    return key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")


def bare_text_name(key: str) -> str:
    """Return the name of a text encoder's weight or layer without "text_model."."""
    return key.removeprefix(TEXT_MODEL)


def text_name(key: str) -> str:
    """Return the name of a text encoder's weight or layer as files have it, with "text_model."."""
    bare = bare_text_name(key)
    return bare if bare.startswith("text_projection") else TEXT_MODEL + bare


def _open_clip_name(name: str) -> str:
    for ours, theirs in OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name


def _split(key: str) -> tuple[list[str], str]:
    parts = key.split(".")
    length = 3 if parts[0] == "mid_block" else 4
    return parts[:length], ".".join(parts[length:])


def _inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    name, end = rest.split(".", 1)
    return f"{RESNET[name]}.{end}"
