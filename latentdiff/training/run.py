"""What a run is made of, put together: processes, data, model, engine, log.

Everything that can be wrong with the input is said here, before the first step.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from latentdiff.config import Config
from latentdiff.config_file import to_yaml
from latentdiff.latents import LatentCodec
from latentdiff.models import Components, schedule_of
from latentdiff.training.checkpoint import BackgroundSaver, validate_checkpoint
from latentdiff.training.components import (
    TextToImage,
    learns_text,
    load_vae_of,
    new_components,
    pretrained_components,
    use_plain_attention,
)
from latentdiff.training.engine import Engine, Objective, RatePlan
from latentdiff.training.log import MetricsLog
from latentdiff.training.samples import Layout
from latentdiff.training.supply import (
    Supply,
    cache_latents,
    fit_scaling,
    make_supply,
    read_data,
)

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


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


def start_accelerator(config: Config) -> Accelerator:
    """Start Accelerate; ValueError when it does not see the processes that were launched."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said, so that several CPU processes are seen
        mixed_precision=MIXED[config.train.precision],
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)] if backend else None,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched and Accelerate sees {accelerator.num_processes}, "
            f"as {accelerator.distributed_type}: they would train copies. On the CPU use "
            "torchrun --nproc_per_node N scripts/train_t2i.py"
        )
    return accelerator


def prepare(config: Config, folder: Path, accelerator: Accelerator, *, start: Path | None) -> Run:
    """Read the data, load or build the model, encode what the caches lack, wrap for training."""
    with accelerator.main_process_first():
        train_data, held_out = read_data(config.data, trust_index=not accelerator.is_main_process)
    trains_text = learns_text(config)
    if accelerator.is_main_process:
        _write(folder / "config.yaml", to_yaml(config))
    if config.model.pretrained:
        components = pretrained_components(config)
        latents = cache_latents(train_data, components.vae, config.data, accelerator=accelerator)
    else:
        vae = load_vae_of(config)
        latents = cache_latents(train_data, vae, config.data, accelerator=accelerator)
        if config.model.measure_latents:
            fit_scaling(vae, latents)
        captions = [caption for record in train_data for caption in record.captions]
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
    )
    layout = Layout.of(
        config.train.batch_size, config.train.micro_batch_size, accelerator.num_processes
    )
    engine = make_engine(config, components, supply, accelerator)
    is_main = accelerator.is_main_process
    first_step = validate_checkpoint(start)["step"] if start else 0
    log = MetricsLog(folder, is_main=is_main, first_step=first_step)
    return Run(
        config, folder, accelerator, components, supply, engine, layout, log, BackgroundSaver()
    )


def make_engine(
    config: Config, components: Components, supply: Supply, accelerator: Accelerator
) -> Engine:
    """Freeze what does not learn, lay out the rest, and build the engine around it."""
    settings, diffusion = config.train, config.diffusion
    for part in (components.vae, components.text_encoder):
        part.requires_grad_(False).eval()
    components.text_encoder.to(accelerator.device)
    model = TextToImage(components, learns_text=learns_text(config))
    model.requires_grad_(True).train()
    if settings.channels_last:
        components.unet.to(memory_format=torch.channels_last)
    if accelerator.device.type == "cpu":
        cells = config.data.resolution // LatentCodec(components.vae).factor
        use_plain_attention(components.unet, num_cells=cells**2)
    if settings.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
        if model.text_encoder is not None:
            model.text_encoder.gradient_checkpointing_enable()
    device = accelerator.device
    objective = Objective(
        schedule_of(components.scheduler).to(device, dtype=torch.float32),
        prediction_type=components.scheduler.config["prediction_type"],
        null_text=supply.null_text.to(device),
        weighting=diffusion.weighting,
        weighting_gamma=diffusion.weighting_gamma,
        timesteps=diffusion.timesteps,
        offset_noise=diffusion.offset_noise,
        batch_size=settings.batch_size,
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
        weight_decay=settings.weight_decay,
        betas=(0.9, settings.beta2),
        max_grad_norm=settings.max_grad_norm,
        ema_decay=settings.ema_decay if settings.ema else None,
        fp16=settings.precision == "fp16",
        seed=settings.seed,
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
