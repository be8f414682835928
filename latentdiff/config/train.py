"""Settings of the training loop: optimisation, checkpoints, samples, held-out loss."""

from dataclasses import dataclass
from typing import Literal

from latentdiff.config.choices import (
    AttentionKernel,
    LRDecay,
    MixedPrecision,
    OptimizerName,
    Tracker,
)
from latentdiff.config.validation import at_least, between, non_empty_texts, share_below_1

LEARNING_RATES: dict[OptimizerName, float] = {  # where train.learning_rate is 0
    "adamw": 1e-4,
    "adamw8bit": 1e-4,
    "adafactor": 1e-4,
    "muon": 1e-4,
    "prodigy": 1.0,
    "schedule_free_adamw": 3e-4,
    "lion": 3e-5,
}
ONE_BY_ONE = ("adamw", "adamw8bit", "adafactor", "lion")  # step one weight without the others
MIN_PRODIGY_RATE = 0.1  # a smaller factor of its estimate is a learning rate of another optimiser


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. batch_size is global: the same on one GPU and on eight."""

    max_steps: int = at_least(1, default=10_000)
    """optimiser steps of the whole run"""
    max_epochs: float = at_least(0, default=0.0)
    """passes over the training images, in place of max_steps, which they become when a run begins;
    0: max_steps"""
    batch_size: int = at_least(1, default=16)
    """images per optimiser step, over all processes and accumulated micro-batches"""
    micro_batch_size: int = at_least(0, default=0)
    """images per forward pass of one process; 0: batch_size / processes, on a GPU halved until its
    estimated memory fits"""
    learning_rate: float = between(0, 10, default=0.0)
    """peak learning rate; 0: the optimiser's own default, 1e-4 of adamw, adamw8bit, adafactor and
    muon, 3e-5 of lion, 3e-4 of schedule_free_adamw, and 1 of prodigy, which multiplies it by an
    estimate"""
    text_learning_rate: float = between(0, 10, default=0.0)
    """learning rate of the text encoder, where it is trained; 0: the same"""
    lr_schedule: LRDecay = "constant"
    """shape of the learning rate after the warm-up, over max_steps"""
    lr_warmup_steps: int = at_least(0, default=500)
    """optimiser steps until the peak learning rate"""
    weight_decay: float = at_least(0, default=0.01)
    """decoupled, as AdamW's, and not applied to norms and biases; lion's authors advise three to
    ten times as much"""
    optimizer: OptimizerName = "adamw"
    """adamw, fused where the device has it; adamw8bit, whose state is a quarter, which needs
    bitsandbytes and a GPU; adafactor, whose state is a few rows and columns (Shazeer & Stern 2018);
    muon, which needs fewer images when training from scratch, at the
    price of some matrix products a step (Jordan et al. 2024); prodigy, which estimates the
    learning rate (Mishchenko & Defazio 2024); schedule_free_adamw, which averages weights in place
    of a decay of the learning rate (Defazio et al. 2024); lion, whose state is half (Chen et al.
    2023). The last three need the extra latentdiff[optimizers]"""
    beta2: float = share_below_1(default=0.999)
    """decay of the second moment; lion has none, and its own 0.99"""
    max_grad_norm: float = at_least(0, default=1.0)
    """gradients are clipped to this norm; 0: not clipped"""
    mixed_precision: MixedPrecision = "bf16"
    """mixed precision of the forward and backward pass; weights and optimiser stay float32, but
    for full_bf16 and frozen_dtype"""
    full_bf16: bool = False
    """keep the trained weights in bf16 too, as kohya's full_bf16, each update rounded up or down at
    random; half the memory of weights and gradients, at some loss of quality"""
    fused_backward_pass: bool = False
    """update each weight within the backward pass, as kohya's fused_backward_pass, which frees its
    gradient at once; without clipping, accumulation and a second process"""
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    """weights that LoRA, or training of some layers alone, leaves frozen in what it trains"""
    channels_last: bool | Literal["auto"] = "auto"
    """memory layout of the U-Net's convolutions; auto: true on a GPU, false on CPUs and with FSDP,
    where it is slower or cannot be"""
    attention: AttentionKernel = "auto"
    """kernel of the U-Net's attention: two products and a softmax, PyTorch's fused one, or that of
    xformers, which needs a GPU; auto: sdpa, but plain for short sequences on the CPU"""
    gradient_checkpointing: bool = False
    """compute activations twice and keep fewer of them"""
    train_text_encoder: bool = False
    """train the text encoder of model.pretrained or model.text_encoder too, at
    text_learning_rate; with LoRA by adapters"""
    train_text_encoder_2: bool = False
    """train the second text encoder of an SDXL model too, alike"""
    ema: bool = True
    """keep an exponential moving average of the weights and export it"""
    ema_decay: float = share_below_1(default=0.9999)
    """decay of the average, reached by a warm-up"""
    ema_device: Literal["same", "cpu"] = "same"
    """device of the averages; cpu saves their memory on the GPU and costs a copy of the weights
    each step"""
    posthoc_ema_sigma_rel: tuple[float, ...] = ()
    """widths (sigma_rel) of power-function averages to track as well, such as [0.05, 0.1], from
    whose snapshots `latentdiff export ema` makes any width (Karras et al. 2024)"""
    posthoc_ema_every_steps: int = at_least(1, default=1000)
    """steps between two snapshots of each in power_ema/, and one at the end; ten or more of a run
    rebuild any width from 0.03 to 0.2"""
    export: Literal["last", "best"] = "last"
    """the state that is exported to pipeline/: the last, or that with the lowest held-out loss"""
    stop: Literal["never", "auto"] = "never"
    """auto: end before max_steps once evaluations (eval.every_steps) overfit or gain nothing, and
    keep and export the best of them (train.keep_best, train.export=best); never: log the verdict
    alone. By the held-out loss, or where nothing is held out by eval.num_samples"""
    seed: int = between(0, 2**63 - 1, default=0)
    """all random numbers of the run are a function of it"""
    resume: str = "auto"
    """auto: the newest valid checkpoint; never: start anew; or a checkpoint's folder: a branch
    begins there, which the same command then continues"""
    log_every_steps: int = at_least(1, default=10)
    """steps between two lines of metrics, at which the host also waits for the device"""
    report_to: Tracker | tuple[Tracker, ...] = "tensorboard"
    """tracker of figures, sheets and settings, besides metrics.jsonl: tensorboard (in RUN/); wandb
    or trackio, of the extra trackers; none; or several, as in [tensorboard, wandb]"""
    tracker_project_name: str = "latentdiff"
    """project of the run in wandb and trackio, where it is named after its folder"""
    checkpoint_every_steps: int = at_least(1, default=1000)
    """steps between two checkpoints; one more is saved at the end"""
    keep_checkpoints: int = at_least(1, default=2)
    """newest checkpoints that are kept"""
    keep_every_steps: int = at_least(0, default=0)
    """checkpoints of steps that it divides are kept too; 0: none"""
    keep_best: bool = False
    """keep the checkpoint of the lowest held-out loss too; each new lowest loss saves one"""
    max_skipped_steps: int = at_least(1, default=20)
    """stop after so many updates in a row were skipped because of NaN or Inf"""

    def __post_init__(self) -> None:
        """Take the optimiser's default learning rate where none is given, and what `stop` needs."""
        if self.learning_rate == 0:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.optimizer])
        if self.stop == "auto":
            object.__setattr__(self, "keep_best", True)
            object.__setattr__(self, "export", "best")

    def check(self) -> None:
        """Raise ValueError for settings that exclude each other."""
        self._check_optimizer()
        self._check_memory_modes()
        widths = self.posthoc_ema_sigma_rel
        if odd := [width for width in widths if not 0 < width <= 0.28]:
            raise ValueError(
                f"train.posthoc_ema_sigma_rel holds {odd[0]}, expected widths, shares of the "
                "training in (0, 0.28], such as [0.05, 0.1]"
            )
        if len({f"{width:g}" for width in widths}) < len(widths):
            raise ValueError(f"train.posthoc_ema_sigma_rel={list(widths)} names a width twice")
        if self.export == "best" and not self.keep_best:
            raise ValueError(
                "train.export=best needs the best checkpoint: set train.keep_best=true"
            )

    def _check_memory_modes(self) -> None:
        """Raise ValueError for settings that a memory mode cannot keep."""
        modes = {
            "train.full_bf16=true": self.full_bf16,
            "train.fused_backward_pass=true": self.fused_backward_pass,
            "train.frozen_dtype=bf16": self.frozen_dtype == "bf16",
        }
        for mode in (name for name, is_on in modes.items() if is_on):
            needs_bf16 = mode != "train.fused_backward_pass=true"
            if self.mixed_precision == "fp16" or (needs_bf16 and self.mixed_precision != "bf16"):
                raise ValueError(
                    f"{mode} does not go with train.mixed_precision={self.mixed_precision}: set "
                    "train.mixed_precision=bf16"
                )
        if (self.full_bf16 or self.fused_backward_pass) and self.optimizer not in ONE_BY_ONE:
            raise ValueError(
                f"train.optimizer={self.optimizer} steps all weights at once, and "
                f"{next(name for name, is_on in modes.items() if is_on)} one by one: choose one of "
                f"{', '.join(ONE_BY_ONE)}"
            )
        if not self.fused_backward_pass:
            return
        what = "train.fused_backward_pass=true updates each weight as soon as its gradient is there"
        if self.max_grad_norm:
            raise ValueError(
                f"{what}, before the norm of all is known, which train.max_grad_norm="
                f"{self.max_grad_norm:g} clips: set train.max_grad_norm=0"
            )
        if self.micro_batch_size not in (0, self.batch_size):
            raise ValueError(
                f"{what}, so no gradients are accumulated: leave train.micro_batch_size out, and "
                "set train.batch_size to what fits at once"
            )
        if (self.ema or self.posthoc_ema_sigma_rel) and self.ema_device != "cpu":
            raise ValueError(
                "train.fused_backward_pass=true saves memory, of which an average of all weights "
                "takes four bytes each: set train.ema=false, or train.ema_device=cpu"
            )

    def _check_optimizer(self) -> None:
        if self.optimizer == "prodigy" and self.learning_rate < MIN_PRODIGY_RATE:
            raise ValueError(
                f"train.learning_rate={self.learning_rate:g} is a factor of the learning rate that "
                "train.optimizer=prodigy estimates, expected about 1: set train.learning_rate=1"
            )
        if self.optimizer == "prodigy" and self.text_learning_rate not in (0, self.learning_rate):
            raise ValueError(
                f"train.text_learning_rate={self.text_learning_rate:g}, and train.optimizer=prodigy"
                " has one learning rate for all that is trained: set train.text_learning_rate=0"
            )
        if self.optimizer != "schedule_free_adamw":
            return
        if self.lr_schedule != "constant":
            raise ValueError(
                f"train.lr_schedule={self.lr_schedule}, and train.optimizer=schedule_free_adamw "
                "averages weights in its place: set train.lr_schedule=constant"
            )
        if self.ema or self.posthoc_ema_sigma_rel:
            raise ValueError(
                "train.optimizer=schedule_free_adamw exports its own average of the weights, and "
                "an EMA would average once more: set train.ema=false, and leave "
                "train.posthoc_ema_sigma_rel empty"
            )


@dataclass(frozen=True)
class PreviewConfig:
    """Sample sheets during the run."""

    prompts: tuple[str, ...] = non_empty_texts()
    """prompts of the sheets, where "(red:1.3) apple" weighs words as in a call of the pipeline; by
    default up to eight held-out captions, verbatim, and training captions where these are few"""
    every_steps: int = at_least(0, default=1000)
    """steps between two sheets in samples/; 0: only before the first step and at the end"""
    num_steps: int = at_least(1, default=20)
    """sampling steps"""
    guidance_scale: float = at_least(0, default=4.0)
    """classifier-free guidance of the sheets"""
    vae: str = ""
    """a VAE that decodes the sheets in place of the model's own: tiny, the fast one that the base
    model's folder carries in vae_tiny/, or the folder or hub id of one of the same latents, such
    as TAESD"""
    num_nearest: int = at_least(0, default=2000)
    """training images, evenly spaced over the folder, among which the nearest to each image of a
    sheet is searched, to be shown next to it; 0: none"""
    features: str = ""
    """folder of a network whose features define nearness: a transformers vision model, a CLIP, or
    arch.json and model.safetensors of a MobileNet; empty: thumbnails of 16 x 16 pixels"""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during the run."""

    every_steps: int = at_least(0, default=500)
    """steps between two measurements of the held-out loss, on fixed (image, timestep, noise)
    triples; 0: only at the end"""
    num_heldout: int = at_least(1, default=256)
    """maximum number of triples, and of as many training images, whose loss shows overfitting"""
    num_samples: int = at_least(0, default=0)
    """images generated at each evaluation, of the sheets' prompts and from the same seeds, whose
    similarity to the training images and copies are measured by the network of preview.features;
    0: none, else 4 or more. Where nothing is held out train.stop goes by them"""
    unrelated_prompts: tuple[str, ...] = non_empty_texts()
    """prompts that have nothing to do with the training images: how far their images move from
    those of the first evaluation is the drift. With eval.num_samples"""
