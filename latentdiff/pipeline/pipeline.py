"""LatentDiffPipeline: from a prompt to an image, in the numbered steps of `__call__`.

Latents stay in float32 through the chain whatever the networks' dtype is. Every argument is checked
before any compute (checks.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Never

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from latentdiff.cpu.fast_sampling import FastCPU
from latentdiff.diffusion.ddpm import Generators
from latentdiff.diffusion.guidance import ScoreFunction
from latentdiff.models.compatibility import CONDITION_KINDS
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.pipeline import checks, schedulers
from latentdiff.pipeline.callbacks import TENSORS, StepEndCallback, StepFunction
from latentdiff.pipeline.cfg_denoiser import CFGDenoiser, Guidance
from latentdiff.pipeline.files.loading import LoadingMixin
from latentdiff.pipeline.files.model_info import (
    ModelInfo,
    default_guidance,
    warn_if_guidance_untrained,
)
from latentdiff.pipeline.image_inputs import ImageInputs, read_image_inputs
from latentdiff.pipeline.initial_latents import (
    InpaintState,
    generators_for,
    prepare_latents,
    trained_size_px,
    warn_if_beyond_trained,
)
from latentdiff.pipeline.output import LatentDiffOutput, decode
from latentdiff.pipeline.png_metadata import attach_settings, generation_metadata
from latentdiff.pipeline.prompts import EncodePromptMixin, PromptInputs
from latentdiff.pipeline.schedulers import make_scheduler


class LatentDiffPipeline(EncodePromptMixin, LoadingMixin, DiffusionPipeline, StableDiffusionMixin):
    """Text to image, image to image and inpainting with any Stable Diffusion 1.x / 2.x model.

    `LatentDiffPipeline.from_pretrained(path_or_id)("a cat").images[0]` is a PIL image. What
    `save_pretrained` writes is opened by stock diffusers, which then makes the same images.

    Arguments of a call, all but the prompt by keyword; a bad one is a ValueError that names it:

    - prompt, negative_prompt: a text or a list; "(red:1.3) apple" weighs words. prompt_embeds,
      negative_prompt_embeds (B, L, D) stand for them. long_prompts: "truncate" warns of words that
      do not fit, "chunks" reads all. prompt_weighting: False takes texts verbatim, as training
      takes captions. clip_skip: layers of the text encoder that are skipped,
      by default as in its training.
    - image, strength in (0, 1]: start from an image, a tensor or array in [0, 1] or [-1, 1];
      mask_image: white where to paint.
    - height, width: in pixels, by default the image's, or those of the training.
    - num_inference_steps, or in its place timesteps or sigmas: the noisiest first; eta (DDIM's
      randomness); `set_scheduler` changes the scheduler.
    - guidance_scale, 1 is none, by default the model's own or 7.5; guidance_rescale in [0, 1];
      guidance_interval: (start, end), the part of the chain that is guided, from 0, noise, to 1.
    - score_fn: a function (z0, t) -> scores (B,) of the predicted clean latents (B, C, h, w); its
      gradient, times score_scale, guides the chain too (gradient_guidance.py).
    - num_images_per_prompt; seed: one number s, counted up over the images, or a list of one a
      image; generator: a torch.Generator, or a list, as in diffusers; latents: the noise.
    - lora_scale, or cross_attention_kwargs={"scale": s}: how strongly loaded LoRAs act.
    - output_type: "pil", "np", "pt" (both in [0, 1]) or "latent"; return_dict: False for a tuple.
    - callback_on_step_end(pipe, i, t, tensors) after each step, with the tensors that
      callback_on_step_end_tensor_inputs names (callbacks.py); tensors it returns replace them.
    """

    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: Any
    safety_checker: StableDiffusionSafetyChecker | None
    feature_extractor: CLIPImageProcessor | None
    image_encoder: CLIPVisionModelWithProjection | None
    text_encoder_2: CLIPTextModelWithProjection | None
    tokenizer_2: CLIPTokenizer | None
    _execution_device: torch.device

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components: ClassVar = [
        *("safety_checker", "feature_extractor", "image_encoder"),
        *("text_encoder_2", "tokenizer_2"),
    ]
    _exclude_from_cpu_offload: ClassVar = ["safety_checker"]
    _callback_tensor_inputs: ClassVar = list(TENSORS)

    def __init__(
        self,
        *,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        force_zeros_for_empty_prompt: bool = False,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("safety_checker needs a feature_extractor; pass both or neither")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self._check_components()
        self.register_to_config(
            requires_safety_checker=requires_safety_checker and safety_checker is not None,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        )
        self.model_info = ModelInfo()
        self._guidance, self._guidance_scale = Guidance(), 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self.fast_cpu = FastCPU()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        score_fn: ScoreFunction | None = None,
        score_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        seed: int | list[int] | None = None,
        generator: Generators | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        long_prompts: str = "truncate",
        prompt_weighting: bool = True,
        clip_skip: int | None = None,
        lora_scale: float | None = None,
        cross_attention_kwargs: Mapping[str, float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepFunction | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **others: Never,
    ) -> LatentDiffOutput | tuple[Any, list[bool] | None]:
        """Make images for a prompt, or for each prompt of a list; see the class."""
        # 1. Checks, all before any compute
        self._check_call(others, output_type, return_dict)
        step_end = StepEndCallback.checked(callback_on_step_end, callback_on_step_end_tensor_inputs)
        score, interval = (score_fn, score_scale), guidance_interval
        guidance = self._read_guidance(guidance_scale, guidance_rescale, interval, score=score)
        texts, embeds = (prompt, negative_prompt), (prompt_embeds, negative_prompt_embeds)
        options = (long_prompts, clip_skip, prompt_weighting)
        lora, count = (lora_scale, cross_attention_kwargs), num_images_per_prompt
        prompts = self._read_prompts(texts, embeds, count, options=options, lora=lora)
        images = self._read_images(prompts, image, mask_image, strength=strength)
        shape = self._latent_shape(prompts.num_images, images, latents, size=(height, width))
        seeds, generator = generators_for(seed, generator, num_images=prompts.num_images)
        chain = self._chain((num_inference_steps, timesteps, sigmas), images, step=(eta, generator))
        # 2. Prompts, encoded
        conditioning = self._conditioning(prompts, chain.timesteps.device)
        # 3. CFGDenoiser: U-Net, initial latents, prompts and guidance in one object
        inputs = self._initial_latents(images, latents, shape=shape, generator=generator)
        denoiser = self._denoiser(inputs, guidance, conditioning, lora_scale=prompts.lora_scale)
        # 4. Scheduler, step by step from noise to clean latents
        z0 = self.denoise_loop(denoiser, chain, step_end=step_end)
        # 5. Output: images, with the settings that make them again
        settings = generation_metadata(self, prompts, images, chain, seeds=seeds, shape=shape)
        return self._output(z0, settings, seeds=seeds, kind=(output_type, return_dict))

    def denoise_loop(
        self,
        denoiser: CFGDenoiser,
        chain: schedulers.DenoisingSteps,
        *,
        step_end: StepEndCallback,
    ) -> Tensor:
        """Return clean latents (B, C, h, w), or those of the step at which a callback stopped."""
        inputs, timesteps, options = denoiser.inputs, chain.timesteps, chain.step_options
        latents = inputs.start(self.scheduler, timesteps)
        may_change = step_end.function is not None or denoiser.lora_scale is not None
        self.fast_cpu.invalidate()
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                xt = self.scheduler.scale_model_input(latents, t)
                denoiser.guidance = replace(self._guidance, scale=self._guidance_scale)
                prediction = denoiser(xt, t)
                latents = self.scheduler.step(prediction.output, t, latents, **options)[0]
                latents = inputs.paste_known(self.scheduler, latents, timesteps[i + 1 :])
                latents, denoiser.conditioning = step_end(
                    self,
                    i,
                    t,
                    latents=latents,
                    conditioning=denoiser.conditioning,
                    xt=xt,
                    prediction=prediction,
                )
                if may_change:
                    self.fast_cpu.invalidate()
                bar.update()
        return latents

    def set_scheduler(self, name: str) -> None:
        """Change the scheduler by name, such as "dpm++2m-karras"; see schedulers.py."""
        self.scheduler = make_scheduler(name, trained=self.scheduler)

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
        self, scale: object, rescale: object, interval: object, *, score: tuple[Any, object]
    ) -> Guidance:
        """Check guidance, by default of the model's own scale, and make it the pipeline's."""
        scale = default_guidance(self.model_info) if scale is None else scale
        guidance = Guidance.checked(scale, rescale, interval, score=score)
        self._guidance, self._guidance_scale, self._interrupt = guidance, guidance.scale, False
        warn_if_guidance_untrained(self.model_info, guidance.scale)
        return guidance

    def _read_images(
        self, prompts: PromptInputs, image: object, mask_image: object, *, strength: object
    ) -> ImageInputs:
        if self.condition_kind not in ("none", "inpaint"):
            kind = CONDITION_KINDS[self.condition_kind]
            raise ValueError(
                f"this model is of the kind {self.condition_kind}: its U-Net also reads "
                f"{kind.reads}, which this pipeline does not give it yet; open its folder with "
                f"diffusers.{kind.pipeline}"
            )
        return read_image_inputs(
            image,
            mask_image,
            strength=strength,
            num_prompts=prompts.num_prompts,
            num_images=prompts.num_images,
            needs_mask=self._reads_mask,
        )

    def _latent_shape(
        self,
        num_images: int,
        images: ImageInputs,
        latents: object,
        *,
        size: tuple[object, object],
    ) -> tuple[int, int, int, int]:
        """Return (B, C, h, w), which latents must have, of a size in pixels.

        size: (height, width), by default the image's or the trained one.
        """
        factor = self.vae_scale_factor
        given = images.size(multiple=factor)
        default = given or trained_size_px(self.unet, factor=factor)
        rows, columns = checks.size_px(*size, default=default, multiple=factor)
        if given is None:
            warn_if_beyond_trained((rows, columns), self.unet, factor=factor)
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

    def _conditioning(self, prompts: PromptInputs, device: torch.device) -> Conditioning:
        """Return that of B images, or under guidance of 2B with the negative prompts first."""
        is_guided = self.do_classifier_free_guidance
        embeds, negative = self._encode_inputs(prompts, device, is_guided=is_guided)
        return Conditioning(embeds if negative is None else torch.cat([negative, embeds]))

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
        *,
        lora_scale: float | None,
    ) -> CFGDenoiser:
        return CFGDenoiser(
            self.unet,
            inputs,
            guidance,
            conditioning=conditioning,
            scheduler=self.scheduler,
            fast_cpu=self.fast_cpu,
            lora_scale=lora_scale,
        )

    def _output(
        self,
        latents: Tensor,
        settings: list[dict[str, Any]],
        *,
        seeds: list[int] | None,
        kind: tuple[str, bool],
    ) -> LatentDiffOutput | tuple[Any, list[bool] | None]:
        """Decode to images, PIL images with their settings, past the safety checker.

        kind: output_type and return_dict.
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
            images = [attach_settings(*pair) for pair in zip(images, settings, strict=True)]
        self.maybe_free_model_hooks()
        output = LatentDiffOutput(images, flagged, seeds, settings)
        return output if return_dict else (images, flagged)
