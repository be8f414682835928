"""A LoRA file in another program's names: diffusers' or kohya's, from any that are read.

Each layer's alpha / rank is folded into its up matrix, so the file acts the same in both. Names in
kohya's files have no dots, so a model's layers tell which are meant: those of the LoRA's run or
base model, by default of the family that its widths tell.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.device import DTYPES
from latentdiff.models.file_kind import family_of
from latentdiff.models.model_path import model_of_run, resolve_model
from latentdiff.pipeline.files.adapter_file import (
    LORA_NAMES,
    AdapterFile,
    open_adapter,
    stored_metadata,
)
from latentdiff.pipeline.files.file_metadata import kohya_metadata, model_spec
from latentdiff.pipeline.files.kohya_lora import (
    kohya_weights,
    layers_unknown_to_kohya,
    lora_rank,
    save_lora,
)
from latentdiff.pipeline.files.lora_layers import lora_layers
from latentdiff.pipeline.files.model_info import ModelInfo, read_model_info
from latentdiff.pipeline.files.single_file import bundled_configs

LoraNaming = Literal["diffusers", "kohya"]
FAMILIES = {"Stable Diffusion 1": "sd1", "Stable Diffusion 2": "sd2"}
HUB = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False}
STALE = ("modelspec.hash_sha256", "modelspec.implementation", "sshs_", "lora_adapter_metadata")


@dataclass(frozen=True)
class WrittenLora:
    """A LoRA that was written; unknown_to_kohya: layers that kohya's own scripts leave out."""

    path: Path
    num_layers: int
    unknown_to_kohya: tuple[str, ...]


def convert_lora(
    source: str | os.PathLike[str],
    out: Path,
    *,
    naming: LoraNaming,
    base: str | None = None,
    dtype: str | None = None,
) -> WrittenLora:
    """Write a LoRA or DoRA in the names of diffusers or of kohya.

    source: a file, a folder, a training run or a hub id. base: the model that it was trained for.
    dtype: of the weights, by default as in the file. Raises ValueError where a layer has no place
    in the base model, for an `out` that exists, and as `load_lora_weights` does.
    """
    if naming not in get_args(LoraNaming) or dtype not in (None, *DTYPES):
        raise ValueError(
            f"got format={naming} and dtype={dtype}, expected one of "
            f"{', '.join(get_args(LoraNaming))} and one of {', '.join(DTYPES)}"
        )
    if out.suffix != ".safetensors" or out.exists():
        state = "already exists" if out.exists() else "is no such name"
        raise ValueError(f"{out} {state}, expected a new name that ends in .safetensors")
    file = open_adapter(source, names=LORA_NAMES, weight_name=None, subfolder=None, **HUB)
    run = model_of_run(source)
    base = base or (os.fspath(run) if run != source else None)
    models = _models(base, file)
    layers = lora_layers(file, models)
    if layers.unused:
        raise ValueError(
            f"{file.name}: {len(layers.unused)} of {layers.num_layers} layers, such as "
            f"{layers.unused[0]}, are none of {base or 'the base model of this family'}; give the "
            "model that it was trained for by --base"
        )
    weights = _diffusers_weights(layers.parts, dtype=DTYPES[dtype] if dtype else _dtype(file))
    info = read_model_info(resolve_model(base)) if base else ModelInfo()
    named = kohya_weights(weights) if naming == "kohya" else weights
    metadata = _metadata(file, named, models=models, info=info, title=out.stem, naming=naming)
    save_lora(named, out, metadata=metadata)
    return WrittenLora(out, layers.num_layers, tuple(layers_unknown_to_kohya(weights)))


def _models(base: str | None, file: AdapterFile) -> dict[str, nn.Module | None]:
    """Return a U-Net and a text encoder without weights, for their layers' names and shapes."""
    if base is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in file.weights.items()}
        family = FAMILIES.get(family_of(shapes) or "")
        if family is None:
            raise ValueError(
                f"{file.name} does not tell which model it is for ({family_of(shapes)} by its "
                "widths); give that model by --base"
            )
        configs = bundled_configs(family)
        unet, text = configs["unet"], CLIPTextConfig(**configs["text_encoder"])
    else:
        path = os.fspath(resolve_model(base))
        unet = UNet2DConditionModel.load_config(path, subfolder="unet")
        text = CLIPTextConfig.from_pretrained(path, subfolder="text_encoder")
    with torch.device("meta"):
        return {"unet": UNet2DConditionModel.from_config(unet), "text_encoder": CLIPTextModel(text)}


def _diffusers_weights(
    parts: Mapping[str, Mapping[str, Tensor]], *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return matrices by diffusers' names; a text encoder's layers are in its text_model."""
    return {
        f"{part}.{'' if part == 'unet' else 'text_model.'}{name.removeprefix('text_model.')}": (
            tensor.to(dtype)
        )
        for part, weights in parts.items()
        for name, tensor in weights.items()
    }


def _dtype(file: AdapterFile) -> torch.dtype:
    """Return the number format of a file's matrices."""
    return next(x.dtype for name, x in file.weights.items() if x.ndim > 1 and "alpha" not in name)


def _metadata(
    file: AdapterFile,
    weights: Mapping[str, Tensor],
    *,
    models: Mapping[str, Any],
    info: ModelInfo,
    title: str,
    naming: LoraNaming,
) -> dict[str, str]:
    """Return the source's metadata, but for what is of other bytes, with what it lacks."""
    stored = stored_metadata(file.path) if file.path else {}
    kept = {key: value for key, value in stored.items() if not key.startswith(STALE)}
    width = models["unet"].config.cross_attention_dim
    is_diffusers = naming == "diffusers"
    spec = model_spec(
        weights, info=info, title=title, width=width, adapter="lora", diffusers_names=is_diffusers
    )
    trained: dict[str, str] = {}
    if not is_diffusers:
        rank = lora_rank(weights)
        trained = kohya_metadata(
            weights, info=info, name=title, width=width, rank=rank, training={}, tags={}
        )
        kept.pop("ss_network_alpha", None)  # which is the rank now
    return spec | trained | kept
