"""The plan of a run, logged before its first step: parameters, memory, steps, time.

plan.json keeps it for `latentdiff report`.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel

from latentdiff.atomic import write_text
from latentdiff.config.text_to_image import Config
from latentdiff.data.folder.companion_files import EXTENSIONS
from latentdiff.data.inspection.statistics import sample_rows, subfolder_counts
from latentdiff.data.inspection.text_report import (
    counted,
    samples_text,
    size_text,
    subfolders_text,
)
from latentdiff.models.compatibility import latent_factor, sample_size_px, size_in_reach
from latentdiff.models.components import Components
from latentdiff.pipeline.files.model_card import untrained_guidance
from latentdiff.training.inputs.randomness import RULE_BY_PLACE
from latentdiff.training.inputs.train_data import TrainData
from latentdiff.training.optim.memory import num_bytes
from latentdiff.training.run_folder import PLAN
from latentdiff.training.text_to_image.memory import PARTS, Memory, estimate_memory
from latentdiff.training.text_to_image.memory_modes import mode_notes
from latentdiff.training.text_to_image.setup import Run

logger = logging.getLogger(__name__)
NUM_EXAMPLES, NUM_STEPS_COUNTED = 5, 100  # in plan.json, of a problem; of the first epoch
UNUSED_IMAGES = (
    "by_product",
    *(f"{how}_{kind}" for kind in EXTENSIONS for how in ("unused", "stray", "second")),
    "unlisted",
)


def log_plan(run: Run, first_step: int) -> None:
    """Log the plan of a run, and write it to plan.json, on the main process."""
    memory = estimate_memory(run)
    if not run.accelerator.is_main_process:
        return
    _log_images(run)
    plan = {
        "data": _data_plan(run),
        "steps": _step_plan(run),
        "memory": asdict(memory),
        "parameters": count_parameters(run.components, run.controlnet),
        "device": _device_name(run),
    }
    write_text(run.folder / PLAN, json.dumps(plan, indent=1) + "\n")
    _log_steps(run, first_step)
    logger.info("parameters: %s", "; ".join(count_parameters(run.components, run.controlnet)))
    _log_null_prompt(run)
    _log_memory(memory, run)
    if run.train_step.posthoc_emas:
        num_snapshots = -(-run.config.train.max_steps // run.config.train.posthoc_ema_every_steps)
        num_snapshots *= len(run.train_step.posthoc_emas)
        size = size_text(num_snapshots * num_bytes(run.train_step.parameters.values()))
        logger.info("power_ema/ will hold %d snapshots, %s in all", num_snapshots, size)
    if run.accelerator.device.type != "cpu" and not run.config.data.num_workers:
        logger.warning("data.num_workers=0: the device waits while a batch is made; set 4 or more")
    _warn_of_half_the_chain(run)
    _warn_of_resolution(run)
    warn_of_dropout(run.config)
    _log_no_heldout(run)


def _data_plan(run: Run) -> dict[str, Any]:
    """Return the number of images by split and by sub-folder, and the folder's problems."""
    data = run.train_data
    counts = {"train": data.train, "held out": data.heldout, "of the class": data.class_images}
    problems = [
        {
            "severity": group.reason.severity,
            "title": group.reason.title,
            "count": group.count,
            "fix": group.reason.fix,
            "examples": [list(example) for example in group.examples[:NUM_EXAMPLES]],
        }
        for group in data.train.problems.values()
    ]
    return {
        "splits": {name: len(folder) for name, folder in counts.items() if folder is not None},
        "subfolders": subfolder_counts(data.train),
        "sources": _source_rows(data, [source.root for source in run.config.data.sources]),
        "problems": problems,
    }


def _source_rows(data: TrainData, roots: Sequence[str]) -> list[dict[str, Any]]:
    """Return the images of each of several sources, held out and not, and its samples an epoch."""
    draws, num = data.order.draws, len(roots)
    images, held = (
        np.bincount(one.sources, minlength=num).tolist() for one in (data.train, data.heldout)
    )
    samples = images if draws is None else [draws.source_counts.get(i, 0) for i in range(num)]
    return [
        {"root": root, "train": images[i], "held out": held[i], "samples_per_epoch": samples[i]}
        for i, root in enumerate(roots)
    ]


def _step_plan(run: Run) -> dict[str, float]:
    """Return the steps of a run and how the images of one are shared out."""
    order, layout = run.train_data.order, run.layout
    num_steps = min(order.steps_per_epoch, NUM_STEPS_COUNTED)
    return {
        "max_steps": run.config.train.max_steps,
        "steps_per_epoch": order.steps_per_epoch,
        "images_per_step": sum(map(order.count, range(num_steps))) / num_steps,
        "num_processes": layout.num_processes,
        "micro_batch_size": layout.micro_batch_size,
        "accumulation": layout.accumulation,
    }


def _device_name(run: Run) -> str:
    device = run.accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _warn_of_half_the_chain(run: Run) -> None:
    """Warn of a run with class images that was begun when the place in a step set the timestep."""
    stratified = run.config.diffusion.timestep_sampling == "stratified"
    is_by_place = run.strata_rule == RULE_BY_PLACE
    if stratified and is_by_place and run.train_data.class_images is not None:
        half = run.train_step.objective.schedule.num_timesteps // 2
        logger.warning(
            "an earlier version began this run, with timesteps below %d for the subject and from "
            "there on for its class, and it ends so; a new --output_dir trains both on all",
            half,
        )


def _warn_of_resolution(run: Run) -> None:
    """Warn of images far larger than those that the model to fine-tune was trained at."""
    side, vae = run.config.data.side_px, run.components.vae
    trained = sample_size_px(run.components.unet.config, factor=latent_factor(vae.config))
    if size_in_reach(side, side, trained=trained, multiple=1) is not None:
        logger.warning(
            "data.resolution=%d is far beyond the %d px that this model was trained at: each image "
            "costs %.0f times as much, and so small a model may never draw them; leave "
            "data.resolution out to train at %d px",
            *(side, min(trained), side**2 / (trained[0] * trained[1]), min(trained)),
        )


def warn_of_dropout(config: Config) -> None:
    """Warn of an instruct_pix2pix model that will not learn what its two guidances need."""
    if config.condition.kind != "instruct_pix2pix":
        return
    dropped = config.diffusion.caption_dropout, config.condition.dropout_share
    if untrained := untrained_guidance(*dropped):
        logger.warning("when this model is sampled: %s; 0.1 each trains both", untrained)


def _log_no_heldout(run: Run) -> None:
    """Log that there is no held-out loss; a warning where the config asks for held-out images."""
    if len(run.train_data.heldout):
        return
    if run.config.data.heldout_fraction:
        logger.warning("no image is held out, so no held-out loss; raise data.heldout_fraction")
    else:
        logger.info("all images are trained on (data.heldout_fraction=0): no held-out loss")


def count_parameters(
    components: Components, controlnet: ControlNetModel | None = None
) -> list[str]:
    """Describe for each part how many of its parameters are trained, and how many frozen."""
    lines = []
    modules = {label: getattr(components, name) for name, label in PARTS.items()}
    modules |= {} if controlnet is None else {"ControlNet": controlnet}
    for label, module in modules.items():
        if module is None:
            continue
        counts = {"trained": 0, "frozen": 0}
        for parameter in module.parameters():
            counts["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
        parts = [f"{_millions(num)} {state}" for state, num in counts.items() if num]
        lines.append(f"{label} {', '.join(parts)}")
    return lines


def _log_images(run: Run) -> None:
    """Log where the training images are, and which images of the folder are no records."""
    data, source_names = run.train_data, [source.root for source in run.config.data.sources]
    train, draws = data.train, data.order.draws
    root = Path(run.config.data.root).name if not source_names else ""
    counts = {
        root if name == "." and root else name: num for name, num in subfolder_counts(train).items()
    }
    logger.info("training images: %s", subfolders_text(counts))
    if draws is not None:
        rows = sample_rows(train, data.heldout, draws, source_names=source_names)
        logger.info("an epoch has %s samples: %s", f"{len(draws):,}", samples_text(rows))
    for key in UNUSED_IMAGES:
        if key in train.problems:
            logger.info("not trained on: %s", train.problems[key].line())


def _log_steps(run: Run, first_step: int) -> None:
    settings, layout = run.config.train, run.layout
    per_epoch = run.train_data.order.steps_per_epoch
    shares = ""  # of several processes or micro-batches
    if layout.num_processes > 1 or layout.accumulation > 1:
        processes = f"{layout.num_processes} process{'es' if layout.num_processes > 1 else ''}"
        shares = f"{processes} x {layout.micro_batch_size} x {layout.accumulation} accumulated"
    logger.info(
        "%s: %s training and %s held-out images of %d px, in %s on %s",
        run.folder,
        f"{len(run.train_data.train):,}",
        f"{len(run.train_data.heldout):,}",
        run.config.data.side_px,
        settings.mixed_precision,
        run.accelerator.device,
    )
    logger.info(
        "steps %d to %d, %d images a step%s, %s an epoch, "
        "%.1f epochs; %s, learning rate %.2g%s, %s after %d warm-up steps",
        first_step,
        settings.max_steps,
        settings.batch_size,
        f" ({shares})" if shares else "",
        counted(per_epoch, "step"),
        settings.max_steps / per_epoch,
        settings.optimizer,
        settings.learning_rate,
        " times its own estimate (prodigy_d)" if settings.optimizer == "prodigy" else "",
        settings.lr_schedule,
        settings.lr_warmup_steps,
    )


def _log_null_prompt(run: Run) -> None:
    """Log of an SDXL model, which may be sampled with either, what dropped captions become."""
    if run.components.text_encoder_2 is None:
        return
    zeros = run.components.force_zeros_for_empty_prompt
    logger.info(
        "%.0f %% of captions become the null prompt that this model is sampled with: %s "
        "(force_zeros_for_empty_prompt=%s in model_index.json, which the export keeps)",
        100 * run.config.diffusion.caption_dropout,
        "zeros" if zeros else "the encoded empty caption",
        str(zeros).lower(),
    )


def _log_memory(memory: Memory, run: Run) -> None:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimizer,
        "averages": memory.averages,
        "averages on the host": memory.host_averages,
        f"activations of {run.layout.micro_batch_size} at once": memory.activations,
    }
    known = [f"{name} {size_text(num)}" for name, num in parts.items() if num]
    unknown = "" if memory.activations is not None else "; activations not known"
    logger.info(
        "memory of a process, estimated: %s%s; on %s together %s, besides the kernels' own",
        ", ".join(known),
        unknown,
        run.accelerator.device,
        size_text(memory.on_device),
    )
    for note in mode_notes(run.config.train):
        logger.info("%s", note)
    if run.accelerator.device.type != "cuda":
        return
    available = torch.cuda.get_device_properties(run.accelerator.device).total_memory
    if memory.on_device > available:
        logger.warning(
            "that is more than the %s of this GPU: lower train.micro_batch_size, or set "
            "train.gradient_checkpointing=true, train.ema_device=cpu, train.optimizer=adafactor or "
            "train.fused_backward_pass=true",
            size_text(available),
        )


def _millions(num: int) -> str:
    return f"{num / 1e6:.1f} M" if num >= 1e5 else f"{num:,}"
