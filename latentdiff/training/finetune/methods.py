"""Fine-tuning methods by name: their adapters, trainable parameters and exported files.

full, attention and cross_attention train weights of the U-Net; lora (lora.py),
textual_inversion (textual_inversion.py) and controlnet leave all of them as they are.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModelWithProjection

from latentdiff.config.choices import FinetuneMethod
from latentdiff.config.finetune import FinetuneConfig
from latentdiff.models.compatibility import reads_time_ids
from latentdiff.models.components import Components
from latentdiff.models.text import clip_skip_of
from latentdiff.models.weights import weights_hash
from latentdiff.pipeline.files.file_metadata import kohya_metadata, model_spec, usage_hint
from latentdiff.pipeline.files.kohya_lora import (
    kohya_weights,
    layers_unknown_to_kohya,
    lora_rank,
    save_lora,
)
from latentdiff.pipeline.files.model_info import ModelInfo, public_name
from latentdiff.sampling.conversion import CLIP_VOCABULARY
from latentdiff.training.finetune import lokr, lora, textual_inversion
from latentdiff.training.finetune.initial_weights import InitialWeights

logger = logging.getLogger(__name__)

WAYS_OF_AN_OWN_MODEL = "use latentdiff sample, latentdiff app or diffusers"
READERS = {False: "kohya's scripts", True: "LyCORIS"}  # by whether it is LoKr

TRAINABLE: dict[FinetuneMethod, Callable[[str], bool]] = {  # by the names of a U-Net's parameters
    "full": lambda name: True,
    "attention": lambda name: ".attn1." in name or ".attn2." in name,
    "cross_attention": lambda name: ".attn2." in name,
    "lora": lora.is_adapter,
    "textual_inversion": lambda name: False,
    "controlnet": lambda name: False,
}


def base_weights_hash(components: Components) -> str:
    """Return the sha256 (hex) of the weights of U-Net, VAE and text encoders."""
    encoders = components.text_encoder, components.text_encoder_2
    parts = (components.unet, components.vae, *encoders)
    hashes = " ".join(weights_hash(part) for part in parts if part is not None)
    return hashlib.sha256(hashes.encode()).hexdigest()


def add_adapters(
    components: Components,
    settings: FinetuneConfig,
    *,
    initial: InitialWeights,
    text_encoders: Sequence[str],
    seed: int,
) -> None:
    """Add the method's LoRA adapters or new tokens, if any.

    text_encoders: names of those that are trained. The model's output stays the same, or becomes
    that with the LoRA of `initial` loaded.
    """
    if settings.method == "lora" and settings.adapter_type == "lokr":
        lokr.add_lokr(
            components.unet,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            factor=settings.lokr_factor,
            targets=settings.lora_targets,
            seed=seed,
        )
    elif settings.method == "lora":
        lora.add_lora(
            components,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=settings.lora_targets,
            use_dora=settings.adapter_type == "dora",
            text_encoders=text_encoders,
            seed=seed,
            initial=initial.lora,
        )
    if settings.method == "textual_inversion":
        vectors = initial.vectors
        if vectors is None:
            vectors = textual_inversion.known_vectors(
                components,
                initializer_token=settings.initializer_token,
                num_vectors=settings.num_vectors,
            )
        textual_inversion.add_tokens(components, token=settings.token, vectors=vectors)


CONDITION_LAYERS = ("conv_in.", "class_embedding.")  # of a U-Net that reads an image condition


def set_trainable(
    unet: UNet2DConditionModel,
    text_encoders: Sequence[nn.Module],
    method: FinetuneMethod,
    *,
    reads_condition: bool = False,
) -> None:
    """Freeze all parameters but the method's; text_encoders: those that are trained.

    reads_condition: where attention is trained, so are the layers that read the image condition.
    """
    reads = reads_condition and method in ("attention", "cross_attention")
    for name, parameter in unet.named_parameters():
        is_own = TRAINABLE[method](name)
        parameter.requires_grad_(is_own or (reads and name.startswith(CONDITION_LAYERS)))
    for text_encoder in text_encoders:
        for name, parameter in text_encoder.named_parameters():
            if method == "textual_inversion":
                parameter.requires_grad_(name.endswith("token_embedding.new"))
            else:
                parameter.requires_grad_(method != "lora" or lora.is_adapter(name))
        _freeze_skipped_layers(text_encoder, is_sdxl=reads_time_ids(unet.config))


def _freeze_skipped_layers(text_encoder: Any, *, is_sdxl: bool) -> None:
    """Freeze the last layers of a text encoder that captions do not pass.

    Of SDXL's first they do not pass the last one and the norm after it; of its second the pooled
    embeddings pass all.
    """
    text_model = getattr(text_encoder, "text_model", text_encoder)
    if isinstance(text_encoder, CLIPTextModelWithProjection):
        return
    layers, skipped = text_model.encoder.layers, clip_skip_of(text_encoder) + is_sdxl
    layers[len(layers) - skipped :].requires_grad_(False)
    if is_sdxl:
        text_model.final_layer_norm.requires_grad_(False)


def merged_components(components: Components, method: FinetuneMethod) -> Components:
    """Return the model as any program opens it: adapters and new tokens merged in."""
    if method == "lora":
        return lora.merge_adapters(components)
    return (
        textual_inversion.merge_tokens(components) if method == "textual_inversion" else components
    )


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA's files tell other programs: of the model, its training, and the captions' tags.

    name: of the LoRA; training: entries of kohya's metadata (file_metadata.kohya_metadata).
    """

    info: ModelInfo
    name: str
    trigger_word: str = ""
    training: dict[str, object] = field(default_factory=dict)
    tags: Mapping[str, int] = field(default_factory=dict)


def save_adapters(
    components: Components, settings: FinetuneConfig, folder: Path, *, facts: LoraFacts
) -> None:
    """Write the trained part alone: lora/, lora_kohya.safetensors or learned_embeds.safetensors."""
    if settings.method == "lora":
        _save_lora_files(components, settings, folder, facts=facts)
    if settings.method == "textual_inversion":
        path = folder / textual_inversion.FILE_NAME
        vectors = textual_inversion.learned_embeds(components, settings.token)
        spec = model_spec(
            vectors,
            info=facts.info,
            title=facts.name,
            width=components.unet.config.cross_attention_dim,
            adapter="textual-inversion",
            diffusers_names=True,
            trigger_word=settings.token,
        )
        num, size = textual_inversion.save_embeds(vectors, path, metadata=spec)
        logger.info("%s: %d vectors, %d bytes", path, num, size)


def _network(settings: FinetuneConfig) -> dict[str, object]:
    """Return kohya's entries for an adapter that is LyCORIS' there; none for a plain LoRA."""
    arguments: dict[str, object] = {
        "dora": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
        "lokr": {"algo": "lokr", "factor": settings.lokr_factor},
    }
    if settings.adapter_type not in arguments:
        return {}
    text = json.dumps(arguments[settings.adapter_type])
    return {"network_module": "lycoris.kohya", "network_args": text}


def _save_lora_files(
    components: Components, settings: FinetuneConfig, folder: Path, *, facts: LoraFacts
) -> None:
    """Write lora/ for diffusers and, if asked for, lora_kohya.safetensors for other programs."""
    is_lokr, width = settings.adapter_type == "lokr", components.unet.config.cross_attention_dim
    weights = lokr.lokr_weights(components.unet) if is_lokr else lora.lora_weights(components)
    spec = partial(
        model_spec,
        info=facts.info,
        title=facts.name,
        width=width,
        adapter="lora",
        trigger_word=facts.trigger_word,
    )
    path = folder / "lora" / lora.FILE_NAME
    hint = usage_hint(facts.info, scheduler=components.scheduler)
    own = spec(weights, diffusers_names=True) | hint
    if is_lokr:
        own |= lokr.adapter_metadata(weights, rank=settings.lora_rank, factor=settings.lokr_factor)
    size = save_lora(weights, path, metadata=own)
    num = sum(tensor.numel() for tensor in weights.values())
    logger.info("%s, for diffusers: %s parameters, %.2f MB", path, f"{num:,}", size / 1e6)
    if not settings.lora_kohya:
        return
    other = folder / "lora_kohya.safetensors"
    renamed = kohya_weights(weights, unet_config=components.unet.config)
    trained = kohya_metadata(
        renamed,
        info=facts.info,
        name=facts.name,
        width=width,
        rank=settings.lora_rank if is_lokr else lora_rank(renamed),
        training=facts.training | _network(settings),
        tags=facts.tags,
    )
    save_lora(renamed, other, metadata=spec(renamed) | hint | trained)
    if len(components.tokenizer) != CLIP_VOCABULARY:
        base = public_name(facts.info.base_model or "its own base model")
        logger.info("%s: the same; it fits %s only: %s", other, base, WAYS_OF_AN_OWN_MODEL)
    else:
        _log_readers(other, settings, layers=weights)


def _log_readers(path: Path, settings: FinetuneConfig, *, layers: Iterable[str]) -> None:
    """Log which programs load a LoRA in kohya's naming, and what they leave out."""
    if settings.adapter_type == "dora":
        logger.warning(
            "%s, for LyCORIS: the same; ComfyUI and A1111 take another norm in DoRA, so that their "
            "images differ: use the merged model there, %s",
            path,
            path.parent / "pipeline",
        )
        return
    is_lokr = settings.adapter_type == "lokr"
    logger.info("%s, for ComfyUI, A1111 and %s: the same", path, READERS[is_lokr])
    if not is_lokr and (unknown := layers_unknown_to_kohya(layers)):
        logger.warning(
            "kohya's own scripts have no place for %d of its layers and leave them out: %s; "
            "ComfyUI and A1111 read all",
            len(unknown),
            ", ".join(unknown),
        )
