"""Prompts to text states, with the surface that Stable Diffusion's pipelines have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentdiff.pipeline import checks
from latentdiff.pipeline.prompts import encode, has_new_words, lora_scaled, paired
from latentdiff.text import NULL_CAPTION


class Reading:
    """What a pipeline does with prompts; a mixin beside DiffusionPipeline."""

    tokenizer: Any
    text_encoder: Any
    unet: Any
    maybe_convert_prompt: Any

    def encode_prompt(  # noqa: PLR0917  (Stable Diffusion's signature)
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        long_prompts: str = "cut",
    ) -> tuple[Tensor, Tensor | None]:
        """Return the text states of prompts and, for guidance, of negative prompts, each (B, L, D).

        The arguments are Stable Diffusion's, in its order, and long_prompts; B counts
        num_images_per_prompt pictures a prompt. As there, clip_skip acts on the prompt alone.
        """

        def read(name: str, value: object, skipped: int | None) -> Tensor:
            texts = checks.texts(name, value)
            if self.text_encoder is None:
                raise ValueError(f"this pipeline has no text encoder; pass {name}_embeds")
            if has_new_words(self.tokenizer):
                texts = self.maybe_convert_prompt(texts, self.tokenizer)
            return encode(
                texts,
                tokenizer=self.tokenizer,
                text_encoder=self.text_encoder,
                device=device,
                clip_skip=skipped,
                long_prompts=long_prompts,
            )

        with lora_scaled(self.text_encoder, lora_scale):
            states = read("prompt", prompt, clip_skip) if prompt_embeds is None else prompt_embeds
            negative = negative_prompt_embeds
            if do_classifier_free_guidance and negative is None:
                negative = read("negative_prompt", negative_prompt or NULL_CAPTION, None)
        owner = self.text_encoder or self.unet
        dtype = states.dtype if owner is None else owner.dtype
        if negative is None or not do_classifier_free_guidance:
            return states.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0), None
        negative = negative.to(device, dtype)
        return paired(
            states.to(device, dtype), negative, num_images_per_prompt=num_images_per_prompt
        )
