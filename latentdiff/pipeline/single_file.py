"""A whole Stable Diffusion model in one .safetensors file: what its shapes say of it.

The components' configs of the two families ship in assets/single_file, so nothing is fetched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from latentdiff.build import make_scheduler
from latentdiff.diffusion.ddpm import check_prediction_type
from latentdiff.fit import read_json
from latentdiff.pipeline.ldm_names import V_PREDICTION, ZERO_TERMINAL_SNR, ldm_names
from latentdiff.text import clip_tokenizer_from_open_clip
from latentdiff.weights import PICKLES, Shape, refuse_bad_weights, stored_shapes

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

FAMILIES = {768: "sd1", 1024: "sd2"}  # by the width of the text states
BASE_SIZE = 64


def config_folder(
    path: Path,
    *,
    config: str | os.PathLike[str] | None,
    prediction_type: str | None,
    scratch: Path,
) -> tuple[Path, dict[str, Any]]:
    """Return a folder of configs for a single-file model, and the components made already.

    The folder is the caller's `config`, or one written into `scratch`. Raises FileNotFoundError or
    ValueError for a file that is none, a pickle, damaged, or of another kind of model.
    """
    if path.suffix in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run any code; convert it to .safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file here")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; expected a whole model in one")
    shapes = stored_shapes([path])
    if config is not None:
        _check_complete(path, shapes, Path(config))
        return Path(config), {}
    if CONV_IN not in shapes or TEXT_KEY not in shapes:
        raise ValueError(
            f"{path} is no Stable Diffusion 1.x or 2.x model in CompVis' naming: it lacks "
            f"{CONV_IN} or {TEXT_KEY}; a LoRA opens with load_lora_weights, a folder with "
            "from_pretrained"
        )
    channels, width = shapes[CONV_IN][1], shapes[TEXT_KEY][-1]
    if width not in FAMILIES or channels not in (4, 9):
        raise ValueError(
            f"{path} reads text states of width {width} and {channels} channels, expected 768 or "
            "1024 and 4 or 9; pass config= with the folder of such a model"
        )
    configs = _shipped(FAMILIES[width])
    configs["unet"]["in_channels"] = channels
    if prediction_type is None and V_PREDICTION in shapes:
        prediction_type = "v_prediction"
    if prediction_type is not None:
        _set_prediction_type(configs, prediction_type)
    if ZERO_TERMINAL_SNR in shapes:
        _set_zero_terminal_snr(configs)
    folder = _write(scratch, configs)
    _check_complete(path, shapes, folder)
    return folder, {"tokenizer": _tokenizer(configs)}


def _shipped(family: str) -> dict[str, dict[str, Any]]:
    source = resources.files("latentdiff") / "assets" / "single_file" / f"{family}.json"
    configs: dict[str, dict[str, Any]] = json.loads(source.read_text(encoding="utf-8"))
    return configs


def _check_complete(path: Path, shapes: Mapping[str, Shape], folder: Path) -> None:
    """Raise ValueError naming the U-Net's and VAE's weights that the file lacks."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_json(folder / "unet" / "config.json"))
        vae = AutoencoderKL.from_config(read_json(folder / "vae" / "config.json"))
    expected = ldm_names(unet=unet, vae=vae)
    refuse_bad_weights(str(path), missing=expected - shapes.keys())


def _set_prediction_type(configs: dict[str, dict[str, Any]], prediction_type: str) -> None:
    check_prediction_type(prediction_type)
    configs["scheduler"]["prediction_type"] = prediction_type
    if prediction_type == "epsilon":  # Stable Diffusion 2's base models are of 512 pixels
        configs["unet"]["sample_size"] = BASE_SIZE


def _set_zero_terminal_snr(configs: dict[str, dict[str, Any]]) -> None:
    own = configs["scheduler"]
    scheduler = make_scheduler(
        prediction_type=own.get("prediction_type", "epsilon"), zero_terminal_snr=True
    )
    configs["scheduler"] = {"_class_name": type(scheduler).__name__} | dict(scheduler.config)


def _tokenizer(configs: dict[str, dict[str, Any]]) -> Any:
    tokenizer = clip_tokenizer_from_open_clip()
    pad = configs["text_encoder"]["pad_token_id"]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def _write(folder: Path, configs: dict[str, dict[str, Any]]) -> Path:
    """Write a folder of configs as diffusers lays it out; return it."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    for name, library in (
        ("unet", "diffusers"),
        ("vae", "diffusers"),
        ("scheduler", "diffusers"),
        ("text_encoder", "transformers"),
    ):
        entries = configs[name]
        index[name] = [library, entries.get("_class_name", "CLIPTextModel")]
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps(entries), encoding="utf-8")
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    index["safety_checker"] = index["feature_extractor"] = index["image_encoder"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
