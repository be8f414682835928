"""A LoRA file in another program's names: diffusers' or kohya's, from any that are read.

Each layer's alpha / rank is folded into its up matrix, so the file acts the same in both. Names in
kohya's files have no dots, so a model's layers tell which are meant: those of the LoRA's run or
base model, by default of the family that its widths tell.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from latentdiff.device import DTYPES
from latentdiff.models.file_kind import family_of
from latentdiff.models.model_path import model_of_run, read_model_configs, resolve_model
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
from latentdiff.pipeline.files.ldm_names import text_name
from latentdiff.pipeline.files.lora_layers import PARTS, UNET, lora_layers
from latentdiff.pipeline.files.model_info import (
    BILL_KEY,
    ModelInfo,
    public_name,
    read_model_info,
)
from latentdiff.pipeline.files.single_file import bundled_configs, empty_modules

LoraNaming = Literal["diffusers", "kohya"]
FAMILIES: dict[str | None, str] = {
    "Stable Diffusion 1": "sd1",
    "Stable Diffusion 2": "sd2",
    "Stable Diffusion XL": "sdxl",
}
BASE_NAME = "ss_sd_model_name"
HUB = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False}
STALE = (
    *("modelspec.hash_sha256", "modelspec.implementation", "sshs_", "lora_adapter_metadata"),
    BILL_KEY,
)


@dataclass(frozen=True)
class WrittenLora:
    """A LoRA that was written, and the model or the family of models that it was trained on.

    unknown_to_kohya: layers that kohya's own scripts leave out.
    """

    path: Path
    num_layers: int
    base: str
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
    _check_arguments(out, naming=naming, dtype=dtype)
    file = open_adapter(source, names=LORA_NAMES, weight_name=None, subfolder=None, **HUB)
    run = model_of_run(source)
    model = base or (os.fspath(run) if run != source else None)
    configs = read_model_configs(model) if model else _family_configs(file)
    models = empty_modules({part: configs[part] for part in PARTS if part in configs})
    layers = lora_layers(file, models)
    if layers.unused:
        raise ValueError(
            f"{file.name}: {len(layers.unused)} of {layers.num_layers} layers, such as "
            f"{layers.unused[0]}, are none of {model or 'the base model of this family'}; give the "
            "model that it was trained for by --base"
        )
    info = read_model_info(run) if run != source else ModelInfo()
    info = _trained_on(info, base, configs) if base else info
    weights = _diffusers_weights(layers.parts, dtype=DTYPES[dtype] if dtype else _dtype(file))
    unet: Any = models[UNET].config
    named = kohya_weights(weights, unet_config=unet) if naming == "kohya" else weights
    stored = stored_metadata(file.path) if file.path else {}
    spec = {"info": info, "title": out.stem, "width": unet.cross_attention_dim}
    metadata = _metadata(stored, named, naming=naming, **spec)
    save_lora(named, out, metadata=metadata)
    trained_on = metadata.get(BASE_NAME) or _family(file) or "its base model"
    unknown = layers_unknown_to_kohya(weights)
    return WrittenLora(out, layers.num_layers, trained_on, tuple(unknown))


def _check_arguments(out: Path, *, naming: str, dtype: str | None) -> None:
    if naming not in get_args(LoraNaming) or dtype not in (None, *DTYPES):
        raise ValueError(
            f"got format={naming} and dtype={dtype}, expected one of "
            f"{', '.join(get_args(LoraNaming))} and one of {', '.join(DTYPES)}"
        )
    if out.suffix != ".safetensors" or out.exists():
        state = "already exists" if out.exists() else "is no such name"
        raise ValueError(f"{out} {state}, expected a new name that ends in .safetensors")


def _trained_on(info: ModelInfo, base: str, configs: Mapping[str, Mapping[str, Any]]) -> ModelInfo:
    """Return what is known of a LoRA that was trained on a base model; info: of its run, if any."""
    model = read_model_info(resolve_model(base))
    return replace(
        info,
        base_model=base,
        prediction_type=configs.get("scheduler", {}).get("prediction_type"),
        resolution=info.resolution or model.resolution,
    )


def _family(file: AdapterFile) -> str | None:
    """Return the family of models that a LoRA's names and widths tell, None where they do not."""
    return family_of({name: tuple(tensor.shape) for name, tensor in file.weights.items()})


def _family_configs(file: AdapterFile) -> dict[str, dict[str, Any]]:
    """Return the configs of the models of a LoRA's family."""
    if (family := _family(file)) not in FAMILIES:
        raise ValueError(
            f"{file.name} does not tell which model it is for ({family} by its widths); give that "
            "model by --base"
        )
    return bundled_configs(FAMILIES[family])


def _diffusers_weights(
    parts: Mapping[str, Mapping[str, Tensor]], *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return matrices by diffusers' names; a text encoder's layers are in its text_model."""
    return {
        f"{part}.{name if part == UNET else text_name(name)}": tensor.to(dtype)
        for part, weights in parts.items()
        for name, tensor in weights.items()
    }


def _dtype(file: AdapterFile) -> torch.dtype:
    """Return the number format of a file's matrices."""
    return next(x.dtype for name, x in file.weights.items() if x.ndim > 1 and "alpha" not in name)


def _metadata(
    stored: Mapping[str, str],
    weights: Mapping[str, Tensor],
    *,
    info: ModelInfo,
    title: str,
    width: int,
    naming: LoraNaming,
) -> dict[str, str]:
    """Return the source's metadata, but for what is of other bytes, with what it lacks.

    The base model is that of the info where that names one.
    """
    kept = {key: value for key, value in stored.items() if not key.startswith(STALE)}
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
    named = {BASE_NAME: public_name(info.base_model)} if info.base_model else {}
    return spec | trained | kept | named
