"""Parsed prompts to prompt embeddings (B, L, D), with weights and prompts of any length.

A weight w on words changes their embeddings: null + w * (embedding - null), where null is the
embedding of the empty prompt at the same place; pooled embeddings have no weights.

A prompt longer than the text encoder's window is truncated with a warning, or read in windows, each
with its own start and end token, put next to each other; pooled embeddings are the first window's.
Prompts of unequal length in one batch are repeated to a common length: a softmax over keys that are
all repeated k times is the softmax over them once, so no image depends on the others of its batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentdiff.models.conditioning import Conditioning
from latentdiff.models.text import earlier_layer
from latentdiff.pipeline.conditioning.prompt import Prompt

MAX_REPEATS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Token ids of one prompt without start and end token, and one weight each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class PromptEncoder:
    """A text encoder with its tokenizer, and how prompts are read by them.

    is_penultimate: SDXL's reading, the state before the last layer without the final norm.
    clip_skip k takes the state k layers before that one. long_prompts: "truncate" or "chunks".
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection
    device: torch.device
    long_prompts: str = "truncate"
    clip_skip: int | None = None
    is_penultimate: bool = False

    def windows(
        self, prompts: Sequence[Prompt], *, warned: Container[str] = ()
    ) -> list[tuple[Tensor, Tensor]]:
        """Return ids and weights of each prompt, (K, window + 2) both, K its number of windows.

        warned: texts whose truncation is known already.
        """
        window = self.tokenizer.model_max_length - 2
        tokens = [tokenize_prompt(self.tokenizer, prompt) for prompt in prompts]
        if self.long_prompts == "truncate":
            unknown = [t for t, p in zip(tokens, prompts, strict=True) if p.text not in warned]
            _warn_of_truncation(self.tokenizer, unknown, window)
            tokens = [Tokens(t.ids[:window], t.weights[:window]) for t in tokens]
        return [_windows(self.tokenizer, one, window) for one in tokens]

    def padded(self, ids: Tensor, weights: Tensor, *, num: int) -> tuple[Tensor, Tensor]:
        """Return the windows of a prompt with empty ones after them, num in all."""
        empty = _windows(self.tokenizer, Tokens((), ()), ids.shape[1] - 2)
        own, missing = (ids, weights), num - len(ids)
        ids, weights = (torch.cat([x, *[e] * missing]) for x, e in zip(own, empty, strict=True))
        return ids, weights

    def embed(self, windows: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor | None]:
        """Return weighted embeddings (K (window + 2), D) of each prompt, and pooled ones (B, P)."""
        counts = [len(ids) for ids, _ in windows]
        ids = torch.cat([ids for ids, _ in windows]).to(self.device)  # (K of all, window + 2)
        weights = torch.cat([weights for _, weights in windows]).to(self.device)
        embeds, pooled = self._forward(ids)  # (K of all, window + 2, D), (K of all, P)
        if _are_weighted(windows):
            null_ids, _ = _windows(self.tokenizer, Tokens((), ()), ids.shape[1] - 2)
            null, _ = self._forward(null_ids.to(self.device))  # (1, window + 2, D)
            by_weight = null + weights[..., None].to(embeds) * (embeds - null)
            embeds = torch.where(weights[..., None] == 1, embeds, by_weight)
        if pooled is not None:
            pooled = torch.stack([one[0] for one in pooled.split(counts)])
        return [one.flatten(0, 1) for one in embeds.split(counts)], pooled

    def _forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        skipped = self.clip_skip or 0
        if self.is_penultimate:
            output: Any = self.text_encoder(input_ids, output_hidden_states=True)
            return output.hidden_states[-2 - skipped], getattr(output, "text_embeds", None)
        if not skipped:
            return self.text_encoder(input_ids).last_hidden_state, None
        layers = self.text_encoder(input_ids, output_hidden_states=True).hidden_states
        return earlier_layer(self.text_encoder, layers, skipped), None


def _are_weighted(windows: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Return whether any weight is not 1, while all are on the host: a GPU need not be asked."""
    return any(bool((weights != 1).any()) for _, weights in windows)


def encode(prompts: Sequence[Prompt], encoder: PromptEncoder) -> Conditioning:
    """Return prompt embeddings (B, L, D), L a multiple of the tokenizer's length.

    Raises ValueError for lengths in one batch that have no common multiple below 64 windows.
    """
    embeds, _ = encoder.embed(encoder.windows(prompts))
    return Conditioning(torch.stack(common_length(embeds)))


def encode_by_two(
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    encoders: tuple[PromptEncoder, PromptEncoder],
) -> Conditioning:
    """Return SDXL's embeddings, those of two text encoders next to each other, and pooled ones.

    prompts: of the one and of the other encoder. Where a text has fewer windows for one of them,
    empty windows follow. ValueError as from `encode`.
    """
    (one, texts), (other, texts_2) = zip(encoders, prompts, strict=True)
    windows, windows_2 = one.windows(texts), other.windows(texts_2, warned={t.text for t in texts})
    nums = [max(len(a), len(b)) for (a, _), (b, _) in zip(windows, windows_2, strict=True)]
    first, _ = one.embed([one.padded(*own, num=n) for own, n in zip(windows, nums, strict=True)])
    second, pooled = other.embed(
        [other.padded(*own, num=n) for own, n in zip(windows_2, nums, strict=True)]
    )
    pairs = zip(first, second, strict=True)
    embeds = [torch.cat([own.to(more.device), more], dim=-1) for own, more in pairs]
    return Conditioning(torch.stack(common_length(embeds)), pooled)


def tokenize_prompt(tokenizer: CLIPTokenizer, prompt: Prompt) -> Tokens:
    """Return the prompt's token ids and weights, however long it is."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in prompt.parts:
        part = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        ids += part
        weights += [weight] * len(part)
    return Tokens(tuple(ids), tuple(weights))


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
