"""LoRA files: layer names in diffusers' and in kohya's naming, and writing them.

diffusers names a matrix `unet.X.to_q.lora_A.weight`; kohya, whose naming ComfyUI and A1111 read,
`lora_unet_X_to_q.lora_down.weight`, with the layer's alpha next to it. `load_lora_weights` in
loading.py reads both.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.atomic import atomic_file

LORA_MATRIX = re.compile(r"\.(lora_A|lora_B|lora|lora_linear_layer)\.|_lora\.")

logger = logging.getLogger(__name__)


def kohya_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same adapters by kohya's names, such as lora_unet_X_to_q.lora_down.weight."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        part, path = name.split(".", 1)
        layer, matrix = path.removesuffix(".weight").rsplit(".", 1)
        flat = f"{'lora_unet' if part == 'unet' else 'lora_te'}_{layer.replace('.', '_')}"
        if matrix == "lora_A":
            renamed[f"{flat}.lora_down.weight"] = tensor
            renamed[f"{flat}.alpha"] = torch.tensor(float(len(tensor)))
        else:
            renamed[f"{flat}.lora_up.weight"] = tensor
    return renamed


def save_lora(weights: Mapping[str, Tensor], path: Path) -> int:
    """Write adapters to a safetensors file as a whole; return its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.cpu() for name, tensor in weights.items()}
    with atomic_file(path) as temporary:
        save_file(on_cpu, temporary, metadata={"format": "pt"})
    return path.stat().st_size


def warn_of_unused_layers(
    weights: Iterable[str], adapters: Mapping[nn.Module, Collection[str]]
) -> None:
    """Warn where layers of a LoRA just loaded have no layer of the model to act on.

    weights: its names in diffusers' naming. adapters: the names of the new adapters by module.
    """
    given = {LORA_MATRIX.split(name)[0] for name in weights if LORA_MATRIX.search(name)}
    used = 0
    for module, names in adapters.items():
        layers: list[Any] = [layer.lora_A for layer in module.modules() if hasattr(layer, "lora_A")]
        used += sum(bool(set(names) & set(matrices)) for matrices in layers)
    if used < len(given):
        logger.warning(
            "%d of the LoRA's %d layers have no place in this model and are without effect; it "
            "was trained for another one",
            len(given) - used,
            len(given),
        )
