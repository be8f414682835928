"""Names and shapes that other programs give SDXL's weights and LoRAs, read from sdxl_keys.json.

Taken, on the meta device, from the modules and loaders of ComfyUI (a125cd84, 2025-10-12) and of
kohya's sd-scripts (48d368fa, 2026-02-16, with transformers' names of its version 4.54). Lists:

single_file: what ComfyUI loads of a whole model; kohya's U-Net has the same. Neither CLIP's
    logit_scale nor position_ids, which no image depends on, are in it.
lora: of kohya's LoRA of rank 4, attention and feed-forward layers, both text encoders.
lora_convolutions: what conv_dim of 4 adds. ComfyUI's key map has all layers of both lists.
lora_comfyui: layers that ComfyUI's key map has, and kohya's scripts do not adapt, with the shape
    of the layer's weight.

A name stands for several: {1,2} in it for 1 and for 2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path

from latentdiff.models.weights import Shape

LISTS = Path(__file__).with_name("sdxl_keys.json")


def key_list(name: str) -> dict[str, Shape]:
    """Return a list's shapes by name."""
    found: dict[str, Shape] = {}
    for pattern, sizes in json.loads(LISTS.read_text(encoding="utf-8"))[name].items():
        shape = tuple(int(size) for size in sizes.split("x") if size)
        choices = [part.split(",") for part in re.split(r"[{}]", pattern)]
        found |= {"".join(parts): shape for parts in product(*choices)}
    return found


def check_keys(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise AssertionError with a line for each name that is missing, unexpected or misshapen."""
    lines = [f"missing {name} {expected[name]}" for name in expected.keys() - found.keys()]
    lines += [f"unexpected {name} {found[name]}" for name in found.keys() - expected.keys()]
    lines += [
        f"misshapen {name} {found[name]}, expected {expected[name]}"
        for name in found.keys() & expected.keys()
        if found[name] != expected[name]
    ]
    assert not lines, "\n".join(sorted(lines))
