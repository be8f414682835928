"""Train steps of every kind of run, tiny, and batches as a loader gives them, on any device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, UNet2DConditionModel
from fakes_gpu import HostSyncs
from fakes_models import make_components
from fakes_sdxl import POOLED, WIDTHS, sdxl_components
from torch import Tensor
from transformers import CLIPTokenizer

from latentdiff.config.text_to_image import Config
from latentdiff.models.build import make_ddpm_scheduler, make_flow_scheduler
from latentdiff.models.compatibility import CONDITION_KINDS
from latentdiff.models.components import Components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.unet.controlnet import make_controlnet
from latentdiff.models.unet.image_conditions import add_condition
from latentdiff.models.unet.learned_variance import fit_variance
from latentdiff.training.distill.student import Teacher, make_student
from latentdiff.training.finetune.initial_weights import InitialWeights
from latentdiff.training.finetune.methods import add_adapters
from latentdiff.training.inputs.conditions import ConditionEncoder
from latentdiff.training.text_to_image.model import trained_text_encoders
from latentdiff.training.text_to_image.setup import build_train_step
from latentdiff.training.text_to_image.train_step import StepResult, TrainStep

B, C, SIDE, FACTOR, TOKENS, WIDTH = 4, 4, 8, 4, 16, 16
CASES: dict[str, dict[str, Any]] = {  # settings by section
    "sd": {
        "diffusion": {"loss_weighting": "min_snr", "offset_noise": 0.1, "input_perturbation": 0.1},
        "train": {"ema": True, "posthoc_ema_sigma_rel": (0.1,)},
    },
    "text encoder, learned variance, loss-aware": {
        "train": {"train_text_encoder": True},
        "diffusion": {"learned_variance": True, "timestep_sampling": "loss_aware"},
    },
    "flow, depth": {
        "diffusion": {
            "prediction_type": "flow_prediction",
            "timestep_sampling": "logit_normal",
            "logit_normal_unbiased": True,
            "loss": "huber",
        },
        "condition": {"kind": "depth"},
        "finetune": {"method": "cross_attention"},
    },
    "sdxl, controlnet": {"finetune": {"method": "controlnet"}},
    "sdxl, lora, both text encoders": {
        "finetune": {"method": "lora"},
        "train": {"train_text_encoder": True, "train_text_encoder_2": True},
    },
    **{
        kind: {"condition": {"kind": kind}, "finetune": {"method": "cross_attention"}}
        for kind in CONDITION_KINDS
        if kind != "depth"
    },
    "guided student": {"distill": {"method": "guided", "num_steps": 8}},
    "progressive student": {"distill": {"method": "progressive", "num_steps": 4}},
    "lcm lora": {
        "distill": {"method": "lcm_lora"},
        "finetune": {"method": "lora"},
        "train": {"ema": True},
    },
}


class Model(NamedTuple):
    """A case's model on the CPU, as a run makes it of the one that it loads."""

    config: Config
    components: Components
    teacher: UNet2DConditionModel | None
    controlnet: ControlNetModel | None
    is_sdxl: bool


class Built(NamedTuple):
    """A case's train step, and where its conditions are made."""

    model: Model
    step: TrainStep
    encoder: ConditionEncoder | None


@cache
def config_of(case: str) -> Config:
    """Return the settings of a case, as those of a fine-tune of some model."""
    tiny = {
        "data": {"resolution": SIDE * FACTOR},
        "model": {"pretrained": "base"},
        "diffusion": {"caption_dropout": 0.0},
        "train": {"mixed_precision": "fp32", "batch_size": B, "ema": False},
    }
    config = Config()
    for given in (tiny, CASES[case]):
        parts = {name: replace(getattr(config, name), **part) for name, part in given.items()}
        config = replace(config, **parts)
    return config


def make_model(case: str, tokenizer: CLIPTokenizer) -> Model:
    """Make the model of a case."""
    config, is_sdxl = config_of(case), "sdxl" in case
    components = _components(config, tokenizer, is_sdxl=is_sdxl)
    teacher = controlnet = None
    if config.distill.method == "progressive":
        _, components = make_student(components, method="guided")
    if config.distill.is_on:
        teacher, components = make_student(components, method=config.distill.method)
    if config.finetune.method == "controlnet":
        controlnet = make_controlnet(components.unet, factor=FACTOR, seed=0)
    return Model(config, components, teacher, controlnet, is_sdxl)


def _components(config: Config, tokenizer: CLIPTokenizer, *, is_sdxl: bool) -> Components:
    kind = config.diffusion.prediction_type or "v_prediction"
    scheduler = make_flow_scheduler(1000)
    if kind != "flow_prediction":
        scheduler = make_ddpm_scheduler(prediction_type=kind)
    components = make_components(tokenizer)
    if is_sdxl:
        components = Components(**sdxl_components())
    components = replace(components, scheduler=scheduler)
    fit_variance(components, learned=config.diffusion.learned_variance)
    if config.condition.is_on:
        add_condition(components.unet, config.condition.kind)
    add_adapters(
        components,
        config.finetune,
        initial=InitialWeights(),
        text_encoders=trained_text_encoders(config),
        seed=0,
    )
    return components


def build(model: Model, accelerator: Accelerator) -> Built:
    """Build a model's train step on the accelerator's device, as `setup` does."""
    config, components, device = model.config, model.components, accelerator.device
    encoder = None
    if config.condition_kind != "none":
        encoder = ConditionEncoder(config.condition_kind, components.vae)
    if encoder is not None and encoder.uses_vae:
        components.vae.to(device)
    if model.teacher is not None:
        components.unet.to(device)
    null_text = Conditioning.of({name: x[:1] for name, x in text_of(model).items()})
    data: Any = SimpleNamespace(null_text=null_text, source=None, condition_encoder=encoder)
    teacher = Teacher(model.teacher, accelerator.autocast) if model.teacher is not None else None
    step = build_train_step(
        config, components, data, accelerator, teacher=teacher, controlnet=model.controlnet
    )
    return Built(model, step, encoder)


def text_of(model: Model) -> dict[str, Tensor]:
    """Return what a loader gives of B captions."""
    if trained_text_encoders(model.config):
        shape = (B, 2, TOKENS) if model.is_sdxl else (B, TOKENS)
        return {"input_ids": torch.ones(shape, dtype=torch.int64)}
    if not model.is_sdxl:
        return {"prompt_embeds": torch.randn(B, TOKENS, WIDTH)}
    embeds = torch.randn(B, TOKENS, sum(WIDTHS))
    return {"prompt_embeds": embeds, "pooled_embeds": torch.randn(B, POOLED)}


def condition_of(kind: str) -> dict[str, Tensor]:
    """Return what a data worker reads of the condition of B images, as conditions.py names it."""
    px = SIDE * FACTOR
    pixels = torch.zeros(B, px, px, 3, dtype=torch.uint8)
    hidden = torch.ones(B, 1, px, px, dtype=torch.uint8)
    noise = torch.randn(B, C, SIDE, SIDE)
    dropped = torch.zeros(B, dtype=torch.bool)
    levels = torch.arange(B)
    found: dict[str, dict[str, Tensor]] = {
        "inpaint": {"condition_pixels": pixels, "hidden": hidden, "condition_noise": noise},
        "instruct_pix2pix": {"condition_pixels": pixels, "condition_dropped": dropped},
        "upscale": {"condition": torch.randn(B, 3, SIDE, SIDE), "class_labels": levels},
        "depth": {"condition": torch.randn(B, 1, SIDE, SIDE)},
        "controlnet": {"control": pixels.permute(0, 3, 1, 2)},
    }
    return found[kind]


def batch_of(model: Model) -> dict[str, Tensor]:
    """Return a step's batch on the CPU, with what the condition is made of."""
    batch = text_of(model) | {
        "z0": torch.randn(B, C, SIDE, SIDE),
        "eps": torch.randn(B, C, SIDE, SIDE),
        "offset": torch.randn(B, C, 1, 1),
        "perturbation": torch.randn(B, C, SIDE, SIDE),
        "mask": torch.ones(B, 1, SIDE, SIDE),
        "u": torch.rand(B, dtype=torch.float64),
        "guidance": torch.rand(B),
        "dropped": torch.zeros(B, dtype=torch.bool),
        "weight": torch.ones(B),
        "stratum": torch.arange(B),
        "index": torch.arange(B),
    }
    if model.is_sdxl:
        batch["time_ids"] = torch.ones(B, 6, dtype=torch.int64)
    if model.config.condition_kind != "none":
        batch |= condition_of(model.config.condition_kind)
    return batch


def run_step(built: Built) -> tuple[StepResult, list[str]]:
    """Do a step as a run does; return its result and the host's waits."""
    batch = batch_of(built.model)
    with HostSyncs() as syncs:
        if built.encoder is not None:
            built.encoder.encode(batch, device=built.step.accelerator.device)
        result = built.step.step(iter([batch]), step=0, count=B, accumulation=1)
    return result, syncs.found
