"""One form of a model into another: LoRAs merged into a folder, a folder as one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.device import DTYPES
from latentdiff.models.components import carry_tiny_vae, left_out
from latentdiff.models.unet.guidance_embedding import fold_guidance, has_guidance_embedding
from latentdiff.pipeline.conditioning.encode_prompt import has_new_words
from latentdiff.pipeline.files.model_info import (
    default_guidance,
    merged_info,
    public_name,
    scales_text,
)
from latentdiff.pipeline.files.single_file import save_single_file
from latentdiff.pipeline.pipeline import LatentDiffPipeline

CLIP_VOCABULARY = 49408

PathLike = str | os.PathLike[str]


def merge_loras(
    base: PathLike,
    loras: Sequence[PathLike],
    out: Path,
    *,
    weights: Sequence[float] = (),
    safety_checker: bool = True,
) -> Path:
    """Write the folder of a model with LoRAs added to its weights; return its path.

    weights: how strongly each acts, by default 1. safety_checker: False leaves it out. Raises
    ValueError for another number of weights, an `out` that exists, or a LoRA that does not fit.
    """
    weights = list(weights) or [1.0] * len(loras)
    if not loras or len(weights) != len(loras):
        raise ValueError(f"{len(weights)} weights for {len(loras)} LoRAs, expected one for each")
    _refuse_existing(out)
    given = left_out(safety_checker=not safety_checker)
    pipe = LatentDiffPipeline.from_pretrained(base, **given)
    names = [f"lora_{k}" for k in range(len(loras))]
    for lora, name in zip(loras, names, strict=True):
        pipe.load_lora_weights(lora, adapter_name=name)
    pipe.set_adapters(names, weights)
    pipe.fuse_lora(adapter_names=names)
    pipe.unload_lora_weights()
    pipe.model_info = merged_info(
        pipe.model_info,
        os.fspath(base),
        loras=dict(zip(_distinct_names(loras), weights, strict=True)),
        prediction_type=pipe.scheduler.config["prediction_type"],
    )
    pipe.save_pretrained(out)
    carry_tiny_vae(os.fspath(base), out)
    return out


def _distinct_names(loras: Sequence[PathLike]) -> list[str]:
    """Name LoRAs as a card does, each otherwise than those before it."""
    names: list[str] = []
    for lora in loras:
        name = public_name(os.fspath(lora))
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def export_single_file(
    model: PathLike, out: Path, *, dtype: str = "float32", guidance_scale: float | None = None
) -> Path:
    """Write a model as one .safetensors file in CompVis' naming; return its path.

    For ComfyUI, A1111 and `from_single_file`, which bring CLIP's vocabulary with them. dtype:
    float32, float16 or bfloat16. guidance_scale: of a distilled model that reads it, to be fixed in
    the weights, as the layout has no place for the embedding; by default the model's own. Raises
    ValueError for a model of another layout than Stable Diffusion 1.x or XL or of another
    vocabulary, a scale that it has no use for, and for an `out` that exists.
    """
    if out.suffix != ".safetensors" or dtype not in DTYPES:
        raise ValueError(
            f"got {out} of {dtype}, expected a name that ends in .safetensors and one of "
            f"{', '.join(DTYPES)}"
        )
    _refuse_existing(out)
    pipe = LatentDiffPipeline.from_pretrained(
        model, torch_dtype=DTYPES[dtype], **left_out(safety_checker=True)
    )  # one file holds none
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        if tokenizer is not None:
            _check_vocabulary(model, tokenizer)
    _fix_guidance(pipe, guidance_scale)
    return save_single_file(pipe, out)


def _check_vocabulary(model: PathLike, tokenizer: Any) -> None:
    """Raise ValueError for other tokens than those of CLIP, which one file does not hold."""
    if has_new_words(tokenizer):
        raise ValueError(
            f"{model} has learned words, and one file holds no vocabulary: convert the base "
            "model, and give learned_embeds.safetensors with it as an embedding"
        )
    if len(tokenizer) != CLIP_VOCABULARY:
        raise ValueError(
            f"{model} has a vocabulary of {len(tokenizer):,} tokens of its own, and one file "
            f"holds none: programs that open it bring CLIP's {CLIP_VOCABULARY:,}; use the folder "
            "in diffusers or latentdiff, or train on Stable Diffusion: latentdiff train --config "
            "lora_sd15_8gb"
        )


def _fix_guidance(pipe: LatentDiffPipeline, scale: float | None) -> None:
    """Fold a guidance scale into a distilled U-Net; ValueError for one it has no use for."""
    info = pipe.model_info
    if not has_guidance_embedding(pipe.unet):
        if scale is not None:
            raise ValueError(
                f"guidance_scale={scale:g} has no effect: only a model that reads the scale, made "
                "by `latentdiff distill`, can have it fixed; leave it out"
            )
        return
    scale = default_guidance(info, is_sdxl=pipe.is_sdxl) if scale is None else scale
    low, high = info.guidance_range or (1.0, scale)
    if not low <= scale <= high:
        raise ValueError(f"guidance_scale={scale:g}, expected one learned: {scales_text(info)}")
    pipe.register_modules(unet=fold_guidance(pipe.unet, scale))
    pipe.model_info = replace(info, guidance_range=(scale, scale), is_guided=True)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} already exists, expected a new name")
