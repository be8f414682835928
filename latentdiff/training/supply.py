"""What a run trains on, made ready: folder -> latents and text on disk -> batches and triples.

The folder is read and judged before any weight is loaded. How pictures and captions are encoded is
encoding.py's business, what a sample is samples.py's.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from latentdiff.config import Config, DataConfig
from latentdiff.data.captions import CaptionEdits
from latentdiff.data.folder import Folder, read_folder
from latentdiff.data.uncached import LatentEncoder
from latentdiff.evaluation.heldout import Triples, stratified_timesteps
from latentdiff.models import Components
from latentdiff.training.encoding import (
    CachedStates,
    LatentSource,
    StepStates,
    TextSource,
    TokenIds,
    assigned,
    buckets_of,
    cache_dir,
    cache_latents,
    caption_edits,
    fit_scaling,
    null_text,
    settled_captions,
    still,
)
from latentdiff.training.randomness import draws, normal
from latentdiff.training.samples import Layout, Order, Samples, StepSlots, collate
from latentdiff.training.workers import WatchedSamples, leave_signals_to_the_trainer

__all__ = [
    "Supply",
    "cache_latents",
    "fit_scaling",
    "make_supply",
    "read_data",
    "step_batches",
]

logger = logging.getLogger(__name__)
NUM_SHOWN = 6  # buckets named in the plan


@dataclass(frozen=True)
class Supply:
    """The training samples, their order, and the fixed held-out triples of a run.

    encoder, states: what makes latents of pixels and states of token ids in the step, where a cache
    does not hold them.
    """

    train: Folder
    held_out: Folder
    samples: WatchedSamples
    order: Order
    edits: CaptionEdits
    null_text: Tensor  # (1, L) ids or (1, L, D) states
    triples: Triples | None
    encoder: LatentEncoder | None = None
    states: StepStates | None = None


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
        cache_dir=cache_dir(data),
        trust_index=trust_index,
    )
    folder.check(max_bad_fraction=data.max_bad_fraction)
    train = folder.split("train")
    if not len(train):
        raise ValueError(f"the data folder {data.root} has no picture in its training split")
    return train, folder.held_out()


def make_supply(
    config: Config,
    train: Folder,
    held_out: Folder,
    *,
    components: Components,
    latents: LatentSource,
    learns_text: bool,
    accelerator: Accelerator,
) -> Supply:
    """Put caches, draws and captions together, and say what comes of them."""
    data, edits = config.data, caption_edits(config.data)
    source: TextSource
    if learns_text:
        source = TokenIds(components)
    elif edits.edits_tags:
        source = StepStates(components, accelerator.device)
    else:
        captions = settled_captions((train, held_out), edits)
        source = CachedStates(captions, components, data=data, accelerator=accelerator)
    encoder = latents if isinstance(latents, LatentEncoder) else None
    samples = Samples(
        latents.pictures if isinstance(latents, LatentEncoder) else latents,
        train,
        source.text,
        seed=config.train.seed,
        caption_dropout=config.diffusion.caption_dropout,
        random_flip=data.random_flip,
        edits=edits,
    )
    order = Order(
        assigned(train, data),
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        partial=data.partial_batches,
    )
    triples = None
    if len(held_out):
        kept = cache_latents(held_out, components.vae, still(data), accelerator=accelerator)
        num = components.scheduler.config["num_train_timesteps"]
        triples = _triples(config, held_out, kept, source, edits, num_timesteps=num)
    if accelerator.is_main_process:
        _say_plan(data, order, source, is_cached=encoder is None)
    return Supply(
        train,
        held_out,
        WatchedSamples(samples, num_workers=data.num_workers),
        order,
        edits,
        null_text(source),
        triples,
        encoder,
        source if isinstance(source, StepStates) else None,
    )


def step_batches(
    config: Config, supply: Supply, layout: Layout, *, first_step: int, accelerator: Accelerator
) -> Iterator[dict[str, Tensor]]:
    """Yield this process's micro-batches from optimiser step `first_step` to the last."""
    slots = StepSlots(
        layout,
        supply.order,
        first_step=first_step,
        last_step=config.train.max_steps,
        rank=accelerator.process_index,
    )
    loader = DataLoader(
        supply.samples,
        batch_sampler=slots,
        num_workers=config.data.num_workers,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=False,
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator(),  # the global one is what dropout draws from
    )
    for packed in loader:
        batch = {name: torch.as_tensor(x) for name, x in packed.items()}
        if supply.encoder is not None:
            batch["z0"] = supply.encoder.encode(batch.pop("pixels"), batch.pop("vae_noise"))
        if supply.states is not None:
            batch["text"] = supply.states.encode(batch["text"])
        yield batch


def _triples(
    config: Config,
    held_out: Folder,
    latents: LatentSource,
    source: TextSource,
    edits: CaptionEdits,
    *,
    num_timesteps: int,
) -> Triples:
    """Fix n (picture, timestep, noise) triples; pictures are used in turn, more than once if few.

    At least 64 triples, so that a handful of pictures still covers the chain. Those of one bucket
    stand together.
    """
    seed = config.train.seed
    n = min(config.preview.num_held_out, max(len(held_out), 64))
    in_turn = np.arange(n) % len(held_out)
    places = np.argsort(assigned(held_out, config.data)[in_turn], kind="stable").tolist()
    z0, eps = [], []
    for i in places:
        index = int(in_turn[i])
        mean, std = latents.moments(index)
        z0.append(mean + std * normal(draws(seed, 0, index, i, "held out vae"), mean.shape))
        eps.append(normal(draws(seed, 0, index, i, "held out"), mean.shape))
    captions = [edits.settle(held_out[int(in_turn[i])].captions[0]) for i in places]
    return Triples(
        z0=z0,
        eps=eps,
        t=stratified_timesteps(n, num_timesteps)[places],
        text=source.settled(captions),
        null_text=null_text(source),
    )


def _say_plan(data: DataConfig, order: Order, source: TextSource, *, is_cached: bool) -> None:
    """Say how pictures and captions come to the model, before the first step."""
    if data.buckets:
        used, counts = np.unique(order.bucket_of, return_counts=True)
        buckets = buckets_of(data)
        shown = [f"{buckets[b]}: {n:,}" for b, n in zip(used, counts, strict=True)][:NUM_SHOWN]
        rest = f" and {len(used) - NUM_SHOWN} more" if len(used) > NUM_SHOWN else ""
        last = "kept smaller" if data.partial_batches == "keep" else "filled with pictures again"
        logger.info(
            "%d buckets (pictures each) %s%s; a bucket's last batch is %s",
            len(used),
            ", ".join(shown),
            rest,
            last,
        )
    views = {0: "cropped anywhere", 1: "cropped in the centre"}.get(
        data.num_crops, f"cropped at {data.num_crops} places"
    )
    how = {
        TokenIds: "text tower learns from token ids",
        CachedStates: "text states come from the cache",
        StepStates: "tags change, so the frozen text tower runs at every step",
    }[type(source)]
    logger.info(
        "pictures %s%s, latents %s; %s",
        views,
        ", half of them mirrored" if data.random_flip else "",
        "come from the cache" if is_cached else "are encoded at every step (data.cache=false)",
        how,
    )
