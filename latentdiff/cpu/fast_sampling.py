"""When a U-Net takes its fast pass on a CPU, and the packed copy of it that is kept for that.

The packed pass (packed_unet.py) stands for a stock U-Net alone. One with LoRA, hooks, another
attention processor, FreeU, chunks, gradients or autocast goes diffusers' way, and so does every
device but a CPU with oneDNN. What was packed is thrown away as soon as one weight differs.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from latentdiff.cpu.packed_unet import PackedUNet

Weights: TypeAlias = list[tuple[int, int, torch.dtype, int]]

# Modules that the packed pass knows, and what they must say of themselves; missing counts as None.
PLAIN_ATTENTION: Final = {
    "residual_connection": False,
    "rescale_output_factor": 1.0,
    "use_bias": False,
    "fused_projections": False,
    "group_norm": None,
    "spatial_norm": None,
    "norm_q": None,
    "norm_cross": None,
    "added_kv_proj_dim": None,
}
PLAIN_BLOCK: Final = {
    "norm_type": "layer_norm",
    "only_cross_attention": False,
    "pos_embed": None,
    "fuser": None,
    "_chunk_size": None,
}
PLAIN_RESNET: Final = {
    "time_embedding_norm": "default",
    "skip_time_act": False,
    "output_scale_factor": 1.0,
    "upsample": None,
    "downsample": None,
}
KNOWN: Final[dict[type[nn.Module], dict[str, Any]]] = {
    UNet2DConditionModel: {"_compiled_call_impl": None},
    CrossAttnDownBlock2D: {},
    DownBlock2D: {},
    UNetMidBlock2DCrossAttn: {},
    CrossAttnUpBlock2D: {"s1": None, "s2": None, "b1": None, "b2": None},
    UpBlock2D: {"s1": None, "s2": None, "b1": None, "b2": None},
    ResnetBlock2D: PLAIN_RESNET,
    Transformer2DModel: {"is_input_continuous": True},
    BasicTransformerBlock: PLAIN_BLOCK,
    Attention: PLAIN_ATTENTION,
    FeedForward: {},
    GEGLU: {},
    Downsample2D: {"use_conv": True, "padding": 1, "norm": None},
    Upsample2D: {"use_conv": True, "use_conv_transpose": False, "interpolate": True, "norm": None},
    Timesteps: {},
    TimestepEmbedding: {"cond_proj": None},
    nn.ModuleList: {},
    nn.Conv2d: {"padding_mode": "zeros"},
    nn.Linear: {},
    nn.GroupNorm: {"affine": True},
    nn.LayerNorm: {"elementwise_affine": True},
    nn.SiLU: {},
    nn.Dropout: {},
}
PLAIN_CONFIG: Final = {
    "act_fn": "silu",
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "class_embed_type": None,
    "num_class_embeds": None,
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "dual_cross_attention": False,
}

WORDS: Final = {2: torch.int16, 4: torch.int32}


class FastCPU:
    """Runs a U-Net's forward pass, packed where it may be and `is_on` is set; else diffusers' way.

    A packed copy takes as much memory as the U-Net's weights. In float32 its images are within
    1/255 of the plain path's, but the same bits are promised only by the plain one.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._packed: PackedUNet | None = None
        self._made_of: tuple[torch.Size, Weights] | None = None
        self._is_current = False

    def look_again(self) -> None:
        """Compare the weights with the packed ones before the next pass: they may have changed."""
        self._is_current = False

    def lay_out(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) in the layout that a VAE decodes faster, if `is_on`."""
        is_wanted = self.is_on and latents.device.type == "cpu"
        return latents.contiguous(memory_format=torch.channels_last) if is_wanted else latents

    def forget(self) -> None:
        """Free the packed copy."""
        self._packed, self._made_of, self._is_current = None, None, False

    def __call__(
        self, unet: Any, x: Tensor, t: Tensor, states: Tensor, *, scale: Tensor | None
    ) -> Tensor:
        """Return the U-Net's output of x (B, C, h, w) at t () and text states (B, L, D).

        With two captions an x, states is (2B, L, D), those of all x by the first caption first, and
        so is the output. scale: the guidance scale as a distilled U-Net reads it (B, D), else None.
        """
        if scale is None and _is_plain_pass():
            if not self._is_current:
                self._prepare(unet, torch.Size([len(states), *x.shape[1:]]))
            if self._packed is not None and _halves_evenly(unet, x):
                return self._packed(x, t, states).clone()  # outside of inference mode
        if len(states) == 2 * len(x):
            x = torch.cat([x, x])
        output: Tensor = unet(
            x, t, encoder_hidden_states=states, timestep_cond=scale, return_dict=False
        )[0]
        return output

    def _prepare(self, unet: Any, shape: torch.Size) -> None:
        """Pack the U-Net for a shape (B, C, h, w), unless that is done or must not be."""
        self._is_current = True
        if not (self.is_on and is_stock(unet)):
            self._packed, self._made_of = None, None
            return
        made_of = shape, _weights(unet)
        if made_of != self._made_of:
            self._packed = None  # frees the old copy before there is a new one
            self._packed, self._made_of = PackedUNet(unet, shape), made_of

    def __deepcopy__(self, memo: dict[int, Any]) -> FastCPU:
        """Return one that has packed nothing yet."""
        copied = FastCPU()
        copied.is_on = self.is_on
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed copy, whose layout is this machine's."""
        return FastCPU().__dict__ | {"is_on": self.is_on}


def is_stock(unet: Any) -> bool:
    """Say whether a U-Net is on the CPU and all made of what the packed pass stands for."""
    return (
        type(unet) is UNet2DConditionModel
        and all(unet.config.get(name) == value for name, value in PLAIN_CONFIG.items())
        and all(_is_known(module) for module in unet.modules())
        and all(type(one) is AttnProcessor2_0 for one in unet.attn_processors.values())
        and _has_kernels({(p.device.type, p.dtype) for p in unet.parameters()})
    )


def _has_kernels(kinds: set[tuple[str, torch.dtype]]) -> bool:
    """Say whether oneDNN has the packed kernels for weights of one dtype."""
    if len(kinds) != 1 or not torch._C._has_mkldnn:
        return False
    if not torch._C._get_mkldnn_enabled():
        return False
    device, dtype = next(iter(kinds))
    is_bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device == "cpu" and (dtype == torch.float32 or is_bf16)


def _is_known(module: nn.Module) -> bool:
    """Say whether a module is as it was made, with nobody hanging on its forward pass."""
    wanted = KNOWN.get(type(module))
    if wanted is None or any(getattr(module, key, None) != value for key, value in wanted.items()):
        return False
    if type(module) is nn.Dropout and module.training and module.p > 0:
        return False
    hooks = module._forward_pre_hooks or module._forward_hooks
    return not hooks and "forward" not in vars(module)


def _weights(unet: UNet2DConditionModel) -> Weights:
    """Return what tells these weights from changed ones: where they lie, and the sum of their bits.

    A weight that is written through `.data` keeps its place and its version; the sum is another.
    """
    return [(p.data_ptr(), _version(p), p.dtype, _bits(p)) for p in unet.parameters()]


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _bits(weight: Tensor) -> int:
    """Return the sum of a tensor's bits, read as integers."""
    is_rows = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    flat = (weight.permute(0, 2, 3, 1) if is_rows else weight).detach().flatten()
    size, offset = flat.element_size(), flat.storage_offset()
    is_even = len(flat) * size % 8 == offset * size % 8 == 0
    return int(flat.view(torch.int64 if is_even else WORDS[size]).sum())


def _is_plain_pass() -> bool:
    """Say whether nobody wants gradients or another dtype of this pass."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


def _halves_evenly(unet: UNet2DConditionModel, x: Tensor) -> bool:
    """Say whether x (B, C, h, w) can be halved and doubled back as often as the U-Net does."""
    multiple: int = 2**unet.num_upsamplers
    return x.shape[-1] % multiple == 0 and x.shape[-2] % multiple == 0
