"""A text-to-image run, set up: its data, model, train step, and the nearest images of its sheets.

Everything that can be wrong with the input is reported here, before the first step.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import ControlNetModel

from latentdiff.config.diffusion import DiffusionConfig
from latentdiff.config.finetune import DistillMethod
from latentdiff.config.text_to_image import Config
from latentdiff.data.folder.folder import Folder
from latentdiff.data.inspection.text_report import counted
from latentdiff.diffusion.timesteps import (
    SamplingOptions,
    TimestepSampler,
    build_timestep_sampler,
)
from latentdiff.models.build import schedule_of
from latentdiff.models.components import Components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.models.unet.controlnet import make_controlnet
from latentdiff.training.bill.materials import Materials
from latentdiff.training.distill.setup import distill_objective, num_distilled_timesteps
from latentdiff.training.distill.student import Teacher, make_student
from latentdiff.training.finetune.dreambooth import generate_class_images
from latentdiff.training.finetune.initial_weights import read_initial_weights, run_base_hash
from latentdiff.training.finetune.lora import share_weights
from latentdiff.training.finetune.methods import add_adapters, base_weights_hash
from latentdiff.training.finetune.textual_inversion import check_captions_have_token
from latentdiff.training.inputs.batches import BatchLayout
from latentdiff.training.inputs.canaries import with_canaries
from latentdiff.training.inputs.encode import (
    CachedPromptEmbeds,
    LatentSource,
    cache_latents,
    caption_transform,
    crop_plan,
    eval_crop_config,
    set_scaling_factor,
    unique_captions,
)
from latentdiff.training.inputs.randomness import STRATA_RULE
from latentdiff.training.inputs.sources import find_images, read_sources, split_sources
from latentdiff.training.inputs.train_data import TrainData, build_train_data, subject_order
from latentdiff.training.objective import TrainingObjective
from latentdiff.training.optim.lr import LRSchedule
from latentdiff.training.text_to_image.components import (
    load_vae_of,
    new_components,
    pretrained_components,
)
from latentdiff.training.text_to_image.memory_modes import check_memory_modes
from latentdiff.training.text_to_image.model import (
    lay_out,
    trainable_model,
    trained_text_encoders,
)
from latentdiff.training.text_to_image.nearest_images import NearestImages
from latentdiff.training.text_to_image.objective import Objective
from latentdiff.training.text_to_image.preview import preview_components
from latentdiff.training.text_to_image.train_step import TrainStep

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything a text-to-image run holds while it trains."""

    config: Config
    folder: Path
    accelerator: Accelerator
    components: Components
    train_data: TrainData
    train_step: TrainStep
    layout: BatchLayout
    nearest_images: NearestImages | None = None
    base_hash: str | None = None  # of a pretrained model that checkpoints do not hold, or a part
    strata_rule: int = STRATA_RULE  # of the run from its first step on, as in `step_strata`
    teacher: Teacher | None = None  # of a student
    controlnet: ControlNetModel | None = None  # in training, of a frozen model
    preview_components: Components | None = None  # where another VAE decodes the sheets
    sources: Mapping[str, Folder] = field(default_factory=dict)  # as they were read, by name
    class_images: Folder | None = None  # of prior preservation
    materials: Materials | None = None  # what latentdiff verify compares, on the main process


def with_epochs_as_steps(config: Config, accelerator: Accelerator) -> Config:
    """Return a config whose max_epochs have become max_steps, by reading the data folder.

    So nothing below knows of epochs, and config.yaml reproduces the run.
    """
    if not config.train.max_epochs:
        return config
    full = with_canaries(config, accelerator)
    per_epoch = subject_order(full, _read_data(full, accelerator)[1]).steps_per_epoch
    max_steps = max(1, math.ceil(config.train.max_epochs * per_epoch))
    if accelerator.is_main_process:
        logger.info(
            "max_epochs=%g become max_steps=%d, %s an epoch",
            *(config.train.max_epochs, max_steps, counted(per_epoch, "step")),
        )
    return replace(config, train=replace(config.train, max_steps=max_steps, max_epochs=0.0))


def _read_data(
    config: Config, accelerator: Accelerator
) -> tuple[Mapping[str, Folder], Folder, Folder]:
    """Return the folder of each source, and the training and held-out records of all."""
    prompts = config.finetune.instance_prompts
    with accelerator.main_process_first():
        folders = read_sources(
            config.data,
            condition=config.condition_files,
            inpaint_masks=config.condition.reads_mask_files,
            needs_captions=not prompts,
            trust_index=not accelerator.is_main_process,
        )
        return folders, *split_sources(config.data, folders, prompts=prompts)


def setup(config: Config, folder: Path, accelerator: Accelerator) -> Run:
    """Read the data, load or build the model, encode what the caches lack, wrap for training."""
    check_memory_modes(config.train, accelerator)
    sources, train_folder, heldout = _read_data(config, accelerator)
    find_images(train_folder, config.data.zero_weight_images)  # a wrong name is told early
    load = _load_base_model if config.model.pretrained else _build_new_model
    base, teacher = load(config, folder, train_folder, accelerator), None
    if config.distill.is_on:
        base, teacher = _with_student(base, config.distill.method, accelerator)
    train_data = build_train_data(
        config,
        train_folder,
        heldout,
        components=base.components,
        latents=base.latents,
        accelerator=accelerator,
        class_images=base.class_images,
    )
    _check_measures(config, train_data)
    if config.train.stop == "auto" and config.train.lr_schedule != "constant":
        logger.warning(
            "train.stop=auto ends a run before train.lr_schedule=%s has brought the learning rate "
            "down, which may gain more than what it measures: train.lr_schedule=constant suits it",
            config.train.lr_schedule,
        )
    layout = BatchLayout.of(
        config.train.batch_size, config.train.micro_batch_size, accelerator.num_processes
    )
    return Run(
        config,
        folder,
        accelerator,
        base.components,
        train_data,
        build_train_step(
            config,
            base.components,
            train_data,
            accelerator,
            teacher=teacher,
            controlnet=base.controlnet,
        ),
        layout,
        make_nearest_images(config, train_data, device=accelerator.device),
        base.weights_hash,
        teacher=teacher,
        controlnet=base.controlnet,
        preview_components=preview_components(
            base.components,
            vae=config.preview.vae,
            source=config.model.pretrained or config.model.vae,
            device=accelerator.device,
        ),
        sources=sources,
        class_images=base.class_images,
    )


def _check_measures(config: Config, train_data: TrainData) -> None:
    num_triples = len(train_data.heldout_triples or ())
    if config.train.stop == "auto" and num_triples == 1 and not config.eval.num_samples:
        raise ValueError(
            "train.stop=auto needs an interval, and eval.num_heldout=1 gives none: set 16 or more"
        )
    if num_triples:
        return
    if config.train.stop == "auto":
        if not config.eval.num_samples:
            raise ValueError(
                "train.stop=auto has nothing to measure: no image is held out, and "
                "eval.num_samples=0. Hold some out by data.heldout_fraction=0.1, or, where each is "
                "needed for training, set eval.num_samples=8 and preview.features=DIR, the folder "
                "of a network such as a CLIP, which tells how like the subject generated images are"
            )
    elif config.train.keep_best:
        raise ValueError(
            "train.keep_best needs held-out images and there are none; set data.heldout_fraction"
        )


class _BaseModel(NamedTuple):
    """A model to train, with the training images' latents.

    class_images: that it made before; weights_hash: of a pretrained one, None where nothing of a
    run depends on it.
    """

    components: Components
    latents: LatentSource
    class_images: Folder | None = None
    weights_hash: str | None = None
    controlnet: ControlNetModel | None = None


def _with_student(
    base: _BaseModel, method: DistillMethod, accelerator: Accelerator
) -> tuple[_BaseModel, Teacher]:
    """Return a model with a student in place of its U-Net, and that U-Net as the teacher."""
    base.components.unet.to(accelerator.device)  # first: not both copy it there
    unet, student = make_student(base.components, method=method)
    return base._replace(components=student), Teacher(unet, accelerator.autocast)


def _build_new_model(
    config: Config, folder: Path, train_folder: Folder, accelerator: Accelerator
) -> _BaseModel:
    """Build a model around a VAE, whose latents it measures, and a vocabulary of the captions."""
    vae = load_vae_of(config)
    latents = cache_latents(train_folder, vae, config.data, accelerator=accelerator)
    if config.model.fit_scaling_factor:
        set_scaling_factor(vae, latents)
    captions = train_folder.each_caption()
    with accelerator.main_process_first():
        components = new_components(
            config, vae, captions=captions, tokenizer_dir=folder / "tokenizer"
        )
    return _BaseModel(components, latents)


def _load_base_model(
    config: Config, folder: Path, train_folder: Folder, accelerator: Accelerator
) -> _BaseModel:
    """Load the model to fine-tune, let it make class images, then add adapters or words to it."""
    finetune, encoders = config.finetune, trained_text_encoders(config)
    components = pretrained_components(config)
    keeps_base = finetune.is_partial or finetune.class_prompt or config.distill.is_on
    found = base_weights_hash(components) if keeps_base else None
    initial = read_initial_weights(components, finetune)
    class_images = None
    if found and finetune.class_prompt:
        class_images = generate_class_images(
            config, components, base_hash=found, run_folder=folder, accelerator=accelerator
        )
    if finetune.method == "textual_inversion":
        captions = unique_captions((train_folder,), caption_transform(config.data))
        check_captions_have_token(captions, finetune.token)
    add_adapters(
        components,
        finetune,
        initial=initial,
        text_encoders=encoders,
        seed=config.train.seed,
    )
    latents = cache_latents(train_folder, components.vae, config.data, accelerator=accelerator)
    run_base = found and run_base_hash(found, initial)
    controlnet = None
    if finetune.method == "controlnet":
        factor = LatentCodec(components.vae).factor
        controlnet = make_controlnet(components.unet, factor=factor, seed=config.train.seed)
    return _BaseModel(components, latents, class_images, run_base, controlnet)


def build_train_step(
    config: Config,
    components: Components,
    train_data: TrainData,
    accelerator: Accelerator,
    *,
    teacher: Teacher | None = None,
    controlnet: ControlNetModel | None = None,
) -> TrainStep:
    """Freeze and lay out the model, and build the train step around it.

    teacher: of a student, to learn from instead of from noised images. controlnet: trained alone.
    """

    def averaged() -> AbstractContextManager[None]:  # is asked in steps, when train_step is there
        assert train_step.ema is not None  # distill.method=lcm_lora needs it
        return train_step.ema.swap_weights(train_step.model)

    settings, device = config.train, accelerator.device
    null_text = train_data.null_text.to(device)
    if teacher is None:
        objective: TrainingObjective = _objective(
            config, components, null_text=null_text, device=device
        )
    else:
        objective = _distillation(
            config, components, teacher, accelerator, null_text=null_text, averaged=averaged
        )
    model = trainable_model(config, components, accelerator, controlnet)
    if teacher is not None and config.distill.method == "lcm_lora":
        share_weights(teacher.unet, components.unet)  # which is cast, and laid out, by now
    _move_unused_to_host(config, components, train_data)
    lr_schedule = LRSchedule(
        base=settings.learning_rate,
        text_base=settings.text_learning_rate or settings.learning_rate,
        schedule=settings.lr_schedule,
        lr_warmup_steps=settings.lr_warmup_steps,
        max_steps=settings.max_steps,
    )
    train_step = TrainStep(
        model.to(device),
        objective=objective,
        accelerator=accelerator,
        lr_schedule=lr_schedule,
        optimizer=settings.optimizer,
        weight_decay=settings.weight_decay,
        betas=(0.9, settings.beta2),
        max_grad_norm=settings.max_grad_norm,
        ema_decay=settings.ema_decay if settings.ema else None,
        posthoc_ema_sigma_rel=settings.posthoc_ema_sigma_rel,
        ema_device="cpu" if settings.ema_device == "cpu" else None,
        fp16=settings.mixed_precision == "fp16",
        seed=settings.seed,
        fused_backward_pass=settings.fused_backward_pass,
        guidance_lr_factor=config.distill.guidance_lr_factor,
    )
    return train_step


def _move_unused_to_host(config: Config, components: Components, train_data: TrainData) -> None:
    """Leave on the device only what encodes in a step."""
    if isinstance(train_data.source, CachedPromptEmbeds):  # no step encodes a caption
        components.text_encoders.to(torch.device("cpu"))
    encoder = train_data.condition_encoder
    if config.data.cache and not (encoder and encoder.uses_vae):
        components.vae.to(torch.device("cpu"))


def _distillation(
    config: Config,
    components: Components,
    teacher: Teacher,
    accelerator: Accelerator,
    *,
    null_text: Conditioning,
    averaged: Callable[[], AbstractContextManager[None]],
) -> TrainingObjective:
    """Return what a student learns of its teacher, which is laid out for the device."""
    teacher.unet.requires_grad_(False).eval().to(accelerator.device)
    lay_out(config, teacher.unet, components, accelerator)
    num_steps = num_distilled_timesteps(config.distill)
    return distill_objective(
        config.distill,
        components,
        teacher,
        sample_steps=_timestep_sampler(config.diffusion, num_steps, accelerator.device),
        null_text=null_text,
        device=accelerator.device,
        averaged=averaged,
    )


def _objective(
    config: Config, components: Components, *, null_text: Conditioning, device: torch.device
) -> Objective:
    """Return the loss that the config asks for, on the device; null_text is there already."""
    diffusion = config.diffusion
    return Objective(
        schedule_of(components.scheduler).to(device, dtype=torch.float32),
        prediction_type=components.scheduler.config["prediction_type"],
        null_text=null_text,
        sample_timesteps=_timestep_sampler(
            diffusion, components.scheduler.config["num_train_timesteps"], device
        ),
        loss_weighting=diffusion.loss_weighting,
        snr_gamma=diffusion.snr_gamma or None,
        huber_delta=diffusion.huber_delta if diffusion.loss == "huber" else None,
        offset_noise=diffusion.offset_noise,
        input_perturbation=diffusion.input_perturbation,
        learned_variance=diffusion.learned_variance,
    )


def make_nearest_images(
    config: Config, train_data: TrainData, *, device: torch.device | str
) -> NearestImages | None:
    """Return what finds the training images nearest to a sheet's; None where none is wanted."""
    if not config.preview.num_nearest:
        return None
    return NearestImages(
        train_data.train,
        train_data.heldout,
        plan_crops=lambda folder: crop_plan(folder, eval_crop_config(config.data)),
        num=config.preview.num_nearest,
        features=config.preview.features,
        device=device,
    )


def _timestep_sampler(
    diffusion: DiffusionConfig, num_timesteps: int, device: torch.device
) -> TimestepSampler:
    options = SamplingOptions(
        num_timesteps,
        mean=diffusion.logit_normal_mean,
        std=diffusion.logit_normal_std,
        is_unbiased=diffusion.logit_normal_unbiased,
        device=device,
    )
    return build_timestep_sampler(diffusion.timestep_sampling, options)
