"""The scale of loaded LoRAs in one call (`lora_scale`), as a context around a module's passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def apply_lora_scale(module: nn.Module | None, scale: float | None) -> Iterator[None]:
    """Multiply the weight of all LoRAs of a module by `scale` within the context.

    At 0 the module is the one without them, bit for bit. Each LoRA keeps its own weight relative to
    the others.
    """
    if module is None or scale is None:
        yield
        return
    with _without_loras(module) if scale == 0 else _scaled(module, scale):
        yield


@contextlib.contextmanager
def _without_loras(module: nn.Module) -> Iterator[None]:
    """Replace layers with LoRAs by their base layers, so that fast paths see stock layers."""
    found: list[tuple[Any, str, Any]] = [
        (parent, key, child)
        for parent in module.modules()
        for key, child in parent.named_children()
        if hasattr(child, "lora_A")
    ]
    for parent, key, child in found:
        parent._modules[key] = child.base_layer
    try:
        yield
    finally:
        for parent, key, child in found:
            parent._modules[key] = child


@contextlib.contextmanager
def _scaled(module: nn.Module, scale: float) -> Iterator[None]:
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "lora_A")]
    own = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: s * scale for name, s in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, own, strict=True):
            layer.scaling.update(scaling)
