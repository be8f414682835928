"""Caption dropout: train on the null prompt now and then, as classifier-free guidance needs.

Ho & Salimans 2022, Alg. 1. A data worker decides by the sample's key, so that no layout changes
which captions are dropped; text_to_image/objective.py replaces these by `drop_captions`, token
ids and prompt embeddings alike.
"""

import torch
from torch import Tensor

from latentdiff.models.text import NULL_CAPTION
from latentdiff.training.inputs.encode import TextSource
from latentdiff.training.inputs.randomness import SampleKey


def is_caption_dropped(key: SampleKey, *, seed: int, caption_dropout: float) -> bool:
    """Return whether a sample's caption is dropped. caption_dropout: the probability, in [0, 1]."""
    return bool(key.generator("dropout", seed=seed).random() < caption_dropout)


def drop_captions(text: Tensor, null_text: Tensor, dropped: Tensor) -> Tensor:
    """Put the null prompt where a caption is dropped (Ho & Salimans 2022, Alg. 1).

    text: ids (B, L) or prompt embeddings (B, L, D); null_text: as text, of 1 or B; dropped: (B,)
    bool.
    """
    mask = dropped.view(-1, *[1] * (text.ndim - 1))
    return torch.where(mask, null_text.to(text.dtype), text)


def null_text(source: TextSource) -> Tensor:
    """Return the null prompt's ids (1, L) or embeddings (1, L, D)."""
    return source.batch([NULL_CAPTION])
