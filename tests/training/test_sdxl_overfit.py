"""SDXL learns: two captions, two images, and each caption gives its own, by each objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from fakes_sdxl import sdxl_components, sdxl_unet
from PIL import Image

from latentdiff.config.io import parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.data.shapes import Scene, render
from latentdiff.models.components import load_vae
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.training.text_to_image.train_t2i import train

pytestmark = pytest.mark.slow
FIRST = (Scene("circle", "red", "large", "white"), Scene("square", "blue", "large", "black"))
OTHERS = (Scene("square", "green", "large", "white"), Scene("circle", "yellow", "large", "black"))
COPIES, SIZE_PX = 4, 32  # several copies, so that a step sees each image at several timesteps
TRAINED = {
    "diffusion.timestep_sampling": "stratified",
    "diffusion.caption_dropout": 0,
    "data.resolution": SIZE_PX,
    "data.heldout_fraction": 0,
    "train.batch_size": 2 * COPIES,
    "train.lr_schedule": "cosine",
    "train.lr_warmup_steps": 10,
    "train.ema": "false",
    "train.mixed_precision": "fp32",
    "train.log_every_steps": 50,
    "preview.every_steps": 0,
    "preview.num_steps": 1,
    "preview.num_nearest": 0,
}
TARGETS = (
    '["to_k","to_v","to_out.0","ff.net.2","conv1","conv2","conv_in","conv_out","time_emb_proj"]'
)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "epsilon": {  # an error of noise is a large one of the image where there is little of it
        "diffusion__prediction_type": "epsilon",
        "diffusion__loss_weighting": "p2",
        "diffusion__timestep_sampling": "logit_normal",
        "diffusion__logit_normal_mean": 1.5,
        "diffusion__logit_normal_std": 1.5,
        "train__beta2": 0.95,
        "train__max_steps": 340,
        "train__learning_rate": 5e-3,
    },
    "v": {
        "diffusion__prediction_type": "v_prediction",
        "diffusion__zero_terminal_snr": "true",
        "train__max_steps": 100,
        "train__learning_rate": 8e-3,
    },
    "flow": {
        "diffusion__prediction_type": "flow_prediction",
        "train__max_steps": 160,
        "train__learning_rate": 5e-3,
    },
}
# from noise alone v is the image, once it is learned
NUM_INFERENCE_STEPS = {"epsilon": 20, "v": 1, "flow": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, an untrained SDXL around the VAE that ships, and two folders of two images."""
    folder = tmp_path_factory.mktemp("overfit")
    vae = load_vae("latentdiff-vae")
    channels = vae.config["latent_channels"]
    unet = sdxl_unet(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(48, 64),
        attention_head_dim=(3, 4),
        norm_num_groups=8,
        sample_size=SIZE_PX // 8,
    )
    LatentDiffPipeline(**sdxl_components(vae=vae, unet=unet)).save_pretrained(folder / "base")
    for name, scenes in (("first", FIRST), ("others", OTHERS)):
        (folder / name).mkdir()
        for index, scene in enumerate(scenes):
            for copy in range(COPIES):
                _image(scene, index).save(folder / name / f"{index}-{copy}.png")
                (folder / name / f"{index}-{copy}.txt").write_text(scene.colour)
    return folder


def _image(scene: Scene, index: int) -> Image.Image:
    return render(scene, np.random.default_rng(index), size_px=SIZE_PX)


def _train(world: Path, run: Path, *, data: str, base: Path, **settings: Any) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    given = TRAINED | {
        "output_dir": run,
        "data.root": world / data,
        "data.cache_dir": world / "cache",
        "model.pretrained": base,
    }
    given |= {name.replace("__", "."): value for name, value in settings.items()}
    config = parse_arguments(Config, [f"--{name}={value}" for name, value in given.items()])
    assert train(config) == 0
    return run / "pipeline"


def _assert_learned(folder: Path, scenes: tuple[Scene, Scene], *, objective: str) -> None:
    """Each caption gives its own image, PSNR above 20 dB, and not the other's, below 15 dB."""
    pipe = LatentDiffPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        [scene.colour for scene in scenes],
        num_inference_steps=NUM_INFERENCE_STEPS[objective],
        guidance_scale=1.0,
        height=SIZE_PX,
        width=SIZE_PX,
        seed=0,
    ).images
    originals = [_image(scene, index) for index, scene in enumerate(scenes)]
    table = [[_psnr(image, original) for original in originals] for image in images]
    for own in range(2):
        assert table[own][own] > 20, table
        assert table[own][1 - own] < 15, table


def _psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


@pytest.fixture(scope="module")
def trained(world: Path) -> dict[str, Path]:
    """The base, trained fully on the first two images by each objective."""
    torch.manual_seed(0)
    return {
        name: _train(
            world,
            world / name,
            data="first",
            base=world / "base",
            **objective,
        )
        for name, objective in OBJECTIVES.items()
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_full_training_gives_each_caption_its_own_image(
    trained: dict[str, Path], objective: str
) -> None:
    _assert_learned(trained[objective], FIRST, objective=objective)


def test_lora_with_convolutions_learns_two_other_images(
    world: Path, trained: dict[str, Path]
) -> None:
    folder = _train(
        world,
        world / "lora",
        data="others",
        base=trained["v"],
        finetune__method="lora",
        finetune__lora_rank=32,
        finetune__lora_alpha=128,
        finetune__lora_targets=TARGETS,
        train__max_steps=120,
        train__learning_rate=4e-3,
        train__beta2=0.95,
    )
    _assert_learned(folder, OTHERS, objective="v")
