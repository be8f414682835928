"""The prompts of a call, checked, and their embeddings: a pipeline's `encode_prompt`.

Of SDXL there are two text encoders, pooled embeddings next to the prompt embeddings, and a choice
of the null prompt: where no negative prompt is given, a model with force_zeros_for_empty_prompt is
guided by zeros, any other, and every negative prompt of "", by the encoded empty text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from latentdiff.models.compatibility import reads_time_ids
from latentdiff.models.conditioning import TEXT, Conditioning
from latentdiff.models.text import (
    NULL_CAPTION,
    clip_skip_of,
    expand_multivector_tokens,
    null_prompt,
)
from latentdiff.pipeline import checks
from latentdiff.pipeline.conditioning.encode import (
    PromptEncoder,
    common_length,
    encode,
    encode_by_two,
)
from latentdiff.pipeline.conditioning.prompt import Prompt, PromptInputs, parse_prompt
from latentdiff.pipeline.lora_scale import apply_lora_scale


class EncodePromptMixin:
    """Prompt checking and encoding of a pipeline; a mixin for DiffusionPipeline."""

    tokenizer: Any
    tokenizer_2: Any
    text_encoder: Any
    text_encoder_2: Any
    unet: Any
    config: Any
    _execution_device: Any

    def encode_prompt(  # noqa: PLR0917  (Stable Diffusion's signature)
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        long_prompts: str = "truncate",
        prompt_weighting: bool = True,
        *,
        prompt_2: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Return the embeddings of prompts and, for guidance, of negative prompts, each (B, L, D).

        Of SDXL the pooled embeddings (B, P) follow, again of prompts and of negative prompts. The
        arguments are Stable Diffusion's, in its order, long_prompts and prompt_weighting, and by
        keyword those of SDXL; B counts num_images_per_prompt images a prompt. As there, clip_skip
        acts on the prompt alone; None is what the text encoder was trained with.
        """
        has_embeds = prompt_embeds is not None
        inputs = self._read_prompts(
            (None if has_embeds else prompt, negative_prompt),
            (None if has_embeds else prompt_2, negative_prompt_2),
            (prompt_embeds, negative_prompt_embeds),
            pooled=(pooled_prompt_embeds, negative_pooled_prompt_embeds),
            num_images_per_prompt=num_images_per_prompt,
            options=(long_prompts, clip_skip, prompt_weighting),
            lora=(lora_scale, None),
        )
        device = device or self._execution_device
        is_guided = do_classifier_free_guidance
        embeds, negative = self._encode_inputs(inputs, device, is_guided=is_guided)
        both = (embeds, negative or Conditioning())
        names = TEXT[1:] if self.is_sdxl else TEXT[1:2]
        return tuple(getattr(one, name) for name in names for one in both)

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net reads pooled embeddings and sizes besides the prompt embeddings."""
        if self.unet is None:
            return self.text_encoder_2 is not None
        return reads_time_ids(self.unet.config)

    def _read_prompts(
        self,
        texts: tuple[object, object],
        texts_2: tuple[object, object],
        embeds: tuple[Any, Any],
        *,
        pooled: tuple[Any, Any],
        num_images_per_prompt: object,
        options: tuple[object, object, object],
        lora: tuple[object, object],
    ) -> PromptInputs:
        """Check and parse prompt and negative prompt, or check their embeddings.

        texts, texts_2, embeds, pooled: of the prompt and of the negative prompt, which may be one
        for all or one a prompt. options: long_prompts, clip_skip and prompt_weighting. lora:
        lora_scale and cross_attention_kwargs.
        """
        long_prompts, clip_skip, prompt_weighting = options
        weighting = checks.true_or_false("prompt_weighting", prompt_weighting)
        self._check_given(texts, texts_2, embeds=embeds, pooled=pooled)
        given = self._read_embeds(embeds, pooled)
        num = None if given[0] is None else len(given[0])
        prompts, second = self._read_texts("prompt", texts[0], texts_2[0], weighting=weighting)
        num = len(prompts) if prompts else num
        negatives, negative_second = self._read_texts(
            "negative_prompt", texts[1], texts_2[1], weighting=weighting, num_prompts=num
        )
        if clip_skip is None:
            clip_skip = clip_skip_of(self.text_encoder) or None
        return PromptInputs(
            prompts,
            negatives,
            *given,
            long_prompts=checks.long_prompts(long_prompts),
            num_images_per_prompt=checks.count(
                "num_images_per_prompt", num_images_per_prompt, maximum=checks.MAX_IMAGES
            ),
            clip_skip=checks.clip_skip(clip_skip, text_encoder=self.text_encoder),
            lora_scale=checks.lora_scale(*lora),
            prompt_weighting=weighting,
            second=second,
            negative_second=negative_second,
        )

    def _check_given(
        self,
        texts: tuple[object, object],
        texts_2: tuple[object, object],
        *,
        embeds: tuple[object, object],
        pooled: tuple[object, object],
    ) -> None:
        """Raise ValueError where arguments contradict each other or are not this model's."""
        (prompt, negative), (prompt_embeds, negative_embeds) = texts, embeds
        if (prompt is None) == (prompt_embeds is None):
            got = "neither" if prompt is None else "both"
            raise ValueError(
                f"pass one of prompt (a str or a list of str) and prompt_embeds, got {got}"
            )
        if negative_embeds is not None and negative is not None:
            raise ValueError(
                "got both negative_prompt and negative_prompt_embeds; pass one of them"
            )
        if negative_embeds is not None and prompt_embeds is None:
            raise ValueError("negative_prompt_embeds needs prompt_embeds; pass both or neither")
        names = "prompt_2", "negative_prompt_2"
        others = "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
        for name, value in zip((*names, *others), (*texts_2, *pooled), strict=True):
            if value is not None and not self.is_sdxl:
                raise ValueError(f"{name} is read by SDXL alone, and this model is not SDXL")
        for name, first, value in zip(names, texts, texts_2, strict=True):
            if value is not None and first is None:
                raise ValueError(f"{name} needs {name.removesuffix('_2')}; pass both or the latter")
        for name, first, value in zip(others, embeds, pooled, strict=True):
            if self.is_sdxl and (first is None) != (value is None):
                own = name.replace("pooled_", "")
                raise ValueError(f"SDXL reads {own} and {name}; pass both or neither")
        if prompt is not None and None in self._text_parts():
            raise ValueError(
                "prompt needs a text encoder, and this pipeline has none; pass prompt_embeds"
            )

    def _text_parts(self) -> tuple[Any, ...]:
        """Return the text encoders that this kind of model has, None where they are left out."""
        return (self.text_encoder, self.text_encoder_2) if self.is_sdxl else (self.text_encoder,)

    def _read_embeds(
        self, embeds: tuple[Any, Any], pooled: tuple[Any, Any]
    ) -> tuple[Conditioning | None, Conditioning | None]:
        """Check the embeddings of prompts and of negative prompts, which have the same shape."""
        width = None if self.unet is None else self.unet.config.cross_attention_dim
        read: list[Conditioning | None] = []
        for prefix, own, one in zip(("", "negative_"), embeds, pooled, strict=True):
            if own is None:
                read.append(None)
                continue
            shape = embeds[0].shape if prefix else None
            checks.prompt_embeds(f"{prefix}prompt_embeds", own, width=width, shape=shape)
            if one is not None:
                checks.pooled_embeds(f"{prefix}pooled_prompt_embeds", one, num=len(own))
            read.append(Conditioning(own, one))
        return read[0], read[1]

    def _read_texts(
        self,
        name: str,
        value: object,
        value_2: object,
        *,
        weighting: bool,
        num_prompts: int | None = None,
    ) -> tuple[list[Prompt] | None, list[Prompt] | None]:
        """Check and parse texts for the text encoder and, of SDXL, for the second one.

        num_prompts: of negative prompts, the number of prompts; one text is for all of them.
        """
        if value is None:
            return None, None
        first = _parsed(self.tokenizer, name, value, weighting=weighting)
        if num_prompts is not None and len(first) not in (1, num_prompts):
            raise ValueError(
                f"{name} has {len(first)} texts but there are {num_prompts} prompts; "
                "pass one text for all of them or one for each"
            )
        if not self.is_sdxl:
            return first, None
        given, label = (value, name) if value_2 is None else (value_2, f"{name}_2")
        second = _parsed(self.tokenizer_2, label, given, weighting=weighting)
        if len(second) not in (1, len(first)):
            raise ValueError(
                f"{name}_2 has {len(second)} texts and {name} {len(first)}; pass one text for all "
                "of them or one for each"
            )
        return first, second * (len(first) // len(second))

    def _encode_inputs(
        self, inputs: PromptInputs, device: torch.device, *, is_guided: bool
    ) -> tuple[Conditioning, Conditioning | None]:
        """Return the embeddings of B images and, for guidance, the negative ones of as many."""
        embeds, negative = inputs.embeds, inputs.negative_embeds
        with ExitStack() as scales:
            for part in self._text_parts():
                scales.enter_context(apply_lora_scale(part, inputs.lora_scale))
            if embeds is None:
                texts = inputs.prompts or (), inputs.second or ()
                embeds = self._embed("prompt", texts, inputs, device, clip_skip=inputs.clip_skip)
            if is_guided and negative is None:
                negative = self._null_or_negative(embeds, inputs, device)
        owner = self._text_parts()[-1] or self.unet
        dtype = None if owner is None else owner.dtype
        num_images, embeds = inputs.num_images_per_prompt, embeds.to(device, dtype)
        if negative is None or not is_guided:
            return embeds.repeat_interleave(num_images), None
        negative = negative.to(device, dtype).expand(len(embeds))
        pair = (one.prompt_embeds for one in (embeds, negative))
        lengths = common_length([one for one in pair if one is not None])
        embeds, negative = (
            Conditioning(states, one.pooled_embeds)
            for states, one in zip(lengths, (embeds, negative), strict=True)
        )
        return embeds.repeat_interleave(num_images), negative.repeat_interleave(num_images)

    def _null_or_negative(
        self, embeds: Conditioning, inputs: PromptInputs, device: torch.device
    ) -> Conditioning:
        """Return the embeddings of the negative prompt, by default those of the null prompt."""
        if inputs.negative_prompts is None and self.config.force_zeros_for_empty_prompt:
            return null_prompt(embeds, zeros=True)
        empty = [parse_prompt(NULL_CAPTION)]
        texts = inputs.negative_prompts or empty, inputs.negative_second or empty
        return self._embed("negative_prompt", texts, inputs, device, clip_skip=None)

    def _embed(
        self,
        name: str,
        texts: tuple[Sequence[Prompt], Sequence[Prompt]],
        inputs: PromptInputs,
        device: torch.device,
        *,
        clip_skip: int | None,
    ) -> Conditioning:
        """Return the embeddings of texts for the text encoder and, of SDXL, for the second one."""
        if None in self._text_parts():
            raise ValueError(f"this pipeline has no text encoder; pass {name}_embeds")
        encoders = [
            PromptEncoder(
                tokenizer,
                text_encoder,
                device,
                long_prompts=inputs.long_prompts,
                clip_skip=clip_skip,
                is_penultimate=self.is_sdxl,
            )
            for tokenizer, text_encoder in self._text_pairs()
        ]
        if len(encoders) == 1:
            return encode(texts[0], encoders[0])
        return encode_by_two(texts, (encoders[0], encoders[1]))

    def _text_pairs(self) -> Iterator[tuple[Any, Any]]:
        tokenizers = self.tokenizer, self.tokenizer_2
        return zip(tokenizers, self._text_parts(), strict=False)


def has_new_words(tokenizer: CLIPTokenizer) -> bool:
    """Return whether textual inversion has added words."""
    return bool(set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens))


def _parsed(
    tokenizer: CLIPTokenizer | None, name: str, value: object, *, weighting: bool
) -> list[Prompt]:
    """Check and parse one text or a list of them, multi-vector tokens of new words expanded."""
    prompts = []
    for text in checks.texts(name, value):
        expanded = text
        if tokenizer is not None and has_new_words(tokenizer):
            (expanded,) = expand_multivector_tokens(tokenizer, [text])
        parts = parse_prompt(expanded, weighting=weighting).parts
        prompts.append(Prompt(text, parts))
    return prompts
