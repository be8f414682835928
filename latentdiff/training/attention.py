"""Which kernel the U-Net's attention runs on while it trains."""

from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from latentdiff.training.components import use_plain_attention

Attention = Literal["auto", "plain", "sdpa", "xformers"]


def check_attention(name: Attention, device: torch.device) -> None:
    """Raise ValueError where xformers is asked for and absent, or without a kernel for `device`."""
    if name != "xformers":
        return
    fix = "take train.attention=sdpa, which is PyTorch's own and about as fast"
    if device.type != "cuda":
        raise ValueError(f"train.attention=xformers needs a GPU and this run is on {device}; {fix}")
    try:
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros(1, 8, 1, 8, device=device, dtype=torch.float16)
        memory_efficient_attention(probe, probe, probe)
    except ImportError as error:
        raise ValueError(
            "train.attention=xformers needs xformers, which is not installed: "
            f"pip install 'latentdiff[xformers]', or {fix}"
        ) from error
    except (NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(
            f"train.attention=xformers: its kernels do not run here ({error}); {fix}"
        ) from error


def set_attention(
    unet: UNet2DConditionModel, name: Attention, *, num_cells: int, device: torch.device
) -> None:
    """Let the U-Net attend by the named kernel; all give the same up to rounding.

    num_cells: of the latents. "auto" takes PyTorch's fused kernel, but on the CPU, where its
    backward pass is slow for short sequences, two products and a softmax for these.
    """
    if name == "xformers":
        unet.enable_xformers_memory_efficient_attention()
        return
    unet.set_attn_processor(AttnProcessor() if name == "plain" else AttnProcessor2_0())
    if name == "auto" and device.type == "cpu":
        use_plain_attention(unet, num_cells=num_cells)
