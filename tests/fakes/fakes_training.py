"""A whole run of seconds: ten tiny images, a tiny VAE, a U-Net of a few thousand parameters."""

import json
from pathlib import Path
from typing import Any

import torch
from fakes_models import make_vae

from latentdiff.config.io import load_config
from latentdiff.config.text_to_image import Config
from latentdiff.data.shapes import write_shapes

SETTINGS = {
    "data": {"resolution": 32},
    "model": {
        "unet": {
            "block_out_channels": [32, 32],
            "attention_levels": [False, True],
            "layers_per_block": 1,
            "head_dim": 16,
            "dropout": 0.1,
        },
        "text": {
            "width": 32,
            "num_layers": 1,
            "num_heads": 2,
            "vocab_size": 560,
            "max_tokens": 16,
        },
    },
    "train": {
        "batch_size": 4,
        "max_steps": 8,
        "lr_warmup_steps": 2,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "log_every_steps": 1,
        "ema_decay": 0.9,
    },
    "preview": {"num_steps": 2, "every_steps": 0},
    "eval": {"every_steps": 0, "num_heldout": 8},
}


def make_world(folder: Path) -> Path:
    """Write data/ (ten training images, so the last batch of four is partial) and vae/."""
    torch.manual_seed(0)
    write_shapes(folder / "data", num_train=10, num_test=4, size_px=32)
    make_vae().save_pretrained(folder / "vae")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return folder


def write_world(folder: Path, data: dict[str, Any]) -> Path:
    """Write a VAE and the settings of a run without U-Net dropout on folder/data; return folder."""
    make_vae().save_pretrained(folder / "vae")
    unet = SETTINGS["model"]["unet"] | {"dropout": 0.0}
    settings = SETTINGS | {"data": data, "model": SETTINGS["model"] | {"unet": unet}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def arguments(world: Path, run: Path, **overrides: Any) -> list[str]:
    """Return the command line of a run; overrides such as train__max_steps=3."""
    settings = {
        "data.root": world / "data",
        "data.cache_dir": world / "cache",
        "model.vae": world / "vae",
        "output_dir": run,
    } | {name.replace("__", "."): value for name, value in overrides.items()}
    return [f"--{name}={value}" for name, value in settings.items()]


def make_config(world: Path, run: Path, **overrides: Any) -> Config:
    """Return the config of a run; overrides such as train__max_steps=3."""
    return load_config(world / "config.json", arguments(world, run, **overrides))


def read_metrics(run: Path, name: str = "loss") -> dict[int, float]:
    """Return a figure by step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}
