"""LatentDiffPipeline: from a prompt to an image, in the numbered steps of `__call__`.

Latents stay in float32 through the chain whatever the networks' dtype is. Every argument is checked
before any compute (checks.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Never

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DiffusionPipeline,
    MultiControlNetModel,
    SchedulerMixin,
    UNet2DConditionModel,
)
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
from latentdiff.pipeline.call_steps import CallStepsMixin
from latentdiff.pipeline.callbacks import StepEndCallback, StepFunction
from latentdiff.pipeline.cfg_denoiser import CFGDenoiser, Guidance
from latentdiff.pipeline.conditioning.canvas import WindowInputs
from latentdiff.pipeline.conditioning.image_condition import describe_kind, read_rgb
from latentdiff.pipeline.conditioning.sizes import SizeInputs
from latentdiff.pipeline.files.model_info import ModelInfo
from latentdiff.pipeline.initial_latents import generators_for
from latentdiff.pipeline.output import LatentDiffOutput
from latentdiff.pipeline.png_metadata import generation_metadata
from latentdiff.pipeline.schedulers import DenoisingSteps, make_scheduler


class LatentDiffPipeline(CallStepsMixin, DiffusionPipeline, StableDiffusionMixin):
    """Text to image, image to image and inpainting with Stable Diffusion 1.x / 2.x and SDXL.

    `LatentDiffPipeline.from_pretrained(path_or_id)("a cat").images[0]` is a PIL image. What
    `save_pretrained` writes is opened by stock diffusers, which then makes the same images.

    Arguments of a call, all but the prompt by keyword; a bad one is a ValueError that names it:

    - prompt, negative_prompt: a text or a list; "(red:1.3) apple" weighs words. prompt_embeds,
      negative_prompt_embeds (B, L, D) stand for them. long_prompts: "truncate" warns of words that
      do not fit, "chunks" reads all. prompt_weighting: False takes texts verbatim, as training
      takes captions. clip_skip: layers of the text encoder that are skipped,
      by default as in its training.
    - of SDXL alone: prompt_2, negative_prompt_2, the second text encoder's texts, by default the
      same; pooled_prompt_embeds, negative_pooled_prompt_embeds (B, P), next to prompt_embeds;
      original_size, target_size (height, width), crops_coords_top_left and negative_* of the three:
      what the U-Net is told of the image's sizes (conditioning/sizes.py).
    - condition: the image that the model's kind, or a ControlNet, reads: an image to edit, one in
      low resolution, to which noise_level is added, or a map of one channel; of several ControlNets
      a list of an image each, and controlnet_conditioning_scale how much of each is added
      (conditioning/image_condition.py). Inpainting models read image and mask_image instead.
    - image, strength in (0, 1]: start from an image, a tensor or array in [0, 1] or [-1, 1];
      mask_image: white where to paint; padding_mask_crop: only what lies so many pixels around it
      is made, at the model's size, and pasted back, so that all other pixels stay; keep_unmasked:
      an inpainting model keeps all else to what the VAE makes of it, as other models always do.
    - height, width: in pixels, by default the image's or condition's, or those of the training;
      window_size: for larger canvases, the side in pixels of square windows in which the U-Net
      predicts one by one, overlapping by window_overlap in [0, 1): each step costs a pass a window.
    - num_inference_steps, by default the model's own or 50, or in its place timesteps or sigmas:
      the noisiest first; eta (DDIM's randomness); `set_scheduler` changes the scheduler.
    - guidance_scale, 1 is none, by default the model's own, or 7.5, for SDXL 5; guidance_rescale
      in [0, 1]; guidance_interval: (start, end), the part of the chain that is guided, from 0,
      noise, to 1. image_guidance_scale from 1, by default 1.5: of a model that edits images,
      towards the image; a guidance_scale of 1 turns both off, as in diffusers.
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
    controlnet: ControlNetModel | MultiControlNetModel | None
    _execution_device: torch.device

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components: ClassVar = [
        *("safety_checker", "feature_extractor", "image_encoder"),
        *("text_encoder_2", "tokenizer_2", "controlnet"),
    ]
    _exclude_from_cpu_offload: ClassVar = ["safety_checker"]

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
        controlnet: ControlNetModel | MultiControlNetModel | None = None,
        force_zeros_for_empty_prompt: bool | None = None,  # None: of SDXL alone, as in diffusers
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
            controlnet=controlnet,
        )
        self.model_info = ModelInfo()
        self._check_components()
        self.register_to_config(
            requires_safety_checker=requires_safety_checker and safety_checker is not None,
            force_zeros_for_empty_prompt=(
                self.is_sdxl
                if force_zeros_for_empty_prompt is None
                else force_zeros_for_empty_prompt
            ),
        )
        self._guidance, self._guidance_scale = Guidance(), 1.0
        self._num_timesteps = 0
        self._interrupt = False
        self.fast_cpu = FastCPU()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        condition: Any = None,
        image: Any = None,
        mask_image: Any = None,
        padding_mask_crop: int | None = None,
        keep_unmasked: bool = False,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        image_guidance_scale: float | None = None,
        controlnet_conditioning_scale: float | Sequence[float] | None = None,
        noise_level: int | None = None,
        score_fn: ScoreFunction | None = None,
        score_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        seed: int | list[int] | None = None,
        generator: Generators | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] | None = None,
        negative_target_size: tuple[int, int] | None = None,
        long_prompts: str = "truncate",
        prompt_weighting: bool = True,
        clip_skip: int | None = None,
        window_size: int | None = None,
        window_overlap: float = 0.5,
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
        names, known = callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        step_end = StepEndCallback.checked(callback_on_step_end, names, known=known)
        scales, interval = (guidance_scale, image_guidance_scale), guidance_interval
        guidance = self._read_guidance(
            scales, guidance_rescale, interval=interval, score=(score_fn, score_scale)
        )
        prompts = self._read_prompts(
            (prompt, negative_prompt),
            (prompt_2, negative_prompt_2),
            (prompt_embeds, negative_prompt_embeds),
            pooled=(pooled_prompt_embeds, negative_pooled_prompt_embeds),
            num_images_per_prompt=num_images_per_prompt,
            options=(long_prompts, clip_skip, prompt_weighting),
            lora=(lora_scale, cross_attention_kwargs),
        )
        sizes = SizeInputs(
            original_size,
            crops_coords_top_left,
            target_size,
            negative_original_size,
            negative_crops_coords_top_left,
            negative_target_size,
        ).checked(is_sdxl=self.is_sdxl)
        images = self._read_images(
            prompts,
            image,
            mask_image,
            strength=strength,
            padding_mask_crop=padding_mask_crop,
            keep_unmasked=keep_unmasked,
            output_type=output_type,
        )
        read = self._read_condition(
            prompts, condition, images, level=noise_level, scale=controlnet_conditioning_scale
        )
        windows = WindowInputs(window_size, window_overlap)
        num, size = prompts.num_images, (height, width)
        shape = self._latent_shape(
            num, size, images=images, condition=read, latents=latents, windows=windows
        )
        seeds, generator = generators_for(seed, generator, num_images=num)
        chain = self._chain((num_inference_steps, timesteps, sigmas), images, step=(eta, generator))
        self._warn_of_distillation(prompts, chain)
        # 2. Prompts, encoded, with the sizes that SDXL reads next to them
        conditioning = self._conditioning(prompts, sizes, shape=shape, windows=windows)
        conditioning = self._with_condition(conditioning, read, shape=shape, generator=generator)
        # 3. CFGDenoiser: U-Net, initial latents, prompts and guidance in one object
        inputs = self._initial_latents(images, latents, shape=shape, generator=generator)
        denoiser = self._denoiser(
            inputs, guidance, conditioning, read, windows=windows, lora_scale=prompts.lora_scale
        )
        # 4. Scheduler, step by step from noise to clean latents
        z0 = self.denoise_loop(denoiser, chain, step_end=step_end)
        # 5. Output: images, with the settings that make them again
        settings = generation_metadata(
            self,
            prompts,
            images,
            chain,
            sizes=sizes,
            seeds=seeds,
            shape=shape,
            condition=read,
            windows=windows,
        )
        kind = output_type, return_dict
        return self._output(z0, settings, seeds=seeds, kind=kind, inputs=images)

    def denoise_loop(
        self,
        denoiser: CFGDenoiser,
        chain: DenoisingSteps,
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

    def upscale(
        self,
        image: Any,
        prompt: str | list[str] = "",
        *,
        negative_prompt: str | list[str] | None = None,
        noise_level: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | list[int] | None = None,
        generator: Generators | None = None,
        window_size: int | None = None,
        window_overlap: float = 0.5,
        output_type: str = "pil",
    ) -> LatentDiffOutput | tuple[Any, list[bool] | None]:
        """Enlarge images by the VAE's factor with a model of the kind upscale; else ValueError.

        A call with condition=image, which has other arguments too. One prompt goes for all images;
        without prompts there is no guidance, as both of its predictions would be the same.
        """
        if self.condition_kind != "upscale":
            raise ValueError(
                f"{describe_kind(self.condition_kind)}, and images are enlarged by a model of the "
                "kind upscale; train one with condition.kind=upscale"
            )
        low_res = read_rgb("image", image)
        is_bare = prompt == "" and negative_prompt is None and not self.is_sdxl
        if guidance_scale is None and is_bare and self.unet.config.time_cond_proj_dim is None:
            guidance_scale = 1.0
        return self(
            [prompt] * len(low_res) if isinstance(prompt, str) else prompt,
            condition=low_res,
            negative_prompt=negative_prompt,
            noise_level=noise_level,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            generator=generator,
            window_size=window_size,
            window_overlap=window_overlap,
            output_type=output_type,
        )

    def set_scheduler(self, name: str) -> None:
        """Change the scheduler by name, such as "dpm++2m-karras"; see schedulers.py."""
        self.scheduler = make_scheduler(name, trained=self.scheduler)
