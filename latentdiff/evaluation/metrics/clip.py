"""CLIP (Radford et al. 2021): the score of an image with its text, recall at k, and a guide.

`ClipGuide` is a `score_fn` of LatentDiffPipeline: it decodes predicted clean latents, embeds the
image, and returns the cosine to its text. CLIP's own logit is about 100 times the cosine, so a
score_scale of some hundreds is where guidance begins to show. Models are loaded in metric_nets.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from latentdiff.evaluation.metrics.bootstrap import Interval, proportion
from latentdiff.models.latents import Autoencoder, LatentCodec

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Clip:
    """A CLIP as two functions to unit vectors; gradients flow through `embed_pixels`."""

    embed_pixels: Callable[[Tensor], Tensor]  # (B, 3, H, W) in [-1, 1] -> (B, D)
    embed_texts: Callable[[Sequence[str]], Tensor]  # B texts -> (B, D)
    name: str = ""
    hash: str = ""  # sha256 of the weights

    @torch.no_grad()
    def score(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the cosine of each image to its own caption, (B,)."""
        return (self.embed_pixels(pixels) * self.embed_texts(captions)).sum(1)


def wrap_transformers_clip(model: CLIPModel, tokenizer: CLIPTokenizer) -> Clip:
    """Wrap a transformers CLIP."""
    size = model.config.vision_config.image_size

    def embed_pixels(pixels: Tensor) -> Tensor:
        seen = preprocess(pixels, size=size).to(model.dtype)
        pooled = model.vision_model(pixel_values=seen).pooler_output
        return F.normalize(model.visual_projection(pooled).float(), dim=1)

    def embed_texts(texts: Sequence[str]) -> Tensor:
        ids = tokenizer(
            list(texts),
            padding="max_length",
            max_length=model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).to(model.device)
        pooled = model.text_model(**ids).pooler_output
        return F.normalize(model.text_projection(pooled).float(), dim=1)

    return Clip(embed_pixels, embed_texts)


def wrap_open_clip(model: Any, tokenize: Callable[[Sequence[str]], Tensor]) -> Clip:
    """Wrap an open_clip model and its tokenizer (`open_clip.get_tokenizer`)."""
    size = model.visual.image_size
    mean = getattr(model.visual, "image_mean", None) or MEAN
    std = getattr(model.visual, "image_std", None) or STD

    def embed_pixels(pixels: Tensor) -> Tensor:
        seen = preprocess(pixels, size=size, mean=mean, std=std)
        embedded: Tensor = model.encode_image(seen, normalize=True)
        return embedded

    def embed_texts(texts: Sequence[str]) -> Tensor:
        device = next(model.parameters()).device
        embedded: Tensor = model.encode_text(tokenize(list(texts)).to(device), normalize=True)
        return embedded

    return Clip(embed_pixels, embed_texts)


def preprocess(
    pixels: Tensor,
    *,
    size: int | tuple[int, int],
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """Resize pixels (B, 3, H, W) in [-1, 1] to a CLIP's input size, and normalise them."""
    target = (size, size) if isinstance(size, int) else tuple(size)
    shown = (pixels.clamp(-1, 1) + 1) / 2
    if tuple(shown.shape[-2:]) != target:
        shown = F.interpolate(shown, size=target, mode="bicubic", antialias=True).clamp(0, 1)
    centre, scale = (pixels.new_tensor(x).view(1, 3, 1, 1) for x in (mean, std))
    return (shown - centre) / scale


class ClipGuide:
    """Scores predicted clean latents by CLIP: pass one as `score_fn` of a LatentDiffPipeline."""

    def __init__(self, clip: Clip, vae: Autoencoder, captions: Sequence[str]) -> None:
        """captions: one for all images of a call, or one an image, in their order."""
        if isinstance(captions, str) or not captions:
            raise ValueError(f"captions is {captions!r}, expected a list of at least one text")
        self._clip, self._codec = clip, LatentCodec(vae)
        with torch.no_grad():
            self._texts = clip.embed_texts(captions)

    def __call__(self, z0: Tensor, t: Tensor) -> Tensor:
        """Return the cosine of each image to its caption. z0: (B, C, h, w) -> (B,)."""
        if len(self._texts) not in (1, len(z0)):
            raise ValueError(
                f"the guide has {len(self._texts)} captions for {len(z0)} images, expected one "
                "for all or one each"
            )
        images = self._clip.embed_pixels(self._codec.decode(z0))
        return (images * self._texts.to(images)).sum(1)


def recall_at(
    images: Tensor, texts: Tensor, captions: Sequence[str], *, k: int, level: float = 0.95
) -> tuple[Interval, Interval]:
    """Return how often the right caption is among an image's k nearest, and the reverse.

    images, texts: (N, D) unit vectors of N pairs; captions: the N texts. A caption that several
    pairs share is one candidate, and any of its images is a right answer. Chance is about k over
    the number of captions. Raises ValueError for unequal counts or a k out of range.
    """
    if not len(images) == len(texts) == len(captions):
        raise ValueError(
            f"{len(images)} images, {len(texts)} texts and {len(captions)} captions, expected pairs"
        )
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    names = sorted(first)
    if not 1 <= k <= len(names):
        raise ValueError(f"k={k}, expected 1 to {len(names)}, the number of captions")
    number = {name: i for i, name in enumerate(names)}
    own = torch.tensor([number[caption] for caption in captions], device=images.device)
    candidates = texts[torch.tensor([first[name] for name in names], device=texts.device)]
    scores = images @ candidates.T  # (N, number of captions)
    found_text = (scores.topk(k, dim=1).indices == own[:, None]).any(1)
    nearest = scores.topk(min(k, len(images)), dim=0).indices  # (k, number of captions)
    found_image = (own[nearest] == torch.arange(len(names), device=own.device)).any(0)
    return (
        proportion(int(found_text.sum()), len(found_text), level=level),
        proportion(int(found_image.sum()), len(found_image), level=level),
    )
