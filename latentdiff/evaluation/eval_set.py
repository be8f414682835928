"""The model under test and the captioned images of its evaluation: pixels, latents, conditioning.

Answers for: which images of a folder are taken, and that they are cropped and encoded as in
training.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latentdiff.config.options import CaptionAuditOptions, EvalModelOptions, PrivacyOptions
from latentdiff.config.validation import check_ranges
from latentdiff.data.arrow.listing import TABLES
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.folder.folder_names import FOLDER_NAMES
from latentdiff.data.images import resize_and_crop, to_pixels
from latentdiff.device import choose_device
from latentdiff.evaluation.metrics.vlb import CaptionedLatents
from latentdiff.image_grid import to_uint8
from latentdiff.image_io import ImageError, load_image
from latentdiff.models.compatibility import condition_kinds, reads_time_ids
from latentdiff.models.components import Components, load_components
from latentdiff.models.conditioning import Conditioning, make_time_ids
from latentdiff.models.latents import LatentCodec
from latentdiff.models.model_path import resolve_model
from latentdiff.models.text import NULL_CAPTION, null_prompt
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.conditioning.canvas import trained_size_px
from latentdiff.pipeline.files.model_info import ModelInfo, read_model_info

DISTILLED = "a distilled model predicts with guidance, at the timesteps of its few steps alone"


@dataclass(frozen=True, eq=False)
class RealImages:
    """N images of the folder, cropped to the model's size."""

    captions: tuple[str, ...]
    ids: tuple[str, ...]
    classes: tuple[str, ...]  # "" where there are none
    bytes: Tensor  # (N, 3, H, W) uint8

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> "RealImages":
        """Return some of the images, in that order."""
        names = (self.captions, self.ids, self.classes)
        captions, ids, classes = (tuple(each[i] for i in indices) for each in names)
        return RealImages(captions, ids, classes, self.bytes[list(indices)])

    def subsample(self, num: int) -> "RealImages":
        """Return at most num images of different captions, evenly spaced."""
        index = {caption: i for i, caption in reversed(list(enumerate(self.captions)))}
        first = sorted(index.values())
        chosen = np.linspace(0, len(first) - 1, min(num, len(first))).round().astype(int)
        return self.select([first[i] for i in chosen])


@dataclass(frozen=True, eq=False)
class EvalModel:
    """A model on its device with the images of its evaluation."""

    components: Components
    latents: CaptionedLatents
    folder: Folder  # of the images, in the latents' order
    device: torch.device
    batch_size: int
    seed: int
    info: ModelInfo = field(default_factory=ModelInfo)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was trained at."""
        return trained_size_px(self.components.unet, factor=LatentCodec(self.components.vae).factor)

    @property
    def is_distilled(self) -> bool:
        """Whether the model was distilled to few sampling steps."""
        return self.info.num_inference_steps is not None

    def pipeline(self) -> LatentDiffPipeline:
        """Return a pipeline of the components, without a progress bar."""
        checker = self.components.safety_checker
        pipe = LatentDiffPipeline(
            **self.components.as_dict(), requires_safety_checker=checker is not None
        )
        pipe.model_info = self.info
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generator(self) -> torch.Generator:
        """Return a generator on the CPU, the same at every call."""
        return torch.Generator().manual_seed(self.seed)


def open_eval_model(model: str, options: EvalModelOptions) -> EvalModel:
    """Load a pipeline folder and encode the images. ValueError or OSError names the fault."""
    check_eval_options(options)
    folder = read_eval_folder(options)
    components = load_components(model, safety_checker=options.safety_checker)
    _check_reads_text_alone(components, model)
    device = choose_device(options.device)
    encoders = (components.text_encoder, components.text_encoder_2)
    for part in (components.unet, components.vae, *encoders):
        if part is not None:
            part.requires_grad_(False).to(device)
    latents = encode_folder(
        components, folder, batch_size=options.batch_size, device=device, seed=options.seed
    )
    info = read_model_info(resolve_model(model))
    return EvalModel(components, latents, folder, device, options.batch_size, options.seed, info)


def open_denoiser(model: str, options: EvalModelOptions) -> EvalModel:
    """Load a model whose losses are those of its training; ValueError too for a distilled one."""
    eval_model = open_eval_model(model, options)
    if eval_model.is_distilled:
        raise ValueError(f"{model}: {DISTILLED}; name the model that it was distilled from")
    return eval_model


def _check_reads_text_alone(components: Components, model: str) -> None:
    """Raise ValueError for a model that reads an image besides its caption."""
    channels, config = LatentCodec(components.vae).channels, components.unet.config
    if config["in_channels"] == channels:
        return
    kinds = condition_kinds(config, latent_channels=channels)
    raise ValueError(
        f"{model} reads an image besides its caption (condition.kind={' or '.join(kinds) or '?'}), "
        "expected a model of text alone; the held-out loss of its run, with condition_use, "
        "measures it: latentdiff report RUN"
    )


def audit_options(
    options: CaptionAuditOptions | PrivacyOptions,
    *,
    split: Literal["heldout", "train", "all"],
    data: str = "",
) -> EvalModelOptions:
    """Return the options by which an audit opens a model and a folder, by default its own."""
    return EvalModelOptions(
        data or options.data,
        split=split,
        num_heldout=options.max_images,
        caption_column=options.caption_column,
        heldout_fraction=options.heldout_fraction,
        batch_size=options.batch_size,
        seed=options.seed,
        device=options.device,
        safety_checker=False,
    )


def check_eval_options(options: EvalModelOptions) -> None:
    """Raise ValueError for options out of range."""
    check_ranges(options)


@torch.no_grad()
def encode_folder(
    components: Components, folder: Folder, *, batch_size: int, device: torch.device, seed: int
) -> CaptionedLatents:
    """Encode a folder's images, with their first captions, at the U-Net's own size."""
    codec = LatentCodec(components.vae)
    height, width = trained_size_px(components.unet, factor=codec.factor)
    captions = tuple(record.captions[0] for record in folder)
    generator = torch.Generator().manual_seed(seed)
    z0, conditioning = [], []
    for start in range(0, len(folder), batch_size):
        part = range(start, min(start + batch_size, len(folder)))
        pixels = torch.stack([read_pixels(folder, i, height=height, width=width) for i in part])
        mean, std = codec.moments(pixels.to(device))
        eps = torch.randn(mean.shape, generator=generator)
        z0.append(mean.cpu() + std.cpu() * eps)
        texts = captions[part.start : part.stop]
        conditioning.append(encode_captions(components, texts, size=(height, width)))
    null = _null_conditioning(components, size=(height, width))
    return CaptionedLatents(captions, torch.cat(z0), Conditioning.cat(conditioning), null)


def read_eval_folder(options: EvalModelOptions) -> Folder:
    """Read the folder and subsample the split. ValueError where the split has no image."""
    folder = read_split(options, options.split)
    if not len(folder):
        raise ValueError(
            f"{options.data} has no image in its {options.split} split; name a folder test/ or "
            "validation/, raise --heldout_fraction, or take --split all"
        )
    return subsample(folder, options.num_heldout)


def read_split(options: EvalModelOptions, split: Literal["heldout", "train", "all"]) -> Folder:
    """Read the folder and return all images of a split, which may be empty."""
    folder = read_folder(
        options.data,
        caption_column=options.caption_column,
        heldout_fraction=options.heldout_fraction if options.split != "all" else 0.0,
    )
    folder.check(max_invalid_fraction=1.0)
    if split == "all":
        return folder
    return folder.heldout() if split == "heldout" else folder.split("train")


def subsample(folder: Folder, num: int) -> Folder:
    """Return at most num records, evenly spaced."""
    kept = np.linspace(0, len(folder) - 1, min(num, len(folder)))
    return folder.select(kept.round().astype(np.int64))


def read_real_images(
    folder: Folder, *, size: tuple[int, int], class_column: str = ""
) -> RealImages:
    """Read a folder's images, cropped as in training; size: (height, width) in pixels.

    class_column: column of the metadata that names an image's class; by default its folder, where
    there are several below the split's.
    """
    height, width = size
    pixels = [read_pixels(folder, i, height=height, width=width) for i in range(len(folder))]
    stacked = torch.stack([to_uint8(one) for one in pixels])
    ids = tuple(record.id for record in folder)
    captions = tuple(record.captions[0] for record in folder)
    return RealImages(captions, ids, read_classes(folder.root, ids, class_column), stacked)


def read_pixels(folder: Folder, index: int, *, height: int, width: int) -> Tensor:
    """Read an image as the model sees it, (3, height, width) in [-1, 1]."""
    try:
        image = load_image(io.BytesIO(folder.read_bytes(index)))
    except ImageError as error:
        raise ValueError(f"{folder[index].id} cannot be read ({error.reason}): {error}") from error
    return to_pixels(resize_and_crop(image, height=height, width=width).image)


def encode_captions(
    components: Components, captions: Sequence[str], *, size: tuple[int, int]
) -> Conditioning:
    """Return the conditioning of captions; SDXL's sizes are those that images are sampled with.

    size: (height, width) in pixels.
    """
    encoders = components.text_encoders
    conditioning = encoders.encode(encoders.tokenize(captions)).to(torch.device("cpu"))
    if reads_time_ids(components.unet.config):
        time_ids = make_time_ids(size).expand(len(captions), -1)
        conditioning = replace(conditioning, time_ids=time_ids)
    return conditioning.to(dtype=torch.float32)


def _null_conditioning(components: Components, *, size: tuple[int, int]) -> Conditioning:
    """Return the conditioning without a caption that the model is sampled with, of one image."""
    null = encode_captions(components, [NULL_CAPTION], size=size)
    return null_prompt(null, zeros=components.force_zeros_for_empty_prompt)


def read_classes(root: Path, ids: Sequence[str], column: str) -> tuple[str, ...]:
    """Return the class of each image, "" where there are none; ValueError for no such column."""
    if column:
        named = read_folder(root, caption_column=column)
        known = {record.id: record.captions[0] for record in named}
        if not known:
            raise ValueError(f"{root} has no column {column!r}; check --class_column")
        return tuple(known.get(name, "") for name in ids)
    parents = [PurePosixPath(name).parent.parts for name in ids]
    folders = [[x for x in parts if not x.endswith((".tar", *TABLES))] for parts in parents]
    below = [parts[1:] if parts and parts[0] in FOLDER_NAMES else parts for parts in folders]
    classes = tuple(parts[0] if parts else "" for parts in below)
    return classes if len(set(classes)) > 1 else ("",) * len(classes)
