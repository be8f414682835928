"""Every setting of the CLIP recipe, as a frozen dataclass."""

from dataclasses import dataclass
from typing import ClassVar

from latentdiff.config.choices import BillOfMaterials, MixedPrecision, Tracker
from latentdiff.config.validation import (
    EffectRule,
    at_least,
    between,
    check_effect,
    check_multiples,
    check_ranges,
    folder,
    share,
)

EFFECT_RULES = (
    EffectRule(
        ("vocab_size",),
        lambda config: not config.tokenizer,
        "it is for a vocabulary of the captions, and tokenizer brings its own",
    ),
)


@dataclass(frozen=True)
class ClipConfig:
    """A small CLIP trained on captioned folders."""

    effect_rules: ClassVar[tuple[EffectRule, ...]] = EFFECT_RULES

    output_dir: str = folder(default="runs/clip")
    """the run's folder: its settings, log, checkpoints and CLIP; the same command continues the
    run in it"""
    roots: tuple[str, ...] = ()
    """captioned folders; their test/ folders are held out"""
    resolution: int = between(8, 16384, default=64)
    """pixels of the square images"""
    patch_size: int = at_least(1, default=8)
    """pixels of a patch's side"""
    width: int = at_least(1, default=192)
    """width of the image encoder"""
    num_layers: int = at_least(1, default=6)
    """transformer layers of the image encoder"""
    text_width: int = at_least(1, default=192)
    """width of the text encoder, and of the cross-attention of a U-Net that is to use it"""
    text_num_layers: int = at_least(1, default=4)
    """transformer layers of the text encoder"""
    head_dim: int = at_least(1, default=32)
    """channels of one attention head, in both encoders"""
    embed_dim: int = at_least(1, default=128)
    """dimensions of the space that images and texts share"""
    tokenizer: str = ""
    """"" trains a byte-pair vocabulary on the captions; "open_clip" takes open_clip's own"""
    vocab_size: int = at_least(514, default=2048)
    """entries of the vocabulary trained on the captions (at least 514)"""
    max_tokens: int = at_least(3, default=32)
    """tokens a caption may have, start and end included"""
    random_flip: bool = True
    """mirror half of the images, but none whose caption mentions sides or writing"""
    min_crop: float = share(default=0.8)
    """smallest side of a random crop, as a share of the image's shorter side"""
    max_steps: int = at_least(1, default=2000)
    """optimiser steps"""
    max_minutes: float = at_least(0, default=0.0)
    """a limit that becomes one of max_steps, by timing a few steps when a run begins; 0: none"""
    batch_size: int = at_least(2, default=128)
    """pairs a step; a batch holds no caption twice, as one pair would be the other's negative"""
    learning_rate: float = between(0, 10, default=1e-3)
    """peak learning rate, cosine to zero"""
    lr_warmup_steps: int = at_least(0, default=100)
    """optimiser steps until the peak learning rate"""
    weight_decay: float = at_least(0, default=0.1)
    """AdamW's, on matrices"""
    mixed_precision: MixedPrecision = "bf16"
    """mixed precision of the forward and backward pass"""
    seed: int = between(0, 2**63 - 1, default=0)
    """all random numbers are a function of it"""
    num_workers: int = between(0, 1024, default=1)
    """processes that prepare images"""
    log_every_steps: int = at_least(1, default=50)
    """steps between two lines of metrics"""
    report_to: Tracker | tuple[Tracker, ...] = "tensorboard"
    """tracker of figures, sheets and settings, besides metrics.jsonl: tensorboard (in RUN/); wandb
    or trackio, of the extra trackers; none; or several, as in [tensorboard, wandb]"""
    tracker_project_name: str = "latentdiff"
    """project of the run in wandb and trackio, where it is named after its folder"""
    checkpoint_every_steps: int = at_least(1, default=1000)
    """steps between two checkpoints; one more is saved at the end"""
    keep_checkpoints: int = at_least(1, default=2)
    """newest checkpoints that are kept"""
    resume: str = "auto"
    """auto: the newest valid checkpoint; never: start anew; or a checkpoint's folder: a branch
    begins there, which the same command then continues"""
    bill_of_materials: BillOfMaterials = "names"
    """write what the weights were made of, for latentdiff verify: hashes of images, captions and
    settings, next to the images' names or without them; none: no such file"""

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range, naming the setting and the allowed values."""
        check_ranges(self)
        check_effect(self)
        check_multiples("width", [self.width], self.head_dim)
        check_multiples("text_width", [self.text_width], self.head_dim)
        check_multiples("resolution", [self.resolution], self.patch_size)
