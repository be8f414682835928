"""What a run trains on, made ready: folder -> latents and text on disk -> batches and triples.

The folder is read and judged before any weight is loaded. How images and captions are encoded is
encoding.py's business, what a sample is samples.py's.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from latentdiff.config.data import DataConfig
from latentdiff.config.text_to_image import Config
from latentdiff.data.cache.online_encode import OnlineLatentEncoder
from latentdiff.data.captions import CaptionTransform
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.evaluation.metrics.heldout_loss import Triples, stratified_timesteps
from latentdiff.models.components import Components
from latentdiff.models.latents import LatentCodec
from latentdiff.training.finetune.dreambooth import (
    AllOnesMasks,
    PairedOrder,
    SubjectAndClassDataset,
    prior_seed,
)
from latentdiff.training.inputs.dataset import (
    BatchLayout,
    EpochOrder,
    LatentDataset,
    StepBatchSampler,
    collate,
)
from latentdiff.training.inputs.encode import (
    CachedPromptEmbeds,
    LatentSource,
    MaskSource,
    OnlinePromptEmbeds,
    TextSource,
    TokenIds,
    bucket_ids,
    bucket_sizes,
    cache_dir,
    cache_latents,
    cache_masks,
    cache_text,
    caption_transform,
    eval_crop_config,
    null_text,
    unique_captions,
)
from latentdiff.training.inputs.randomness import sample_generator, standard_normal
from latentdiff.training.inputs.workers import TrackedDataset, ignore_signals

logger = logging.getLogger(__name__)
NUM_SHOWN = 6  # buckets named in the plan
MIN_TRIPLES = 64  # so that a handful of held-out images still covers the chain
JUDGED_MASKS = 500


@dataclass(frozen=True)
class TrainData:
    """The training samples, their order, and the fixed held-out triples of a run.

    encoder, states: what makes latents of pixels and states of token ids in the step, where a cache
    does not hold them.
    """

    train: Folder
    heldout: Folder
    samples: TrackedDataset
    order: EpochOrder | PairedOrder
    edits: CaptionTransform
    null_text: Tensor  # (1, L) ids or (1, L, D) states
    triples: Triples | None
    prior: Folder | None = None  # class images beside the subject's
    train_triples: Triples | None = None  # of training images, with the timesteps of `triples`
    encoder: OnlineLatentEncoder | None = None
    states: OnlinePromptEmbeds | None = None

    @property
    def ids(self) -> Sequence[str]:
        """Names of the samples by index."""
        if self.prior is None:
            return self.train.ids
        own, others = self.train.ids.to_pylist(), self.prior.ids.to_pylist()
        return own + [f"{self.prior.root}/{name}" for name in others]


def read_data(
    data: DataConfig, *, prompts: Sequence[str] = (), trust_index: bool = False
) -> tuple[Folder, Folder]:
    """Read the folder; return its training and held-out records. ValueError says what is wrong.

    prompts: captions of all images, which then need none of their own. trust_index: take the
    scan that another process has just made.
    """
    if prompts:
        data = replace(data, missing_caption="empty")
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
        heldout_fraction=data.heldout_fraction,
        min_size=data.min_size,
        max_aspect=data.max_aspect,
        mask=data.mask,
        cache_dir=cache_dir(data),
        trust_index=trust_index,
    )
    folder.check(max_invalid_fraction=data.max_invalid_fraction)
    folder = folder.with_captions(prompts) if prompts else folder
    train = folder.split("train")
    if not len(train):
        raise ValueError(f"the data folder {data.root} has no image in its training split")
    return train, folder.heldout()


def build_train_data(
    config: Config,
    train: Folder,
    heldout: Folder,
    *,
    components: Components,
    latents: LatentSource,
    trains_text_encoder: bool,
    accelerator: Accelerator,
    prior: Folder | None = None,
) -> TrainData:
    """Put caches, draws and captions together, and say what comes of them.

    prior: class images, of which each step takes as many as of the subject's.
    """
    data, edits = config.data, caption_transform(config.data)
    source: TextSource
    if trains_text_encoder:
        source = TokenIds(components)
    elif edits.edits_tags:
        source = OnlinePromptEmbeds(components, accelerator.device)
    else:
        captions = [
            *unique_captions((train, heldout), edits),
            *((config.finetune.class_prompt,) if prior is not None else ()),
        ]
        tokenizer, tower = components.tokenizer, components.text_encoder
        cache = cache_text(captions, tokenizer, tower, data, accelerator=accelerator)
        source = CachedPromptEmbeds(cache)
    encoder = latents if isinstance(latents, OnlineLatentEncoder) else None
    factor = LatentCodec(components.vae).factor
    masks = cache_masks(train, data, factor=factor, accelerator=accelerator)
    if masks is not None:
        _check_masks(masks, data)
    samples = LatentDataset(
        latents.images if isinstance(latents, OnlineLatentEncoder) else latents,
        train,
        source.text,
        seed=config.train.seed,
        caption_dropout=config.diffusion.caption_dropout,
        random_flip=data.random_flip,
        edits=edits,
        masks=masks,
        perturbs=config.diffusion.input_perturbation > 0,
    )
    order = EpochOrder(
        bucket_ids(train, data),
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        partial=data.partial_batches,
    )
    mixed: LatentDataset | SubjectAndClassDataset = samples
    paired: EpochOrder | PairedOrder = order
    if prior is not None:
        shown = cache_latents(prior, components.vae, data, accelerator=accelerator)
        mixed, paired = _with_prior(config, prior, samples, order, latents=shown)
    triples = train_triples = None
    if len(heldout):
        kept = cache_latents(
            heldout, components.vae, eval_crop_config(data), accelerator=accelerator
        )
        kept_masks = cache_masks(
            heldout, eval_crop_config(data), factor=factor, accelerator=accelerator
        )
        n = min(config.eval.num_heldout, max(len(heldout), MIN_TRIPLES))
        t = stratified_timesteps(n, components.scheduler.config["num_train_timesteps"])
        fix = partial(_triples, config, source=source, edits=edits, t=t)
        in_turn = np.arange(n) % len(heldout)
        triples = fix(heldout, in_turn, latents=kept, masks=kept_masks, purpose="held out")
        spread = np.arange(n) * max(len(train), n) // n % len(train)
        train_triples = fix(train, spread, latents=latents, masks=masks, purpose="trained")
    if accelerator.is_main_process:
        _log_data_plan(data, paired, source, is_cached=encoder is None)
    return TrainData(
        train,
        heldout,
        TrackedDataset(mixed, num_workers=data.num_workers),
        paired,
        edits,
        null_text(source),
        triples,
        prior,
        train_triples,
        encoder,
        source if isinstance(source, OnlinePromptEmbeds) else None,
    )


def _with_prior(
    config: Config,
    prior: Folder,
    samples: LatentDataset,
    order: EpochOrder,
    *,
    latents: LatentSource,
) -> tuple[SubjectAndClassDataset, PairedOrder]:
    """Add class images, half of each step, to the subject's samples and their order."""
    data, num_subject = config.data, len(samples.records)
    images = latents.images if isinstance(latents, OnlineLatentEncoder) else latents
    seed, half = prior_seed(config.train.seed), config.train.batch_size // 2
    others = LatentDataset(
        images,
        prior,
        samples.text,
        seed=seed,
        caption_dropout=samples.caption_dropout,
        random_flip=samples.random_flip,
        edits=CaptionTransform(),
        masks=None if samples.masks is None else AllOnesMasks(images.shape(0)),
        perturbs=samples.perturbs,
    )
    own = EpochOrder(
        order.bucket_of,
        batch_size=config.train.batch_size - half,
        seed=config.train.seed,
        partial=order.partial,
    )
    weight = config.finetune.prior_loss_weight
    mixed = SubjectAndClassDataset(
        samples, others, num_subject=num_subject, prior_loss_weight=weight
    )
    classes = EpochOrder(bucket_ids(prior, data), batch_size=half, seed=seed, partial="fill")
    return mixed, PairedOrder(own, classes)


def train_batches(
    config: Config,
    train_data: TrainData,
    layout: BatchLayout,
    *,
    first_step: int,
    accelerator: Accelerator,
) -> Iterator[dict[str, Tensor]]:
    """Yield this process's micro-batches from optimiser step `first_step` to the last."""
    keys = StepBatchSampler(
        layout,
        train_data.order,
        first_step=first_step,
        last_step=config.train.max_steps,
        rank=accelerator.process_index,
    )
    loader = DataLoader(
        train_data.samples,
        batch_sampler=keys,
        num_workers=config.data.num_workers,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=False,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # the global one is what dropout draws from
    )
    for packed in loader:
        batch = {name: torch.as_tensor(x) for name, x in packed.items()}
        if train_data.encoder is not None:
            z0 = train_data.encoder.encode(batch.pop("pixels"), batch.pop("vae_noise"))
            batch["z0"] = z0.contiguous()  # as from the cache: dropout draws in memory's order
        if train_data.states is not None:
            batch["text"] = train_data.states.encode(batch["text"])
        yield batch


def _triples(
    config: Config,
    folder: Folder,
    indices: np.ndarray,
    *,
    latents: LatentSource,
    masks: MaskSource | None,
    source: TextSource,
    edits: CaptionTransform,
    t: Tensor,
    purpose: str,
) -> Triples:
    """Fix n (image, timestep, noise) triples of the records at `indices` (n,) and t (n,).

    Those of one bucket stand together. purpose: what keys their draws.
    """
    seed = config.train.seed
    places = np.argsort(bucket_ids(folder, config.data)[indices], kind="stable").tolist()
    z0, eps, kept = [], [], []
    for i in places:
        index = int(indices[i])
        mean, std = latents.moments(index)
        z0.append(
            mean
            + std
            * standard_normal(sample_generator(seed, 0, index, i, f"{purpose} vae"), mean.shape)
        )
        eps.append(standard_normal(sample_generator(seed, 0, index, i, purpose), mean.shape))
        if masks is not None:
            kept.append(masks.mask(index, flipped=False, crop=0.5))
    captions = [edits.fixed(folder[int(indices[i])].captions[0]) for i in places]
    return Triples(
        z0=z0,
        eps=eps,
        t=t[places],
        text=source.settled(captions),
        null_text=null_text(source),
        mask=kept or None,
    )


def _check_masks(masks: MaskSource, data: DataConfig) -> None:
    """Say what masks keep, on images spread over the folder; ValueError where that is all, or
    nothing."""
    chosen = np.linspace(0, len(masks) - 1, min(len(masks), JUDGED_MASKS)).astype(int)
    kept = [float(masks.mask(i, flipped=False, crop=0.5).mean()) for i in chosen.tolist()]
    share = float(np.mean(kept))
    if share in (0.0, 1.0):
        told = "no image has transparency" if share else "the masks are black all over"
        raise ValueError(
            f"data.mask={data.mask} and {told}, where {len(kept):,} of them are cut; leave it out, "
            "or make masks in which what is to be learned is opaque, or white"
        )
    logger.info(
        "masks keep %.0f %% of the latents; %d of %d keep nothing, and teach nothing",
        100 * share,
        kept.count(0.0),
        len(kept),
    )


def _log_data_plan(
    data: DataConfig, order: EpochOrder | PairedOrder, source: TextSource, *, is_cached: bool
) -> None:
    """Say how images and captions come to the model, before the first step."""
    if data.buckets:
        used, counts = np.unique(order.bucket_of, return_counts=True)
        buckets = bucket_sizes(data)
        shown = [f"{buckets[b]}: {n:,}" for b, n in zip(used, counts, strict=True)][:NUM_SHOWN]
        rest = f" and {len(used) - NUM_SHOWN} more" if len(used) > NUM_SHOWN else ""
        last = "kept smaller" if data.partial_batches == "keep" else "filled with images again"
        logger.info(
            "%d buckets (images each) %s%s; a bucket's last batch is %s",
            len(used),
            ", ".join(shown),
            rest,
            last,
        )
    views = {0: "cropped anywhere", 1: "cropped in the centre"}.get(
        data.num_crops, f"cropped at {data.num_crops} places"
    )
    how = {
        TokenIds: "text encoder learns from token ids",
        CachedPromptEmbeds: "text states come from the cache",
        OnlinePromptEmbeds: "tags change, so the frozen text encoder runs at every step",
    }[type(source)]
    logger.info(
        "images %s%s, latents %s; %s",
        views,
        ", half of them mirrored" if data.random_flip else "",
        "come from the cache" if is_cached else "are encoded at every step (data.cache=false)",
        how,
    )
