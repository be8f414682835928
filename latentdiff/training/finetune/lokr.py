"""LoKr (Yeh et al. 2023): a layer gives W x + (alpha / r) (w1 kron w2) x, where w1 is small and w2,
where it is large, of rank r.

Answers for: adding them (peft's layers) and their weights by diffusers' names. In a file the scale
is part of w1, so that every reader applies them alike. Merging is lora.py's.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from peft import LoKrConfig, inject_adapter_in_model
from peft.tuners.lokr import LoKrLayer
from torch import Tensor, nn

from latentdiff.training.finetune.lora import ADAPTER, check_targets

FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def add_lokr(
    unet: UNet2DConditionModel,
    *,
    rank: int,
    alpha: float,
    factor: int,
    targets: Sequence[str],
    seed: int,
) -> None:
    """Add adapters to layers of the U-Net; its output stays the same at first.

    factor: rows and columns of w1 where they divide the layer's; -1: near the square root. targets:
    ends of layers' names. Raises ValueError for a target that no layer is named.
    """
    check_targets(unet, targets)
    torch.manual_seed(seed)
    settings = LoKrConfig(
        r=rank,
        alpha=alpha or rank,  # type: ignore[arg-type]  # any number does
        decompose_factor=factor,
        target_modules=list(targets),
        init_weights="lycoris",  # w2 at 0, as that library begins
    )
    inject_adapter_in_model(settings, unet, ADAPTER)


def lokr_weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Return the factors of every adapter by diffusers' names, such as unet.X.to_q.lokr_w1."""
    weights: dict[str, Tensor] = {}
    for path, layer in unet.named_modules():
        if not isinstance(layer, LoKrLayer):
            continue
        for name in FACTORS:
            if ADAPTER in (factors := getattr(layer, name)):
                scale = layer.scaling[ADAPTER] if name in ("lokr_w1", "lokr_w1_a") else 1.0
                weights[f"unet.{path}.{name}"] = (factors[ADAPTER].detach() * scale).contiguous()
    return weights


@contextmanager
def without_drawing(model: nn.Module) -> Iterator[None]:
    """Let the layers of LoKr draw no number for their dropout, which is 0, inside the block.

    So a pass can be taken where tensors have no contents.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoKrLayer)]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


def adapter_metadata(names: Iterable[str], *, rank: int, factor: int) -> dict[str, str]:
    """Return the entry of a file's metadata from which diffusers sets up LoKr's layers.

    names: of the factors, as `lokr_weights` gives them. Without the entry diffusers guesses, which
    convolutions defeat.
    """
    layers = sorted({name.removeprefix("unet.").partition(".lokr_")[0] for name in names})
    settings = {"r": rank, "alpha": rank, "decompose_factor": factor, "target_modules": layers}
    prefixed = {f"unet.{name}": value for name, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(prefixed)}
