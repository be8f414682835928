"""What diffusers' own pipeline of each kind expects of a folder besides the components.

Its class name and components; for the upscaler the scheduler of its low-resolution images and the
one scaling factor of VAEs that it takes; for depth a depth estimator.
"""

from __future__ import annotations

import copy
import inspect
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from latentdiff.models.build import make_ddpm_scheduler
from latentdiff.models.compatibility import CONDITION_KINDS, CONTROLNET, read_json
from latentdiff.models.latents import fold_normalisation, set_scale
from latentdiff.models.save import complete_component
from latentdiff.pipeline.files.model_info import MAX_NOISE_LEVEL, ModelInfo

logger = logging.getLogger(__name__)

OURS = "LatentDiffPipeline"  # of what no pipeline of diffusers opens
UPSCALE_SCALING_FACTOR = 0.08333  # which StableDiffusionUpscalePipeline gives every VAE
DEPTH_PARTS = {  # of a stand-in: users pass maps
    "depth_estimator": ["transformers", "DPTForDepthEstimation"],
    "feature_extractor": ["transformers", "DPTImageProcessor"],
}
LOW_RES_PARTS = {"low_res_scheduler": ["diffusers", "DDPMScheduler"]}


def stock_class(kind: str, *, is_sdxl: bool, vae: Any = None) -> str:
    """Return the pipeline of diffusers for a kind: of CONDITION_KINDS, "controlnet" or "none".

    Where there is none, as for an upscaler of SDXL, our own class' name.
    """
    if kind in CONDITION_KINDS:
        name = CONDITION_KINDS[kind].pipeline
    else:
        name = f"StableDiffusion{'ControlNet' if kind == CONTROLNET else ''}Pipeline"
    if is_sdxl:
        name = name.replace("Diffusion", "DiffusionXL", 1)
    is_foldable = kind != "upscale" or vae is None or isinstance(vae, AutoencoderKL)
    return name if is_foldable and hasattr(diffusers, name) else OURS


def of_stock(named: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """Return the components and settings by name that a pipeline of diffusers has."""
    if class_name == OURS:
        return dict(named)
    known = _arguments(class_name)
    return {name: one for name, one in named.items() if name in known or name.startswith("_")}


def extra_entries(class_name: str, info: ModelInfo) -> dict[str, Any]:
    """Return the entries of model_index.json of what `write_extras` writes."""
    if class_name == CONDITION_KINDS["depth"].pipeline:
        return dict(DEPTH_PARTS)
    if class_name != CONDITION_KINDS["upscale"].pipeline:
        return {}
    level = MAX_NOISE_LEVEL if info.max_noise_level is None else info.max_noise_level
    return LOW_RES_PARTS | {"max_noise_level": level}


def info_of_stock(info: ModelInfo, folder: Path, index: Mapping[str, Any]) -> ModelInfo:
    """Return the info with what diffusers' class of a folder states of its kind.

    index: its model_index.json. ValueError for settings of a model of others that are read here as
    if they were the usual ones: the chain of low-resolution images, latents with a scale.
    """
    name = str(index.get("_class_name")).replace("DiffusionXL", "Diffusion", 1)
    kind = next((kind for kind, one in CONDITION_KINDS.items() if one.pipeline == name), None)
    if index.get("is_cosxl_edit"):
        raise ValueError(
            f"{folder} is a CosXL edit model (is_cosxl_edit), which reads latents with their "
            "scale, expected one that reads them without; open it with diffusers"
        )
    if kind == "upscale":
        _check_low_res_scheduler(folder / "low_res_scheduler")
        if info.max_noise_level is None:
            info = replace(info, max_noise_level=index.get("max_noise_level"))
    return replace(info, condition_kind=info.condition_kind or kind)


def _check_low_res_scheduler(folder: Path) -> None:
    """Raise ValueError for another chain than low_res_schedule()."""
    if not (path := folder / "scheduler_config.json").is_file():
        return
    own, stored = low_res_scheduler().config, read_json(path)
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"):
        if name in stored and stored[name] != own[name]:
            raise ValueError(
                f"{path} has {name}={stored[name]}, expected {own[name]}, as of Stable Diffusion's "
                "upscaler; open the model with diffusers"
            )


def scale_as_stock(vae: Any, index: Mapping[str, Any]) -> None:
    """Give a VAE the one scaling factor of diffusers' upscaler where a folder names that class."""
    if index.get("_class_name") == CONDITION_KINDS["upscale"].pipeline:
        set_scale(vae, UPSCALE_SCALING_FACTOR)


def write_extras(pipe: Any, folder: Path, class_name: str, *, variant: str | None) -> None:
    """Write what a pipeline's own components lack into its folder.

    variant: of the weights. The VAE of an upscaler is written anew.
    """
    if class_name == CONDITION_KINDS["depth"].pipeline:
        if pipe.safety_checker is not None:
            logger.warning(
                "%s has no safety checker: the model is saved without its own", class_name
            )
        shutil.rmtree(folder / "safety_checker", ignore_errors=True)  # which stock's class has not
        shutil.rmtree(folder / "feature_extractor", ignore_errors=True)
        write_depth_estimator(folder)
    if class_name == CONDITION_KINDS["upscale"].pipeline:
        low_res_scheduler().save_pretrained(folder / "low_res_scheduler")
        if pipe.vae.config.scaling_factor != UPSCALE_SCALING_FACTOR:
            vae = for_upscaler(pipe.vae)
            shutil.rmtree(folder / "vae")
            vae.save_pretrained(folder / "vae", variant=variant)
            complete_component(vae, folder / "vae", variant=variant)


def low_res_scheduler() -> DDPMScheduler:
    """Return the chain of low_res_schedule() as diffusers' scheduler."""
    settings = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    return DDPMScheduler.from_config(make_ddpm_scheduler().config, **settings)


def for_upscaler(vae: AutoencoderKL) -> AutoencoderKL:
    """Return a copy of a VAE with the same latents at the upscaler's scaling factor."""
    folded = copy.deepcopy(vae)
    channels, scale = int(vae.config.latent_channels), float(vae.config.scaling_factor)
    fold_normalisation(
        folded,
        mean=[0.0] * channels,
        std=[1 / scale] * channels,
        scaling_factor=UPSCALE_SCALING_FACTOR,
    )
    return folded


def write_depth_estimator(folder: Path) -> None:
    """Write a depth estimator of a few thousand random weights, so that stock's class opens.

    Its depth means nothing: calls pass depth_map.
    """
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    config = DPTConfig(
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 4, 4, 4],
        fusion_hidden_size=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        estimator = DPTForDepthEstimation(config)
    estimator.save_pretrained(folder / "depth_estimator")
    complete_component(estimator, folder / "depth_estimator")
    processor = DPTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "feature_extractor")


@cache
def _arguments(class_name: str) -> frozenset[str]:
    return frozenset(inspect.signature(getattr(diffusers, class_name).__init__).parameters)
