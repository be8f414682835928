"""Fresh components from plain values: U-Net, text encoder, VAE, and the scheduler of an export.

Stock diffusers / transformers classes in Stable Diffusion's layout; weights come from torch's
global generator, so seed it first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentdiff.diffusion.prediction import check_objective
from latentdiff.diffusion.schedules import Schedule, make_betas, rectified_flow
from latentdiff.models.open_clip import clip_text_model

DIFFUSERS_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def build_unet(
    *,
    sample_size: int,
    in_channels: int,
    block_out_channels: Sequence[int],
    cross_attention_dim: int,
    out_channels: int | None = None,
    layers_per_block: int = 2,
    attention_levels: Sequence[bool] | None = None,
    head_dim: int = 64,
    dropout: float = 0.0,
    norm_num_groups: int = 32,
) -> UNet2DConditionModel:
    """Build a U-Net with fresh weights from torch's global generator.

    sample_size: latent pixels along a side; block_out_channels: width of each level, finest first;
    attention_levels: which of them attend to the text, by default all but the last, as in Stable
    Diffusion (the middle block always does); head_dim: channels of one attention head;
    out_channels: by default in_channels.
    """
    widths = tuple(block_out_channels)
    attends = _attention_levels(attention_levels, num_levels=len(widths))
    _check_divides(widths, head_dim=head_dim, norm_num_groups=norm_num_groups)
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=in_channels if out_channels is None else out_channels,
        down_block_types=tuple(f"{'CrossAttn' * on}DownBlock2D" for on in attends),
        up_block_types=tuple(f"{'CrossAttn' * on}UpBlock2D" for on in reversed(attends)),
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=tuple(width // head_dim for width in widths),  # means number of heads
        dropout=dropout,
        norm_num_groups=norm_num_groups,
    )


def _attention_levels(levels: Sequence[bool] | None, *, num_levels: int) -> tuple[bool, ...]:
    if levels is None:
        levels = [*[True] * (num_levels - 1), num_levels == 1]
    if len(levels) != num_levels:
        raise ValueError(
            f"attention_levels has {len(levels)} entries and block_out_channels {num_levels}, "
            "expected as many"
        )
    return tuple(levels)


def _check_divides(widths: tuple[int, ...], **divisors: int) -> None:
    """Raise ValueError where a width is no multiple of a divisor, by the divisor's name."""
    for name, divisor in divisors.items():
        if divisor < 1 or any(width % divisor for width in widths):
            raise ValueError(
                f"block_out_channels are {widths}, expected multiples of {name}, which is {divisor}"
            )


def build_text_encoder(
    tokenizer: CLIPTokenizer,
    *,
    width: int,
    num_layers: int,
    num_heads: int,
    hidden_act: str = "gelu",
) -> CLIPTextModel:
    """Build CLIP's causal text transformer with fresh weights for a tokenizer's vocabulary.

    width: of the prompt embeddings; the number of positions is the tokenizer's model_max_length.
    hidden_act: transformers' name; "quick_gelu" is OpenAI's CLIP.
    """
    if width % num_heads:
        raise ValueError(
            f"width is {width}, expected a multiple of num_heads, which is {num_heads}"
        )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return clip_text_model(config, CLIPTextModel(config).state_dict()).train()


def build_vae(
    *,
    block_out_channels: Sequence[int],
    latent_channels: int = 4,
    layers_per_block: int = 2,
    norm_num_groups: int = 32,
    sample_size: int = 256,
) -> AutoencoderKL:
    """Build an AutoencoderKL with fresh weights, of factor 2 ** (levels - 1) and not yet scaled."""
    levels = len(block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        sample_size=sample_size,
        scaling_factor=1.0,
    )


def build_tiny_vae(*, factor: int, latent_channels: int, width: int = 64) -> AutoencoderTiny:
    """Build an AutoencoderTiny with fresh weights for another VAE's scaled latents z, in TAESD's
    layout: three residual blocks a level, one at full resolution.

    factor: image pixels along a side of a latent pixel, a power of 2. Its scaling_factor is 1, so
    whatever decodes z / scaling_factor decodes z itself.
    """
    levels = factor.bit_length()
    blocks = (3,) * (levels - 1)
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(width,) * levels,
        decoder_block_out_channels=(width,) * levels,
        num_encoder_blocks=(1, *blocks),
        num_decoder_blocks=(*blocks, 1),
        scaling_factor=1.0,
    )


def make_ddpm_scheduler(
    *,
    beta_schedule: str = "scaled_linear",
    prediction_type: str = "epsilon",
    num_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> DDIMScheduler:
    """Make the scheduler of an exported model, in the settings that stock pipelines expect.

    beta_schedule: as in make_betas. Zero terminal SNR (Lin et al. 2024) refuses "epsilon": at the
    last step xt does not depend on x0, so its noise does not determine x0.
    """
    name = {"cosine": "squaredcos_cap_v2"}.get(beta_schedule, beta_schedule)
    trained = None
    if name not in DIFFUSERS_BETAS:
        betas = make_betas(name, num_timesteps, beta_start=beta_start, beta_end=beta_end)
        name, trained = "linear", betas.tolist()
    scheduler = DDIMScheduler(
        num_train_timesteps=num_timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule=name,
        trained_betas=trained,
        clip_sample=False,  # latents are not bounded by 1
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing" if zero_terminal_snr else "leading",
    )
    check_objective(schedule_of(scheduler), prediction_type)
    return scheduler


FLOW_SIGMAS = "use_flow_sigmas"  # the setting of diffusers' schedulers of rectified flow


def make_flow_scheduler(num_timesteps: int = 1000) -> UniPCMultistepScheduler:
    """Make the scheduler of an exported model of rectified flow, which stock pipelines drive.

    UniPC and DPM++ sample flow with `use_flow_sigmas`; diffusers' Euler for flow has not the
    methods that Stable Diffusion's pipelines call.
    """
    return UniPCMultistepScheduler(
        num_train_timesteps=num_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        steps_offset=1,
    )


def schedule_of(scheduler: Any) -> Schedule:
    """Return the float64 tables of a diffusers scheduler, from the noise that it samples with."""
    if scheduler.config.get(FLOW_SIGMAS):
        return rectified_flow(scheduler.config["num_train_timesteps"])
    betas = getattr(scheduler, "betas", None)
    if not isinstance(betas, torch.Tensor):
        raise ValueError(
            f"{type(scheduler).__name__} has no betas, expected a scheduler of a DDPM chain such "
            "as DDIMScheduler, or UniPCMultistepScheduler with use_flow_sigmas=true for rectified "
            "flow"
        )
    return Schedule.from_betas(betas.double())
