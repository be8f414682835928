"""LoRA files in kohya's naming for the tiny model, and the same merged into it by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fakes_pipeline import tiny_pipeline
from torch import Tensor, nn

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = [f"{BLOCK}.attn{k}.{end}" for k in (1, 2) for end in ("to_q", "to_k", "to_v")]
ATTENTION += [f"{BLOCK}.attn{k}.to_out.0" for k in (1, 2)]
CONVS = ["down_blocks.0.resnets.0.conv1", "up_blocks.1.attentions.0.proj_in"]
TEXT = [f"encoder.layers.0.self_attn.{end}_proj" for end in "qkv"] + ["encoder.layers.1.mlp.fc1"]
Strengths = Mapping[str, tuple[int, float | None]]  # rank and alpha by layer; None: no alpha stored


def evenly(layers: Sequence[str], *, rank: int = 4, alpha: float | None = 2.0) -> Strengths:
    return dict.fromkeys(layers, (rank, alpha))


def matrices(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random A and B that change a layer's output about as much as its weight."""
    ones = [1] * (weight.ndim - 2)
    down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.2
    return down, torch.randn(len(weight), rank, *ones, generator=generator) * 0.2


def product(up: Tensor, down: Tensor, like: Tensor) -> Tensor:
    return (up.flatten(1) @ down.flatten(1)).reshape(like.shape)


def kohya_file(pipe: Any, strengths: Strengths, *, seed: int = 0) -> dict[str, Tensor]:
    """Return a LoRA for layers of the U-Net and the text encoder as kohya stores it."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for path, (rank, alpha) in strengths.items():
        is_text = path.startswith("encoder.")
        layer = (pipe.text_encoder if is_text else pipe.unet).get_submodule(path)
        prefix = "lora_te_text_model_" if is_text else "lora_unet_"
        name = prefix + path.replace(".", "_")
        down, up = matrices(layer.weight, rank, generator)
        weights[f"{name}.lora_down.weight"], weights[f"{name}.lora_up.weight"] = down, up
        if alpha is not None:
            weights[f"{name}.alpha"] = torch.tensor(alpha)
    return weights


def merge_by_hand(pipe: Any, strengths: Strengths, weights: Mapping[str, Tensor]) -> None:
    """Add alpha / rank B A to the weights of a pipeline."""
    for path, (rank, alpha) in strengths.items():
        is_text = path.startswith("encoder.")
        layer: nn.Module = (pipe.text_encoder if is_text else pipe.unet).get_submodule(path)
        name = ("lora_te_text_model_" if is_text else "lora_unet_") + path.replace(".", "_")
        scale = 1.0 if alpha is None else alpha / rank
        up, down = weights[f"{name}.lora_up.weight"], weights[f"{name}.lora_down.weight"]
        layer.weight.data += scale * product(up, down, layer.weight)


@torch.no_grad()
def outputs(pipe: Any) -> Tensor:
    """Return what the text encoder and the U-Net make of fixed inputs, in one vector."""
    generator = torch.Generator().manual_seed(5)
    embeds = pipe.text_encoder(torch.arange(16)[None]).last_hidden_state
    xt = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=generator)
    return torch.cat([embeds.flatten(), pipe.unet(xt, 500, embeds).sample.flatten()])


def merged_outputs(strengths: Strengths, weights: Mapping[str, Tensor]) -> Tensor:
    pipe = tiny_pipeline()
    merge_by_hand(pipe, strengths, weights)
    return outputs(pipe)
