"""What a run is made of, put together: processes, data, model, engine, log.

Everything that can be wrong with the input is said here, before the first step.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs

from latentdiff.allocator import keep_freed_memory
from latentdiff.config import Config
from latentdiff.config_file import to_yaml
from latentdiff.data.folder import Folder
from latentdiff.diffusion.timesteps import LossAwareTimesteps, logit_normal_probabilities
from latentdiff.latents import LatentCodec
from latentdiff.models import Components, schedule_of
from latentdiff.training.attention import check_attention, set_attention
from latentdiff.training.checkpoint import BackgroundSaver, validate_checkpoint
from latentdiff.training.components import (
    TextToImage,
    learns_text,
    load_vae_of,
    new_components,
    pretrained_components,
    take_large_steps,
)
from latentdiff.training.encoding import caption_edits, crop_plan, settled_captions, still
from latentdiff.training.engine import Engine, Objective, RatePlan
from latentdiff.training.finetune import add_what_learns, choose_what_learns, hash_of
from latentdiff.training.log import MetricsLog
from latentdiff.training.neighbours import Neighbours
from latentdiff.training.one_process import MIXED
from latentdiff.training.optim import check_optimizer
from latentdiff.training.prior import class_pictures
from latentdiff.training.samples import Layout
from latentdiff.training.supply import (
    Supply,
    cache_latents,
    fit_scaling,
    make_supply,
    read_data,
)
from latentdiff.training.words import check_captions
from latentdiff.whole_file import write_text

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
    supply: Supply
    engine: Engine
    layout: Layout
    log: MetricsLog
    saver: BackgroundSaver
    neighbours: Neighbours | None = None
    held_out: dict[int, float] = field(default_factory=dict)  # losses so far, by step
    base_hash: str | None = None  # of a pretrained model that checkpoints hold a part of


def start_accelerator(config: Config) -> Accelerator:
    """Start Accelerate; ValueError when it is not what was launched, or cannot be used."""
    _refuse_unsupported()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said, so that several CPU processes are seen
        mixed_precision=MIXED[config.train.precision],
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
        keep_freed_memory()
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


def prepare(config: Config, folder: Path, accelerator: Accelerator, *, start: Path | None) -> Run:
    """Read the data, load or build the model, encode what the caches lack, wrap for training."""
    with accelerator.main_process_first():
        train_data, held_out = read_data(
            config.data,
            prompts=config.finetune.instance_prompts,
            trust_index=not accelerator.is_main_process,
        )
    trains_text = learns_text(config)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", to_yaml(config))
    base = None
    if config.model.pretrained:
        base = _adapted_base(config, folder, train_data, accelerator)
        components = base.components
        latents = cache_latents(train_data, components.vae, config.data, accelerator=accelerator)
    else:
        vae = load_vae_of(config)
        latents = cache_latents(train_data, vae, config.data, accelerator=accelerator)
        if config.model.measure_latents:
            fit_scaling(vae, latents)
        captions = train_data.each_caption()
        with accelerator.main_process_first():
            components = new_components(
                config, vae, captions=captions, tokenizer_dir=folder / "tokenizer"
            )
    supply = make_supply(
        config,
        train_data,
        held_out,
        components=components,
        latents=latents,
        learns_text=trains_text,
        accelerator=accelerator,
        prior=base.prior if base else None,
    )
    if config.train.keep_best and supply.triples is None:
        raise ValueError(
            "train.keep_best needs held-out pictures and there are none; set data.split_fraction"
        )
    layout = Layout.of(
        config.train.batch_size, config.train.micro_batch_size, accelerator.num_processes
    )
    engine = make_engine(config, components, supply, accelerator)
    is_main = accelerator.is_main_process
    first_step = validate_checkpoint(start)["step"] if start else 0
    log = MetricsLog(folder, is_main=is_main, first_step=first_step)
    return Run(
        config,
        folder,
        accelerator,
        components,
        supply,
        engine,
        layout,
        log,
        BackgroundSaver(),
        make_neighbours(config, supply, device=accelerator.device),
        base_hash=base.weights_hash if base else None,
    )


class _Base(NamedTuple):
    """A pretrained model, ready for what learns: its class pictures, and the weights it had."""

    components: Components
    prior: Folder | None
    weights_hash: str | None  # None where nothing of a run hangs on it


def _adapted_base(
    config: Config, folder: Path, train_data: Folder, accelerator: Accelerator
) -> _Base:
    """Load the model to fine-tune, let it draw class pictures, then add adapters or words to it."""
    finetune, learns = config.finetune, learns_text(config)
    components = pretrained_components(config)
    found = hash_of(components) if finetune.is_partial or finetune.class_prompt else None
    prior = None
    if found and finetune.class_prompt:
        prior = class_pictures(
            config, components, base_hash=found, run_folder=folder, accelerator=accelerator
        )
    if finetune.method == "textual_inversion":
        captions = settled_captions((train_data,), caption_edits(config.data))
        check_captions(captions, finetune.token)
    add_what_learns(components, finetune, learns_text=learns, seed=config.train.seed)
    return _Base(components, prior, found)


def make_engine(
    config: Config, components: Components, supply: Supply, accelerator: Accelerator
) -> Engine:
    """Freeze what does not learn, lay out the rest, and build the engine around it."""
    settings, diffusion = config.train, config.diffusion
    for part in (components.vae, components.text_encoder):
        part.requires_grad_(False).eval()
    components.text_encoder.to(accelerator.device)
    model = TextToImage(components, learns_text=learns_text(config))
    choose_what_learns(model.unet, model.text_encoder, config.finetune.method)
    model.train()
    if _is_channels_last(settings.channels_last, accelerator):
        components.unet.to(memory_format=torch.channels_last)
    cells = config.data.resolution // LatentCodec(components.vae).factor
    set_attention(
        components.unet, settings.attention, num_cells=cells**2, device=accelerator.device
    )
    if accelerator.device.type == "cpu" and settings.attention == "auto":
        take_large_steps(model)
    if settings.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
        if model.text_encoder is not None:
            # the reentrant form passes no gradient to words or adapters behind frozen inputs
            model.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    device = accelerator.device
    objective = Objective(
        schedule_of(components.scheduler).to(device, dtype=torch.float32),
        prediction_type=components.scheduler.config["prediction_type"],
        null_text=supply.null_text.to(device),
        weighting=diffusion.weighting,
        weighting_gamma=diffusion.weighting_gamma or None,
        huber_delta=diffusion.huber_delta if diffusion.loss == "huber" else None,
        timesteps=diffusion.timesteps,
        logit_normal=(diffusion.logit_normal_mean, diffusion.logit_normal_std),
        probabilities=_probabilities(config, components, device),
        offset_noise=diffusion.offset_noise,
        input_perturbation=diffusion.input_perturbation,
        learned_variance=diffusion.learned_variance,
        loss_aware=_loss_aware(config, components, device),
    )
    rates = RatePlan(
        base=settings.learning_rate,
        text_base=settings.text_learning_rate or settings.learning_rate,
        schedule=settings.lr_schedule,
        warmup_steps=settings.warmup_steps,
        max_steps=settings.max_steps,
    )
    return Engine(
        model.to(device),
        objective=objective,
        accelerator=accelerator,
        rates=rates,
        optimizer=settings.optimizer,
        weight_decay=settings.weight_decay,
        betas=(0.9, settings.beta2),
        max_grad_norm=settings.max_grad_norm,
        ema_decay=settings.ema_decay if settings.ema else None,
        power_ema=settings.power_ema,
        ema_device="cpu" if settings.ema_device == "cpu" else None,
        fp16=settings.precision == "fp16",
        seed=settings.seed,
    )


def _is_channels_last(wanted: bool | str, accelerator: Accelerator) -> bool:
    """Return whether the U-Net is laid out that way; "auto": where it is faster, as measured."""
    if wanted != "auto":
        return bool(wanted)
    if accelerator.distributed_type == DistributedType.FSDP:
        return False
    return accelerator.device.type != "cpu" or torch.cpu._is_amx_tile_supported()


def make_neighbours(
    config: Config, supply: Supply, *, device: torch.device | str
) -> Neighbours | None:
    """Return what finds the training pictures nearest to a sheet's; None where none is wanted."""
    if not config.preview.num_nearest:
        return None
    return Neighbours(
        supply.train,
        supply.held_out,
        plan_of=lambda folder: crop_plan(folder, still(config.data)),
        num=config.preview.num_nearest,
        features=config.preview.features,
        device=device,
    )


def _probabilities(
    config: Config, components: Components, device: torch.device
) -> torch.Tensor | None:
    """Return the p_t that timesteps are drawn by and weighed against; None where neither is so."""
    diffusion = config.diffusion
    if not diffusion.logit_normal_unbiased:
        return None
    return logit_normal_probabilities(
        components.scheduler.config["num_train_timesteps"],
        mean=diffusion.logit_normal_mean,
        std=diffusion.logit_normal_std,
    ).to(device)


def _loss_aware(
    config: Config, components: Components, device: torch.device
) -> LossAwareTimesteps | None:
    if config.diffusion.timesteps != "loss_aware":
        return None
    return LossAwareTimesteps(components.scheduler.config["num_train_timesteps"], device=device)
