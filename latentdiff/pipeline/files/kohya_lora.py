"""LoRA files, written in two namings of the same matrices.

diffusers names a matrix `unet.X.to_q.lora_A.weight`; kohya, whose naming ComfyUI and A1111 read,
`lora_unet_X_to_q.lora_down.weight`, with the layer's alpha next to it; what kohya's scripts leave
to LyCORIS, DoRA's norms and LoKr's factors, has the names of that library. For SDXL kohya has
CompVis' layers of the U-Net, `lora_unet_input_blocks_...`, and `lora_te1_`, `lora_te2_`. All are
read by lora_layers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.atomic import atomic_file
from latentdiff.models.compatibility import reads_time_ids
from latentdiff.pipeline.files.ldm_names import unet_name
from latentdiff.pipeline.files.lora_layers import TEXT, TEXT_2, UNET

# the blocks of the U-Net whose layers kohya's own scripts adapt; ComfyUI and A1111 know all layers
KOHYA_BLOCKS = re.compile(r"\.(attentions|resnets|downsamplers|upsamplers)\.|\.(self_attn|mlp)\.")
PREFIXES = {UNET: "lora_unet", TEXT: "lora_te", TEXT_2: "lora_te2"}


def kohya_weights(
    weights: Mapping[str, Tensor], *, unet_config: Any = MappingProxyType({})
) -> dict[str, Tensor]:
    """Return the same adapters by kohya's names, such as lora_unet_X_to_q.lora_down.weight.

    unet_config: of the U-Net that they are for; that of SDXL has names of its own. DoRA's norms
    (Liu et al. 2024) are its dora_scale, a column there; LoKr's factors keep theirs.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        part, layer, matrix = _split(name)
        flat = _kohya_layer(part, layer, unet_config)
        if matrix == "lora_A":
            renamed[f"{flat}.lora_down.weight"] = tensor
            renamed[f"{flat}.alpha"] = torch.tensor(float(len(tensor)))
        elif matrix == "lora_magnitude_vector":
            dims = weights[name.partition(f".{matrix}")[0] + ".lora_A.weight"].ndim
            renamed[f"{flat}.dora_scale"] = tensor.reshape(-1, *[1] * (dims - 1))
        elif matrix == "lora_B":
            renamed[f"{flat}.lora_up.weight"] = tensor
        else:
            renamed[f"{flat}.{matrix}"] = tensor
            if matrix.endswith("_b"):  # the rank, which is what alpha is divided by
                renamed[f"{flat}.alpha"] = torch.tensor(float(len(tensor)))
    return renamed


def _kohya_layer(part: str, layer: str, unet_config: Any) -> str:
    """Return kohya's name of a layer, without dots."""
    prefix = PREFIXES[part]
    if reads_time_ids(unet_config):  # SDXL's
        prefix = "lora_te1" if part == TEXT else prefix
        if part == UNET:
            layer = unet_name(f"{layer}.weight", unet_config).removesuffix(".weight")
    return f"{prefix}_{layer.replace('.', '_')}"


def lora_rank(weights: Mapping[str, Tensor]) -> int | None:
    """Return the layers' rank, None where it differs by layer; weights: by kohya's names."""
    ranks = {len(x) for name, x in weights.items() if name.endswith(".lora_down.weight")}
    return ranks.pop() if len(ranks) == 1 else None


def layers_unknown_to_kohya(names: Iterable[str]) -> list[str]:
    """Return the adapted layers that kohya's own scripts have no place for.

    names: of matrices, as in diffusers.
    """
    layers = {_split(name)[1] for name in names}
    return sorted(layer for layer in layers if not KOHYA_BLOCKS.search(layer))


def save_lora(
    weights: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None
) -> int:
    """Write adapters to a safetensors file as a whole; return its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    with atomic_file(path) as temporary:
        save_file(on_cpu, temporary, metadata={"format": "pt"} | dict(metadata or {}))
    return path.stat().st_size


def _split(name: str) -> tuple[str, str, str]:
    """Return part, layer and matrix of a name such as unet.X.to_q.lora_A.weight."""
    part, path = name.split(".", 1)
    layer, matrix = path.removesuffix(".weight").rsplit(".", 1)
    return part, layer, matrix
