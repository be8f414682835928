"""A tiny SDXL folder and a captioned folder, for runs of seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fakes_sdxl import sdxl_components
from fakes_training import SETTINGS, make_config

from latentdiff.config.text_to_image import Config
from latentdiff.data.shapes import write_shapes
from latentdiff.pipeline import LatentDiffPipeline

QUICK = {
    "model__vae": "",
    "train__max_steps": 3,
    "train__ema": "false",
    "train__channels_last": "false",
    "preview__num_steps": 1,
    "preview__num_nearest": 0,
}


def make_sdxl_world(folder: Path, *, zeros: bool = True, **changes: Any) -> Path:
    """Write data/, ten training images, and base/, a tiny SDXL model; config.json for both.

    changes: components of the model by name.
    """
    write_shapes(folder / "data", num_train=10, num_test=4, size_px=32)
    parts = sdxl_components(**changes)
    LatentDiffPipeline(**parts, force_zeros_for_empty_prompt=zeros).save_pretrained(folder / "base")
    settings = {name: part for name, part in SETTINGS.items() if name != "model"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def sdxl_config(world: Path, run: Path, **overrides: object) -> Config:
    """Return the config of a fine-tune of the tiny model; overrides such as train__max_steps=3."""
    base = {"model__pretrained": world / "base"}
    return make_config(world, run, **(QUICK | base | overrides))
