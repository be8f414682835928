"""Every setting, as frozen dataclasses; config_file.py reads and writes them.

Answers for: names, types and defaults (config_checks.py for ranges). Only scripts and the top of a
recipe see these objects; below them go plain values. Counts are of optimiser steps and of images
per optimiser step, so no figure depends on the number of GPUs.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from latentdiff.config.finetune import FinetuneConfig
from latentdiff.config.ranges import check

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class DataConfig:
    """The captioned folder and how its images are read."""

    root: str = ""
    """the captioned folder; it may hold train/ and test/ or validation/ folders"""
    resolution: int = 512
    """pixels of a square image; each is resized until it covers its size, then cropped"""
    buckets: bool = False
    """cut each image to the size nearest to its own aspect ratio, among sizes of at most
    resolution x resolution pixels, instead of to the square"""
    bucket_multiple: int = 64
    """pixels that the sides of buckets are multiples of: the VAE's factor times the U-Net's"""
    bucket_max_aspect: float = 2.0
    """longer side over shorter side of the longest bucket"""
    partial_batches: Literal["keep", "fill"] = "keep"
    """the last batch of a bucket stays smaller, or shows some of its images again"""
    num_crops: int = 1
    """places that an image is cut at, spread over the room there is, one at random each time; all
    are cached; 1: the centre; 0: anywhere, which needs data.cache=false"""
    cache: bool = True
    """encode images once, ahead of training; false: read and encode them at every step"""
    caption_column: str = "text"
    """column of the metadata file that holds the caption, or a list of captions"""
    file_column: str = "file_name"
    """column of the metadata file that holds the image's name"""
    duplicate_rows: Literal["error", "captions"] = "error"
    """an image listed twice: an error, or one with several captions"""
    sidecar_lines: Literal["one", "captions"] = "one"
    """a text file beside an image is one caption, or has one a line"""
    caption_template: str = ""
    """such as "a photo of a {label}" where the folders' names are the only captions"""
    missing_caption: Literal["skip", "empty"] = "skip"
    """what becomes of an image without a caption"""
    caption_choice: Literal["random", "first"] = "random"
    """which of several captions an image has: one at random each time, or the first"""
    shuffle_tags: bool = False
    """bring the comma-separated tags of a caption into another order each time"""
    keep_tags: int = 0
    """tags at the start that neither move nor drop out"""
    tag_dropout: float = 0.0
    """share of the other tags that is left out each time"""
    trigger_word: str = ""
    """a word that becomes the first tag of every caption that lacks it"""
    caption_prefix: str = ""
    """text before every caption, as it is"""
    caption_suffix: str = ""
    """text after every caption, as it is"""
    heldout_fraction: float = 0.02
    """share held out by a stable hash where no test/ or validation/ folder exists"""
    random_flip: bool = False
    """mirror half of the images, but none whose caption speaks of sides or of writing"""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB under transparent images"""
    mask: Literal["none", "alpha", "file"] = "none"
    """where the loss looks: everywhere, where an image is opaque, or where NAME.mask.png beside
    NAME.jpg is white; the mask is cut as the image is and averaged over each latent cell"""
    min_size: int = 32
    """pixels of the shorter side below which an image is skipped"""
    max_aspect: float = 4.0
    """longer side over shorter side above which an image is skipped"""
    max_invalid_fraction: float = 0.02
    """share of unusable images above which training does not start"""
    follow_links: bool = False
    """read through links that leave the folder (Hugging Face caches are made of them)"""
    cache_dir: str = "~/.cache/latentdiff"
    """where latents, text states and scans are kept, addressed by content"""
    num_workers: int = 0
    """processes that prepare batches beside training"""


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net trained from scratch."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """width of each level, finest first"""
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """which levels attend to the text"""
    layers_per_block: int = 2
    """residual blocks a level"""
    head_dim: int = 64
    """channels of one attention head"""
    dropout: float = 0.0
    """dropout inside the residual blocks"""


@dataclass(frozen=True)
class TextConfig:
    """A text encoder trained from scratch together with the U-Net."""

    width: int = 256
    """width of the text states"""
    num_layers: int = 4
    """transformer layers"""
    num_heads: int = 4
    """attention heads"""
    vocab_size: int = 2048
    """entries of the byte-pair vocabulary trained on the captions (514 at the least)"""
    max_tokens: int = 32
    """tokens a caption may have, start and end included"""


@dataclass(frozen=True)
class ModelConfig:
    """Where the parts come from. `pretrained` fine-tunes; without it the U-Net is new."""

    pretrained: str = ""
    """a Stable-Diffusion-format folder or hub id to fine-tune, or "latentdiff-mini", the small
    model that ships; empty trains from scratch"""
    vae: str = ""
    """a VAE's folder; "latentdiff-mini" is that of the small model that ships with the package,
    with 4 latent channels, "latentdiff-vae" one with 8"""
    text_encoder: str = ""
    """a folder with text_encoder/ and tokenizer/, kept frozen but for train.train_text_encoder;
    empty trains a new tower"""
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextConfig = field(default_factory=TextConfig)
    fit_scaling_factor: bool = True
    """from scratch: set the VAE's scaling_factor to 1 / the measured std of the latents"""


@dataclass(frozen=True)
class DiffusionConfig:
    """The chain and what the U-Net predicts. Fine-tuning keeps the model's own unless said."""

    beta_schedule: Literal["", "linear", "scaled_linear", "cosine", "sigmoid", "quadratic"] = ""
    """empty: scaled_linear from scratch, the model's own for fine-tuning"""
    beta_start: float = 0.00085
    """first beta of the linear schedules"""
    beta_end: float = 0.012
    """last beta of the linear schedules"""
    num_timesteps: int = 1000
    """length of the chain, T"""
    zero_terminal_snr: bool = False
    """from scratch: rescale the betas so that the last step is pure noise (Lin et al. 2024)"""
    prediction_type: Literal["", "epsilon", "v_prediction", "sample"] = ""
    """what the U-Net predicts: noise, velocity or clean latents; empty: epsilon, or the model's"""
    loss_weighting: Literal["none", "min_snr", "soft_min_snr", "p2"] = "none"
    """loss weight by timestep"""
    snr_gamma: float = 0.0
    """gamma of the weighting; 0: 5 for min_snr and soft_min_snr, 1 for p2"""
    loss: Literal["mse", "huber"] = "mse"
    """squared errors, or the pseudo-Huber loss, which counts large errors by their size"""
    huber_delta: float = 0.1
    """error from which the Huber loss is no longer square"""
    timestep_sampling: Literal["uniform", "stratified", "logit_normal", "loss_aware"] = "uniform"
    """how timesteps are drawn; stratified spreads them evenly over each batch, loss_aware draws
    those with large losses more often and weighs them less (Nichol & Dhariwal 2021)"""
    logit_normal_mean: float = 0.0
    """of timesteps=logit_normal: above 0 means more noise"""
    logit_normal_std: float = 1.0
    """of timesteps=logit_normal: small means more of the middle"""
    logit_normal_unbiased: bool = False
    """draw a tenth of these uniformly and weigh losses by 1 / (T p_t), so that what is minimised
    is what uniform timesteps minimise"""
    learned_variance: bool = False
    """learn the variance of the reverse steps too, by the hybrid loss (Nichol & Dhariwal 2021); the
    export beside pipeline/ is then pipeline_learned_variance/, for ancestral sampling"""
    caption_dropout: float = 0.1
    """share of captions replaced by the empty one, which guidance needs (Ho & Salimans 2022)"""
    offset_noise: float = 0.0
    """strength of a noise that is constant over each channel"""
    input_perturbation: float = 0.0
    """strength of noise that the U-Net sees and need not predict, against exposure bias; 0.1 in
    Ning et al. 2023"""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. batch_size is the global one: the same on one GPU and on eight."""

    max_steps: int = 10_000
    """optimiser steps of the whole run"""
    batch_size: int = 16
    """images per optimiser step, over all processes and accumulated micro-batches"""
    micro_batch_size: int = 0
    """images per forward pass of one process; 0: batch_size / processes, no accumulation"""
    learning_rate: float = 1e-4
    """peak learning rate"""
    text_learning_rate: float = 0.0
    """rate of a text encoder trained along; 0: the same"""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """shape of the rate after the warm-up, over max_steps"""
    lr_warmup_steps: int = 500
    """optimiser steps until the peak rate is reached"""
    weight_decay: float = 0.01
    """AdamW's, not applied to norms and biases"""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw, fused where the device has it; adamw8bit, whose state is a quarter, which needs
    bitsandbytes and a GPU; muon, which learns more from each image when training from scratch, at
    the price of some matrix products a step (Jordan et al. 2024)"""
    beta2: float = 0.999
    """AdamW's second-moment decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    mixed_precision: Precision = "bf16"
    """mixed precision of the forward and backward pass; weights and optimiser stay float32"""
    channels_last: bool | Literal["auto"] = "auto"
    """memory layout of the U-Net's convolutions; auto: true on a GPU and on CPUs with AMX, false on
    other CPUs and with FSDP, where it is slower or cannot be"""
    attention: Literal["auto", "plain", "sdpa", "xformers"] = "auto"
    """kernel of the U-Net's attention: two products and a softmax, PyTorch's fused one, or that of
    xformers, which needs a GPU; auto: sdpa, but plain for short sequences on the CPU"""
    gradient_checkpointing: bool = False
    """compute activations twice and keep fewer of them"""
    train_text_encoder: bool = False
    """train a text encoder that is there already, of model.pretrained or model.text_encoder, too,
    at its own rate; with LoRA by adapters"""
    ema: bool = True
    """keep an exponential moving average of the weights and export it"""
    ema_decay: float = 0.9999
    """its decay, reached by a warm-up"""
    ema_device: Literal["same", "cpu"] = "same"
    """where averages live; cpu saves their memory on the GPU and costs a copy of the weights each
    step"""
    posthoc_ema_sigma_rel: tuple[float, ...] = ()
    """widths (sigma_rel) of power-function averages to track beside it, such as [0.05, 0.1], of
    whose snapshots scripts/reconstruct_ema.py makes any width (Karras et al. 2024)"""
    posthoc_ema_every_steps: int = 1000
    """a snapshot of each in power_ema/, apart from the one at the end; ten or more of a run rebuild
    any width from 0.03 to 0.2"""
    export: Literal["last", "best"] = "last"
    """the state that pipeline/ is made of: the last, or that with the least held-out loss"""
    seed: int = 0
    """every draw of the run is a function of it"""
    resume: str = "auto"
    """auto: the newest valid checkpoint; never: start anew; or a checkpoint's folder"""
    log_every_steps: int = 10
    """a line of metrics; also how often the host waits for the device"""
    checkpoint_every_steps: int = 1000
    """a checkpoint, apart from the one at the end"""
    keep_checkpoints: int = 2
    """newest checkpoints that are kept"""
    keep_every_steps: int = 0
    """checkpoints of steps that it divides are kept too; 0: none"""
    keep_best: bool = False
    """keep the one with the least held-out loss too; whenever a loss is the least, one is saved"""
    max_skipped_steps: int = 20
    """stop after so many updates in a row were skipped because of NaN or Inf"""


@dataclass(frozen=True)
class PreviewConfig:
    """Sample sheets during the run."""

    prompts: tuple[str, ...] = ()
    """what the sheets show; by default eight held-out captions"""
    every_steps: int = 1000
    """a sheet in samples/; 0: only at the end"""
    num_steps: int = 20
    """sampling steps"""
    guidance_scale: float = 4.0
    """classifier-free guidance of the sheets"""
    num_nearest: int = 2000
    """training images, spread over the folder, among which the nearest to each image of a sheet
    is looked for and shown beside it; 0: none"""
    features: str = ""
    """folder of a network whose features say what is near: a transformers vision model, a CLIP, or
    arch.json and model.safetensors of a MobileNet; empty: thumbnails of 16 x 16 pixels"""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during the run."""

    every_steps: int = 500
    """held-out loss on fixed (image, timestep, noise) triples; 0: only at the end"""
    num_heldout: int = 256
    """triples at the most, and as many of training images, whose loss tells overfitting"""


@dataclass(frozen=True)
class Config:
    """A whole text-to-image run."""

    output_dir: str = "runs/new"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range, naming the setting and what is allowed."""
        check(self, flat(self))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return {"train.seed": 0, ...}: every setting by its dotted name."""
    settings: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            settings |= flat(value, f"{prefix}{f.name}.")
        else:
            settings[prefix + f.name] = value
    return settings
