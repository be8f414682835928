"""A model and held-out captioned images as it sees them: latents and text states.

Answers for: which images of a folder are taken, and that they are cut and encoded as in training.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latentdiff.config.evaluation import EvalModelOptions
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.images import resize_and_crop, to_pixels
from latentdiff.device import choose_device
from latentdiff.image_io import ImageError, load_image
from latentdiff.models.components import Components, load_components
from latentdiff.models.latents import LatentCodec
from latentdiff.models.text import NULL_CAPTION, encode_text, tokenize
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.initial_latents import trained_size_px


@dataclass(frozen=True, eq=False)
class CaptionedLatents:
    """N images as latents with their text states, on the CPU."""

    captions: tuple[str, ...]
    z0: Tensor  # (N, C, h, w) normalised, one sample of the VAE's posterior each
    text: Tensor  # (N, L, D)
    null_text: Tensor  # (1, L, D)

    def __len__(self) -> int:
        return len(self.z0)

    def select(self, indices: Sequence[int]) -> "CaptionedLatents":
        """Return some of the images, in that order."""
        chosen = list(indices)
        return replace(
            self,
            captions=tuple(self.captions[i] for i in chosen),
            z0=self.z0[chosen],
            text=self.text[chosen],
        )


@dataclass(frozen=True, eq=False)
class EvalModel:
    """A model on its device, and the images that it is evaluated on."""

    components: Components
    latents: CaptionedLatents
    folder: Folder  # of the images, in the latents' order
    device: torch.device
    batch_size: int
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was trained at."""
        return trained_size_px(self.components.unet, factor=LatentCodec(self.components.vae).factor)

    def pipeline(self) -> LatentDiffPipeline:
        """Return a pipeline of the components, without a progress bar."""
        checker = self.components.safety_checker
        pipe = LatentDiffPipeline(
            **self.components.as_dict(), requires_safety_checker=checker is not None
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generator(self) -> torch.Generator:
        """Return a generator on the CPU, the same at every call."""
        return torch.Generator().manual_seed(self.seed)


def open_eval_model(model: str, options: EvalModelOptions) -> EvalModel:
    """Open a pipeline folder and encode the images. ValueError or OSError says what is wrong."""
    for name in ("num_heldout", "batch_size"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"{name}={value}, expected at least 1")
    folder = subsample_indices(options)
    components = load_components(model)
    device = choose_device(options.device)
    for part in (components.unet, components.vae, components.text_encoder):
        part.requires_grad_(False).to(device)
    latents = encode_folder(
        components, folder, batch_size=options.batch_size, device=device, seed=options.seed
    )
    return EvalModel(components, latents, folder, device, options.batch_size, options.seed)


@torch.no_grad()
def encode_folder(
    components: Components, folder: Folder, *, batch_size: int, device: torch.device, seed: int
) -> CaptionedLatents:
    """Encode a folder's images, with their first captions, at the U-Net's own size."""
    codec = LatentCodec(components.vae)
    height, width = trained_size_px(components.unet, factor=codec.factor)
    captions = tuple(record.captions[0] for record in folder)
    generator = torch.Generator().manual_seed(seed)
    z0, text = [], []
    for start in range(0, len(folder), batch_size):
        part = range(start, min(start + batch_size, len(folder)))
        pixels = torch.stack([read_pixels(folder, i, height=height, width=width) for i in part])
        mean, std = codec.moments(pixels.to(device))
        eps = torch.randn(mean.shape, generator=generator)
        z0.append(mean.cpu() + std.cpu() * eps)
        text.append(_states(components, captions[part.start : part.stop]))
    null = _states(components, [NULL_CAPTION])
    return CaptionedLatents(captions, torch.cat(z0), torch.cat(text), null)


def subsample_indices(options: EvalModelOptions) -> Folder:
    """Read the folder and take images of the split. ValueError where there is none."""
    folder = read_split(options, options.split)
    if not len(folder):
        raise ValueError(
            f"{options.data} has no image in its {options.split} split; name a folder test/ or "
            "validation/, raise --heldout_fraction, or take --split all"
        )
    return spread(folder, options.num_heldout)


def read_split(options: EvalModelOptions, split: Literal["heldout", "train", "all"]) -> Folder:
    """Read the folder and take all images of a split, which may be none."""
    folder = read_folder(
        Path(options.data).expanduser(),
        caption_column=options.caption_column,
        heldout_fraction=options.heldout_fraction if options.split != "all" else 0.0,
    )
    folder.check(max_invalid_fraction=1.0)
    if split == "all":
        return folder
    return folder.heldout() if split == "heldout" else folder.split("train")


def spread(folder: Folder, num: int) -> Folder:
    """Take at most num records, evenly spread."""
    kept = np.linspace(0, len(folder) - 1, min(num, len(folder)))
    return folder.select(kept.round().astype(np.int64))


def read_pixels(folder: Folder, index: int, *, height: int, width: int) -> Tensor:
    """Read an image as the model sees it, (3, height, width) in [-1, 1]."""
    try:
        image = load_image(io.BytesIO(folder.read_bytes(index)))
    except ImageError as error:
        raise ValueError(f"{folder[index].id} cannot be read ({error.reason}): {error}") from error
    return to_pixels(resize_and_crop(image, height=height, width=width).image)


def _states(components: Components, captions: Sequence[str]) -> Tensor:
    ids = tokenize(components.tokenizer, captions)
    return encode_text(components.text_encoder, ids).float().cpu()
