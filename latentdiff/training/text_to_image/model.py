"""The model in training: which parts train, their memory layout, precision and attention kernels.

Does not answer for: loading or building its components (components.py), wrapping by Accelerate
(train_step.py), the loop (loop.py).
"""

import torch
from accelerate import Accelerator, DistributedType
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentdiff.config.choices import AttentionKernel
from latentdiff.config.text_to_image import Config
from latentdiff.cpu.fused_transformers import fuse_transformers
from latentdiff.models.compatibility import (
    TEXT_ENCODERS,
)
from latentdiff.models.components import (
    Components,
)
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.models.text import null_prompt
from latentdiff.models.unet.guidance_embedding import predict
from latentdiff.training.finetune.methods import set_trainable
from latentdiff.training.text_to_image.memory_modes import cast_weights

PLAIN_ATTENTION_PIXELS = 256


class TextToImage(nn.Module):
    """The U-Net, and the text encoders or a ControlNet where these are trained, as one module."""

    def __init__(
        self,
        components: Components,
        *,
        trains_text_encoder: bool,
        trains_text_encoder_2: bool = False,
        controlnet: ControlNetModel | None = None,
    ) -> None:
        super().__init__()
        self.controlnet = controlnet
        self.unet, self._encoders = components.unet, components.text_encoders
        self._zeros_for_null = components.force_zeros_for_empty_prompt
        self.text_encoder: CLIPTextModel | None = (
            components.text_encoder if trains_text_encoder else None
        )
        self.text_encoder_2: CLIPTextModelWithProjection | None = (
            components.text_encoder_2 if trains_text_encoder_2 else None
        )

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The text encoders that are trained."""
        both: list[nn.Module | None] = [self.text_encoder, self.text_encoder_2]
        return [part for part in both if part is not None]

    def forward(
        self,
        zt: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the U-Net's output for zt (B, C, h, w), t (B,) and the conditioning of B images.

        guidance_scale: (B,), for a U-Net that reads it.
        """
        if self.text_encoders and conditioning.input_ids is not None:
            conditioning = self._encoded(conditioning, conditioning.input_ids)
        return predict(self.unet, zt, t, conditioning, guidance_scale, controlnet=self.controlnet)

    def _encoded(self, conditioning: Conditioning, input_ids: Tensor) -> Conditioning:
        """Return the conditioning with the embeddings of its token ids, zeros for the null prompt
        where the model is sampled so."""
        text = self._encoders.encode(input_ids)
        if self._zeros_for_null:
            first = input_ids[:, 0] if input_ids.ndim == 3 else input_ids
            is_null = first[:, 1] == self._encoders.tokenizer.eos_token_id  # after the start token
            text = text.with_text(null_prompt(text, zeros=True), where=is_null)
        return Conditioning(**(conditioning.tensors() | text.tensors()))


def trained_text_encoders(config: Config) -> tuple[str, ...]:
    """Return the names of the text encoders that are trained: a new one always is, others when
    asked.

    The new tokens of textual inversion count as training all that the model has; of a model with
    one text encoder the second name stands for nothing.
    """
    if config.finetune.method == "textual_inversion":
        return TEXT_ENCODERS
    is_new = not config.model.pretrained and not config.model.text_encoder
    asked = is_new or config.train.train_text_encoder, config.train.train_text_encoder_2
    return tuple(name for name, is_on in zip(TEXT_ENCODERS, asked, strict=True) if is_on)


def trains_text_encoder(config: Config) -> bool:
    """Return whether any text encoder is trained, so that captions are encoded at every step."""
    return bool(trained_text_encoders(config))


def trainable_model(
    config: Config,
    components: Components,
    accelerator: Accelerator,
    controlnet: ControlNetModel | None,
) -> TextToImage:
    """Freeze all but the trainable parts, and choose the model's memory layout and kernels."""
    settings, device = config.train, accelerator.device
    encoders, trained = components.text_encoders.to(device), trained_text_encoders(config)
    for part in (components.vae, encoders.text_encoder, encoders.text_encoder_2):
        if part is not None:
            part.requires_grad_(False).eval()
    first, second = (name in trained for name in TEXT_ENCODERS)
    model = TextToImage(
        components,
        trains_text_encoder=first,
        trains_text_encoder_2=second,
        controlnet=controlnet,
    )
    set_trainable(
        model.unet,
        model.text_encoders,
        config.finetune.method,
        reads_condition=config.condition.is_on,
    )
    cast_weights(model, config.train)
    model.train()
    for net in (components.unet, *([controlnet] if controlnet is not None else [])):
        lay_out(config, net, components, accelerator)
    if device.type == "cpu" and settings.attention == "auto":
        use_fused_transformers(model)
    if settings.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
        if controlnet is not None:
            controlnet.enable_gradient_checkpointing()
        for text_encoder in (model.text_encoder, model.text_encoder_2):
            # the reentrant form passes no gradient to words or adapters behind frozen inputs
            if text_encoder is not None:
                text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def lay_out(
    config: Config,
    unet: UNet2DConditionModel | ControlNetModel,
    components: Components,
    accelerator: Accelerator,
) -> None:
    """Choose the memory layout and attention kernel of a U-Net or ControlNet of the components."""
    settings = config.train
    if _is_channels_last(settings.channels_last, accelerator):
        unet.to(memory_format=torch.channels_last)
        _keep_adapters_contiguous(unet)
    side = config.data.side_px // LatentCodec(components.vae).factor
    num_pixels, device = side**2, accelerator.device
    set_attention(unet, settings.attention, num_latent_pixels=num_pixels, device=device)


def _is_channels_last(wanted: bool | str, accelerator: Accelerator) -> bool:
    """Return whether the U-Net is laid out that way; "auto": where it is faster, as measured."""
    if wanted != "auto":
        return bool(wanted)
    if accelerator.distributed_type == DistributedType.FSDP:
        return False
    # on CPUs group norms of few channels are ten times as slow in channels_last, with AMX too
    return accelerator.device.type != "cpu"


def _keep_adapters_contiguous(unet: nn.Module) -> None:
    """Undo channels_last for adapters' matrices, of which peft's DoRA takes views as rows."""
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.contiguous()


def use_plain_attention(
    unet: UNet2DConditionModel | ControlNetModel, *, num_latent_pixels: int
) -> None:
    """Train short sequences with two matrix products and a softmax, the same up to rounding.

    On the CPU the fused kernel's backward pass is several times slower below about 256 latent
    pixels.
    """
    if num_latent_pixels <= PLAIN_ATTENTION_PIXELS:
        unet.set_attn_processor(AttnProcessor())


def use_fused_transformers(model: TextToImage) -> None:
    """Train through fewer and larger kernels, the same up to rounding; faster on CPUs."""
    fuse_transformers(model.unet)
    for text_encoder in (model.text_encoder, model.text_encoder_2):
        if text_encoder and text_encoder.config.max_position_embeddings <= PLAIN_ATTENTION_PIXELS:
            text_encoder.set_attn_implementation("eager")  # as use_plain_attention


def check_attention(name: AttentionKernel, device: torch.device) -> None:
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
    unet: UNet2DConditionModel | ControlNetModel,
    name: AttentionKernel,
    *,
    num_latent_pixels: int,
    device: torch.device,
) -> None:
    """Let the U-Net attend by the named kernel; all give the same up to rounding.

    num_latent_pixels: of the latents. "auto" takes PyTorch's fused kernel, but on the CPU, where
    its backward pass is slow for short sequences, two products and a softmax for these.
    """
    if name == "xformers":
        unet.enable_xformers_memory_efficient_attention()
        return
    unet.set_attn_processor(AttnProcessor() if name == "plain" else AttnProcessor2_0())
    if name == "auto" and device.type == "cpu":
        use_plain_attention(unet, num_latent_pixels=num_latent_pixels)
