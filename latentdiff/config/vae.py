"""Every setting of the VAE recipe, as a frozen dataclass."""

from dataclasses import dataclass
from typing import ClassVar, Literal

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
    share_below_1,
    widths,
)

EFFECT_RULES = (
    EffectRule(
        ("train_part", "pca_channels"),
        lambda config: bool(config.pretrained),
        "train_part=decoder and pca_channels need --pretrained, a VAE to continue from",
    ),
    EffectRule(
        ("decoder",),
        lambda config: bool(config.pretrained) and config.train_part == "decoder",
        "it needs --train_part=decoder and --pretrained, the VAE whose latents it decodes",
    ),
    EffectRule(
        ("decoder_width",),
        lambda config: config.decoder == "tiny",
        "it is that of --decoder=tiny",
    ),
    EffectRule(
        ("pca_channels",),
        lambda config: config.decoder == "full",
        "a tiny decoder keeps the latents of --pretrained as they are",
    ),
    EffectRule(
        ("lpips_weight",),
        lambda config: bool(config.lpips),
        "it weights --lpips, and there is none",
    ),
    EffectRule(
        ("discriminator_start", "discriminator_width"),
        lambda config: config.discriminator_weight > 0,
        "discriminator_weight=0 trains without one",
    ),
)


@dataclass(frozen=True)
class VaeConfig:
    """A VAE trained on folders of images; captions are not needed."""

    effect_rules: ClassVar[tuple[EffectRule, ...]] = EFFECT_RULES

    output_dir: str = folder(default="runs/vae")
    """the run's folder: its settings, log, checkpoints and VAE; the same command continues the
    run in it"""
    roots: tuple[str, ...] = ()
    """folders of images; their test/ folders are held out"""
    pretrained: str = ""
    """a VAE's folder to continue from; empty starts from random weights"""
    resolution: int = between(8, 16384, default=64)
    """pixels of the square crops"""
    block_out_channels: tuple[int, ...] = widths(default=(32, 64, 128, 128))
    """width of each level; the factor is 2 ** (levels - 1)"""
    layers_per_block: int = at_least(1, default=1)
    """residual blocks a level"""
    norm_num_groups: int = at_least(1, default=8)
    """groups of the group norms"""
    latent_channels: int = at_least(1, default=4)
    """channels of a latent"""
    kl_weight: float = at_least(0, default=1e-6)
    """weight of the KL term, a sum over the latent, against the mean error of a pixel value"""
    pca_channels: int = at_least(0, default=0)
    """with pretrained: number of principal components of its latents to take as channels; 0: its
    own channels"""
    train_part: Literal["all", "decoder"] = "all"
    """with pretrained: training the decoder alone keeps the latents, and so the models trained on
    them, as they are"""
    decoder: Literal["full", "tiny"] = "full"
    """tiny: train an AutoencoderTiny, in TAESD's layout, that decodes the latents of pretrained
    several times as fast; its encoder learns them too, for image to image; written to vae_tiny/"""
    decoder_width: int = at_least(1, default=64)
    """channels of the tiny decoder's layers: 64, as in TAESD, for a VAE of Stable Diffusion's size;
    16 to 32 for a small one"""
    lpips: str = ""
    """a local file of LPIPS weights (named in training/vae/losses.py); empty: no such loss"""
    lpips_weight: float = at_least(0, default=0.5)
    """weight of LPIPS"""
    discriminator_weight: float = at_least(0, default=0.0)
    """weight of the patch discriminator, times the adaptive weight; 0: none"""
    discriminator_start: int = at_least(0, default=2000)
    """optimiser step from which the discriminator's loss counts"""
    discriminator_width: int = at_least(1, default=32)
    """channels of the discriminator's first layer"""
    features: str = ""
    """a local feature network's folder for the FD of held-out reconstructions; empty: no FD"""
    equivariance_prob: float = share(default=0.0)
    """share of steps whose latents are rotated, mirrored, and downscaled or shifted by part of a
    latent pixel, and must decode to the image so transformed: smoother latents, which diffusion
    learns faster (after Kouzelis et al. 2025)"""
    latent_noise: float = at_least(0, default=0.0)
    """largest noise added to latents before decoding, in units of their std, sampled for each image
    from zero up: the decoder then tolerates small errors of diffusion, and latents of different
    images move apart (after Zheng et al. 2025)"""
    l2_weight: float = at_least(0, default=1.0)
    """weight of the squared error, next to the absolute error"""
    max_steps: int = at_least(1, default=10_000)
    """optimiser steps"""
    max_minutes: float = at_least(0, default=0.0)
    """a limit that becomes one of max_steps, by timing a few steps when a run begins; 0: none"""
    batch_size: int = at_least(1, default=32)
    """crops a step"""
    learning_rate: float = between(0, 10, default=1e-3)
    """peak learning rate, cosine to zero"""
    lr_warmup_steps: int = at_least(0, default=100)
    """optimiser steps until the peak learning rate"""
    ema_decay: float = share_below_1(default=0.999)
    """decay of the weights' moving average; the average is saved"""
    mixed_precision: MixedPrecision = "bf16"
    """mixed precision of the forward and backward pass"""
    channels_last: bool = True
    """memory layout of the convolutions; which is faster depends on the machine"""
    seed: int = between(0, 2**63 - 1, default=0)
    """all random numbers are a function of it"""
    num_workers: int = between(0, 1024, default=1)
    """processes that prepare crops"""
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
    """write what the weights were made of, for latentdiff verify: hashes of images and settings,
    next to the images' names or without them; none: no such file"""
    save_dtype: Literal["fp32", "fp16"] = "fp32"
    """dtype of the stored weights"""

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range, naming the setting and the allowed values."""
        check_ranges(self)
        check_effect(self)
        if not self.pretrained:
            check_multiples("block_out_channels", self.block_out_channels, self.norm_num_groups)
