"""Low-rank adapters (Hu et al. 2022): a layer gives W x + (alpha / r) B A x, and A and B are
trained.

Answers for: adding them (peft's layers), their weights by diffusers' names, and the plain model
with them merged in. In a file alpha is the rank, the scale being part of B, so that every reader
applies them alike. Their files are written by pipeline/files/kohya_lora.py.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from latentdiff.pipeline.files.lora_layers import TEXT, UNET, LoraLayers

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
    initial: LoraLayers | None = None,
) -> None:
    """Add adapters to layers of the U-Net, and of the text encoder where it is trained.

    targets: ends of layers' names. B starts at 0, so that the model's output is the same at first;
    A follows from the seed. initial: layers to start from; a part that has some gets these and no
    others, of their own ranks, with the same scale alpha / rank. Raises ValueError for a target
    that no layer of the U-Net is named.
    """
    known = initial.parts if initial is not None else {}
    if UNET not in known:
        _check_targets(components.unet, targets)
    torch.manual_seed(seed)
    scale = alpha / rank if alpha else 1.0
    for part, names in ((UNET, targets), (TEXT, TEXT_TARGETS if trains_text_encoder else ())):
        module, weights = getattr(components, part), known.get(part, {})
        if not weights and not names:
            continue
        ranks = {path: len(weights[f"{path}.lora_A.weight"]) for path in _paths(weights)}
        settings = LoraConfig(
            r=rank,
            lora_alpha=scale * rank,  # type: ignore[arg-type]  # any number does
            lora_dropout=dropout,
            target_modules=list(ranks or names),
            rank_pattern={f"^{re.escape(path)}": r for path, r in ranks.items()},
            alpha_pattern={f"^{re.escape(path)}": scale * r for path, r in ranks.items()},
        )
        inject_adapter_in_model(settings, module, ADAPTER)
        _load(module, weights)


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


def rank_of(weights: Mapping[str, Tensor]) -> int | None:
    """Return the rank of all of a LoRA's layers, None where it differs."""
    ranks = {len(weights[f"{path}.lora_A.weight"]) for path in _paths(weights)}
    return ranks.pop() if len(ranks) == 1 else None


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


@torch.no_grad()
def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the matrices of a LoRA that acts at scale 1 into adapters, which divide B by theirs."""
    adapted = dict(_adapted(module)) if weights else {}
    assert adapted.keys() == set(_paths(weights))
    for path, layer in adapted.items():
        layer.lora_A[ADAPTER].weight.copy_(weights[f"{path}.lora_A.weight"])
        layer.lora_B[ADAPTER].weight.copy_(
            weights[f"{path}.lora_B.weight"] / layer.scaling[ADAPTER]
        )


def _paths(weights: Iterable[str]) -> list[str]:
    """Return the layers whose matrices are named."""
    end = ".lora_A.weight"
    return [name.removesuffix(end) for name in weights if name.endswith(end)]


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
