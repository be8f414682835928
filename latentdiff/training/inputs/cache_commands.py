"""The caches of whole configs: build them ahead of training, verify them, prune unused files.

The files of a cache are data/cache/'s business.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from latentdiff.config.data import DataConfig
from latentdiff.config.text_to_image import Config
from latentdiff.data.cache.latent_cache import LatentCache, prune_cache, verify_cache
from latentdiff.data.cache.mask_cache import MaskCache
from latentdiff.data.cache.prompt_cache import prompt_keys
from latentdiff.data.folder.folder import Folder
from latentdiff.data.inspection.text_report import size_text
from latentdiff.models.components import load_components, load_text
from latentdiff.models.latents import LatentCodec
from latentdiff.models.model_path import resolve_model
from latentdiff.models.text import TextEncoders, set_clip_skip
from latentdiff.training.inputs.conditions import (
    ConditionSource,
    DepthSource,
    EditSource,
    UpscaleSource,
    condition_keys,
    condition_source,
)
from latentdiff.training.inputs.encode import (
    cache_dir,
    cache_latents,
    cache_masks,
    cache_prompts,
    caption_transform,
    crop_plan,
    eval_crop_config,
    make_masks,
    unique_captions,
)
from latentdiff.training.inputs.sources import read_data
from latentdiff.training.text_to_image.components import check_components, load_vae_of
from latentdiff.training.text_to_image.model import trains_text_encoder
from latentdiff.training.text_to_image.resolution import with_resolution

TOLERANCE = 0.05  # of raw latents: above the rounding of another device, below another VAE's


@dataclass(frozen=True)
class Built:
    """The number of cached items of one kind, and how many this process encoded now."""

    name: str
    num: int
    num_encoded: int

    def __str__(self) -> str:
        return f"{self.num:,} {self.name}, {self.num_encoded:,} encoded now"


@dataclass(frozen=True)
class Verified:
    """The result of verifying one folder's latents.

    num_missing: latents not encoded yet; max_error: largest difference of raw moments over the
    num_verified images that were encoded again.
    """

    name: str
    num: int
    num_missing: int
    num_verified: int
    max_error: float

    @property
    def is_valid(self) -> bool:
        """Whether the verified latents are the VAE's; missing ones may yet be built."""
        return self.max_error <= TOLERANCE

    def __str__(self) -> str:
        state = f"latents of {self.num:,} {self.name}: {self.num_missing:,} not encoded yet"
        if not self.num_verified:
            return f"{state}; none to verify"
        verdict = "as kept" if self.is_valid else "NOT AS KEPT, remove them and build again"
        found = f"{self.num_verified:,} encoded again differ by at most {self.max_error:.2g}"
        return f"{state}; {found}: {verdict}"


def build_caches(config: Config, *, accelerator: Accelerator) -> Iterator[Built]:
    """Encode what a config's caches lack: images, and captions for a frozen text encoder.

    ValueError or FileNotFoundError names the error in the config or the data.
    """
    config = with_resolution(config)
    train, heldout = _checked(config)
    vae = load_vae_of(config)
    for name, folder, data in _parts(config, train, heldout):
        cache = cache_latents(folder, vae, data, accelerator=accelerator)
        assert isinstance(cache, LatentCache)
        yield Built(f"{name} images", len(cache), cache.num_encoded)
        factor = cache.factor
        masks = cache_masks(folder, data, factor=factor, accelerator=accelerator)
        if isinstance(masks, MaskCache):
            yield Built(f"{name} masks", len(masks), masks.num_read)
        if (kind := config.condition_kind) != "none":
            source = condition_source(
                folder, config.condition, data, kind=kind, vae=vae, accelerator=accelerator
            )
            yield from _build_conditions(name, source)
    if (loaded := _frozen_text_encoders(config)) is not None:
        captions = unique_captions((train, heldout), caption_transform(config.data))
        texts = cache_prompts(captions, loaded, config.data, accelerator=accelerator)
        yield Built("captions", len(texts), texts.num_encoded)


def _build_conditions(name: str, source: ConditionSource) -> Iterator[Built]:
    """Yield what was cached of conditions; nothing for those that are read at every step."""
    if isinstance(source, EditSource) and isinstance(source.latents, LatentCache):
        cache = source.latents
        yield Built(f"{name} conditions", len(cache), cache.num_encoded)
    elif isinstance(source, DepthSource | UpscaleSource) and isinstance(source.maps, MaskCache):
        yield Built(f"{name} conditions", len(source.maps), source.maps.num_read)


def verify_caches(
    config: Config, *, num_samples: int = 16, device: torch.device | str = "cpu"
) -> Iterator[Verified]:
    """Encode a subsample of a config's images again and compare; nothing is written."""
    config = with_resolution(config)
    train, heldout = _checked(config)
    codec = LatentCodec(load_vae_of(config).to(device))
    for name, folder, data in _parts(config, train, heldout):
        cache = _opened(folder, codec, data)
        max_error = verify_cache(cache, folder, codec=codec, num_samples=num_samples)
        num_verified = min(num_samples, len(cache.complete_records()))
        yield Verified(f"{name} images", len(cache), cache.num_missing, num_verified, max_error)


def prune_caches(configs: Sequence[Config], *, delete: bool = False) -> list[tuple[Path, int]]:
    """List the files of the configs' cache folders, with their bytes, that none of them uses.

    They are removed only if `delete`. A file that holds anything in use stays whole.
    """
    in_use: dict[Path, list[np.ndarray]] = {}
    for config in configs:
        in_use.setdefault(cache_dir(config.data).resolve(), []).extend(_keys_in_use(config))
    found = []
    for folder, keys in in_use.items():
        found += prune_cache(folder, keys, delete=delete)
    return found


def describe_pruned(found: Sequence[tuple[Path, int]], *, deleted: bool) -> Iterator[str]:
    """Describe the files that `prune_caches` found, a line each, and whether they are removed."""
    for path, num_bytes in found:
        yield f"{path}  {size_text(num_bytes)}"
    total = size_text(sum(num_bytes for _, num_bytes in found))
    fate = "removed" if deleted else "not in use; --delete removes them"
    yield f"{len(found):,} files, {total}: {fate}" if found else "all files are in use"


def _keys_in_use(config: Config) -> Iterator[np.ndarray]:
    """Yield the keys of all cached items that a run with this config reads."""
    config = with_resolution(config)
    check_components(config)
    folders = read_data(
        config.data,
        condition=config.condition_files,
        inpaint_masks=config.condition.reads_mask_files,
        prompts=config.finetune.instance_prompts,
    )
    if config.data.cache:
        codec = LatentCodec(load_vae_of(config))
        for _, folder, data in _parts(config, *folders):
            yield _opened(folder, codec, data).keys
            if (masks := make_masks(folder, data, factor=codec.factor)) is not None:
                yield MaskCache.open(masks, cache_dir=cache_dir(data)).keys
            yield from condition_keys(folder, config.condition_kind, data, codec=codec)
    if (loaded := _frozen_text_encoders(config)) is not None:
        captions = unique_captions(folders, caption_transform(config.data))
        yield prompt_keys(captions, loaded)


def _checked(config: Config) -> tuple[Folder, Folder]:
    """Return training and held-out records; ValueError without data.cache."""
    check_components(config)
    if not config.data.cache:
        raise ValueError("data.cache=false keeps no latents; leave it out to build or verify them")
    return read_data(
        config.data,
        condition=config.condition_files,
        inpaint_masks=config.condition.reads_mask_files,
        prompts=config.finetune.instance_prompts,
    )


def _parts(config: Config, train: Folder, heldout: Folder) -> list[tuple[str, Folder, DataConfig]]:
    """Return the folders that are not empty, with the settings they are encoded with."""
    parts = [
        ("training", train, config.data),
        ("held-out", heldout, eval_crop_config(config.data)),
    ]
    return [part for part in parts if len(part[1])]


def _opened(folder: Folder, codec: LatentCodec, data: DataConfig) -> LatentCache:
    return LatentCache.open(
        folder,
        codec,
        cache_dir=cache_dir(data),
        plan=crop_plan(folder, data),
        flips=data.random_flip,
        progress=False,
    )


def _frozen_text_encoders(config: Config) -> TextEncoders | None:
    """Load the text encoders whose embeddings a config's run caches; None where it caches none."""
    if trains_text_encoder(config) or caption_transform(config.data).edits_randomly:
        return None
    folder = resolve_model(config.model.pretrained or config.model.text_encoder)
    if folder.is_dir():
        encoders = load_text(folder)
    else:
        components = load_components(config.model.pretrained, safety_checker=False)
        encoders = components.text_encoders
    set_clip_skip(encoders, config.model.clip_skip)
    return encoders
