"""What a run is made of, put together: processes, data, model, engine, log.

Everything that can be wrong with the input is said here, before the first step.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs

from latentdiff.atomic import write_text
from latentdiff.config.diffusion import DiffusionConfig
from latentdiff.config.io import to_yaml
from latentdiff.config.text_to_image import Config
from latentdiff.data.folder.folder import Folder
from latentdiff.device import tune_malloc
from latentdiff.diffusion.timesteps import (
    SamplingOptions,
    TimestepSampler,
    build_timestep_sampler,
)
from latentdiff.models.build import schedule_of
from latentdiff.models.components import Components
from latentdiff.models.latents import LatentCodec
from latentdiff.training.checkpoint import BackgroundSaver, validate_checkpoint
from latentdiff.training.distributed import MIXED
from latentdiff.training.finetune.dreambooth import generate_class_images
from latentdiff.training.finetune.methods import add_adapters, base_weights_hash, set_trainable
from latentdiff.training.finetune.textual_inversion import check_captions_have_token
from latentdiff.training.inputs.batches import BatchLayout
from latentdiff.training.inputs.encode import (
    cache_latents,
    caption_transform,
    crop_plan,
    eval_crop_config,
    set_scaling_factor,
    unique_captions,
)
from latentdiff.training.inputs.train_data import TrainData, build_train_data, read_data
from latentdiff.training.metrics_log import MetricsLog
from latentdiff.training.model import (
    TextToImage,
    check_attention,
    load_vae_of,
    new_components,
    pretrained_components,
    set_attention,
    trains_text_encoder,
    use_fused_transformers,
)
from latentdiff.training.nearest_images import NearestImages
from latentdiff.training.objective import Objective
from latentdiff.training.optim.lr import LRSchedule
from latentdiff.training.optim.optimizer import check_optimizer
from latentdiff.training.train_step import TrainStep

UNDER_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # set by accelerate launch
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
ON_THE_CPU = "On the CPU use torchrun --nproc_per_node N scripts/train_t2i.py"


@dataclass
class Run:
    """Everything a run holds while it trains."""

    config: Config
    folder: Path
    accelerator: Accelerator
    components: Components
    train_data: TrainData
    train_step: TrainStep
    layout: BatchLayout
    log: MetricsLog
    saver: BackgroundSaver
    nearest_images: NearestImages | None = None
    heldout: dict[int, float] = field(default_factory=dict)  # losses so far, by step
    base_hash: str | None = None  # of a pretrained model that checkpoints hold a part of


def start_accelerator(config: Config) -> Accelerator:
    """Start Accelerate; ValueError when it is not what was launched, or cannot be used."""
    _refuse_unsupported()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said, so that several CPU processes are seen
        mixed_precision=MIXED[config.train.mixed_precision],
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)] if backend else None,
    )
    _refuse_copies(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP and config.train.channels_last is True:
        raise ValueError(
            "train.channels_last is true, and FSDP2 cannot spread weights in that layout: add "
            "--train.channels_last=false"
        )
    if accelerator.distributed_type == DistributedType.FSDP and config.train.optimizer != "adamw":
        raise ValueError(
            f"train.optimizer={config.train.optimizer} has no form that FSDP2 can spread: take "
            "adamw, whose state FSDP2 spreads, or train without FSDP"
        )
    check_optimizer(config.train.optimizer, accelerator.device)
    check_attention(config.train.attention, accelerator.device)
    if accelerator.device.type == "cpu":
        tune_malloc()
    return accelerator


def _refuse_unsupported() -> None:
    """Raise ValueError for a way of training by Accelerate that this project does not know."""
    for name, what in UNSUPPORTED.items():
        if _is_set(name):
            raise ValueError(
                f"accelerate launch asks for {what}, which LatentDiff cannot do: use DDP or FSDP2, "
                "as in configs/accelerate/"
            )
    if _is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") != "2":
        raise ValueError(
            f"accelerate launch asks for FSDP version {os.environ.get('FSDP_VERSION', '1')}, "
            "expected fsdp_version: 2, as in configs/accelerate/fsdp2_8_gpus.yaml"
        )


def _refuse_copies(accelerator: Accelerator) -> None:
    """Raise ValueError when fewer processes, or another kind, came to be than was asked for."""
    found, kind = accelerator.num_processes, accelerator.distributed_type
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if found != launched:
        raise ValueError(
            f"{launched} processes were launched and Accelerate sees {found}, as {kind}: they "
            f"would train copies. {ON_THE_CPU}"
        )
    # Given by accelerate launch to what is to be several processes, also where it starts just one.
    asked_for_several = UNDER_ACCELERATE in os.environ and "MASTER_ADDR" in os.environ
    if asked_for_several and found == 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes (MASTER_ADDR is set) and started "
            f"one. {ON_THE_CPU}"
        )
    if _is_set("ACCELERATE_USE_FSDP") and kind != DistributedType.FSDP:
        raise ValueError(
            f"accelerate launch asks for FSDP and Accelerate trains as {kind}: FSDP needs GPUs. "
            f"{ON_THE_CPU}"
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def setup(config: Config, folder: Path, accelerator: Accelerator, *, start: Path | None) -> Run:
    """Read the data, load or build the model, encode what the caches lack, wrap for training."""
    with accelerator.main_process_first():
        train_folder, heldout = read_data(
            config.data,
            prompts=config.finetune.instance_prompts,
            trust_index=not accelerator.is_main_process,
        )
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", to_yaml(config))
    base = None
    if config.model.pretrained:
        base = _load_base_model(config, folder, train_folder, accelerator)
        components = base.components
        latents = cache_latents(train_folder, components.vae, config.data, accelerator=accelerator)
    else:
        vae = load_vae_of(config)
        latents = cache_latents(train_folder, vae, config.data, accelerator=accelerator)
        if config.model.fit_scaling_factor:
            set_scaling_factor(vae, latents)
        captions = train_folder.each_caption()
        with accelerator.main_process_first():
            components = new_components(
                config, vae, captions=captions, tokenizer_dir=folder / "tokenizer"
            )
    train_data = build_train_data(
        config,
        train_folder,
        heldout,
        components=components,
        latents=latents,
        accelerator=accelerator,
        class_images=base.class_images if base else None,
    )
    if config.train.keep_best and train_data.heldout_triples is None:
        raise ValueError(
            "train.keep_best needs held-out images and there are none; set data.heldout_fraction"
        )
    layout = BatchLayout.of(
        config.train.batch_size, config.train.micro_batch_size, accelerator.num_processes
    )
    train_step = build_train_step(config, components, train_data, accelerator)
    is_main = accelerator.is_main_process
    first_step = validate_checkpoint(start)["step"] if start else 0
    log = MetricsLog(folder, is_main=is_main, first_step=first_step)
    return Run(
        config,
        folder,
        accelerator,
        components,
        train_data,
        train_step,
        layout,
        log,
        BackgroundSaver(),
        make_nearest_images(config, train_data, device=accelerator.device),
        base_hash=base.weights_hash if base else None,
    )


class _BaseModel(NamedTuple):
    """A pretrained model, ready for what learns: its class images, and the weights it had."""

    components: Components
    class_images: Folder | None
    weights_hash: str | None  # None where nothing of a run depends on it


def _load_base_model(
    config: Config, folder: Path, train_folder: Folder, accelerator: Accelerator
) -> _BaseModel:
    """Load the model to fine-tune, let it draw class images, then add adapters or words to it."""
    finetune, learns = config.finetune, trains_text_encoder(config)
    components = pretrained_components(config)
    found = base_weights_hash(components) if finetune.is_partial or finetune.class_prompt else None
    prior = None
    if found and finetune.class_prompt:
        prior = generate_class_images(
            config, components, base_hash=found, run_folder=folder, accelerator=accelerator
        )
    if finetune.method == "textual_inversion":
        captions = unique_captions((train_folder,), caption_transform(config.data))
        check_captions_have_token(captions, finetune.token)
    add_adapters(components, finetune, trains_text_encoder=learns, seed=config.train.seed)
    return _BaseModel(components, prior, found)


def build_train_step(
    config: Config, components: Components, train_data: TrainData, accelerator: Accelerator
) -> TrainStep:
    """Freeze what does not learn, lay out the rest, and build the engine around it."""
    settings, diffusion = config.train, config.diffusion
    for part in (components.vae, components.text_encoder):
        part.requires_grad_(False).eval()
    components.text_encoder.to(accelerator.device)
    model = TextToImage(components, trains_text_encoder=trains_text_encoder(config))
    set_trainable(model.unet, model.text_encoder, config.finetune.method)
    model.train()
    if _is_channels_last(settings.channels_last, accelerator):
        components.unet.to(memory_format=torch.channels_last)
    cells = config.data.resolution // LatentCodec(components.vae).factor
    set_attention(
        components.unet, settings.attention, num_latent_pixels=cells**2, device=accelerator.device
    )
    if accelerator.device.type == "cpu" and settings.attention == "auto":
        use_fused_transformers(model)
    if settings.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
        if model.text_encoder is not None:
            # the reentrant form passes no gradient to words or adapters behind frozen inputs
            model.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    device = accelerator.device
    objective = Objective(
        schedule_of(components.scheduler).to(device, dtype=torch.float32),
        prediction_type=components.scheduler.config["prediction_type"],
        null_text=train_data.null_text.to(device),
        sample_timesteps=_timestep_sampler(diffusion, components, device),
        loss_weighting=diffusion.loss_weighting,
        snr_gamma=diffusion.snr_gamma or None,
        huber_delta=diffusion.huber_delta if diffusion.loss == "huber" else None,
        offset_noise=diffusion.offset_noise,
        input_perturbation=diffusion.input_perturbation,
        learned_variance=diffusion.learned_variance,
    )
    lr_schedule = LRSchedule(
        base=settings.learning_rate,
        text_base=settings.text_learning_rate or settings.learning_rate,
        schedule=settings.lr_schedule,
        lr_warmup_steps=settings.lr_warmup_steps,
        max_steps=settings.max_steps,
    )
    return TrainStep(
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
    )


def _is_channels_last(wanted: bool | str, accelerator: Accelerator) -> bool:
    """Return whether the U-Net is laid out that way; "auto": where it is faster, as measured."""
    if wanted != "auto":
        return bool(wanted)
    if accelerator.distributed_type == DistributedType.FSDP:
        return False
    return accelerator.device.type != "cpu" or torch.cpu._is_amx_tile_supported()


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
    diffusion: DiffusionConfig, components: Components, device: torch.device
) -> TimestepSampler:
    options = SamplingOptions(
        components.scheduler.config["num_train_timesteps"],
        mean=diffusion.logit_normal_mean,
        std=diffusion.logit_normal_std,
        is_unbiased=diffusion.logit_normal_unbiased,
        device=device,
    )
    return build_timestep_sampler(diffusion.timestep_sampling, options)
