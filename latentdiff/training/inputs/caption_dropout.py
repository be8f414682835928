"""Caption dropout: train on the null prompt now and then, as classifier-free guidance needs.

Ho & Salimans 2022, Alg. 1. A data worker decides by the sample's key, so that no layout changes
which captions are dropped; text_to_image/objective.py replaces these, token ids and embeddings
alike.
"""

from latentdiff.models.conditioning import Conditioning
from latentdiff.models.text import NULL_CAPTION, null_prompt
from latentdiff.training.inputs.encode import TextSource
from latentdiff.training.inputs.randomness import SampleKey


def is_caption_dropped(key: SampleKey, *, seed: int, caption_dropout: float) -> bool:
    """Return whether a sample's caption is dropped. caption_dropout: the probability, in [0, 1]."""
    return bool(key.generator("dropout", seed=seed).random() < caption_dropout)


def is_condition_dropped(
    key: SampleKey, *, seed: int, caption_dropout: float, condition_dropout: float
) -> bool:
    """Return whether a sample's image condition is dropped, half of them with their caption.

    By the number that decides on the caption too, as Brooks et al. 2023: probabilities of 0.1 each
    leave 5 % without the caption alone, 5 % without the image and 5 % without both.
    """
    first = min(caption_dropout / 2, 1 - condition_dropout)
    u = key.generator("dropout", seed=seed).random()
    return bool(first <= u < first + condition_dropout)


def null_text(source: TextSource, *, zeros: bool) -> Conditioning:
    """Return the null prompt's token ids or embeddings, of one image; zeros: see `null_prompt`."""
    return null_prompt(source.batch([NULL_CAPTION]), zeros=zeros)
