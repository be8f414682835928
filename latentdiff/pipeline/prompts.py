r"""Prompts to text states (B, L, D): what was cut is said, weights and long prompts are possible.

"(red:1.3) apple" weighs the states of "red" by 1.3: state = null + 1.3 * (state - null), where null
is the state of the empty prompt at the same place. Only "(text:number)" is read so; all other
brackets are text, and "\(" is always a bracket.

A prompt longer than the text encoder's window is cut with a warning, or read in chunks, each with
its own start and end token, set side by side. Prompts of unequal length in one batch are repeated
to a common length: a softmax over keys that are all repeated k times is the softmax over them
once, so no image depends on its neighbours.

Prompts to text states, with the surface that Stable Diffusion's pipelines have.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff.models.text import NULL_CAPTION
from latentdiff.pipeline import checks

MAX_WEIGHT = 10.0
MAX_REPEATS = 64

logger = logging.getLogger(__name__)

_WEIGHTED = re.compile(r"(?<!\\)\(([^()]*?[^()\\]):\s*(\d+(?:\.\d*)?|\.\d+)\s*\)")


@dataclass(frozen=True)
class Text:
    """What a call says to the text encoder: prompts, or their text states, and how to read them."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    num_images_per_prompt: int
    long_prompts: str
    clip_skip: int | None
    lora_scale: float | None

    @property
    def num_prompts(self) -> int:
        """Number of prompts."""
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 1 if self.prompt is None or isinstance(self.prompt, str) else len(self.prompt)

    @property
    def num_images(self) -> int:
        """Number of images to make."""
        return self.num_prompts * self.num_images_per_prompt


@dataclass(frozen=True)
class Tokens:
    """Token ids of one prompt without start and end token, and one weight each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


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
                f"prompt weighs {match[1]!r} by {weight:g}; expected 0..{MAX_WEIGHT:g}"
            )
        parts += [(prompt[end : match.start()], 1.0), (match[1], weight)]
        end = match.end()
    parts.append((prompt[end:], 1.0))
    parts = [(_unescape(text), weight) for text, weight in parts if text]
    return parts or [("", 1.0)]


def tokenize_prompts(tokenizer: CLIPTokenizer, prompt: str) -> Tokens:
    """Return the prompt's token ids and weights, however long it is."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in weighted_parts(prompt):
        part = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        ids += part
        weights += [weight] * len(part)
    return Tokens(tuple(ids), tuple(weights))


def encode(
    prompts: Sequence[str],
    *,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    device: torch.device,
    long_prompts: str = "cut",
    clip_skip: int | None = None,
) -> Tensor:
    """Return text states (B, L, D) on the device, L a multiple of the tokenizer's length.

    clip_skip k takes the states k layers before the last. Raises ValueError for a weight out of
    range, or for lengths in one batch that have no common multiple below 64 windows.
    """
    window = tokenizer.model_max_length - 2
    tokens = [tokenize_prompts(tokenizer, prompt) for prompt in prompts]
    if long_prompts == "cut":
        _warn_of_cuts(tokenizer, tokens, window)
        tokens = [Tokens(t.ids[:window], t.weights[:window]) for t in tokens]
    windows = [_windows(tokenizer, one, window) for one in tokens]
    ids = torch.cat([ids for ids, _ in windows]).to(device)  # (windows of all prompts, window + 2)
    weights = torch.cat([weights for _, weights in windows]).to(device)
    states = _forward(text_encoder, ids, clip_skip)  # (windows, window + 2, D)
    if bool((weights != 1).any()):
        null_ids, _ = _windows(tokenizer, Tokens((), ()), window)
        null = _forward(text_encoder, null_ids.to(device), clip_skip)  # (1, window + 2, D)
        states = torch.where(
            weights[..., None] == 1, states, null + weights[..., None].to(states) * (states - null)
        )
    by_prompt = states.split([len(ids) for ids, _ in windows])
    return torch.stack(common_length([one.flatten(0, 1) for one in by_prompt]))


def has_new_words(tokenizer: CLIPTokenizer) -> bool:
    """Say whether textual inversion has added words."""
    return bool(set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens))


def common_length(states: Sequence[Tensor]) -> list[Tensor]:
    """Repeat states (..., L_k, D) along L to one length, which leaves cross-attention as it is.

    Raises ValueError where the least common multiple of the lengths is above 64 of the shortest.
    """
    lengths = [one.shape[-2] for one in states]
    length = math.lcm(*lengths)
    if length > MAX_REPEATS * min(lengths):
        raise ValueError(
            f"prompt lists texts of {sorted(set(lengths))} tokens, whose common multiple is too "
            "long; call once for each length"
        )
    return [torch.cat([one] * (length // one.shape[-2]), dim=-2) for one in states]


def repeat_to_common_length(
    states: Tensor, negative: Tensor, *, num_images_per_prompt: int
) -> tuple[Tensor, Tensor]:
    """Return states and negative states, one or one a prompt, of one length for each image."""
    states, negative = common_length([states, negative.expand(len(states), -1, -1)])
    return (
        states.repeat_interleave(num_images_per_prompt, dim=0),
        negative.repeat_interleave(num_images_per_prompt, dim=0),
    )


@contextlib.contextmanager
def apply_lora_scale(module: nn.Module | None, scale: float | None) -> Iterator[None]:
    """Let all LoRAs of a module act `scale` times as strongly for a while.

    At 0 the module is the one without them, bit for bit. Each LoRA keeps its own weight beside the
    others.
    """
    if module is None or scale is None:
        yield
        return
    with _without_loras(module) if scale == 0 else _scaled(module, scale):
        yield


@contextlib.contextmanager
def _without_loras(module: nn.Module) -> Iterator[None]:
    """Put the layers that LoRAs stand beside in their places, so that fast paths see them plain."""
    found: list[tuple[Any, str, Any]] = [
        (parent, key, child)
        for parent in module.modules()
        for key, child in parent.named_children()
        if hasattr(child, "lora_A")
    ]
    for parent, key, child in found:
        parent._modules[key] = child.base_layer
    try:
        yield
    finally:
        for parent, key, child in found:
            parent._modules[key] = child


@contextlib.contextmanager
def _scaled(module: nn.Module, scale: float) -> Iterator[None]:
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "lora_A")]
    own = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: s * scale for name, s in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, own, strict=True):
            layer.scaling.update(scaling)


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
        states: Tensor = text_encoder(input_ids).last_hidden_state
        return states
    layers = text_encoder(input_ids, output_hidden_states=True).hidden_states
    text_model = getattr(text_encoder, "text_model", text_encoder)
    normed: Tensor = text_model.final_layer_norm(layers[-(clip_skip + 1)])
    return normed


def _warn_of_cuts(tokenizer: CLIPTokenizer, tokens: Sequence[Tokens], window: int) -> None:
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


class EncodePromptMixin:
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
        num_images_per_prompt images a prompt. As there, clip_skip acts on the prompt alone.
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

        with apply_lora_scale(self.text_encoder, lora_scale):
            states = read("prompt", prompt, clip_skip) if prompt_embeds is None else prompt_embeds
            negative = negative_prompt_embeds
            if do_classifier_free_guidance and negative is None:
                negative = read("negative_prompt", negative_prompt or NULL_CAPTION, None)
        owner = self.text_encoder or self.unet
        dtype = states.dtype if owner is None else owner.dtype
        if negative is None or not do_classifier_free_guidance:
            return states.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0), None
        negative = negative.to(device, dtype)
        return repeat_to_common_length(
            states.to(device, dtype), negative, num_images_per_prompt=num_images_per_prompt
        )
