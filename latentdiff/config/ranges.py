"""Ranges of the settings, and which of them exclude each other."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.config.finetune import FinetuneConfig
    from latentdiff.config.text_to_image import Config, DataConfig, TrainConfig

AT_LEAST = {
    "data.resolution": 8,
    "data.bucket_multiple": 1,
    "data.bucket_max_aspect": 1,
    "data.num_crops": 0,
    "data.keep_tags": 0,
    "data.min_size": 1,
    "data.max_aspect": 1,
    "data.num_workers": 0,
    "model.unet.layers_per_block": 1,
    "model.unet.head_dim": 1,
    "model.text.width": 1,
    "model.text.num_layers": 1,
    "model.text.num_heads": 1,
    "model.text.vocab_size": 514,
    "model.text.max_tokens": 3,
    "finetune.lora_rank": 1,
    "finetune.lora_alpha": 0,
    "finetune.num_vectors": 1,
    "finetune.num_class_images": 1,
    "finetune.class_num_steps": 1,
    "finetune.class_guidance_scale": 0,
    "finetune.prior_loss_weight": 0,
    "diffusion.num_timesteps": 2,
    "diffusion.snr_gamma": 0,
    "diffusion.offset_noise": 0,
    "diffusion.input_perturbation": 0,
    "train.max_steps": 1,
    "train.batch_size": 1,
    "train.micro_batch_size": 0,
    "train.learning_rate": 0,
    "train.text_learning_rate": 0,
    "train.lr_warmup_steps": 0,
    "train.weight_decay": 0,
    "train.max_grad_norm": 0,
    "train.seed": 0,
    "train.log_every_steps": 1,
    "train.checkpoint_every_steps": 1,
    "train.posthoc_ema_every_steps": 1,
    "train.keep_checkpoints": 1,
    "train.keep_every_steps": 0,
    "train.max_skipped_steps": 1,
    "preview.every_steps": 0,
    "preview.num_steps": 1,
    "preview.guidance_scale": 0,
    "eval.every_steps": 0,
    "eval.num_heldout": 1,
    "preview.num_nearest": 0,
}
SHARES = (
    "data.heldout_fraction",
    "data.tag_dropout",
    "data.max_invalid_fraction",
    "model.unet.dropout",
    "finetune.lora_dropout",
    "diffusion.caption_dropout",
    "train.ema_decay",
    "train.beta2",
)


def check(config: "Config", settings: Mapping[str, Any]) -> None:
    """Raise ValueError for the first setting out of range. settings: all, by dotted name."""
    for name, least in AT_LEAST.items():
        value = settings[name]
        if not least <= value < float("inf"):
            raise ValueError(f"{name}={value}, expected a number of at least {least}")
    for name in SHARES:
        if not 0.0 <= settings[name] <= 1.0:
            raise ValueError(f"{name}={settings[name]}, expected a share in [0, 1]")
    for name in ("train.ema_decay", "train.beta2", "data.tag_dropout", "finetune.lora_dropout"):
        if settings[name] >= 1:
            raise ValueError(f"{name}={settings[name]}, expected a number below 1")
    for name in ("diffusion.huber_delta", "diffusion.logit_normal_std"):
        if not 0 < settings[name] < float("inf"):
            raise ValueError(f"{name}={settings[name]}, expected a number above 0")
    _check_data(config.data)
    _check_objective(config)
    _check_averages(config.train)
    _check_finetune(config, config.finetune)
    unet = config.model.unet
    if len(unet.block_out_channels) != len(unet.attention_levels):
        raise ValueError(
            f"model.unet.attention_levels has {len(unet.attention_levels)} entries, expected one "
            f"for each of the {len(unet.block_out_channels)} model.unet.block_out_channels"
        )
    if config.model.pretrained and (config.model.vae or config.model.text_encoder):
        raise ValueError(
            "model.pretrained brings its own VAE and text encoder; leave model.vae and "
            "model.text_encoder empty, or model.pretrained for training from scratch"
        )


def _check_finetune(config: "Config", finetune: "FinetuneConfig") -> None:
    method = finetune.method
    if method != "full" and not config.model.pretrained:
        raise ValueError(
            f"finetune.method={method} needs a model that is trained already; set "
            "model.pretrained, or leave finetune.method=full for training from scratch"
        )
    if method in ("lora", "textual_inversion") and config.train.posthoc_ema_sigma_rel:
        raise ValueError(
            f"train.posthoc_ema_sigma_rel needs whole weights, which finetune.method={method} does "
            "not train; leave train.posthoc_ema_sigma_rel empty (train.ema averages these too)"
        )
    if method != "full" and config.diffusion.learned_variance:
        raise ValueError("diffusion.learned_variance needs finetune.method=full")
    if method == "lora" and not finetune.lora_targets:
        raise ValueError('finetune.lora_targets is empty, expected names such as ["to_q", "to_v"]')
    if method == "textual_inversion":
        _check_word(config, finetune)
    if finetune.class_prompt and not config.model.pretrained:
        raise ValueError("finetune.class_prompt needs model.pretrained, which draws its images")
    if finetune.class_prompt and config.data.buckets:
        raise ValueError(
            "finetune.class_prompt gives square images, which share their batches with the "
            "subject's; set data.buckets=false"
        )
    if finetune.class_prompt and config.train.batch_size < 2:
        raise ValueError(
            f"train.batch_size={config.train.batch_size} holds no class image beside one of the "
            "subject, as finetune.class_prompt asks; set train.batch_size=2 or more"
        )


def _check_word(config: "Config", finetune: "FinetuneConfig") -> None:
    token = finetune.token
    inside = token[1:-1]
    is_word = token[:1] == "<" and token[-1:] == ">" and inside.replace("-", "").isalnum()
    if not is_word or token != token.lower():
        raise ValueError(
            f"finetune.token={token!r}, expected a new word in angle brackets of small letters, "
            'digits and hyphens, such as "<my-dog>"'
        )
    if not finetune.initializer_token.strip():
        raise ValueError(
            "finetune.initializer_token is empty, expected a known word to start from, such as "
            '"dog"'
        )
    if config.train.train_text_encoder:
        raise ValueError(
            "finetune.method=textual_inversion trains new words alone; leave "
            "train.train_text_encoder=false, or choose another method"
        )


def _check_data(data: "DataConfig") -> None:
    if data.buckets and data.resolution % data.bucket_multiple:
        raise ValueError(
            f"data.resolution={data.resolution} is not a multiple of data.bucket_multiple="
            f"{data.bucket_multiple}; the latter is the VAE's factor times the U-Net's, or a "
            "multiple of it"
        )
    if data.cache and data.num_crops == 0:
        raise ValueError(
            "data.num_crops=0 cuts at a new place each time, which cannot be cached: add "
            "--data.cache=false, or give a number of places"
        )


def _check_objective(config: "Config") -> None:
    diffusion = config.diffusion
    if not abs(diffusion.logit_normal_mean) < float("inf"):
        raise ValueError(
            f"diffusion.logit_normal_mean={diffusion.logit_normal_mean}, expected a finite number"
        )
    if diffusion.logit_normal_unbiased and diffusion.timestep_sampling != "logit_normal":
        raise ValueError(
            "diffusion.logit_normal_unbiased weighs the draws of "
            "diffusion.timestep_sampling=logit_normal, got "
            f"{diffusion.timestep_sampling!r}; leave it out, or set that"
        )
    if config.data.mask != "none" and config.finetune.class_prompt:
        raise ValueError(
            f"data.mask={config.data.mask} and finetune.class_prompt exclude each other: the "
            "images drawn for the class have no masks"
        )
    others = {"data.mask": config.data.mask != "none"}
    others["diffusion.input_perturbation"] = diffusion.input_perturbation > 0
    for name, is_on in others.items() if diffusion.learned_variance else ():
        if is_on:
            raise ValueError(
                f"diffusion.learned_variance trains on the bound, which has no {name}: leave out "
                "one of them"
            )


def _check_averages(train: "TrainConfig") -> None:
    widths = train.posthoc_ema_sigma_rel
    if odd := [width for width in widths if not 0 < width <= 0.28]:
        raise ValueError(
            f"train.posthoc_ema_sigma_rel holds {odd[0]}, expected widths, shares of the training "
            "in (0, 0.28], such as [0.05, 0.1]"
        )
    if len({f"{width:g}" for width in widths}) < len(widths):
        raise ValueError(f"train.posthoc_ema_sigma_rel={list(widths)} names a width twice")
    if train.export == "best" and not train.keep_best:
        raise ValueError("train.export=best needs the best checkpoint: set train.keep_best=true")
