"""Learned words of textual inversion (Gal et al. 2023), read from files and checked.

diffusers keeps vectors (n, D) under the word itself; kohya and A1111 under "emb_params", where the
file's name is the word. Files for SDXL have "clip_l" and "clip_g", the same number of vectors for
each text encoder; the word is in the metadata, or the file's name. Does not answer for: adding a
word to the text encoder (adapters.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from latentdiff.models.file_kind import EMBEDDING, WIDTHS, describe, kind_of
from latentdiff.models.text import END_OF_WORD
from latentdiff.pipeline.files.adapter_file import AdapterFile, stored_metadata

NAMELESS = "emb_params"
SDXL_EMBEDDINGS = ("clip_l", "clip_g")  # of the first and the second text encoder
WORD = "modelspec.trigger_phrase"
MAX_VECTORS = 75  # of a window of 77 tokens, without its start and end

logger = logging.getLogger(__name__)


def read_embeddings(
    file: AdapterFile, token: str | None, *, widths: Sequence[int]
) -> tuple[str, list[Tensor]]:
    """Return the word of a file and its vectors (n, D) for each text encoder, of these widths.

    token: the word to use in its place. Raises ValueError, with the file's name, as
    `read_embedding` does, and for a file that is for one text encoder where there are two.
    """
    if len(widths) == 1:
        word, vectors = read_embedding(file, token, width=widths[0])
        return word, [vectors]
    shapes = {name: tuple(tensor.shape) for name, tensor in file.weights.items()}
    if shapes.keys() != set(SDXL_EMBEDDINGS):
        known = kind_of(shapes) is EMBEDDING
        found = f"the vectors {', '.join(sorted(shapes)):.200}" if known else describe(shapes)
        raise ValueError(
            f"{file.name} holds {found}, expected clip_l and clip_g: the vectors of one word for "
            "both of this model's text encoders"
        )
    rows = [
        _checked(file.weights[name], name=f"{file.name}: {name}", width=width)
        for name, width in zip(SDXL_EMBEDDINGS, widths, strict=True)
    ]
    if len(rows[0]) != len(rows[1]):
        raise ValueError(
            f"{file.name} has {len(rows[0])} vectors in clip_l and {len(rows[1])} in clip_g, "
            "expected as many"
        )
    stored = stored_metadata(file.path).get(WORD) if file.path is not None else None
    word = token or stored or (file.path.stem if file.path is not None else "")
    if not isinstance(word, str) or not word.strip():
        raise ValueError(f"{file.name} does not name its word; pass token=")
    return word, rows


def read_embedding(file: AdapterFile, token: str | None, *, width: int) -> tuple[str, Tensor]:
    """Return the word and its vectors (n, D) of a file; token: the word to use in its place.

    Raises ValueError, with the file's name, for another kind of file, another width, vectors that
    are not finite, or a word that is missing or blank.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in file.weights.items()}
    if shapes.keys() >= set(SDXL_EMBEDDINGS):
        raise ValueError(
            f"{file.name} is an embedding for Stable Diffusion XL (clip_l and clip_g), and this "
            f"model has one text encoder, of width {width}"
        )
    if kind_of(shapes) is not EMBEDDING:
        raise ValueError(f"{file.name} is no embedding, it holds {describe(shapes)}")
    if len(shapes) != 1:
        names = ", ".join(sorted(shapes))
        raise ValueError(f"{file.name} holds {names:.200}, expected the vectors of one word")
    ((name, vectors),) = file.weights.items()
    own = file.path.stem if name == NAMELESS and file.path is not None else name
    word = own if token is None else token
    if not isinstance(word, str) or not word.strip() or (word == NAMELESS and token is None):
        raise ValueError(f"{file.name} does not name its word, got {word!r:.80}; pass token=")
    return word, _checked(vectors, name=file.name, width=width)


def check_new_words(words: Mapping[str, Tensor], tokenizer: CLIPTokenizer) -> None:
    """Raise ValueError where a word, or the name of one of its vectors, is a token already.

    Warn where a new word is part of ordinary words, which are then read as other tokens.
    """
    taken = set(tokenizer.get_vocab())
    folded = {name.casefold(): name for name in tokenizer.get_added_vocab()}
    for word, vectors in words.items():
        for name in (word, *(f"{word}_{k}" for k in range(1, len(vectors)))):
            if name in taken or name.casefold() in folded:
                raise ValueError(
                    f"the tokenizer has a token {name!r} already; pass another word as token=, "
                    f'such as "<{word}>"'
                )
            folded[name.casefold()] = name
        _warn_of_changed_words(word, taken)


def _checked(vectors: Tensor, *, name: str, width: int) -> Tensor:
    """Return vectors (n, D) in float32."""
    rows = vectors[None] if vectors.ndim == 1 else vectors
    if rows.ndim != 2 or not 1 <= len(rows) <= MAX_VECTORS or not rows.is_floating_point():
        raise ValueError(
            f"{name} holds {tuple(vectors.shape)} of {vectors.dtype}, expected (n, {width}) real "
            f"numbers, n from 1 to {MAX_VECTORS}"
        )
    if rows.shape[1] != width:
        family = WIDTHS.get(rows.shape[1], "another text encoder")
        raise ValueError(
            f"{name} is an embedding of width {rows.shape[1]}, for {family}; this model's text "
            f"encoder has width {width}"
        )
    if not bool(torch.isfinite(rows.float()).all()):
        raise ValueError(f"{name} holds vectors that are not finite: NaN or infinite")
    return rows.float()


def _warn_of_changed_words(word: str, vocabulary: set[str]) -> None:
    part = word.casefold()
    whole = (one.removesuffix(END_OF_WORD) for one in vocabulary if one.endswith(END_OF_WORD))
    changed: Any = sorted((one for one in whole if part in one), key=lambda one: (len(one), one))
    if changed:
        logger.warning(
            "the new word %r is part of %d of the tokenizer's words, such as %s, which are now "
            'read as other tokens; pass token="<%s>" to keep them',
            word,
            len(changed),
            ", ".join(changed[:3]),
            word,
        )
