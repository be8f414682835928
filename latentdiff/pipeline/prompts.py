r"""Prompts to prompt embeddings (B, L, D), with weights and prompts of any length.

A prompt is checked and parsed once, into `Prompt`; "(red:1.3) apple" weighs the embeddings of "red"
by 1.3: embedding = null + 1.3 * (embedding - null), where null is the embedding of the empty prompt
at the same place. Only "(text:number)" is read so; all other brackets are text, and "\(" is always
a bracket. With prompt_weighting=False a text is encoded verbatim, as training encodes captions.

A prompt longer than the text encoder's window is truncated with a warning, or read in chunks, each
with its own start and end token, put next to each other. Prompts of unequal length in one batch are
repeated to a common length: a softmax over keys that are all repeated k times is the softmax over
them once, so no image depends on the others of its batch.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff.models.text import (
    NULL_CAPTION,
    clip_skip_of,
    earlier_layer,
    expand_multivector_tokens,
)
from latentdiff.pipeline import checks
from latentdiff.pipeline.lora_scale import apply_lora_scale

MAX_WEIGHT = 10.0
MAX_REPEATS = 64

logger = logging.getLogger(__name__)

_WEIGHTED = re.compile(r"(?<!\\)\(([^()]*?[^()\\]):\s*(\d+(?:\.\d*)?|\.\d+)\s*\)")


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, and its (text, weight) parts."""

    text: str
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class PromptInputs:
    """The prompts of one call, checked and parsed, or their embeddings, and how to encode them."""

    prompts: Sequence[Prompt] | None
    negative_prompts: Sequence[Prompt] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    num_images_per_prompt: int
    long_prompts: str
    clip_skip: int | None
    lora_scale: float | None
    prompt_weighting: bool = True

    @property
    def num_prompts(self) -> int:
        """Number of prompts."""
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 0 if self.prompts is None else len(self.prompts)

    @property
    def num_images(self) -> int:
        """Number of images to make."""
        return self.num_prompts * self.num_images_per_prompt


class EncodePromptMixin:
    """Prompt checking and encoding of a pipeline; a mixin for DiffusionPipeline."""

    tokenizer: Any
    text_encoder: Any
    unet: Any

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
        long_prompts: str = "truncate",
        prompt_weighting: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings of prompts and, for guidance, of negative prompts, each (B, L, D).

        The arguments are Stable Diffusion's, in its order, long_prompts and prompt_weighting; B
        counts num_images_per_prompt images a prompt. As there, clip_skip acts on the prompt alone;
        None is what the text encoder was trained with.
        """
        inputs = self._read_prompts(
            (None if prompt_embeds is not None else prompt, negative_prompt or None),
            (prompt_embeds, negative_prompt_embeds),
            num_images_per_prompt,
            options=(long_prompts, clip_skip, prompt_weighting),
            lora=(lora_scale, None),
        )
        return self._encode_inputs(inputs, device, is_guided=do_classifier_free_guidance)

    def _read_prompts(
        self,
        texts: tuple[object, object],
        embeds: tuple[Any, Any],
        num_images_per_prompt: object,
        *,
        options: tuple[object, object, object],
        lora: tuple[object, object],
    ) -> PromptInputs:
        """Check and parse prompt and negative prompt, or check their embeddings.

        texts, embeds: of the prompt and of the negative prompt, which may be one for all or one a
        prompt. options: long_prompts, clip_skip and prompt_weighting. lora: lora_scale and
        cross_attention_kwargs.
        """
        (prompt, negative_prompt), (prompt_embeds, negative_prompt_embeds) = texts, embeds
        long_prompts, clip_skip, prompt_weighting = options
        if clip_skip is None:
            clip_skip = clip_skip_of(self.text_encoder) or None
        if (prompt is None) == (prompt_embeds is None):
            got = "neither" if prompt is None else "both"
            raise ValueError(
                f"pass one of prompt (a str or a list of str) and prompt_embeds, got {got}"
            )
        weighting = checks.true_or_false("prompt_weighting", prompt_weighting)
        prompts = None if prompt is None else self._parsed("prompt", prompt, weighting=weighting)
        if prompts is None:
            checks.prompt_embeds("prompt_embeds", prompt_embeds, width=self._prompt_width())
        elif self.text_encoder is None:
            raise ValueError(
                "prompt needs a text encoder, and this pipeline has none; pass prompt_embeds"
            )
        return PromptInputs(
            prompts,
            self._read_negative(
                negative_prompt,
                embeds,
                num_prompts=len(prompts or prompt_embeds),
                weighting=weighting,
            ),
            prompt_embeds,
            negative_prompt_embeds,
            long_prompts=checks.long_prompts(long_prompts),
            num_images_per_prompt=checks.count(
                "num_images_per_prompt", num_images_per_prompt, maximum=checks.MAX_IMAGES
            ),
            clip_skip=checks.clip_skip(clip_skip, text_encoder=self.text_encoder),
            lora_scale=checks.lora_scale(*lora),
            prompt_weighting=weighting,
        )

    def _prompt_width(self) -> int | None:
        """Return the width of prompt embeddings that the U-Net reads, None without a U-Net."""
        return None if self.unet is None else self.unet.config.cross_attention_dim

    def _read_negative(
        self,
        negative_prompt: object,
        embeds: tuple[Any, Any],
        *,
        num_prompts: int,
        weighting: bool,
    ) -> list[Prompt] | None:
        """Check and parse the negative prompt; check its embeddings, which need the prompt's."""
        prompt_embeds, negative_prompt_embeds = embeds
        if negative_prompt_embeds is not None:
            if negative_prompt is not None:
                raise ValueError(
                    "got both negative_prompt and negative_prompt_embeds; pass one of them"
                )
            if prompt_embeds is None:
                raise ValueError("negative_prompt_embeds needs prompt_embeds; pass both or neither")
            width, shape = self._prompt_width(), prompt_embeds.shape
            checks.prompt_embeds(
                "negative_prompt_embeds", negative_prompt_embeds, width=width, shape=shape
            )
        if negative_prompt is None:
            return None
        prompts = self._parsed("negative_prompt", negative_prompt, weighting=weighting)
        if len(prompts) not in (1, num_prompts):
            raise ValueError(
                f"negative_prompt has {len(prompts)} texts but there are {num_prompts} prompts; "
                "pass one text for all of them or one for each"
            )
        return prompts

    def _parsed(self, name: str, value: object, *, weighting: bool) -> list[Prompt]:
        """Check and parse one text or a list of them, multi-vector tokens of new words expanded."""
        prompts = []
        for text in checks.texts(name, value):
            expanded = text
            if self.tokenizer is not None and has_new_words(self.tokenizer):
                (expanded,) = expand_multivector_tokens(self.tokenizer, [text])
            parts = parse_prompt(expanded, weighting=weighting).parts
            prompts.append(Prompt(text, parts))
        return prompts

    def _encode_inputs(
        self, inputs: PromptInputs, device: torch.device, *, is_guided: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return prompt embeddings and, for guidance, negative ones, each (B, L, D)."""

        def embed(name: str, prompts: Sequence[Prompt], clip_skip: int | None) -> Tensor:
            if self.text_encoder is None:
                raise ValueError(f"this pipeline has no text encoder; pass {name}_embeds")
            return encode(
                prompts,
                tokenizer=self.tokenizer,
                text_encoder=self.text_encoder,
                device=device,
                clip_skip=clip_skip,
                long_prompts=inputs.long_prompts,
            )

        embeds, negative = inputs.prompt_embeds, inputs.negative_prompt_embeds
        with apply_lora_scale(self.text_encoder, inputs.lora_scale):
            if embeds is None:
                embeds = embed("prompt", inputs.prompts or (), inputs.clip_skip)
            if is_guided and negative is None:
                prompts = inputs.negative_prompts or [parse_prompt(NULL_CAPTION)]
                negative = embed("negative_prompt", prompts, None)
        owner = self.text_encoder or self.unet
        dtype = embeds.dtype if owner is None else owner.dtype
        num_images, embeds = inputs.num_images_per_prompt, embeds.to(device, dtype)
        if negative is None or not is_guided:
            return embeds.repeat_interleave(num_images, dim=0), None
        return repeat_to_common_length(
            embeds, negative.to(device, dtype), num_images_per_prompt=num_images
        )


@dataclass(frozen=True)
class Tokens:
    """Token ids of one prompt without start and end token, and one weight each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def parse_prompt(text: str, *, weighting: bool = True) -> Prompt:
    """Split a prompt into parts with their weights; ValueError for a weight above 10.

    weighting: False reads the text verbatim, as one part of weight 1.
    """
    return Prompt(text, tuple(weighted_parts(text)) if weighting else ((text, 1.0),))


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt into (text, weight) parts; a prompt without "(text:weight)" is one part.

    Raises ValueError for a weight above 10.
    """
    parts: list[tuple[str, float]] = []
    end = 0
    for match in _WEIGHTED.finditer(prompt):
        weight = float(match[2])
        if weight > MAX_WEIGHT:
            raise ValueError(
                f"prompt weighs {match[1]!r} by {weight:g}; expected 0..{MAX_WEIGHT:g}, "
                "or \\( for a bracket that is text, or prompt_weighting=false"
            )
        parts += [(prompt[end : match.start()], 1.0), (match[1], weight)]
        end = match.end()
    parts.append((prompt[end:], 1.0))
    parts = [(_unescape(text), weight) for text, weight in parts if text]
    return parts or [("", 1.0)]


def tokenize_prompt(tokenizer: CLIPTokenizer, prompt: Prompt) -> Tokens:
    """Return the prompt's token ids and weights, however long it is."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in prompt.parts:
        part = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        ids += part
        weights += [weight] * len(part)
    return Tokens(tuple(ids), tuple(weights))


def encode(
    prompts: Sequence[Prompt],
    *,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    device: torch.device,
    long_prompts: str = "truncate",
    clip_skip: int | None = None,
) -> Tensor:
    """Return prompt embeddings (B, L, D) on the device, L a multiple of the tokenizer's length.

    clip_skip k takes the embeddings k layers before the last. Raises ValueError for a weight out of
    range, or for lengths in one batch that have no common multiple below 64 windows.
    """
    window = tokenizer.model_max_length - 2
    tokens = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    if long_prompts == "truncate":
        _warn_of_truncation(tokenizer, tokens, window)
        tokens = [Tokens(t.ids[:window], t.weights[:window]) for t in tokens]
    windows = [_windows(tokenizer, one, window) for one in tokens]
    ids = torch.cat([ids for ids, _ in windows]).to(device)  # (windows of all prompts, window + 2)
    weights = torch.cat([weights for _, weights in windows]).to(device)
    embeds = _forward(text_encoder, ids, clip_skip)  # (windows, window + 2, D)
    if bool((weights != 1).any()):
        null_ids, _ = _windows(tokenizer, Tokens((), ()), window)
        null = _forward(text_encoder, null_ids.to(device), clip_skip)  # (1, window + 2, D)
        embeds = torch.where(
            weights[..., None] == 1, embeds, null + weights[..., None].to(embeds) * (embeds - null)
        )
    by_prompt = embeds.split([len(ids) for ids, _ in windows])
    return torch.stack(common_length([one.flatten(0, 1) for one in by_prompt]))


def has_new_words(tokenizer: CLIPTokenizer) -> bool:
    """Return whether textual inversion has added words."""
    return bool(set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens))


def common_length(embeds: Sequence[Tensor]) -> list[Tensor]:
    """Repeat embeddings (..., L_k, D) along L to one length, which leaves cross-attention as it is.

    Raises ValueError where the least common multiple of the lengths is above 64 of the shortest.
    """
    lengths = [one.shape[-2] for one in embeds]
    length = math.lcm(*lengths)
    if length > MAX_REPEATS * min(lengths):
        raise ValueError(
            f"prompt lists texts of {sorted(set(lengths))} tokens, whose common multiple is too "
            "long; call once for each length"
        )
    return [torch.cat([one] * (length // one.shape[-2]), dim=-2) for one in embeds]


def repeat_to_common_length(
    embeds: Tensor, negative: Tensor, *, num_images_per_prompt: int
) -> tuple[Tensor, Tensor]:
    """Return embeddings and negative ones, one or one a prompt, of one length for each image."""
    embeds, negative = common_length([embeds, negative.expand(len(embeds), -1, -1)])
    return (
        embeds.repeat_interleave(num_images_per_prompt, dim=0),
        negative.repeat_interleave(num_images_per_prompt, dim=0),
    )


def _windows(tokenizer: CLIPTokenizer, tokens: Tokens, window: int) -> tuple[Tensor, Tensor]:
    """Return ids (K, window + 2) and weights of the same shape: start, tokens, end, padding."""
    ids, weights = [], []
    for start in range(0, max(len(tokens.ids), 1), window):
        part = tokens.ids[start : start + window]
        padding = window - len(part)
        ids.append(
            [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
            + [tokenizer.pad_token_id] * padding
        )
        weights.append([1.0, *tokens.weights[start : start + window], 1.0] + [1.0] * padding)
    return torch.tensor(ids), torch.tensor(weights)


def _forward(text_encoder: CLIPTextModel, input_ids: Tensor, clip_skip: int | None) -> Tensor:
    if not clip_skip:
        embeds: Tensor = text_encoder(input_ids).last_hidden_state
        return embeds
    layers = text_encoder(input_ids, output_hidden_states=True).hidden_states
    return earlier_layer(text_encoder, layers, clip_skip)


def _warn_of_truncation(tokenizer: CLIPTokenizer, tokens: Sequence[Tokens], window: int) -> None:
    for index, one in enumerate(tokens):
        if len(one.ids) > window:
            logger.warning(
                "prompt %d has %d tokens, %d fit; cut off: %r (long_prompts='chunks' reads all)",
                index,
                len(one.ids),
                window,
                _readable(tokenizer, one.ids[window:]),
            )


def _readable(tokenizer: CLIPTokenizer, ids: Sequence[int]) -> str:
    text: Any = tokenizer.decode(list(ids))
    return str(text).replace("</w>", " ").strip()  # the mark of a word's end, where it is left in


def _unescape(text: str) -> str:
    return text.replace("\\(", "(").replace("\\)", ")")
