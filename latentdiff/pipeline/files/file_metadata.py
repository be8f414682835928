"""Metadata in safetensors files that other programs show: modelspec.* and kohya's ss_*.

modelspec (Stability AI's model metadata standard 1.0) names a file's architecture, title,
hash and use; A1111, ComfyUI and model managers show it. kohya's scripts and A1111 read how a LoRA
was trained from ss_*. Files are read without either.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from latentdiff.pipeline.files.model_info import ModelInfo, public_name, scales_text

# by the width of the prompt embeddings: modelspec's architecture, kohya's version; of a model that
# predicts v, too. Models of other widths have neither name.
ARCHITECTURES = {
    768: ("stable-diffusion-v1", "sd_v1"),
    1024: ("stable-diffusion-v2-512", "sd_v2"),
    2048: ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
V_ARCHITECTURES = {
    768: ("stable-diffusion-v1", "sd_v1_v"),
    1024: ("stable-diffusion-v2-768-v", "sd_v2_v"),
}
OTHER_ARCHITECTURE = "latent-diffusion"
PREDICTION_TYPES = {"v_prediction": "v"}  # where modelspec's name is another
IMPLEMENTATIONS = {
    True: "diffusers",
    False: "https://github.com/Stability-AI/generative-models",
}
MAX_TAGS = 100
USAGE_HINT = "modelspec.usage_hint"
WEBUI_SAMPLERS = {  # as ComfyUI and A1111 name what these schedulers of diffusers do
    "DDIMScheduler": "sampler Euler, schedule SGM uniform",
    "LCMScheduler": "sampler LCM, schedule SGM uniform",
}


def model_spec(
    weights: Mapping[str, Tensor],
    *,
    info: ModelInfo,
    title: str,
    width: int,
    adapter: str = "",
    diffusers_names: bool = False,
    trigger_word: str = "",
    usage_hint: str = "",
) -> dict[str, str]:
    """Return the modelspec.* entries of a file of these weights; those unknown are absent.

    width: of the prompt embeddings. adapter: "lora" or "textual-inversion", "" for a whole model.
    trigger_word: words that call for what an adapter learned. diffusers_names: the weights' names
    are diffusers', not CompVis' or kohya's. hash_sha256 is of the tensors, as they lie in the file.
    """
    architecture = _architecture(width, info.prediction_type)[0] or OTHER_ARCHITECTURE
    prediction = info.prediction_type
    entries = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/{adapter}" if adapter else architecture,
        "implementation": IMPLEMENTATIONS[diffusers_names],
        "title": title,
        "hash_sha256": f"0x{tensors_hash(weights)}",
        "license": info.licence,
        "resolution": info.resolution and f"{info.resolution}x{info.resolution}",
        "prediction_type": prediction and PREDICTION_TYPES.get(prediction, prediction),
        "trigger_phrase": trigger_word,
        "usage_hint": usage_hint,
        "merged_from": ", ".join(info.loras),
    }
    return {f"modelspec.{key}": str(value) for key, value in entries.items() if value}


def usage_hint(info: ModelInfo, *, scheduler: object) -> dict[str, str]:
    """Return the entry that says how a distilled model or adapter is sampled; none of others."""
    if not info.num_inference_steps:
        return {}
    hint = f"{info.num_inference_steps} steps, CFG scale 1"
    if info.is_guided:
        hint += f" (guidance scale {scales_text(info)} is in the weights)"
    sampler = WEBUI_SAMPLERS.get(type(scheduler).__name__, "the sampler of its training")
    return {USAGE_HINT: f"{hint}, {sampler}"}


def kohya_metadata(
    weights: Mapping[str, Tensor],
    *,
    info: ModelInfo,
    name: str,
    width: int,
    rank: int | None,
    training: Mapping[str, object],
    tags: Mapping[str, int],
) -> dict[str, str]:
    """Return kohya's ss_* entries of a LoRA, and the hash that A1111 names it by; all are texts.

    weights: by kohya's names. name: the file's without its ending. rank: alpha too, the scale being
    part of the matrices; None where it differs by layer. training: further entries, without ss_.
    tags: counts, under the data set's name.
    """
    size = info.resolution
    entries: dict[str, object] = {
        "base_model_version": _architecture(width, info.prediction_type)[1],
        "output_name": name,
        "network_module": "networks.lora",
        "network_dim": "Dynamic" if rank is None else rank,
        "network_alpha": "Dynamic" if rank is None else float(rank),
        "sd_model_name": info.base_model and public_name(info.base_model),
        "v2": width == 1024,
        "v_parameterization": info.prediction_type and info.prediction_type == "v_prediction",
        "clip_skip": info.clip_skip and info.clip_skip + 1,
        "steps": info.steps,
        "resolution": size and f"({size}, {size})",
        "tag_frequency": tags
        and json.dumps({info.dataset or "data": dict(tags)}, ensure_ascii=False),
        **training,
    }
    known = {f"ss_{key}": str(value) for key, value in entries.items() if value not in (None, {})}
    return known | {"sshs_model_hash": tensors_hash(weights)}


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """Count the comma-separated tags of captions: the most frequent 100 of those met twice or more.

    A caption that occurs once is not published in this way.
    """
    tags = (tag.strip() for caption in captions for tag in caption.split(","))
    counts = Counter(tag for tag in tags if tag).most_common(MAX_TAGS)
    return {tag: count for tag, count in counts if count > 1}


def tensors_hash(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) of tensors in a safetensors file's order: wider types first."""
    digest = hashlib.sha256()
    for _, tensor in sorted(weights.items(), key=lambda item: (-item[1].itemsize, item[0])):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _architecture(width: int, prediction_type: str | None) -> tuple[str | None, str | None]:
    predicts_v = prediction_type == "v_prediction"
    known = ARCHITECTURES | (V_ARCHITECTURES if predicts_v else {})
    return known.get(width, (None, None))
