"""What a run trains on, made ready: folder -> latents and text on disk -> batches and triples.

The folder is read and judged before any weight is loaded; pictures and captions are encoded once.
A text tower that learns gets token ids, a frozen one's states come from the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from latentdiff.config import Config, DataConfig
from latentdiff.data.cache import CropPlan, LatentCache, TextCache
from latentdiff.data.folder import Folder, read_folder
from latentdiff.evaluation.heldout import Triples, stratified_timesteps
from latentdiff.latents import Autoencoder, LatentCodec, LatentStats, set_scalar_scaling
from latentdiff.models import Components
from latentdiff.text import NULL_CAPTION, tokenize
from latentdiff.training.randomness import draws, normal
from latentdiff.training.samples import Layout, Samples, StepSlots

MEASURED_PICTURES = 1000  # enough for the std of latents to three digits
ENCODED_PIXELS = 1 << 20  # of one batch for the VAE
REMEMBERED_CAPTIONS = 100_000  # whose token ids are kept


@dataclass(frozen=True)
class Supply:
    """The training samples and the fixed held-out triples of a run."""

    train: Folder
    held_out: Folder
    samples: Samples
    null_text: Tensor  # (1, L) ids or (1, L, D) states
    triples: Triples | None


def read_data(data: DataConfig, *, trust_index: bool = False) -> tuple[Folder, Folder]:
    """Read the folder; return its training and held-out records. ValueError says what is wrong.

    trust_index: take the scan that another process has just made.
    """
    if not data.root:
        raise ValueError("data.root is empty, expected a captioned folder; give --data.root=DIR")
    folder = read_folder(
        Path(data.root).expanduser(),
        caption_column=data.caption_column,
        file_column=data.file_column,
        duplicate_rows=data.duplicate_rows,
        sidecar_lines=data.sidecar_lines,
        caption_template=data.caption_template,
        missing_caption=data.missing_caption,
        follow_links=data.follow_links,
        split_fraction=data.split_fraction,
        min_size=data.min_size,
        max_aspect=data.max_aspect,
        cache_dir=_cache_dir(data),
        trust_index=trust_index,
    )
    folder.check(max_bad_fraction=data.max_bad_fraction)
    train = folder.split("train")
    if not len(train):
        raise ValueError(f"the data folder {data.root} has no picture in its training split")
    return train, folder.held_out()


def cache_latents(
    folder: Folder, vae: Autoencoder, data: DataConfig, *, accelerator: Accelerator
) -> LatentCache:
    """Encode what the cache lacks, shared out over the processes, and open it."""
    plan = CropPlan(
        sizes=np.full((len(folder), 2), data.resolution, dtype=np.int32), background=data.background
    )
    cache = LatentCache.build(
        folder,
        LatentCodec(vae.to(accelerator.device)),
        cache_dir=_cache_dir(data),
        plan=plan,
        flips=data.random_flip,
        batch_size=max(1, min(32, ENCODED_PIXELS // data.resolution**2)),
        shard=(accelerator.process_index, accelerator.num_processes),
        progress=accelerator.is_local_main_process,
    )
    accelerator.wait_for_everyone()
    return cache


def fit_scaling(vae: Autoencoder, cache: LatentCache) -> LatentStats:
    """Set the VAE's scaling_factor to 1 / std of the cached latents (Rombach et al. 2022, D.1)."""
    chosen = np.linspace(0, len(cache) - 1, min(len(cache), MEASURED_PICTURES)).astype(int)
    means, squares = [], []
    for index in chosen.tolist():
        mean, std = cache.raw_moments(index)
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
    cache.use_scaling_of(LatentCodec(vae))
    return stats


def make_supply(
    config: Config,
    train: Folder,
    held_out: Folder,
    *,
    components: Components,
    latents: LatentCache,
    learns_text: bool,
    accelerator: Accelerator,
) -> Supply:
    """Put caches, draws and captions together."""
    source: _TokenIds | _CachedStates
    if learns_text:
        source = _TokenIds(components)
    else:
        captions = [c for folder in (train, held_out) for r in folder for c in r.captions]
        source = _CachedStates(config, captions, components, accelerator)
    samples = Samples(
        latents.moments,
        train,
        source.text,
        seed=config.train.seed,
        caption_dropout=config.diffusion.caption_dropout,
        random_flip=config.data.random_flip,
    )
    null_text = source.text(NULL_CAPTION)[None]
    triples = None
    if len(held_out):
        cache = cache_latents(held_out, components.vae, config.data, accelerator=accelerator)
        num = components.scheduler.config["num_train_timesteps"]
        triples = _triples(config, held_out, cache, source, null_text, num_timesteps=num)
    return Supply(train, held_out, samples, null_text, triples)


def step_batches(
    config: Config, supply: Supply, layout: Layout, *, first_step: int, accelerator: Accelerator
) -> Iterator[dict[str, Tensor]]:
    """Yield this process's micro-batches from optimiser step `first_step` to the last."""
    slots = StepSlots(
        layout,
        num_samples=len(supply.train),
        seed=config.train.seed,
        first_step=first_step,
        last_step=config.train.max_steps,
        rank=accelerator.process_index,
    )
    loader = DataLoader(
        supply.samples,
        batch_sampler=slots,
        num_workers=config.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=False,
    )
    return iter(loader)


class _TokenIds:
    """Captions as token ids (L,) int64, for a text tower that learns."""

    def __init__(self, components: Components) -> None:
        self._tokenizer = components.tokenizer
        self._known: dict[str, Tensor] = {}

    def text(self, caption: str) -> Tensor:
        if caption not in self._known:
            if len(self._known) >= REMEMBERED_CAPTIONS:
                self._known.clear()
            self._known[caption] = tokenize(self._tokenizer, [caption])[0]
        return self._known[caption]


class _CachedStates:
    """Captions as states (L, D) of a frozen text tower."""

    def __init__(
        self, config: Config, captions: list[str], components: Components, accelerator: Accelerator
    ) -> None:
        self._cache = TextCache.build(
            captions,
            components.tokenizer,
            components.text_encoder.to(accelerator.device),
            cache_dir=_cache_dir(config.data),
            shard=(accelerator.process_index, accelerator.num_processes),
            progress=accelerator.is_local_main_process,
        )
        accelerator.wait_for_everyone()

    def text(self, caption: str) -> Tensor:
        return self._cache.states(caption)


def _triples(
    config: Config,
    held_out: Folder,
    cache: LatentCache,
    source: "_TokenIds | _CachedStates",
    null_text: Tensor,
    *,
    num_timesteps: int,
) -> Triples:
    """Fix n (picture, timestep, noise) triples; pictures are used in turn, more than once if few.

    At least 64 triples, so that a handful of pictures still covers the chain.
    """
    n = min(config.preview.num_held_out, max(len(held_out), 64))
    z0, eps, text = [], [], []
    for i in range(n):
        index = i % len(held_out)
        mean, std = cache.moments(index)
        vae_noise = normal(draws(config.train.seed, 0, index, i, "held out vae"), mean.shape)
        z0.append(mean + std * vae_noise)
        eps.append(normal(draws(config.train.seed, 0, index, i, "held out"), mean.shape))
        text.append(source.text(held_out[index].captions[0]))
    return Triples(
        z0=torch.stack(z0),
        eps=torch.stack(eps),
        t=stratified_timesteps(n, num_timesteps),
        text=torch.stack(text),
        null_text=null_text,
    )


def _cache_dir(data: DataConfig) -> Path:
    return Path(data.cache_dir).expanduser()
