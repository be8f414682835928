"""SDXL with images as conditions, with a ControlNet, distilled: exact resume, and stock agrees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from fakes_sdxl_training import make_sdxl_world, sdxl_config
from fakes_training import read_metrics
from PIL import Image
from safetensors.torch import load_file

from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.training.text_to_image.train_t2i import train

SIZE = {"height": 32, "width": 32}
DISTILLED: dict[str, dict[str, Any]] = {
    "guided": {"distill__num_steps": 4},
    "lcm_lora": {
        "distill__num_steps": 2,
        "finetune__method": "lora",
        "finetune__lora_rank": 2,
        "train__ema": "true",
    },
}
QUICK = {
    "train__max_steps": 2,
    "train__checkpoint_every_steps": 1,
    "train__keep_checkpoints": 2,
    "train__learning_rate": 1e-2,
    "eval__num_heldout": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL, and images that are each the condition of the next."""
    folder = make_sdxl_world(tmp_path_factory.mktemp("sdxl-conditions"))
    for split in ("train", "test"):
        images = sorted((folder / "data" / split).glob("*.png"))
        for image, other in zip(images, images[1:] + images[:1], strict=True):
            shutil.copyfile(other, image.with_suffix(".condition.png"))
    return folder


def settings_of(name: str) -> dict[str, Any]:
    if name == "controlnet":
        return QUICK | {"finetune__method": "controlnet"}
    if name in DISTILLED:
        plain = {"diffusion__caption_dropout": 0, "preview__num_steps": 2, "distill__method": name}
        return QUICK | plain | DISTILLED[name]
    return QUICK | {"condition__kind": name}


def run_of(world: Path, folder: Path, name: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(sdxl_config(world, folder, **settings_of(name))) == 0
    return folder


def trained(world: Path, name: str) -> Path:
    """Return the folder of a run of two steps, trained where it is asked for first."""
    folder = world / "runs" / name
    return folder if folder.exists() else run_of(world, folder, name)


def photo(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((32, 32), Image.Resampling.BICUBIC)


def image_of(pipe: Any, **given: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    generator = torch.Generator().manual_seed(1)
    images: np.ndarray = pipe("a red circle", generator=generator, **call | given).images
    return images


def class_name(folder: Path) -> str:
    name: str = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return name


STOCK: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # class, our call, stock's
    "inpaint": (
        "StableDiffusionXLInpaintPipeline",
        (mask := {"image": photo(1), "mask_image": photo(2).convert("L"), "strength": 1.0}),
        mask | SIZE,
    ),
    "instruct_pix2pix": (
        "StableDiffusionXLInstructPix2PixPipeline",
        {"condition": photo(1), "image_guidance_scale": 1.8},
        {"image": photo(1), "image_guidance_scale": 1.8, **SIZE},
    ),
    "controlnet": (
        "StableDiffusionXLControlNetPipeline",
        {"condition": photo(1), "controlnet_conditioning_scale": 0.8},
        {"image": photo(1), "controlnet_conditioning_scale": 0.8, **SIZE},
    ),
    "guided": ("StableDiffusionXLPipeline", {}, SIZE),
    "lcm_lora": ("StableDiffusionXLPipeline", {}, SIZE),
}


@pytest.mark.parametrize("name", STOCK)
def test_a_resumed_run_is_the_same_run(
    world: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(world, name)
    shutil.copytree(whole, tmp_path / "run")
    last = Path("checkpoints", "step-000000002")
    shutil.rmtree(tmp_path / "run" / last)
    memory = "latentdiff.training.text_to_image.memory"  # estimated once is enough
    monkeypatch.setattr(f"{memory}.activations_of", lambda run: None)
    resumed = run_of(world, tmp_path / "run", name)
    losses = read_metrics(whole)
    assert list(losses) == [1, 2]
    assert read_metrics(resumed) == losses
    first, second = (load_file(run / last / "model.safetensors") for run in (whole, resumed))
    before = load_file(whole / "checkpoints" / "step-000000001" / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], before[key]) for key in first)


@pytest.mark.parametrize("name", STOCK)
def test_stock_opens_the_export_and_makes_the_same_image(
    world: Path, tmp_path: Path, name: str
) -> None:
    run, (cls, own, others) = trained(world, name), STOCK[name]
    folder = run / "pipeline"
    if name == "controlnet":
        pipe = LatentDiffPipeline.from_pretrained(world / "base")
        pipe.load_controlnet(run)
        pipe.save_pretrained(folder := tmp_path / "saved")
    assert class_name(folder) == cls
    pipe = LatentDiffPipeline.from_pretrained(folder)
    stock = getattr(diffusers, cls).from_pretrained(folder)
    assert type(stock.scheduler).__name__ == type(pipe.scheduler).__name__
    assert np.abs(image_of(pipe, **own) - image_of(stock, **others)).max() <= 1 / 255


@pytest.mark.parametrize("kind", ["depth", "upscale"])
def test_a_kind_without_a_class_of_diffusers_is_trained_and_opens_here(
    world: Path, kind: str
) -> None:
    run = trained(world, kind)
    assert list(read_metrics(run)) == [1, 2]
    assert class_name(run / "pipeline") == "LatentDiffPipeline"
    pipe = LatentDiffPipeline.from_pretrained(run / "pipeline")
    assert pipe.condition_kind == kind
    size = (8, 8) if kind == "upscale" else (32, 32)
    images = [image_of(pipe, condition=photo(seed).resize(size)) for seed in (1, 2)]
    assert images[0].shape == (1, 32, 32, 3)
    assert np.abs(images[0] - images[1]).max() > 0


def test_stock_draws_our_image_by_an_lcm_lora_on_the_base(world: Path) -> None:
    run = trained(world, "lcm_lora")
    ours = LatentDiffPipeline.from_pretrained(world / "base")
    stock = diffusers.StableDiffusionXLPipeline.from_pretrained(world / "base")
    plain, images = image_of(ours, guidance_scale=1.0), []
    for pipe, size in ((ours, {}), (stock, SIZE)):
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
        pipe.load_lora_weights(run / "lora")
        images.append(image_of(pipe, guidance_scale=1.0, **size))
    assert np.abs(images[0] - images[1]).max() <= 1 / 255
    assert np.abs(images[0] - plain).max() > 1 / 255
