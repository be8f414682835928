"""A whole Stable Diffusion model in one .safetensors file, its weights by CompVis' names.

Opening: the weights' shapes tell the family (1.x or 2.x), whose configs are bundled in
assets/single_file, so that nothing is fetched. Saving: as ComfyUI, A1111 and `from_single_file`
read it, for the layout of Stable Diffusion 1.x (U-Net, AutoencoderKL and a CLIP text encoder).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.atomic import atomic_file
from latentdiff.diffusion.prediction import parametrization
from latentdiff.models.build import make_ddpm_scheduler
from latentdiff.models.compatibility import read_json
from latentdiff.models.file_kind import describe, family_of
from latentdiff.models.open_clip import clip_tokenizer_from_open_clip
from latentdiff.models.weights import PICKLES, Shape, refuse_bad_weights, stored_shapes
from latentdiff.pipeline.files.file_metadata import USAGE_HINT, model_spec, usage_hint
from latentdiff.pipeline.files.model_info import info_from_json, info_to_json
from latentdiff.pipeline.schedulers import scheduler_from_json, scheduler_to_json

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

FAMILY_NAMES = ("Stable Diffusion 1", "Stable Diffusion 2")
FAMILIES = {768: "sd1", 1024: "sd2"}  # by the width of the prompt embeddings
BASE_SIZE = 64
TEXT_ROOT = "cond_stage_model."


def config_folder(
    path: Path,
    *,
    config: str | os.PathLike[str] | None,
    prediction_type: str | None,
    scratch: Path,
) -> tuple[Path, dict[str, Any]]:
    """Return a folder of configs for a single-file model, and components that it lacks.

    The folder is the caller's `config`, or one written into `scratch`. Raises FileNotFoundError or
    ValueError for a missing file, a pickle, a damaged file, or another kind of model.
    """
    _check_is_safetensors(path)
    shapes = stored_shapes([path])
    if config is not None:
        _check_complete(path, shapes, Path(config))
        return Path(config), {}
    if CONV_IN not in shapes or TEXT_KEY not in shapes:
        raise ValueError(
            f"{path} is no whole Stable Diffusion 1.x or 2.x model in CompVis' naming, it holds "
            f"{describe(shapes)}"
        )
    if (family := family_of(shapes)) not in (None, *FAMILY_NAMES):
        raise ValueError(f"{path} is a model of {family}, expected {' or '.join(FAMILY_NAMES)}")
    if len(shapes[CONV_IN]) != 4 or len(shapes[TEXT_KEY]) != 2:
        raise ValueError(f"{path}: {CONV_IN} or {TEXT_KEY} has another number of dimensions")
    channels, width = shapes[CONV_IN][1], shapes[TEXT_KEY][-1]
    if width not in FAMILIES or channels not in (4, 9):
        raise ValueError(
            f"{path} reads prompt embeddings of width {width} and {channels} channels, expected "
            "768 or 1024 and 4 or 9; pass config= with the folder of such a model"
        )
    configs = bundled_configs(FAMILIES[width])
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


def _check_is_safetensors(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
        raise ValueError(f"{path} is a pickle, which can run any code; convert it to .safetensors")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; open it with from_pretrained")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file here; check the spelling")
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; expected a whole model in one")


def bundled_configs(family: str) -> dict[str, dict[str, Any]]:
    """Return the components' configs of a model family, "sd1" or "sd2", by component."""
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
    if not any(name.startswith(TEXT_ROOT) for name in shapes):
        raise ValueError(f"{path} has no text encoder: no weight's name begins with {TEXT_ROOT}")


def _set_prediction_type(configs: dict[str, dict[str, Any]], prediction_type: str) -> None:
    parametrization(prediction_type)  # ValueError for an unknown name
    configs["scheduler"]["prediction_type"] = prediction_type
    if prediction_type == "epsilon":  # Stable Diffusion 2's base models are of 512 pixels
        configs["unet"]["sample_size"] = BASE_SIZE


def _set_zero_terminal_snr(configs: dict[str, dict[str, Any]]) -> None:
    own = configs["scheduler"]
    scheduler = make_ddpm_scheduler(
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


UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
V_PREDICTION, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"  # empty entries that mark the schedule

DISTILLED = "latentdiff"  # key of the metadata that a distilled model has

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def ldm_weights(*, unet: Any, vae: Any, text_encoder: Any) -> dict[str, Tensor]:
    """Return all weights by CompVis' names.

    Raises ValueError for a component of another layout than Stable Diffusion 1.x has.
    """
    if text_encoder.config.hidden_act != "quick_gelu" or unet.config.use_linear_projection:
        raise ValueError(
            "one file holds Stable Diffusion 1.x models only; this one has another layout"
        )
    if type(vae).__name__ != "AutoencoderKL":
        raise ValueError(f"one file holds an AutoencoderKL only; the VAE is a {type(vae).__name__}")
    weights: dict[str, Tensor] = {}
    for key, tensor in unet.state_dict().items():
        weights[UNET_PREFIX + unet_name(key, layers=unet.config.layers_per_block)] = tensor
    for key, tensor in vae.state_dict().items():
        is_projection = ".attentions." in key and key.endswith("weight") and tensor.ndim == 2
        value = tensor[..., None, None] if is_projection else tensor  # a 1x1 convolution there
        weights[VAE_PREFIX + vae_name(key, levels=len(vae.config.block_out_channels))] = value
    for key, tensor in text_encoder.state_dict().items():
        weights[TEXT_PREFIX + key.removeprefix("text_model.")] = tensor
    return weights


def ldm_names(*, unet: Any, vae: Any) -> set[str]:
    """Return the names that a U-Net's and a VAE's weights have in one file."""
    layers, levels = unet.config.layers_per_block, len(vae.config.block_out_channels)
    unet_names = {UNET_PREFIX + unet_name(key, layers=layers) for key in unet.state_dict()}
    return unet_names | {VAE_PREFIX + vae_name(key, levels=levels) for key in vae.state_dict()}


def save_single_file(pipe: Any, path: str | os.PathLike[str]) -> Path:
    """Write a pipeline's models into one .safetensors file, atomically; return its path."""
    weights = ldm_weights(unet=pipe.unet, vae=pipe.vae, text_encoder=pipe.text_encoder)
    schedule = pipe.scheduler.config
    marks = {
        V_PREDICTION: schedule.prediction_type == "v_prediction",
        ZERO_TERMINAL_SNR: bool(schedule.get("rescale_betas_zero_snr")),
    }
    weights |= {mark: torch.tensor([]) for mark, holds in marks.items() if holds}
    metadata = {"format": "pt"} | model_spec(
        weights,
        info=replace(pipe.model_info, prediction_type=schedule.prediction_type),
        title=Path(path).stem,
        width=pipe.unet.config.cross_attention_dim,
    )
    if pipe.model_info.num_inference_steps:
        metadata |= _distilled_metadata(pipe)
    with atomic_file(path) as temporary:
        contiguous = {key: tensor.contiguous() for key, tensor in weights.items()}
        save_file(contiguous, temporary, metadata=metadata)
    return Path(path)


def _distilled_metadata(pipe: Any) -> dict[str, str]:
    """Return how a distilled model is sampled: for a person, and for `restore_distilled`."""
    info, scheduler = pipe.model_info, pipe.scheduler
    stored = {"model_info": info_to_json(info), "scheduler": scheduler_to_json(scheduler)}
    return usage_hint(info, scheduler=scheduler) | {DISTILLED: json.dumps(stored)}


def stored_usage_hint(path: Path) -> str | None:
    """Return how a single file says it is to be sampled, None where it does not."""
    with safe_open(path, "pt") as opened:
        return (opened.metadata() or {}).get(USAGE_HINT)


def restore_distilled(pipe: Any, path: Path) -> None:
    """Give a pipeline the scheduler and info that the file of a distilled model states, if it does.

    ValueError where that is damaged.
    """
    with safe_open(path, "pt") as opened:
        text = (opened.metadata() or {}).get(DISTILLED)
    if text is None:
        return
    try:
        stored = json.loads(text)
        pipe.model_info = info_from_json(stored["model_info"])
        pipe.register_modules(scheduler=scheduler_from_json(stored["scheduler"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} has damaged metadata under {DISTILLED}: {error}") from error


def unet_name(key: str, *, layers: int) -> str:
    """Return CompVis' name of a U-Net weight; layers: residual blocks on each level."""
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    part, rest = _split(key)
    match part:
        case ["mid_block", kind, index]:
            place = "1" if kind == "attentions" else str(2 * int(index))
            return f"middle_block.{place}.{_inner(kind, rest)}"
        case ["down_blocks", level, "downsamplers", _]:
            return (
                f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
            )
        case ["down_blocks", level, kind, index]:
            block = int(level) * (layers + 1) + int(index) + 1
            return f"input_blocks.{block}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
        case ["up_blocks", level, "upsamplers", _]:
            # after the level's attention, if it has one: diffusers' coarsest up block has none
            place = "1" if level == "0" else "2"
            return f"output_blocks.{int(level) * (layers + 1) + layers}.{place}.{rest}"
        case ["up_blocks", level, kind, index]:
            block = int(level) * (layers + 1) + int(index)
            return f"output_blocks.{block}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
    raise ValueError(f"the U-Net has a weight {key} that Stable Diffusion 1.x has not")


def vae_name(key: str, *, levels: int) -> str:
    """Return CompVis' name of a VAE weight; levels: number of resolutions."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
        for ours, theirs in VAE_ATTENTION.items():
            key = key.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    key = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", key)
    key = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{levels - 1 - int(m[1])}.", key)
    key = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", key)
    return key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")


def _split(key: str) -> tuple[list[str], str]:
    parts = key.split(".")
    length = 3 if parts[0] == "mid_block" else 4
    return parts[:length], ".".join(parts[length:])


def _inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    name, end = rest.split(".", 1)
    return f"{RESNET[name]}.{end}"
