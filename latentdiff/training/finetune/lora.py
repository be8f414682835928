"""Low-rank adapters (Hu et al. 2022): a layer gives W x + (alpha / r) B A x, and A and B are
trained.

Answers for: adding them (peft's layers), their weights by diffusers' names, and the plain model
with them merged in. In a file alpha is the rank, the scale being part of B, so that every reader
applies them alike. Their files are written by pipeline/files/kohya_lora.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextModel

from latentdiff.models.components import Components
from latentdiff.models.weights import load_into_meta

ADAPTER = "default"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
FILE_NAME = "pytorch_lora_weights.safetensors"  # as diffusers looks for in a folder


def add_lora(
    components: Components,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    trains_text_encoder: bool,
    seed: int,
) -> None:
    """Add adapters to layers of the U-Net, and of the text encoder where it is trained.

    targets: ends of layers' names. B starts at 0, so that the model's output is the same at first;
    A follows from the seed. Raises ValueError for a target that no layer of the U-Net is named.
    """
    _check_targets(components.unet, targets)
    torch.manual_seed(seed)
    parts: list[tuple[nn.Module, Sequence[str]]] = [(components.unet, targets)]
    if trains_text_encoder:
        parts.append((components.text_encoder, TEXT_TARGETS))
    for module, names in parts:
        settings = LoraConfig(
            r=rank,
            lora_alpha=alpha or rank,  # type: ignore[arg-type]  # any number does
            lora_dropout=dropout,
            target_modules=list(names),
        )
        inject_adapter_in_model(settings, module, ADAPTER)


def is_adapter(name: str) -> bool:
    """Return whether a parameter of that name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def lora_weights(components: Components) -> dict[str, Tensor]:
    """Return A and B of every adapter by diffusers' names, such as unet.X.to_q.lora_A.weight."""
    weights: dict[str, Tensor] = {}
    for prefix, module in (("unet", components.unet), ("text_encoder", components.text_encoder)):
        for name, layer in _adapted(module):
            # older transformers have a text_model inside, and the files are named after it
            path = name if prefix == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            weights[f"{prefix}.{path}.lora_A.weight"] = down.detach().clone().contiguous()
            scaled = up.detach() * layer.scaling[ADAPTER]
            weights[f"{prefix}.{path}.lora_B.weight"] = scaled.contiguous()
    return weights


def merge_adapters(components: Components) -> Components:
    """Return the plain model with its adapters added to the weights, W + (alpha / r) B A.

    Weights without adapters are shared with the model in training.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(components.unet.config)
        text_encoder = CLIPTextModel(components.text_encoder.config)
    return replace(
        components,
        unet=_merged(unet, components.unet),
        text_encoder=_merged(text_encoder, components.text_encoder),
    )


@torch.no_grad()
def _merged(empty: Any, adapted: nn.Module) -> Any:
    """Return a module with its adapters merged; one without any as it is."""
    layers = dict(_adapted(adapted))
    if not layers:
        return adapted
    weights: dict[str, Tensor] = {}
    for name, tensor in adapted.state_dict().items():
        owner, _, key = name.rpartition(".")
        path = owner.removesuffix(".base_layer")
        if is_adapter(name):
            continue
        has_delta = path != owner and key == "weight"
        weights[f"{path}.{key}"] = (
            tensor + layers[path].get_delta_weight(ADAPTER) if has_delta else tensor
        )
    return load_into_meta(empty, weights, like=adapted)


def _adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def _check_targets(unet: nn.Module, targets: Iterable[str]) -> None:
    layers = [name for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.rpartition("attn1.")[2] for name in layers if "attn1." in name})
            raise ValueError(
                f"finetune.lora_targets holds {target!r}, and no layer of this U-Net has a name "
                f"that ends so; there are {', '.join(ends)} and others"
            )
