"""Low-rank adapters (Hu et al. 2022): a layer gives W x + (alpha / r) B A x, and A and B are
trained. With DoRA (Liu et al. 2024) the norm of each row of W + (alpha / r) B A is trained too.

Answers for: adding them (peft's layers), their weights by diffusers' names, and the plain model
with them, or with LoKr (lokr.py), merged in. In a file alpha is the rank, the scale being part of
B, so that every reader applies them alike. Their files are written by pipeline/files/kohya_lora.py.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentdiff.models.components import Components
from latentdiff.models.weights import load_into_meta
from latentdiff.pipeline.files.lora_layers import MAGNITUDES, TEXT, TEXT_2, UNET, LoraLayers

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
    use_dora: bool = False,
    text_encoders: Sequence[str] = (),
    seed: int,
    initial: LoraLayers | None = None,
) -> None:
    """Add adapters to layers of the U-Net, and of the text encoders that are trained.

    targets: ends of layers' names; text_encoders: names of components, of which an SDXL model alone
    has the second. B starts at 0, so that the model's output is the same at first;
    A follows from the seed. initial: layers to start from; a part that has some gets these and no
    others, of their own ranks, with the same scale alpha / rank. Raises ValueError for a target
    that no layer of the U-Net is named, and for layers to start from that are DoRA's where
    use_dora is false, or the other way.
    """
    known = initial.parts if initial is not None else {}
    if UNET not in known:
        check_targets(components.unet, targets)
    for weights in known.values():
        _check_kind(weights, use_dora=use_dora)
    torch.manual_seed(seed)
    scale = alpha / rank if alpha else 1.0
    for part in (UNET, TEXT, TEXT_2):
        names = targets if part == UNET else TEXT_TARGETS if part in text_encoders else ()
        module, weights = getattr(components, part), known.get(part, {})
        if module is None or not (weights or names):
            continue
        ranks = {path: len(weights[f"{path}.lora_A.weight"]) for path in _paths(weights)}
        settings = LoraConfig(
            r=rank,
            lora_alpha=scale * rank,  # type: ignore[arg-type]  # any number does
            lora_dropout=dropout,
            use_dora=use_dora,
            target_modules=list(ranks or names),
            rank_pattern={f"^{re.escape(path)}": r for path, r in ranks.items()},
            alpha_pattern={f"^{re.escape(path)}": scale * r for path, r in ranks.items()},
        )
        inject_adapter_in_model(settings, module, ADAPTER)
        _load(part, module, weights)


def check_targets(unet: nn.Module, targets: Iterable[str]) -> None:
    """Raise ValueError for the end of a name that no layer of the U-Net has."""
    layers = [name for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = sorted({name.rpartition("attn1.")[2] for name in layers if "attn1." in name})
            raise ValueError(
                f"finetune.lora_targets holds {target!r}, and no layer of this U-Net has a name "
                f"that ends so; there are {', '.join(ends)} and others"
            )


def is_adapter(name: str) -> bool:
    """Return whether a parameter of that name is an adapter's."""
    return any(f".{end}" in name for end in ("lora_A.", "lora_B.", "lora_magnitude_", "lokr_w"))


def lora_weights(components: Components) -> dict[str, Tensor]:
    """Return the matrices of every adapter by diffusers' names, such as unet.X.to_q.lora_A.weight.

    With DoRA also the norms, X.to_q.lora_magnitude_vector.
    """
    weights: dict[str, Tensor] = {}
    for prefix in (UNET, TEXT, TEXT_2):
        module = getattr(components, prefix)
        for name, layer in _adapted(module) if module is not None else ():
            # older transformers have a text_model inside, and the files are named after it
            path = name if prefix == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            weights[f"{prefix}.{path}.lora_A.weight"] = down.detach().clone().contiguous()
            scaled = up.detach() * layer.scaling[ADAPTER]
            weights[f"{prefix}.{path}.lora_B.weight"] = scaled.contiguous()
            if ADAPTER in layer.lora_magnitude_vector:
                norms = layer.lora_magnitude_vector[ADAPTER].weight
                end = MAGNITUDES.get(prefix, MAGNITUDES[TEXT])
                weights[f"{prefix}.{path}.{end}"] = norms.detach().clone()
    return weights


def merge_adapters(components: Components) -> Components:
    """Return the plain model with its adapters, of any type, merged into the weights.

    Weights without adapters are shared with the model in training.
    """
    second = components.text_encoder_2
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(components.unet.config)
        text_encoder = CLIPTextModel(components.text_encoder.config)
        text_encoder_2 = second and CLIPTextModelWithProjection(second.config)
    return replace(
        components,
        unet=_merged(unet, components.unet),
        text_encoder=_merged(text_encoder, components.text_encoder),
        text_encoder_2=second and _merged(text_encoder_2, second),
    )


def without_adapters(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return the plain U-Net that adapters were added to; the weights are shared."""
    weights = _plain_weights(unet)
    with torch.device("meta"):
        empty = UNet2DConditionModel.from_config(unet.config)
    return load_into_meta(empty, weights, like=unet)


def share_weights(plain: UNet2DConditionModel, unet: UNet2DConditionModel) -> None:
    """Let a U-Net of `without_adapters` share the weights of `unet` again, which were cast, or laid
    out in memory anew."""
    weights = _plain_weights(unet)
    for name, parameter in plain.named_parameters():
        parameter.data = weights[name]


def _plain_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights that adapters were added to, by the names that they have without these."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict().items()
        if not is_adapter(name)
    }


@torch.no_grad()
def _merged(empty: Any, adapted: nn.Module) -> Any:
    """Return a module with its adapters merged; one without any as it is."""
    layers = dict(_adapted(adapted, kind=BaseTunerLayer))
    if not layers:
        return adapted
    weights = _plain_weights(adapted)
    for path, layer in layers.items():
        weights[f"{path}.weight"] = _merged_weight(layer, weights[f"{path}.weight"])
    return load_into_meta(empty, weights, like=adapted)


@torch.no_grad()
def _load(part: str, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the matrices of a LoRA that acts at scale 1 into adapters, which divide B by theirs."""
    adapted = dict(_adapted(module)) if weights else {}
    assert adapted.keys() == set(_paths(weights))
    for path, layer in adapted.items():
        layer.lora_A[ADAPTER].weight.copy_(weights[f"{path}.lora_A.weight"])
        layer.lora_B[ADAPTER].weight.copy_(
            weights[f"{path}.lora_B.weight"] / layer.scaling[ADAPTER]
        )
        if ADAPTER in layer.lora_magnitude_vector:
            norms = weights[f"{path}.{MAGNITUDES.get(part, MAGNITUDES[TEXT])}"]
            layer.lora_magnitude_vector[ADAPTER].weight.copy_(norms)


def _paths(weights: Iterable[str]) -> list[str]:
    """Return the layers whose matrices are named."""
    end = ".lora_A.weight"
    return [name.removesuffix(end) for name in weights if name.endswith(end)]


def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """Return W + delta, and with DoRA its rows at their trained norms (Liu et al. 2024, Eq. 5)."""
    merged: Tensor = weight + layer.get_delta_weight(ADAPTER)
    magnitudes = getattr(layer, "lora_magnitude_vector", {})
    if ADAPTER not in magnitudes:
        return merged
    factor = magnitudes[ADAPTER].weight.flatten() / merged.flatten(1).norm(dim=1)
    return merged * factor.view(-1, *[1] * (merged.ndim - 1))


def _adapted(module: nn.Module, kind: type = LoraLayer) -> Iterator[tuple[str, Any]]:
    for name, layer in module.named_modules():
        if isinstance(layer, kind):
            yield name, layer


def _check_kind(weights: Iterable[str], *, use_dora: bool) -> None:
    has_norms = any(".lora_magnitude_vector" in name for name in weights)
    if has_norms != use_dora:
        kind, wanted = ("a DoRA", "dora") if has_norms else ("a plain LoRA", "lora")
        raise ValueError(f"finetune.init_lora is {kind}: set finetune.adapter_type={wanted}")
