r"""A prompt as it was given, checked and parsed once into weighted parts.

"(red:1.3) apple" weighs "red" by 1.3. Only "(text:number)" is read so; all other brackets are text,
and "\(" is always a bracket. With prompt_weighting=False a text is one part, verbatim, as training
encodes captions. What a weight does to embeddings is encode.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from latentdiff.models.conditioning import Conditioning

MAX_WEIGHT = 10.0

_WEIGHTED = re.compile(r"(?<!\\)\(([^()]*?[^()\\]):\s*(\d+(?:\.\d*)?|\.\d+)\s*\)")


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, and its (text, weight) parts."""

    text: str
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class PromptInputs:
    """The prompts of one call, checked and parsed, or their embeddings, and how to encode them.

    second, negative_second: of SDXL's second text encoder, which reads the same texts by default.
    """

    prompts: Sequence[Prompt] | None
    negative_prompts: Sequence[Prompt] | None
    embeds: Conditioning | None
    negative_embeds: Conditioning | None
    num_images_per_prompt: int
    long_prompts: str
    clip_skip: int | None
    lora_scale: float | None
    prompt_weighting: bool = True
    second: Sequence[Prompt] | None = None
    negative_second: Sequence[Prompt] | None = None

    @property
    def num_prompts(self) -> int:
        """Number of prompts."""
        if self.embeds is not None:
            return len(self.embeds)
        return 0 if self.prompts is None else len(self.prompts)

    @property
    def has_negative(self) -> bool:
        """Whether a negative prompt that is not empty is given."""
        texts = (*(self.negative_prompts or ()), *(self.negative_second or ()))
        return self.negative_embeds is not None or any(prompt.text for prompt in texts)

    @property
    def num_images(self) -> int:
        """Number of images to make."""
        return self.num_prompts * self.num_images_per_prompt


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


def _unescape(text: str) -> str:
    return text.replace("\\(", "(").replace("\\)", ")")
