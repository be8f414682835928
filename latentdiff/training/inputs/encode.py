"""A run's images and captions, encoded as its settings ask: buckets and crops, latents, text.

Images are encoded once into the cache, or at every step without it. Captions become token ids for
a text encoder in training and prompt embeddings for a frozen one: from the cache, or made in the
step where shuffled tags make every caption a new one. The caches are ours, addressed by the content
of each item: datasets' map keys by the whole table, so that one new image would encode all again.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import default_collate

from latentdiff.config.data import DataConfig
from latentdiff.data.arrow.columns import iter_py
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.buckets import Bucket, assign_buckets, make_buckets
from latentdiff.data.cache.decode_ahead import CropPlan
from latentdiff.data.cache.latent_cache import LatentCache
from latentdiff.data.cache.mask_cache import MaskCache
from latentdiff.data.cache.online_encode import OnlineLatentEncoder
from latentdiff.data.cache.prompt_cache import PromptCache
from latentdiff.data.captions import CaptionTransform
from latentdiff.data.conditions import ConditionMaps
from latentdiff.data.folder.content_hash import image_hashes
from latentdiff.data.folder.folder import Folder
from latentdiff.data.masks import Masks
from latentdiff.models.components import Components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import Autoencoder, LatentCodec, LatentStats, set_scalar_scaling
from latentdiff.models.text import TextEncoders, tokenize_all

NUM_SCALING_IMAGES = 1000  # enough for the std of latents to three digits
PIXELS_PER_BATCH = 1 << 20  # for the VAE
MAX_TOKENIZED = 100_000  # captions whose token ids are kept
LatentSource: TypeAlias = LatentCache | OnlineLatentEncoder
Maps: TypeAlias = Masks | ConditionMaps
MaskSource: TypeAlias = MaskCache | Maps


def bucket_sizes(data: DataConfig) -> tuple[Bucket, ...]:
    """List the sizes that images are cut to; the square alone without data.buckets."""
    if not data.buckets:
        return (Bucket(data.side_px, data.side_px),)
    return make_buckets(
        data.side_px, multiple=data.bucket_multiple, max_aspect=data.bucket_max_aspect
    )


def bucket_ids(folder: Folder, data: DataConfig) -> np.ndarray:
    """Return the index in `bucket_sizes` of each image's bucket, (N,)."""
    return assign_buckets(folder.widths, folder.heights, buckets=bucket_sizes(data))


def crop_plan(folder: Folder, data: DataConfig) -> CropPlan:
    """Return how each image of a folder is cropped."""
    table = np.array([(bucket.height, bucket.width) for bucket in bucket_sizes(data)], np.int32)
    sizes = table[bucket_ids(folder, data)]
    originals = np.stack([folder.heights, folder.widths], axis=1)
    scale = (sizes / originals).max(axis=1, initial=0, keepdims=True)
    positions = tuple(np.linspace(0, 1, data.num_crops).tolist())
    return CropPlan(
        sizes=sizes,
        places=(0.5,) if data.num_crops == 1 else positions,
        has_room=(np.rint(originals * scale) > sizes).any(axis=1),
        background=data.background,
    )


def eval_crop_config(data: DataConfig) -> DataConfig:
    """Return the settings that held-out images are read with: centre crops, never mirrored."""
    return replace(data, num_crops=1, random_flip=False)


def cache_latents(
    folder: Folder,
    vae: Autoencoder,
    data: DataConfig,
    *,
    accelerator: Accelerator,
    plan: CropPlan | None = None,
) -> LatentSource:
    """Encode the latents that the cache lacks, shared out over the processes, and open it.

    plan: how images are cropped, by default as the settings say. Without data.cache an image is
    encoded each time it is read.
    """
    codec, plan = LatentCodec(vae.to(accelerator.device)), plan or crop_plan(folder, data)
    if not data.cache:
        return OnlineLatentEncoder(folder, codec, plan=plan)
    if accelerator.num_processes > 1:
        with accelerator.main_process_first():  # the others find its hashes on disk
            image_hashes(folder, index=ScanIndex(cache_dir(data), folder.root))
    cache = LatentCache.build(
        folder,
        codec,
        cache_dir=cache_dir(data),
        plan=plan,
        flips=data.random_flip,
        batch_size=max(1, min(32, PIXELS_PER_BATCH // data.side_px**2)),
        shard=(accelerator.process_index, accelerator.num_processes),
        progress=accelerator.is_local_main_process,
    )
    accelerator.wait_for_everyone()
    return cache


def make_masks(folder: Folder, data: DataConfig, *, factor: int) -> Masks | None:
    """Return the masks of a folder's images, cropped alike; None where the settings ask for none.

    factor: image pixels a side of one latent pixel.
    """
    if data.mask == "none":
        return None
    return Masks(folder, crop_plan(folder, data), factor, data.mask)


def cache_masks(
    folder: Folder, data: DataConfig, *, factor: int, accelerator: Accelerator
) -> MaskSource | None:
    """Read the masks that the cache lacks, shared out over the processes, and open it.

    Without data.cache a mask is read each time its image is.
    """
    masks = make_masks(folder, data, factor=factor)
    return masks and cache_maps(masks, data, accelerator=accelerator)


def cache_maps(masks: Maps, data: DataConfig, *, accelerator: Accelerator) -> MaskSource:
    """Read the maps that the cache lacks, once over all processes; or at every step, uncached."""
    if not data.cache:
        return masks
    if accelerator.num_processes > 1:
        with accelerator.main_process_first():  # the others find its hashes on disk
            MaskCache.open(masks, cache_dir=cache_dir(data))
    cache = MaskCache.build(
        masks,
        cache_dir=cache_dir(data),
        shard=(accelerator.process_index, accelerator.num_processes),
        progress=accelerator.is_local_main_process,
    )
    accelerator.wait_for_everyone()
    return cache


def cache_prompts(
    captions: Iterable[str],
    encoders: TextEncoders,
    data: DataConfig,
    *,
    accelerator: Accelerator,
) -> PromptCache:
    """Encode the captions that the cache lacks, shared out over the processes, and open it."""
    cache = PromptCache.build(
        captions,
        encoders.to(accelerator.device),
        cache_dir=cache_dir(data),
        shard=(accelerator.process_index, accelerator.num_processes),
        progress=accelerator.is_local_main_process,
    )
    accelerator.wait_for_everyone()
    return cache


def set_scaling_factor(vae: Autoencoder, latents: LatentSource) -> LatentStats:
    """Set the VAE's scaling_factor to 1 / std of the latents (Rombach et al. 2022, D.1)."""
    chosen = np.linspace(0, len(latents) - 1, min(len(latents), NUM_SCALING_IMAGES)).astype(int)
    means, squares = [], []
    for index in chosen.tolist():
        mean, std = latents.raw_moments(index)
        means.append(mean.double().mean((1, 2)))
        squares.append((mean.double().square() + std.double().square()).mean((1, 2)))
    mean, square = torch.stack(means).mean(0), torch.stack(squares).mean(0)  # (C,)
    overall = mean.mean()
    stats = LatentStats(
        mean=tuple(mean.tolist()),
        std=tuple((square - mean.square()).clamp_min(0).sqrt().tolist()),
        overall_mean=overall.item(),
        overall_std=(square.mean() - overall.square()).clamp_min(0).sqrt().item(),
        num_images=len(chosen),
    )
    set_scalar_scaling(vae, stats)
    latents.use_scaling_of(LatentCodec(vae))
    return stats


def caption_transform(data: DataConfig) -> CaptionTransform:
    """Return how captions are chosen and edited."""
    sources = tuple(map(caption_transform, data.each_source())) if data.sources else ()
    return CaptionTransform(
        choice=data.caption_choice,
        wildcards=data.wildcards,
        shuffle_tags=data.shuffle_tags,
        keep_tags=data.keep_tags,
        tag_dropout=data.tag_dropout,
        trigger_word=data.trigger_word,
        prefix=data.caption_prefix,
        suffix=data.caption_suffix,
        sources=sources,
    )


def unique_captions(folders: Iterable[Folder], transform: CaptionTransform) -> Iterator[str]:
    """Yield the unique captions of folders, with those edits that are the same each time."""
    for folder in folders:
        for source, part in enumerate(folder.by_source() if transform.sources else [folder]):
            for caption in iter_py(pc.unique(part.captions.flatten())):
                yield transform.of_source(source).fixed(caption)


class TokenIds:
    """Captions as token ids, for a text encoder in training."""

    def __init__(self, components: Components) -> None:
        # no text encoder goes to the data workers
        self._tokenizers = components.tokenizer, components.tokenizer_2
        self._known: dict[str, Tensor] = {}

    def item(self, caption: str) -> dict[str, Tensor]:
        """Return input_ids (L,) int64, of SDXL (2, L)."""
        if caption not in self._known:
            if len(self._known) >= MAX_TOKENIZED:
                self._known.clear()
            self._known[caption] = tokenize_all([caption], *self._tokenizers)[0]
        return {"input_ids": self._known[caption]}

    def batch(self, captions: Sequence[str]) -> Conditioning:
        """Return the token ids of n captions."""
        return Conditioning(input_ids=tokenize_all(captions, *self._tokenizers))


class CachedPromptEmbeds:
    """Captions as prompt embeddings of a frozen text encoder, encoded once."""

    def __init__(self, cache: PromptCache) -> None:
        self.cache = cache

    def item(self, caption: str) -> dict[str, Tensor]:
        """Return prompt_embeds (L, D) and, of SDXL, pooled_embeds (P,)."""
        return self.cache.embeds(caption)

    def batch(self, captions: Sequence[str]) -> Conditioning:
        """Return the embeddings of n captions."""
        return Conditioning.of(default_collate([self.cache.embeds(one) for one in captions]))


class OnlinePromptEmbeds:
    """Captions as token ids that a frozen text encoder turns into prompt embeddings in the step."""

    def __init__(self, components: Components, device: torch.device) -> None:
        self._encoders = components.text_encoders.to(device)
        self.item = TokenIds(components).item

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Conditioning:
        """Return the embeddings of ids (B, L) or (B, 2, L), on the text encoder's device."""
        device = self._encoders.text_encoder.device
        with torch.autocast(device.type, enabled=False):
            return self._encoders.encode(ids.to(device, non_blocking=True))

    @torch.no_grad()
    def batch(self, captions: Sequence[str]) -> Conditioning:
        """Return the embeddings of n captions, on the CPU."""
        parts = [captions[i : i + 64] for i in range(0, len(captions), 64)]
        embeds = [self._encoders.encode_captions(part).to(torch.device("cpu")) for part in parts]
        return Conditioning.cat(embeds)


TextSource: TypeAlias = TokenIds | CachedPromptEmbeds | OnlinePromptEmbeds


def text_source(
    captions: Iterable[str],
    components: Components,
    data: DataConfig,
    *,
    trains_text_encoder: bool,
    accelerator: Accelerator,
) -> TextSource:
    """Return how captions reach the model; a cache is filled with `captions` where one is used."""
    if trains_text_encoder:
        return TokenIds(components)
    if caption_transform(data).edits_randomly:
        return OnlinePromptEmbeds(components, accelerator.device)
    encoders = components.text_encoders
    cache = cache_prompts(captions, encoders, data, accelerator=accelerator)
    return CachedPromptEmbeds(cache)


def cache_dir(data: DataConfig) -> Path:
    """Return the folder of a run's caches and scans."""
    return Path(data.cache_dir).expanduser()
