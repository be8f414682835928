"""A trained LoRA of a real SDXL, on the meta device, against the names that other programs read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes_key_lists import check_keys, key_list

from latentdiff.models.weights import Shape
from latentdiff.pipeline.files.kohya_lora import kohya_weights, layers_unknown_to_kohya
from latentdiff.pipeline.files.single_file import bundled_configs, empty_modules
from latentdiff.training.finetune.lora import add_lora, lora_weights

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = (
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
)
OTHERS = (
    *("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"),
    *("add_embedding.linear_1", "add_embedding.linear_2"),
)
RANK = 4  # as in the lists


@pytest.fixture(scope="module")
def adapters() -> tuple[dict[str, torch.Tensor], Any]:
    """Adapters of every layer of a real SDXL by diffusers' names, and the U-Net's config."""
    components: Any = SimpleNamespace(**empty_modules(bundled_configs("sdxl")))
    with torch.device("meta"):
        add_lora(
            components,
            rank=RANK,
            alpha=0,
            dropout=0.0,
            targets=ATTENTION + CONVOLUTIONS + OTHERS,
            text_encoders=("text_encoder", "text_encoder_2"),
            seed=0,
        )
    return lora_weights(components), components.unet.config


def of_unet(weights: dict[str, torch.Tensor], targets: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the matrices of the U-Net's layers whose names end so."""
    return {
        name: tensor
        for name, tensor in weights.items()
        if name.startswith("unet.") and name.rpartition(".lora_")[0].endswith(targets)
    }


def kohya_shapes(weights: dict[str, torch.Tensor], config: Any) -> dict[str, Shape]:
    named = kohya_weights(weights, unet_config=config)
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


@pytest.mark.parametrize(
    ("targets", "lists"),
    [(ATTENTION, ["lora"]), (ATTENTION + CONVOLUTIONS, ["lora", "lora_convolutions"])],
    ids=["attention", "convolutions"],
)
def test_trained_lora_has_the_names_and_shapes_of_kohyas(adapters, targets, lists):
    """The lists are from kohya's sd-scripts 48d368fa (2026-02-16): sources in fakes_key_lists.py.

    Of the text encoders kohya adapts the feed-forward layers too, and we attention alone.
    """
    weights, config = adapters
    expected = {name: shape for one in lists for name, shape in key_list(one).items()}
    ours = {name: shape for name, shape in expected.items() if "_mlp_" not in name}
    text = {name: tensor for name, tensor in weights.items() if not name.startswith("unet.")}
    chosen = of_unet(weights, targets) | text
    assert layers_unknown_to_kohya(chosen) == []
    check_keys(kohya_shapes(chosen, config), ours)


def test_layers_that_kohya_has_no_place_for_have_one_in_comfyuis_key_map(adapters):
    """The list is from ComfyUI a125cd84 (2025-10-12): sources in fakes_key_lists.py."""
    weights, config = adapters
    assert layers_unknown_to_kohya(weights) == sorted(OTHERS)
    layers: dict[str, dict[str, Shape]] = {}
    for name, shape in kohya_shapes(of_unet(weights, OTHERS), config).items():
        layer, _, matrix = name.partition(".")
        layers.setdefault(layer, {})[matrix] = shape
    found = {
        layer: (matrices["lora_up.weight"][0], *matrices["lora_down.weight"][1:])
        for layer, matrices in layers.items()
    }
    check_keys(found, key_list("lora_comfyui"))
