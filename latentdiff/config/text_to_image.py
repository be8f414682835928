"""The settings of a text-to-image run, its sections together, and the checks that cross them.

Only commands and the top of a recipe see these objects; below them go plain values. Counts are of
optimiser steps and of images per optimiser step, so no figure depends on the number of GPUs. io.py
reads and writes them.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from latentdiff.config.data import DataConfig
from latentdiff.config.diffusion import DiffusionConfig
from latentdiff.config.finetune import DistillConfig, FinetuneConfig, check_distillation
from latentdiff.config.model import ConditionConfig, ConditionFiles, ModelConfig
from latentdiff.config.train import EvalConfig, PreviewConfig, TrainConfig
from latentdiff.config.validation import EffectRule, check_effect, check_ranges, folder

MIN_SAMPLES = 4  # generated at an evaluation, for an interval
MIN_EVALUATIONS = 4  # before a run may end by them
EFFECT_RULES = (
    EffectRule(
        (
            *("diffusion.num_timesteps", "diffusion.beta_schedule", "diffusion.beta_start"),
            "diffusion.beta_end",
        ),
        lambda config: not config.model.pretrained,
        "it is for training from scratch, and model.pretrained brings its own schedule",
    ),
    EffectRule(
        (
            *("diffusion.beta_schedule", "diffusion.beta_start", "diffusion.beta_end"),
            "diffusion.zero_terminal_snr",
        ),
        lambda config: config.diffusion.prediction_type != "flow_prediction",
        "rectified flow has no betas, and its last step is pure noise",
    ),
    EffectRule(
        ("diffusion.beta_start", "diffusion.beta_end"),
        lambda config: config.diffusion.beta_schedule not in ("cosine", "squaredcos_cap_v2"),
        "the cosine schedule has no part for it",
    ),
    EffectRule(
        ("diffusion.logit_normal_mean", "diffusion.logit_normal_std"),
        lambda config: config.diffusion.timestep_sampling == "logit_normal",
        "it is for diffusion.timestep_sampling=logit_normal",
    ),
    EffectRule(
        ("diffusion.snr_gamma",),
        lambda config: config.diffusion.loss_weighting != "none",
        "it is for a diffusion.loss_weighting, and there is none",
    ),
    EffectRule(
        ("diffusion.huber_delta",),
        lambda config: config.diffusion.loss == "huber",
        "it is for diffusion.loss=huber",
    ),
    EffectRule(
        (
            *("finetune.token", "finetune.initializer_token", "finetune.num_vectors"),
            "finetune.init_embedding",
        ),
        lambda config: config.finetune.method == "textual_inversion",
        "it is for finetune.method=textual_inversion",
    ),
    EffectRule(
        (
            *("finetune.lora_rank", "finetune.lora_alpha", "finetune.lora_dropout"),
            *("finetune.lora_targets", "finetune.lora_kohya", "finetune.init_lora"),
            "finetune.adapter_type",
        ),
        lambda config: config.finetune.method == "lora",
        "it is for finetune.method=lora",
    ),
    EffectRule(
        ("finetune.lora_dropout",),
        lambda config: config.finetune.adapter_type != "lokr",
        "lokr has no dropout",
    ),
    EffectRule(
        ("finetune.lokr_factor",),
        lambda config: config.finetune.adapter_type == "lokr",
        "it is for finetune.adapter_type=lokr",
    ),
    EffectRule(
        (
            *("finetune.num_class_images", "finetune.class_images_dir", "finetune.class_num_steps"),
            *("finetune.class_guidance_scale", "finetune.prior_loss_weight"),
        ),
        lambda config: bool(config.finetune.class_prompt),
        "it is for the images of finetune.class_prompt, which is empty",
    ),
    EffectRule(
        ("condition.source", "condition.max_noise_level"),
        lambda config: config.condition.kind == "upscale",
        "it is for condition.kind=upscale",
    ),
    EffectRule(
        ("condition.degradations",),
        lambda config: config.condition.kind == "upscale" and config.condition.source == "image",
        "it is for condition.kind=upscale with condition.source=image",
    ),
    EffectRule(
        ("condition.masks", "condition.whole_masks"),
        lambda config: config.condition.kind == "inpaint",
        "it is for condition.kind=inpaint",
    ),
    EffectRule(
        ("condition.dropout",),
        lambda config: config.condition.kind == "instruct_pix2pix",
        "it is for condition.kind=instruct_pix2pix",
    ),
    EffectRule(
        ("data.condition_column",),
        lambda config: config.finetune.method == "controlnet" or config.condition.files != "none",
        "it is for the files of a condition.kind or a ControlNet, and none are read",
    ),
    EffectRule(
        ("data.inpaint_mask_column",),
        lambda config: config.condition.reads_mask_files,
        "it is for condition.kind=inpaint with condition.masks=file",
    ),
    EffectRule(
        ("data.num_canaries",),
        lambda config: (
            not config.finetune.instance_prompts
            and config.finetune.method not in ("textual_inversion", "controlnet")
            and config.condition.kind == "none"
            and config.data.mask != "file"
        ),
        "canaries have captions of their own and no mask or condition",
    ),
    EffectRule(
        ("train.text_learning_rate",),
        lambda config: (
            config.train.train_text_encoder
            or config.train.train_text_encoder_2
            or config.finetune.method == "textual_inversion"
            or not (config.model.pretrained or config.model.text_encoder)
        ),
        "the text encoder is not trained; train.train_text_encoder=true trains it",
    ),
    EffectRule(
        ("train.beta2",),
        lambda config: config.train.optimizer != "lion",
        "lion has no second moment",
    ),
    EffectRule(
        ("train.beta2",),
        lambda config: config.train.optimizer != "adafactor",
        "adafactor has a decay of its own",
    ),
    EffectRule(
        ("train.frozen_dtype",),
        lambda config: config.finetune.is_partial,
        "finetune.method=full leaves nothing frozen in the U-Net",
    ),
    EffectRule(
        ("distill.num_steps", "distill.min_guidance", "distill.max_guidance"),
        lambda config: config.distill.is_on,
        "it is for a distill.method, and there is none",
    ),
    EffectRule(
        ("distill.guidance_weighting", "distill.guidance_lr_factor"),
        lambda config: config.distill.method in ("guided", "progressive"),
        "it is for a student that reads the guidance scale: distill.method=guided or progressive",
    ),
    EffectRule(
        ("eval.unrelated_prompts",),
        lambda config: config.eval.num_samples > 0,
        "it goes with the images of eval.num_samples, which is 0",
    ),
    EffectRule(
        ("train.posthoc_ema_every_steps",),
        lambda config: bool(config.train.posthoc_ema_sigma_rel),
        "it is for the averages of train.posthoc_ema_sigma_rel, and there are none",
    ),
)


@dataclass(frozen=True)
class Config:
    """A whole text-to-image run."""

    effect_rules: ClassVar[tuple[EffectRule, ...]] = EFFECT_RULES

    output_dir: str = folder(default="runs/new")
    """the run's folder: its settings, log, checkpoints, samples and exported model; the same
    command continues the run in it"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def condition_kind(self) -> str:
        """The kind of image that a run reads: condition.kind, or "controlnet"; or "none"."""
        return "controlnet" if self.finetune.method == "controlnet" else self.condition.kind

    @property
    def condition_files(self) -> ConditionFiles:
        """How a run's condition files must fit their images; "none" where none is read."""
        return "aspect" if self.condition_kind == "controlnet" else self.condition.files

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range, naming the setting and the allowed values."""
        check_ranges(self)
        self.data.check()
        self.model.check()
        self.diffusion.check()
        self.train.check()
        self.finetune.check()
        self.condition.check()
        if not self.model.pretrained and self.preview.num_steps > self.diffusion.num_timesteps:
            raise ValueError(
                f"preview.num_steps={self.preview.num_steps}, expected at most "
                f"diffusion.num_timesteps={self.diffusion.num_timesteps}"
            )
        _check_method(self)
        _check_class_images(self)
        _check_learned_variance(self)
        _check_condition(self)
        _check_zero_weight(self)
        check_distillation(self)
        _check_stop(self)
        check_effect(self)


def _check_method(config: Config) -> None:
    method = config.finetune.method
    if config.finetune.is_partial and not config.model.pretrained:
        raise ValueError(
            f"finetune.method={method} needs a model that is trained already; set "
            "model.pretrained, or leave finetune.method=full for training from scratch"
        )
    if method in ("lora", "textual_inversion", "controlnet") and config.train.posthoc_ema_sigma_rel:
        raise ValueError(
            f"train.posthoc_ema_sigma_rel needs whole weights, which finetune.method={method} does "
            "not train; leave train.posthoc_ema_sigma_rel empty (train.ema averages these too)"
        )
    trains_text = config.train.train_text_encoder or config.train.train_text_encoder_2
    if config.finetune.adapter_type == "lokr" and trains_text:
        raise ValueError(
            "finetune.adapter_type=lokr adapts the U-Net alone, as diffusers reads it: set "
            "train.train_text_encoder=false, or finetune.adapter_type=lora or dora"
        )
    if method == "controlnet" and trains_text:
        raise ValueError(
            "finetune.method=controlnet trains the ControlNet alone; leave "
            "train.train_text_encoder=false, or choose another method"
        )
    if config.train.train_text_encoder_2 and not config.model.pretrained:
        raise ValueError(
            "train.train_text_encoder_2 is for an SDXL model in model.pretrained, which is empty"
        )
    if method == "textual_inversion" and trains_text:
        raise ValueError(
            "finetune.method=textual_inversion trains new words alone; leave "
            "train.train_text_encoder=false, or choose another method"
        )


def _check_class_images(config: Config) -> None:
    if not config.finetune.class_prompt:
        return
    if not config.model.pretrained:
        raise ValueError("finetune.class_prompt needs model.pretrained, which generates its images")
    if config.data.buckets:
        raise ValueError(
            "finetune.class_prompt gives square images, which share their batches with the "
            "subject's; set data.buckets=false"
        )
    if config.train.batch_size < 2:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} holds no class image next to one of the "
            "subject, as finetune.class_prompt asks; set train.batch_size=2 or more"
        )
    if config.data.mask != "none":
        raise ValueError(
            f"data.mask={config.data.mask} and finetune.class_prompt exclude each other: the "
            "images generated for the class have no masks"
        )


def _check_learned_variance(config: Config) -> None:
    if not config.diffusion.learned_variance:
        return
    if config.finetune.is_partial:
        raise ValueError("diffusion.learned_variance needs finetune.method=full")
    if config.diffusion.prediction_type == "flow_prediction":
        raise ValueError(
            "diffusion.learned_variance is sampled by DDPM, which cannot sample "
            "diffusion.prediction_type=flow_prediction: leave out one of them"
        )
    others = {
        "data.mask": config.data.mask != "none",
        "diffusion.input_perturbation": config.diffusion.input_perturbation > 0,
    }
    for name, is_on in others.items():
        if is_on:
            raise ValueError(
                f"diffusion.learned_variance trains on the bound, which has no {name}: leave out "
                "one of them"
            )


def _check_stop(config: Config) -> None:
    samples, unrelated = config.eval.num_samples, len(config.eval.unrelated_prompts)
    if samples and not config.preview.features:
        raise ValueError(
            f"eval.num_samples={samples} compares images by the features of a network: set "
            "preview.features to the folder of one, such as a CLIP"
        )
    if 0 < samples < MIN_SAMPLES or unrelated == 1:
        raise ValueError(
            f"eval.num_samples={samples} and {unrelated} of eval.unrelated_prompts, expected 0 or "
            f"at least {MIN_SAMPLES} samples, and none or at least 2 prompts, for an interval"
        )
    every, steps = config.eval.every_steps, config.train.max_steps
    if config.train.stop == "never" or config.train.max_epochs:  # which become max_steps first
        return
    if not every or steps // every < MIN_EVALUATIONS:
        raise ValueError(
            f"train.stop=auto compares evaluations, and eval.every_steps={every} gives "
            f"{steps // every if every else 1} in train.max_steps={steps}, expected at least "
            f"{MIN_EVALUATIONS}: set eval.every_steps={max(1, steps // 12)}, for 12"
        )


def _check_condition(config: Config) -> None:
    if config.condition_kind == "none":
        return
    name_of = {"controlnet": "finetune.method=controlnet"}
    what = name_of.get(config.condition_kind, f"condition.kind={config.condition.kind}")
    others = {
        "condition.kind": what in name_of.values() and config.condition.is_on,
        "finetune.class_prompt": bool(config.finetune.class_prompt),
        "diffusion.learned_variance": config.diffusion.learned_variance,
        "distill.method": config.distill.is_on,
    }
    for name, is_on in others.items():
        if is_on:
            raise ValueError(f"{what} and {name} exclude each other: leave out one of them")


def _check_zero_weight(config: Config) -> None:
    """Raise ValueError where an image whose loss weighs 0 would change the weights all the same."""
    if not config.data.zero_weight_images:
        return
    reasons = {
        "diffusion.timestep_sampling=loss_aware": (
            config.diffusion.timestep_sampling == "loss_aware",
            "draws the timesteps of all images by the losses of each",
        ),
        f"distill.method={config.distill.method}": (
            config.distill.is_on,
            "learns from a teacher that was trained on the image: name it in the teacher's run",
        ),
        "train.stop=auto": (
            config.train.stop == "auto",
            "ends each run by its own evaluations, so that twins have other steps: train the run "
            "with train.stop=never",
        ),
    }
    for name, (is_on, why) in reasons.items():
        if is_on:
            raise ValueError(
                f"data.zero_weight_images leaves nothing of an image, and {name} {why}"
            )
