"""A tiny base model, and fine-tunes of it, for the tests of training/finetune and conversions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from fakes_training import make_config, make_world

from latentdiff.config.text_to_image import Config
from latentdiff.training.text_to_image.train_t2i import train

QUICK = {
    "train__max_steps": 4,
    "train__ema": "false",
    "train__channels_last": "false",
    "preview__num_nearest": 0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder, and base/pipeline, a model to fine-tune."""
    world = make_world(tmp_path_factory.mktemp("world"))
    AcceleratorState._reset_state(reset_partial_state=True)
    config = make_config(
        world, world / "base", train__max_steps=2, preview__num_nearest=0, model__unet__dropout=0
    )
    assert train(config) == 0
    return world


def finetuning(world: Path, run: Path, **overrides: object) -> Config:
    """Return the config of a fine-tune of the base."""
    base = {"model__vae": "", "model__pretrained": world / "base" / "pipeline"}
    return make_config(world, run, **(QUICK | base | overrides))


def generate(pipe, prompt: str = "a small red circle", **changes) -> torch.Tensor:
    """Return the float image of a stock or our own pipeline."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"} | changes
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt, generator=generator, height=32, width=32, **settings).images


def open_ours(folder: Path):
    from latentdiff import LatentDiffPipeline

    return LatentDiffPipeline.from_pretrained(folder)
