"""The steps of a pipeline's call: from its arguments to the objects that denoise and decode.

Each step checks its arguments before any compute; LatentDiffPipeline.__call__ has their order.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from latentdiff.cpu.fast_sampling import FastCPU
from latentdiff.diffusion.ddpm import Generators
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.pipeline import checks, schedulers
from latentdiff.pipeline.callbacks import OF_SDXL, TENSORS
from latentdiff.pipeline.cfg_denoiser import MAX_GUIDANCE, CFGDenoiser, Guidance
from latentdiff.pipeline.conditioning.canvas import (
    WindowInputs,
    canvas_size,
    warn_if_beyond_trained,
)
from latentdiff.pipeline.conditioning.encode_prompt import EncodePromptMixin
from latentdiff.pipeline.conditioning.image_condition import (
    ConditionInputs,
    ControlNets,
    describe_kind,
    read_condition,
    with_condition,
)
from latentdiff.pipeline.conditioning.prompt import PromptInputs
from latentdiff.pipeline.conditioning.sizes import SizeInputs
from latentdiff.pipeline.files.loading import LoadingMixin
from latentdiff.pipeline.files.model_info import (
    NUM_STEPS,
    default_guidance,
    default_steps,
    image_guidance,
    warn_if_guidance_untrained,
    warn_of_distillation,
)
from latentdiff.pipeline.image_inputs import ImageInputs, read_image_inputs
from latentdiff.pipeline.initial_latents import InpaintState, prepare_latents
from latentdiff.pipeline.output import LatentDiffOutput, decode
from latentdiff.pipeline.png_metadata import attach_settings

logger = logging.getLogger(__name__)


class CallStepsMixin(EncodePromptMixin, LoadingMixin):
    """The steps of a call and the properties they read; a mixin for DiffusionPipeline."""

    fast_cpu: FastCPU
    _guidance: Guidance
    _guidance_scale: float
    _num_timesteps: int
    _interrupt: bool

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance in the call that runs, or ran last; 1 is none."""
        return self._guidance_scale

    @property
    def guidance(self) -> Guidance:
        """Guidance of the call that runs, or ran last."""
        return self._guidance

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether each step makes two predictions; a U-Net that reads the scale needs one."""
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs, or ran last."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to stop, by setting `_interrupt`."""
        return self._interrupt

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        """Names of the tensors that a step callback may take."""
        return [name for name in TENSORS if self.is_sdxl or name not in OF_SDXL]

    @property
    def _reads_mask(self) -> bool:
        """Whether this is an inpainting U-Net, which reads mask and masked image."""
        return self.condition_kind == "inpaint"

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels along one side of a latent pixel, of the VAE that is there now."""
        return 8 if self.vae is None else LatentCodec(self.vae).factor

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Diffusers' conversion of images to pixels in [-1, 1] and back, for this VAE."""
        factor, channels = self.vae_scale_factor, self.num_channels
        return VaeImageProcessor(vae_scale_factor=factor, vae_latent_channels=channels)

    @property
    def num_channels(self) -> int:
        """Channels of a latent."""
        return 4 if self.vae is None else int(self.vae.config.latent_channels)

    def _check_call(self, others: Mapping[str, object], *output: object) -> None:
        """Check the names of arguments, the output's kind and that swapped components fit."""
        checks.no_others(others, inspect.signature(type(self).__call__).parameters)
        checks.output(*output)
        self._check_fit()

    def _read_guidance(
        self,
        scales: tuple[object, Any],
        rescale: object,
        *,
        interval: object,
        score: tuple[Any, object],
    ) -> Guidance:
        """Check guidance, by default of the model's own scales, and make it the pipeline's.

        scales: guidance_scale and image_guidance_scale. score: score_fn and score_scale.
        """
        scale, image_scale = scales
        is_asked = image_scale is not None
        if scale is None:
            scale = default_guidance(self.model_info, is_sdxl=self.is_sdxl)
        if image_scale is not None:
            checks.in_range("image_guidance_scale", image_scale, low=1.0, high=MAX_GUIDANCE)
        if self.condition_kind == "instruct_pix2pix":
            image_scale = image_guidance(self.model_info, image_scale)
        elif image_scale is not None:
            raise ValueError(
                "image_guidance_scale is read by models that edit images (instruct_pix2pix) alone, "
                f"and {describe_kind(self.condition_kind)}; leave it out"
            )
        image_scale = 1.0 if image_scale is None else image_scale
        guidance = Guidance.checked(scale, rescale, interval, score=score, image_scale=image_scale)
        self._guidance, self._guidance_scale, self._interrupt = guidance, guidance.scale, False
        warn_if_guidance_untrained(self.model_info, guidance.scale)
        if is_asked and image_scale > 1 and not self.do_classifier_free_guidance:
            logger.warning(
                "image_guidance_scale=%g has no effect: without guidance by the prompt, which "
                "guidance_scale above 1 turns on, there is none by the image, as in diffusers",
                image_scale,
            )
        return guidance

    def _read_images(
        self,
        prompts: PromptInputs,
        image: object,
        mask_image: object,
        *,
        strength: object,
        padding_mask_crop: object,
        keep_unmasked: object,
        output_type: str,
    ) -> ImageInputs:
        """Check the image, the mask and what is made of them."""
        if padding_mask_crop is not None and output_type != "pil":
            raise ValueError(
                f"padding_mask_crop pastes PIL images, and output_type is {output_type!r}; leave "
                "out one of the two"
            )
        if padding_mask_crop is not None and self.controlnet is not None:
            raise ValueError(
                "padding_mask_crop crops image and mask_image, and not the condition of a "
                "ControlNet; leave it out, or crop all three before the call"
            )
        return read_image_inputs(
            image,
            mask_image,
            strength=strength,
            num_prompts=prompts.num_prompts,
            num_images=prompts.num_images,
            needs_mask=self._reads_mask,
            padding_mask_crop=padding_mask_crop,
            keep_unmasked=keep_unmasked,
        )

    def _read_condition(
        self,
        prompts: PromptInputs,
        condition: object,
        images: ImageInputs,
        *,
        level: object,
        scale: object,
    ) -> ConditionInputs:
        """Check the condition. level: noise_level; scale: controlnet_conditioning_scale."""
        return read_condition(
            condition,
            kind=self.condition_kind,
            info=self.model_info,
            num_controlnets=len(self.controlnets),
            noise_level=level,
            scale=scale,
            num_prompts=prompts.num_prompts,
            num_images=prompts.num_images,
            has_image=images.image is not None,
        )

    def _latent_shape(
        self,
        num_images: int,
        size: tuple[object, object],
        *,
        images: ImageInputs,
        condition: ConditionInputs,
        latents: object,
        windows: WindowInputs,
    ) -> tuple[int, int, int, int]:
        """Return (B, C, h, w), which latents must have, of a size in pixels; check the windows.

        size: (height, width), by default the image's, the condition's or the trained one.
        """
        factor = self.vae_scale_factor
        windows.checked(factor=factor)
        rows, columns = canvas_size(size, images, condition, unet=self.unet, factor=factor)
        condition.check_size(rows, columns, factor=factor)
        if images.image is None:  # which would hold a large image together
            warn_if_beyond_trained(
                (rows, columns),
                self.unet,
                windows=windows,
                is_upscaled=condition.kind == "upscale",
                factor=factor,
            )
        shape = num_images, self.num_channels, rows // factor, columns // factor
        if latents is not None:
            checks.latents(latents, shape=shape, dtypes=(torch.float32, self.unet.dtype))
        return shape

    def _chain(
        self,
        asked: tuple[object, object, object],
        images: ImageInputs,
        *,
        step: tuple[object, Generators],
    ) -> schedulers.DenoisingSteps:
        """Set the scheduler's steps and return them, those of the images' strength if any.

        asked: num_inference_steps, timesteps and sigmas. step: eta and generator.
        """
        (num_steps, timesteps, sigmas), (eta, generator) = asked, step
        num_steps = default_steps(self.model_info, NUM_STEPS) if num_steps is None else num_steps
        out_channels = self.unet.config.out_channels
        schedulers.check_variance(
            self.scheduler, out_channels=out_channels, channels=self.num_channels
        )
        chain = schedulers.set_timesteps(
            self.scheduler,
            num_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            strength=images.strength,
            device=self._execution_device,
        )
        self._num_timesteps = len(chain.timesteps)
        eta = checks.in_range("eta", eta, low=0.0, high=1.0)
        options = schedulers.step_options(self.scheduler, eta=eta, generator=generator)
        return replace(chain, settings=chain.settings | {"eta": eta}, step_options=options)

    def _warn_of_distillation(
        self, prompts: PromptInputs, chain: schedulers.DenoisingSteps
    ) -> None:
        warn_of_distillation(
            self.model_info,
            scale=self._guidance_scale,
            num_steps=chain.settings["num_inference_steps"],
            reads_scale=self.unet.config.time_cond_proj_dim is not None,
            has_negative=prompts.has_negative,
        )

    def _conditioning(
        self,
        prompts: PromptInputs,
        sizes: SizeInputs,
        *,
        shape: Sequence[int],
        windows: WindowInputs,
    ) -> Conditioning:
        """Return that of B images, or under guidance of 2B with the negative prompts first.

        shape: (B, C, h, w) of the latents. The size of a window is told where there are some, as
        that is what a pass makes.
        """
        is_guided = self.do_classifier_free_guidance
        device = self.scheduler.timesteps.device  # that of the call
        embeds, negative = self._encode_inputs(prompts, device, is_guided=is_guided)
        conditioning = embeds if negative is None else Conditioning.cat([negative, embeds])
        if not self.is_sdxl:
            return conditioning
        factor = self.vae_scale_factor
        made = windows.pass_size((shape[-2] * factor, shape[-1] * factor))
        time_ids = sizes.time_ids(made, num=shape[0], is_guided=is_guided)
        return replace(conditioning, time_ids=time_ids.to(device))

    def _with_condition(
        self,
        conditioning: Conditioning,
        condition: ConditionInputs,
        *,
        shape: Sequence[int],
        generator: Generators,
    ) -> Conditioning:
        """Return the conditioning with what the U-Net or the ControlNets read of the images."""
        device = self.scheduler.timesteps.device  # that of the call
        given = condition.tensors(
            LatentCodec(self.vae), shape=shape, generator=generator, device=device
        )
        return with_condition(conditioning, given)

    def _initial_latents(
        self,
        images: ImageInputs,
        noise: Tensor | None,
        *,
        shape: Sequence[int],
        generator: Generators,
    ) -> InpaintState:
        return prepare_latents(
            images,
            noise,
            shape=shape,
            generator=generator,
            codec=LatentCodec(self.vae),
            device=self.scheduler.timesteps.device,  # that of the call
            reads_mask=self._reads_mask,
        )

    def _denoiser(
        self,
        inputs: InpaintState,
        guidance: Guidance,
        conditioning: Conditioning,
        condition: ConditionInputs,
        *,
        windows: WindowInputs,
        lora_scale: float | None,
    ) -> CFGDenoiser:
        factor, size = self.vae_scale_factor, inputs.noise.shape[-2:]
        return CFGDenoiser(
            self.unet,
            inputs,
            guidance,
            conditioning=conditioning,
            scheduler=self.scheduler,
            fast_cpu=self.fast_cpu,
            lora_scale=lora_scale,
            controlnets=ControlNets(tuple(self.controlnets), condition.scales),
            windows=windows.place((size[0], size[1]), factor=factor),
            factor=factor,
        )

    def _output(
        self,
        latents: Tensor,
        settings: list[dict[str, Any]],
        *,
        seeds: list[int] | None,
        kind: tuple[str, bool],
        inputs: ImageInputs,
    ) -> LatentDiffOutput | tuple[Any, list[bool] | None]:
        """Decode to images, PIL images with their settings, past the safety checker.

        kind: output_type and return_dict. inputs: the images that a part was made of.
        """
        output_type, return_dict = kind
        if output_type != "latent":
            latents = self.fast_cpu.channels_last(latents)
        images, flagged = decode(
            latents,
            vae=self.vae,
            safety_checker=self.safety_checker,
            feature_extractor=self.feature_extractor,
            output_type=output_type,
        )
        if output_type == "pil":
            images = inputs.pasted(images)
            images = [attach_settings(*pair) for pair in zip(images, settings, strict=True)]
        self.maybe_free_model_hooks()
        output = LatentDiffOutput(images, flagged, seeds, settings)
        return output if return_dict else (images, flagged)
