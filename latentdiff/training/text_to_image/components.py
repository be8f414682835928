"""The components that a run trains: a folder to fine-tune, or a new U-Net (and text encoder).

Parts that do not fit are refused before any weight is loaded. New weights come from the run's seed.
Does not answer for: which of them train, and how they lie in memory (model.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from latentdiff.config.data import DataConfig
from latentdiff.config.diffusion import DiffusionConfig
from latentdiff.config.text_to_image import Config
from latentdiff.diffusion.prediction import check_objective
from latentdiff.models.build import (
    build_text_encoder,
    build_unet,
    make_ddpm_scheduler,
    make_flow_scheduler,
    schedule_of,
)
from latentdiff.models.compatibility import (
    TEXT_ENCODERS,
    check_compatible,
    check_condition,
    latent_factor,
    read_configs,
    read_json,
    unet_factor,
)
from latentdiff.models.components import (
    Components,
    load_components,
    load_text,
    load_vae,
)
from latentdiff.models.latents import Autoencoder
from latentdiff.models.model_path import resolve_model
from latentdiff.models.save import save_component
from latentdiff.models.text import (
    check_clip_skip,
    set_clip_skip,
    train_tokenizer,
)
from latentdiff.models.unet.image_conditions import add_condition
from latentdiff.models.unet.learned_variance import fit_variance
from latentdiff.pipeline.files.model_info import read_model_info
from latentdiff.pipeline.files.prediction_marks import check_folder
from latentdiff.pipeline.schedulers import zero_terminal_snr_scheduler
from latentdiff.training.distill.student import check_teacher


def check_components(config: Config) -> None:
    """Raise ValueError or FileNotFoundError for parts that do not fit; reads config files only."""
    if config.model.pretrained:
        _check_pretrained(config)
        return
    if not config.model.vae:
        raise ValueError(
            'model.vae is empty, expected the folder of a VAE, or "latentdiff-vae" for the small '
            "one that ships; model.pretrained=FOLDER fine-tunes a whole model instead"
        )
    vae = _vae_config(resolve_model(config.model.vae))
    unet, text = config.model.unet, config.model.text
    if config.model.text_encoder:
        text_config = read_configs(_text_folder(config)).get("text_encoder", {})
        _check_clip_skip(text_config, config)
    else:
        text_config = {"hidden_size": text.width, "max_position_embeddings": text.max_tokens}
    channels = vae["latent_channels"]
    configs = {
        "vae": vae,
        "text_encoder": text_config,
        "unet": {
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": unet.block_out_channels,
            "cross_attention_dim": text_config.get("hidden_size"),
        },
    }
    check_compatible(configs, image_size=config.data.side_px)
    _check_buckets(configs, config.data)


def _check_pretrained(config: Config) -> None:
    folder = resolve_model(config.model.pretrained)
    if not folder.is_dir():
        return
    configs = read_configs(folder)
    if not config.diffusion.prediction_type:
        recorded = read_model_info(folder).prediction_type
        check_folder(str(folder), configs.get("scheduler", {}), recorded)
    check_compatible(configs, image_size=config.data.side_px)
    _check_buckets(configs, config.data)
    for name in TEXT_ENCODERS:
        _check_clip_skip(configs.get(name, {}), config)
    check_teacher(configs, method=config.distill.method)
    if "unet" in configs and "vae" in configs:
        needs_condition(config, configs)
    _check_second_encoder(configs, config)


def _check_second_encoder(configs: Mapping[str, Mapping[str, Any]], config: Config) -> None:
    """Raise ValueError where the second text encoder is to be trained and there is none."""
    if config.train.train_text_encoder_2 and "text_encoder_2" not in configs:
        raise ValueError(
            f"train.train_text_encoder_2=true, and model.pretrained={config.model.pretrained} has "
            "one text encoder: set train.train_text_encoder=true"
        )


def _check_buckets(configs: Mapping[str, Mapping[str, Any]], data: DataConfig) -> None:
    """Raise ValueError where the sides of buckets do not fit; absent parts are not checked."""
    if not data.buckets or "vae" not in configs or "unet" not in configs:
        return
    vae, unet = latent_factor(configs["vae"]), unet_factor(configs["unet"])
    if data.bucket_multiple % (vae * unet):
        raise ValueError(
            f"data.bucket_multiple={data.bucket_multiple} must be a multiple of {vae * unet} (VAE "
            f"factor {vae} x U-Net factor {unet}), so that this model can take every bucket's size"
        )


def _check_clip_skip(text_config: Mapping[str, Any], config: Config) -> None:
    """Raise ValueError where a text encoder, if its config is there, has too few layers to skip."""
    num_layers, skipped = text_config.get("num_hidden_layers"), config.model.clip_skip
    if isinstance(num_layers, int) and skipped is not None:
        check_clip_skip(skipped, num_layers=num_layers, name="model.clip_skip")


def needs_condition(config: Config, configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether the U-Net has yet to get the channels of condition.kind.

    ValueError for one of another kind, and for a method that does not train the new channels.
    """
    channels = configs["vae"]["latent_channels"]
    method, kind = config.finetune.method, config.condition.kind
    if check_condition(configs["unet"], kind, latent_channels=channels):
        return False
    if method in ("lora", "textual_inversion"):
        raise ValueError(
            f"condition.kind={kind} widens the U-Net's first layer, which finetune.method={method} "
            "does not train; set finetune.method=full, attention or cross_attention, or start from "
            f"a model of the kind {kind}"
        )
    return True


def load_vae_of(config: Config) -> Autoencoder:
    """Load the VAE that a run encodes with: model.vae, or that of the model to fine-tune."""
    return load_vae(config.model.pretrained or config.model.vae)


def new_components(
    config: Config, vae: Autoencoder, *, captions: Iterable[str], tokenizer_dir: Path
) -> Components:
    """Build the model of a run from scratch around its VAE; weights follow from train.seed.

    The tokenizer is trained on the captions once and kept in tokenizer_dir for a resumed run.
    """
    model, diffusion = config.model, config.diffusion
    torch.manual_seed(config.train.seed)
    if model.text_encoder:
        loaded = load_text(_text_folder(config))
        text_encoder, tokenizer = loaded.text_encoder, loaded.tokenizer
        set_clip_skip(loaded, model.clip_skip)
    else:
        tokenizer = _trained_tokenizer(config, captions, tokenizer_dir)
        text_encoder = build_text_encoder(
            tokenizer,
            width=model.text.width,
            num_layers=model.text.num_layers,
            num_heads=model.text.num_heads,
        )
    unet = build_unet(
        sample_size=config.data.side_px // latent_factor(vae.config),
        in_channels=vae.config["latent_channels"],
        block_out_channels=model.unet.block_out_channels,
        attention_levels=model.unet.attention_levels,
        layers_per_block=model.unet.layers_per_block,
        head_dim=model.unet.head_dim,
        dropout=model.unet.dropout,
        cross_attention_dim=text_encoder.config.hidden_size,
    )
    scheduler = _scheduler(diffusion)
    components = Components(
        unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
    )
    fit_variance(components, learned=diffusion.learned_variance)
    if config.condition.is_on:
        add_condition(unet, config.condition.kind)
    return components


def pretrained_components(config: Config) -> Components:
    """Load the model to fine-tune, with the scheduler of the objective that it is trained by."""
    components = load_components(
        config.model.pretrained, safety_checker=config.model.safety_checker
    )
    set_clip_skip(components.text_encoders, config.model.clip_skip)
    components = replace(components, scheduler=_own_scheduler(components.scheduler, config))
    fit_variance(components, learned=config.diffusion.learned_variance)
    if needs_condition(config, components.configs()):
        add_condition(components.unet, config.condition.kind)
    return components


def _own_scheduler(scheduler: Any, config: Config) -> Any:
    """Return a model's scheduler with the prediction type and zero terminal SNR of the config.

    ValueError where the two, or what the model's folder says, do not go together.
    """
    diffusion = config.diffusion
    own = scheduler.config.get("prediction_type", "epsilon")
    prediction_type = diffusion.prediction_type or own
    if prediction_type == "flow_prediction" != own:
        scheduler = make_flow_scheduler(scheduler.config["num_train_timesteps"])
    elif own == "flow_prediction" != prediction_type:
        raise ValueError(
            f"diffusion.prediction_type={prediction_type}, and model.pretrained="
            f"{config.model.pretrained} is a model of rectified flow, which has no betas: leave "
            "diffusion.prediction_type out"
        )
    elif prediction_type != own:
        scheduler.register_to_config(prediction_type=prediction_type)
    if diffusion.zero_terminal_snr:
        scheduler = zero_terminal_snr_scheduler(scheduler)
    check_objective(schedule_of(scheduler), prediction_type)
    if prediction_type == "flow_prediction" and diffusion.learned_variance:
        raise ValueError(
            "diffusion.learned_variance is sampled by DDPM, which cannot sample a model of "
            "rectified flow: leave it out"
        )
    return scheduler


def _scheduler(diffusion: DiffusionConfig) -> Any:
    if diffusion.prediction_type == "flow_prediction":
        return make_flow_scheduler(diffusion.num_timesteps)
    return make_ddpm_scheduler(
        beta_schedule=diffusion.beta_schedule or "scaled_linear",
        prediction_type=diffusion.prediction_type or "epsilon",
        num_timesteps=diffusion.num_timesteps,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        zero_terminal_snr=diffusion.zero_terminal_snr,
    )


def _trained_tokenizer(config: Config, captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    if (folder / "tokenizer.json").is_file():
        return CLIPTokenizer.from_pretrained(folder)
    text = config.model.text
    tokenizer = train_tokenizer(captions, vocab_size=text.vocab_size, max_length=text.max_tokens)
    save_component(tokenizer, folder)
    return tokenizer


def _vae_config(path: Path) -> dict[str, Any]:
    """Read a local VAE's config; a VAE's own folder or a pipeline's."""
    for folder in (path / "vae", path):
        if (folder / "config.json").is_file():
            return read_json(folder / "config.json")
    raise FileNotFoundError(f"model.vae={path} has no config.json, expected the folder of a VAE")


def _text_folder(config: Config) -> Path:
    folder = resolve_model(config.model.text_encoder)
    for name in ("text_encoder", "tokenizer"):
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"model.text_encoder={folder} has no folder {name}, expected text_encoder/ and "
                "tokenizer/ as in a Stable-Diffusion-format folder"
            )
    return folder
