"""Captions as text: cleaning, choice among several, and edits of tag lists while training.

Everything random is driven by a numpy Generator that the caller keys by (seed, epoch, sample), so
that a caption does not depend on workers or batches. Token counts: `latentdiff.models.text`.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, Protocol

import numpy as np

BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
WILDCARD = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")  # one without others inside
SIDE_WORDS = (
    "left",
    "right",
    "text",
    "letter",
    "letters",
    "word",
    "words",
    "number",
    "numbers",
    "writing",
    "sign",
)


class Captioned(Protocol):
    """A record's captions, and which of several sources it is of."""

    @property
    def captions(self) -> tuple[str, ...]: ...
    @property
    def source(self) -> int: ...


@dataclass(frozen=True)
class CaptionTransform:
    """How an image's captions are chosen and edited in training.

    choice: one of several at random, or always the first. wildcards: {a|b} becomes one of the
    alternatives, before anything else. Tags are the comma-separated parts; the
    first `keep_tags` neither move nor drop out, each other one drops out with probability
    `tag_dropout`. `trigger` becomes the first tag unless the caption has it already. `prefix` and
    `suffix` are put around the result as they are. sources: the edits of each of several sources,
    instead of these.
    """

    choice: Literal["random", "first"] = "random"
    wildcards: bool = False
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    trigger_word: str = ""
    prefix: str = ""
    suffix: str = ""
    sources: tuple["CaptionTransform", ...] = ()

    def of_source(self, source: int) -> "CaptionTransform":
        """Return the edits of a source's captions. source: `Record.source`."""
        return self.sources[source] if self.sources else self

    @property
    def edits_randomly(self) -> bool:
        """Whether a caption differs each time, so that its embeddings cannot be cached."""
        if self.sources:
            return any(source.edits_randomly for source in self.sources)
        return self._edits_tags or self.wildcards

    @property
    def _edits_tags(self) -> bool:
        return self.shuffle_tags or self.tag_dropout != 0

    def sample(self, captions: Sequence[str], rng: np.random.Generator) -> str:
        """Choose and edit one of an image's captions.

        The count of numbers drawn from `rng` depends on the captions and the settings alone.
        """
        caption = captions[0]
        if self.choice == "random" and len(captions) > 1:
            caption = captions[int(rng.integers(len(captions)))]
        if self.wildcards:
            caption = resolve_wildcards(caption, rng)
        if self._edits_tags:
            caption = edit_tags(
                caption,
                rng,
                shuffle=self.shuffle_tags,
                keep=self.keep_tags,
                dropout=self.tag_dropout,
            )
        return self._with_fixed(caption)

    def first(self, record: Captioned) -> str:
        """Return a record's first caption with all edits that are not random."""
        return self.of_source(record.source).fixed(record.captions[0])

    def fixed(self, caption: str) -> str:
        """Apply all edits that are not random, as for held-out images; of {a|b} it takes a."""
        return self._with_fixed(resolve_wildcards(caption) if self.wildcards else caption)

    def _with_fixed(self, caption: str) -> str:
        return f"{self.prefix}{with_trigger(caption, self.trigger_word)}{self.suffix}"


def resolve_wildcards(caption: str, rng: np.random.Generator | None = None) -> str:
    """Replace each {a|b}, inner ones first, by an alternative at random; by the first without rng.

    Braces without | stay as they are.
    """

    def one(match: re.Match[str]) -> str:
        choices = match[1].split("|")
        return choices[0 if rng is None else int(rng.integers(len(choices)))]

    while (resolved := WILDCARD.sub(one, caption)) != caption:
        caption = resolved
    return caption


def edit_tags(
    caption: str, rng: np.random.Generator, *, shuffle: bool, keep: int = 0, dropout: float = 0.0
) -> str:
    """Shuffle and drop the comma-separated tags of a caption; the first `keep` stay where they are.

    Each other tag is dropped with probability `dropout` in [0, 1). Raises ValueError outside that
    range.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"tag_dropout must be in [0, 1), got {dropout}")
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    fixed, free = tags[:keep], tags[keep:]
    if dropout > 0:
        kept = rng.random(len(free)) >= dropout
        free = [tag for tag, stays in zip(free, kept, strict=True) if stays]
    if shuffle:
        free = [free[i] for i in rng.permutation(len(free))]
    return ", ".join(fixed + free)


def with_trigger(caption: str, trigger_word: str) -> str:
    """Put the trigger word first, as a tag, unless the caption already holds it as whole words."""
    if not trigger_word or re.search(
        rf"(?<!\w){re.escape(trigger_word)}(?!\w)", caption, re.IGNORECASE
    ):
        return caption
    return f"{trigger_word}, {caption}" if caption else trigger_word


def may_flip(captions: Sequence[str], *, side_words: Sequence[str] = SIDE_WORDS) -> bool:
    """Return whether all captions fit the mirrored image: none mentions sides or writing."""
    words = {word for caption in captions for word in re.findall(r"\w+", caption.lower())}
    return words.isdisjoint(side_words)


def clean_caption(caption: str) -> tuple[str, bool]:
    """Trim a caption, join its lines and remove control characters.

    Returns the caption and whether control characters (also lone surrogates and text-direction
    overrides) were removed.
    """
    if caption.isprintable():
        return " ".join(caption.split()), False
    kept = "".join(c for c in caption if c in "\t\n\r" or not _is_control(c))
    return " ".join(kept.split()), len(kept) < len(caption)


def label_caption(template: str, label: str) -> str:
    """Fill `{label}` in a template with a folder's name, underscores read as spaces."""
    return template.replace("{label}", label.replace("_", " ").strip())


def file_name_caption(path: str) -> str:
    """Return the caption that a file's name is: without folder, ending and a copy's " (2)"."""
    name = re.sub(r"\s*\(\d+\)$", "", PurePosixPath(path).stem)
    return clean_caption(name.replace("_", " "))[0]


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in BIDI_CONTROLS + "\ufeff"
