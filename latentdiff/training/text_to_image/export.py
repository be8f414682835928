"""The export: pipeline/, with EMA weights, in Stable Diffusion's format, and what learned alone."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ControlNetModel, DDPMScheduler
from torch import Tensor

from latentdiff.atomic import atomic_folder, write_text
from latentdiff.data.image_tables.hub_dataset import public_dataset_name
from latentdiff.models.compatibility import TEXT_ENCODERS
from latentdiff.models.components import Components, carry_tiny_vae, load_components
from latentdiff.models.model_path import resolve_model
from latentdiff.models.text import clip_skip_of
from latentdiff.models.unet.learned_variance import has_learned_variance, without_variance
from latentdiff.pipeline.files.file_metadata import tag_counts
from latentdiff.pipeline.files.model_card import folder_title, model_card
from latentdiff.pipeline.files.model_info import (
    BILL_NAME,
    ModelInfo,
    read_model_info,
    write_model_info,
)
from latentdiff.pipeline.files.prediction_marks import flow_shift_of
from latentdiff.pipeline.schedulers import make_scheduler
from latentdiff.training.bill.materials import Materials
from latentdiff.training.checkpoint import best_step, load_checkpoint
from latentdiff.training.finetune.methods import LoraFacts, merged_components, save_adapters
from latentdiff.training.finetune.textual_inversion import FILE_NAME
from latentdiff.training.fsdp import is_sharded
from latentdiff.training.metrics_file import read_rows
from latentdiff.training.optim.optimizer import evaluated_weights
from latentdiff.training.optim.posthoc_ema import gamma_of, read_snapshots, reconstruct
from latentdiff.training.text_to_image.model import TextToImage
from latentdiff.training.text_to_image.preview import make_pipeline
from latentdiff.training.text_to_image.setup import Run
from latentdiff.training.text_to_image.train_step import TrainStep

logger = logging.getLogger(__name__)
HELDOUT_METRICS = ("heldout_loss", "heldout_se", "caption_use", "condition_use")
MAX_COUNTED = 100_000  # images whose captions' tags are counted
WITH_VARIANCE = "_learned_variance"  # ends the name of the second folder


def export(run: Run, heldout: Mapping[int, float], *, example_prompts: Sequence[str] = ()) -> None:
    """Write pipeline/ from the run's last state, or from its best one as train.export says; or the
    controlnet/ that was trained.

    heldout: losses by step. example_prompts: for the model card. Where no process has the whole
    weights nothing is written.
    """
    if is_sharded(run.train_step.parameters):
        if run.accelerator.is_main_process:
            logger.warning(
                "the weights are sharded over processes; the same command in one process, without "
                "FSDP, writes %s from the last checkpoint",
                run.folder / "pipeline",
            )
        return
    if run.accelerator.is_main_process:
        wants_best = run.config.train.export == "best"
        step = _load_best(run, heldout) if wants_best else run.config.train.max_steps
        with averaged(run.train_step):
            run.components.unet.to(memory_format=torch.contiguous_format)
            facts = replace(_facts(run, step), example_prompts=tuple(example_prompts))
            settings = run.config.finetune
            if run.controlnet is not None:
                final = run.folder / "controlnet"
                _write_controlnet(run.controlnet, final, facts=facts, materials=run.materials)
            else:
                (run.folder / "lora" / BILL_NAME).unlink(missing_ok=True)  # of an earlier export
                save_adapters(run.components, settings, run.folder, facts=_lora_facts(run, facts))
                _attach_to_adapters(run)
                plain = merged_components(run.components, settings.method)
                _write_both(
                    plain,
                    run.folder / "pipeline",
                    facts=facts,
                    base=run.config.model.pretrained,
                    materials=run.materials,
                )
    run.accelerator.wait_for_everyone()


def export_reconstructed(
    run_folder: Path, out: Path, *, width: float, step: int | None = None
) -> None:
    """Write to `out` the run's model with the average of any width (posthoc_ema.reconstruct).

    width: sigma_rel; step: one of the snapshots', by default the last. The run must have ended, as
    everything but the weights comes from its pipeline/. ValueError or FileNotFoundError for what
    cannot be rebuilt from the run's snapshots.
    """
    for folder in (out, out.with_name(out.name + WITH_VARIANCE)):
        if folder.exists():
            raise ValueError(f"{folder} already exists, expected the name of a new folder")
    if not (run_folder / "pipeline").is_dir():
        raise FileNotFoundError(
            f"{run_folder / 'pipeline'} does not exist, expected a run that has come to its end"
        )
    snapshots = read_snapshots(run_folder)
    weights = reconstruct(snapshots, gamma=gamma_of(width), step=step)
    source = run_folder / f"pipeline{WITH_VARIANCE}"
    components = load_components(source if source.is_dir() else run_folder / "pipeline")
    _take_weights(components, weights)
    step = step or max(snapshot.step for snapshot in snapshots)
    facts = replace(read_model_info(run_folder / "pipeline"), steps=step, metrics={})
    _write_both(components, out, facts=facts, base=run_folder)


def averaged(train_step: TrainStep) -> AbstractContextManager[None]:
    """Give the model its averaged weights inside the block: an EMA's or the optimiser's, if any."""
    if train_step.ema is None:
        return evaluated_weights(train_step.optimizer)
    return train_step.ema.swap_weights(train_step.model)


def _load_best(run: Run, heldout: Mapping[int, float]) -> int:
    """Load the kept checkpoint with the minimum held-out loss; return its step."""
    root = run.folder / "checkpoints"
    kept = {step: root / f"step-{step:09d}" for step in heldout}
    best = best_step({step: heldout[step] for step, path in kept.items() if path.is_dir()})
    if best is None:
        raise ValueError(
            f"train.export=best, and {root} holds no checkpoint with a held-out loss; "
            "--train.export=last exports the last state"
        )
    checkpoint = load_checkpoint(kept[best])
    run.train_step.load(checkpoint.tensors, checkpoint.state)
    return best


@torch.no_grad()
def _take_weights(components: Components, weights: dict[str, Tensor]) -> None:
    """Put weights, named as in training, in the place of a model's own."""
    first, second = (any(name.startswith(f"{part}.") for name in weights) for part in TEXT_ENCODERS)
    model = TextToImage(components, trains_text_encoder=first, trains_text_encoder_2=second)
    own = dict(model.named_parameters())
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(
                f"the snapshots hold {name} of shape {tuple(tensor.shape)}, and pipeline/ has no "
                "such weight: they are of another model"
            )
        own[name].copy_(tensor)


def _attach_to_adapters(run: Run) -> None:
    """Write the bill of materials into the files of what was trained alone."""
    if run.materials is None:
        return
    if run.config.finetune.method == "lora":
        run.materials.attach_to_folder(run.folder / "lora", artifact="lora")
        if run.config.finetune.lora_kohya:
            run.materials.attach_to_file(run.folder / "lora_kohya.safetensors")
    if run.config.finetune.method == "textual_inversion":
        run.materials.attach_to_file(run.folder / FILE_NAME)


def _write_both(
    components: Components,
    final: Path,
    *,
    facts: ModelInfo,
    base: str | Path,
    materials: Materials | None = None,
) -> None:
    """Write a model; one that learned its variance whole to a second folder, and cut to this.

    base: a model of the same VAE, whose tiny one is carried along. materials: for the bill.
    """
    if has_learned_variance(components):
        whole = for_ancestral_sampling(components)
        second = final.with_name(final.name + WITH_VARIANCE)
        _write(whole, second, facts=facts, base=base, materials=materials)
        components = for_any_scheduler(without_variance(components))
    _write(components, final, facts=facts, base=base, materials=materials)


def for_ancestral_sampling(components: Components) -> Components:
    """Return the model with the DDPMScheduler that uses its learned variance."""
    ddpm = make_scheduler("ddpm", trained=components.scheduler)
    scheduler = DDPMScheduler.from_config(ddpm.config, variance_type="learned_range")
    return replace(components, scheduler=scheduler)


def for_any_scheduler(components: Components) -> Components:
    """Return a model without variance channels with DDIM for a scheduler of a learned variance."""
    scheduler = components.scheduler
    if not str(scheduler.config.get("variance_type")).startswith("learned"):
        return components
    return replace(components, scheduler=make_scheduler("ddim", trained=scheduler))


def _write(
    components: Components,
    final: Path,
    *,
    facts: ModelInfo,
    base: str | Path,
    materials: Materials | None,
) -> None:
    """Write a folder as a whole, in place of an older one."""
    final.parent.mkdir(parents=True, exist_ok=True)
    pipeline = make_pipeline(components)
    pipeline.model_info = facts
    with atomic_folder(final) as temporary:
        name, stock = folder_title(final), pipeline.stock_class_name
        write_text(temporary / "README.md", model_card(facts, name=name, stock=stock))
        pipeline.save_pretrained(temporary)
        carry_tiny_vae(base, temporary)
        if materials is not None:
            root = materials.attach_to_folder(temporary, artifact=final.name)
            card = model_card(facts, name=name, stock=stock, bill_root=root)
            write_text(temporary / "README.md", card)


def _write_controlnet(
    controlnet: ControlNetModel, final: Path, *, facts: ModelInfo, materials: Materials | None
) -> None:
    """Write a ControlNet's folder for diffusers, in place of an older one."""
    controlnet.to(memory_format=torch.contiguous_format)
    with atomic_folder(final) as temporary:
        controlnet.save_pretrained(temporary)
        write_model_info(temporary, facts)
        if materials is not None:
            materials.attach_to_folder(temporary, artifact=final.name)


def _lora_facts(run: Run, info: ModelInfo) -> LoraFacts:
    """Return what the files of a LoRA tell of its training."""
    config, train = run.config, run.train_data.train
    training: dict[str, object] = {
        "num_train_images": len(train),
        "max_train_steps": config.train.max_steps,
        "learning_rate": config.train.learning_rate,
        "total_batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "network_dropout": config.finetune.lora_dropout,
    }
    captions = train.captions.slice(0, MAX_COUNTED).flatten().to_pylist()
    return LoraFacts(
        info,
        run.folder.resolve().name,
        trigger_word=config.data.trigger_word or ", ".join(config.finetune.instance_prompts),
        training=training,
        tags=tag_counts(captions) if config.finetune.method == "lora" else {},
    )


def _facts(run: Run, step: int) -> ModelInfo:
    """Return what is known of the state of a step."""
    config, distill = run.config, run.config.distill
    last: dict[str, float] = {}
    for row in read_rows(run.folder):
        last |= row if row["step"] <= step else {}
    metrics = {name: last[name] for name in HELDOUT_METRICS if name in last}
    if metrics and (triples := run.train_data.heldout_triples) is not None:
        metrics["num_heldout_images"] = min(len(triples), len(run.train_data.heldout))
        metrics["num_heldout_draws"] = len(triples)  # of a timestep and noise for one of them
    base = (
        read_model_info(resolve_model(config.model.pretrained))
        if config.model.pretrained
        else ModelInfo()
    )
    return ModelInfo(
        caption_dropout=config.diffusion.caption_dropout,
        base_caption_dropout=base.null_caption_dropout,
        prediction_type=run.train_step.objective.prediction_type,
        flow_shift=flow_shift_of(run.components.scheduler.config),
        base_model=config.model.pretrained or None,
        dataset=", ".join(public_dataset_name(data.root) for data in config.data.each_source()),
        steps=step,
        batch_size=config.train.batch_size,
        resolution=config.data.side_px,
        guidance_scale=base.guidance_scale,
        num_inference_steps=distill.num_steps if distill.is_on else None,
        guidance_range=(distill.min_guidance, distill.max_guidance) if distill.is_on else (),
        is_guided=distill.method == "lcm_lora" or None,
        clip_skip=clip_skip_of(run.components.text_encoder) or None,
        condition_kind=config.condition_kind if config.condition_kind != "none" else None,
        condition_dropout=config.condition.dropout_share if config.condition.is_on else None,
        max_noise_level=(
            config.condition.max_noise_level if config.condition.kind == "upscale" else None
        ),
        metrics=metrics,
    )
