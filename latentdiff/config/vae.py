"""Every setting of the VAE recipe, as a frozen dataclass."""

from dataclasses import dataclass
from typing import Literal

from latentdiff.config.choices import MixedPrecision
from latentdiff.config.ranges import at_least, check_ranges


@dataclass(frozen=True)
class VaeConfig:
    """A VAE trained on folders of images; captions are not needed."""

    output_dir: str = "runs/vae"
    roots: tuple[str, ...] = ()
    """folders of images; their test/ folders are held out"""
    pretrained: str = ""
    """a VAE's folder to go on from; empty starts from noise"""
    resolution: int = 64
    """pixels of the square crops"""
    block_out_channels: tuple[int, ...] = (32, 64, 128, 128)
    """width of each level; the factor is 2 ** (levels - 1)"""
    layers_per_block: int = 1
    """residual blocks a level"""
    norm_num_groups: int = 8
    """groups of the group norms"""
    latent_channels: int = 4
    """channels of a latent"""
    kl_weight: float = 1e-6
    """weight of the KL term, a sum over the latent, against the mean error of a pixel value"""
    pca_channels: int = 0
    """with pretrained: go on with so many principal components of its latents as channels; 0: with
    its own channels"""
    train_part: Literal["all", "decoder"] = "all"
    """with pretrained: the decoder alone keeps the latents, and what was trained on them, as is"""
    lpips: str = ""
    """a local file of LPIPS weights (training/vae/losses.py says which); empty: no such loss"""
    lpips_weight: float = 0.5
    """weight of LPIPS"""
    discriminator_weight: float = 0.0
    """weight of the patch discriminator, times the adaptive weight; 0: none"""
    discriminator_start: int = 2000
    """step at which it begins to count"""
    discriminator_width: int = 32
    """channels of its first layer"""
    features: str = ""
    """a local feature network's folder for the FD of held-out reconstructions; empty: no FD"""
    equivariance_prob: float = 0.0
    """share of steps whose latents are turned, mirrored, and halved or slid by part of a cell, and
    must decode to the image so moved: smoother latents, which diffusion learns faster (after
    Kouzelis et al. 2025)"""
    latent_noise: float = 0.0
    """largest noise that latents get before they are decoded, in units of their std, drawn anew for
    each image from zero up: the decoder then forgives what diffusion gets a little wrong, and
    latents that mean different images move apart (after Zheng et al. 2025)"""
    l2_weight: float = 1.0
    """weight of the squared error beside the absolute error"""
    max_steps: int = at_least(1, default=10_000)
    """optimiser steps"""
    max_minutes: float = at_least(0, default=0.0)
    """a limit that becomes one of max_steps, by timing a few steps when a run begins; 0: none"""
    batch_size: int = 32
    """crops a step"""
    learning_rate: float = 1e-3
    """peak rate, cosine to zero"""
    lr_warmup_steps: int = 100
    """steps until the peak rate"""
    ema_decay: float = 0.999
    """decay of the weights' moving average, which is what is saved"""
    mixed_precision: MixedPrecision = "bf16"
    """mixed precision of the forward and backward pass"""
    channels_last: bool = True
    """memory layout of the convolutions; which is faster depends on the machine"""
    seed: int = 0
    """every draw is a function of it"""
    num_workers: int = 1
    """processes that prepare crops"""
    log_every_steps: int = at_least(1, default=50)
    """a line of metrics"""
    checkpoint_every_steps: int = at_least(1, default=1000)
    """a checkpoint, apart from the one at the end"""
    keep_checkpoints: int = at_least(1, default=2)
    """newest checkpoints that are kept"""
    resume: str = "auto"
    """auto: the newest valid checkpoint; never: start anew; or a checkpoint's folder"""
    save_dtype: Literal["fp32", "fp16"] = "fp32"
    """how the weights are stored"""

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range, naming the setting and the allowed values."""
        check_ranges(self)
