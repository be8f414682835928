"""Does a CLIP find the caption of a picture, and the picture of a caption? Recall at k."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.evaluation.bootstrap import Interval, proportion


def recall_at(
    pictures: Tensor, texts: Tensor, captions: Sequence[str], *, k: int, level: float = 0.95
) -> tuple[Interval, Interval]:
    """Return how often the right caption is among a picture's k nearest, and the reverse.

    pictures, texts: (N, D) unit vectors of N pairs; captions: the N texts. A caption that several
    pairs share is one candidate, and any of its pictures is a right answer. Chance is about k over
    the number of captions. Raises ValueError for unequal counts or a k out of range.
    """
    if not len(pictures) == len(texts) == len(captions):
        raise ValueError(
            f"{len(pictures)} pictures, {len(texts)} texts and {len(captions)} captions, expected "
            "pairs"
        )
    first = {caption: place for place, caption in reversed(list(enumerate(captions)))}
    names = sorted(first)
    if not 1 <= k <= len(names):
        raise ValueError(f"k={k}, expected 1 to {len(names)}, the number of captions")
    number = {name: place for place, name in enumerate(names)}
    own = torch.tensor([number[caption] for caption in captions], device=pictures.device)
    candidates = texts[torch.tensor([first[name] for name in names], device=texts.device)]
    scores = pictures @ candidates.T  # (N, number of captions)
    found_text = (scores.topk(k, dim=1).indices == own[:, None]).any(1)
    nearest = scores.topk(min(k, len(pictures)), dim=0).indices  # (k, number of captions)
    found_picture = (own[nearest] == torch.arange(len(names), device=own.device)).any(0)
    return (
        proportion(int(found_text.sum()), len(found_text), level=level),
        proportion(int(found_picture.sum()), len(found_picture), level=level),
    )
