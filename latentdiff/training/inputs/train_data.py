"""A run's training data, made ready: folder -> latents and text on disk -> batches and triples.

The folder is read and checked before any weight is loaded. How images and captions are encoded is
encode.py's business, one sample dataset.py's, a batch batches.py's.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from latentdiff.config.data import DataConfig
from latentdiff.config.model import ConditionConfig
from latentdiff.config.text_to_image import Config
from latentdiff.data.cache.online_encode import OnlineLatentEncoder
from latentdiff.data.captions import CaptionTransform
from latentdiff.data.epoch_draws import make_draws
from latentdiff.data.folder.folder import Folder
from latentdiff.evaluation.metrics.heldout_loss import Triples
from latentdiff.models.compatibility import reads_time_ids
from latentdiff.models.components import Components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.training.finetune.dreambooth import (
    AllOnesMasks,
    PairedOrder,
    SubjectAndClassDataset,
    class_seed,
)
from latentdiff.training.inputs.batches import (
    BatchLayout,
    EpochOrder,
    StepBatchSampler,
    train_batches,
)
from latentdiff.training.inputs.caption_dropout import null_text
from latentdiff.training.inputs.conditions import (
    ConditionEncoder,
    FixedCondition,
    condition_source,
    preview_conditions,
)
from latentdiff.training.inputs.dataset import LatentDataset
from latentdiff.training.inputs.encode import (
    CachedPromptEmbeds,
    LatentSource,
    MaskSource,
    OnlinePromptEmbeds,
    TextSource,
    TokenIds,
    bucket_ids,
    bucket_sizes,
    cache_latents,
    cache_masks,
    caption_transform,
    eval_crop_config,
    text_source,
    unique_captions,
)
from latentdiff.training.inputs.fixed_triples import EncodedImages, fixed_triples
from latentdiff.training.inputs.randomness import STRATA_RULE
from latentdiff.training.inputs.sources import find_images, source_weights
from latentdiff.training.inputs.workers import TrackedDataset
from latentdiff.training.text_to_image.model import trains_text_encoder

logger = logging.getLogger(__name__)
MAX_BUCKETS_LOGGED = 6

NUM_CHECKED_MASKS = 500


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """The training samples, their order, and the fixed held-out triples of a run."""

    train: Folder
    heldout: Folder
    class_images: Folder | None  # besides the subject's, for prior preservation
    latents: LatentSource  # of the training images
    source: TextSource
    dataset: TrackedDataset
    order: EpochOrder | PairedOrder
    transform: CaptionTransform
    heldout_triples: Triples | None
    train_triples: Triples | None  # of training images, with the timesteps of the held-out ones
    condition_encoder: ConditionEncoder | None = None  # of image conditions
    preview_conditions: Sequence[FixedCondition] = ()  # of held-out images, if there are any
    zeros_for_null: bool = False  # whether the null prompt is zeros, not the encoded empty caption

    @cached_property
    def null_text(self) -> Conditioning:
        """The null prompt's token ids or embeddings, of one image."""
        return null_text(self.source, zeros=self.zeros_for_null)

    @property
    def ids(self) -> Sequence[str]:
        """Names of the samples by index."""
        if self.class_images is None:
            return self.train.ids
        own, others = self.train.ids.to_pylist(), self.class_images.ids.to_pylist()
        return own + [f"{self.class_images.root}/{name}" for name in others]

    def batches(
        self,
        layout: BatchLayout,
        *,
        first_step: int,
        last_step: int,
        accelerator: Accelerator,
        seed: int,
        strata_rule: int = STRATA_RULE,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield this process's micro-batches from optimiser step first_step up to last_step.

        seed, strata_rule: as in `step_strata`.
        """
        sampler = StepBatchSampler(
            layout,
            self.order,
            first_step=first_step,
            last_step=last_step,
            rank=accelerator.process_index,
            seed=seed,
            strata_rule=strata_rule,
        )
        latents, source = self.latents, self.source
        return train_batches(
            self.dataset,
            sampler,
            device=accelerator.device,
            latent_encoder=latents if isinstance(latents, OnlineLatentEncoder) else None,
            text_encoder=source if isinstance(source, OnlinePromptEmbeds) else None,
            condition_encoder=self.condition_encoder,
        )


def build_train_data(
    config: Config,
    train: Folder,
    heldout: Folder,
    *,
    components: Components,
    latents: LatentSource,
    accelerator: Accelerator,
    class_images: Folder | None = None,
) -> TrainData:
    """Encode what the caches lack; return samples, order and triples. latents: of `train`."""
    source = text_source(
        _captions(config, train, heldout, class_images),
        components,
        config.data,
        trains_text_encoder=trains_text_encoder(config),
        accelerator=accelerator,
    )
    encode = partial(
        _encode,
        components=components,
        accelerator=accelerator,
        condition=config.condition,
        condition_kind=config.condition_kind,
    )
    images = encode(train, config.data, latents=latents)
    encoder = ConditionEncoder(config.condition_kind, components.vae)
    condition_encoder = encoder if encoder.kind != "none" else None
    sized = reads_time_ids(components.unet.config)
    dataset, order = _samples(
        config, images, class_images, source=source, encode=encode, gives_time_ids=sized
    )
    heldout_images = encode(heldout, eval_crop_config(config.data)) if len(heldout) else None
    heldout_triples, train_triples = fixed_triples(
        config,
        images,
        heldout_images,
        source=source,
        components=components,
        condition_encoder=condition_encoder,
    )
    if accelerator.is_main_process:
        _log_data_plan(config.data, order, source)
        if condition_encoder is not None:
            logger.info("%s", condition_plan(config, condition_encoder.kind))
    return TrainData(
        train=train,
        heldout=heldout,
        class_images=class_images,
        latents=latents,
        source=source,
        dataset=TrackedDataset(dataset, num_workers=config.data.num_workers),
        order=order,
        transform=caption_transform(config.data),
        heldout_triples=heldout_triples,
        train_triples=train_triples,
        condition_encoder=condition_encoder,
        preview_conditions=_preview_conditions(config, heldout_images or images, condition_encoder),
        zeros_for_null=components.force_zeros_for_empty_prompt,
    )


def _preview_conditions(
    config: Config, images: EncodedImages, encoder: ConditionEncoder | None
) -> list[FixedCondition]:
    if images.conditions is None or encoder is None:
        return []
    transform = caption_transform(config.data)
    return preview_conditions(
        images.folder, images.conditions, encoder, transform=transform, seed=config.train.seed
    )


def _captions(
    config: Config, train: Folder, heldout: Folder, class_images: Folder | None
) -> Iterator[str]:
    """Yield the captions that a run shows its model, as far as they are the same each time."""
    yield from unique_captions((train, heldout), caption_transform(config.data))
    if class_images is not None:
        yield config.finetune.class_prompt


def _encode(
    folder: Folder,
    data: DataConfig,
    *,
    components: Components,
    accelerator: Accelerator,
    condition: ConditionConfig,
    condition_kind: str,
    latents: LatentSource | None = None,
) -> EncodedImages:
    """Encode the latents, unless given, the masks and the conditions that the caches lack."""
    vae, factor = components.vae, LatentCodec(components.vae).factor
    if latents is None:
        latents = cache_latents(folder, vae, data, accelerator=accelerator)
    masks = cache_masks(folder, data, factor=factor, accelerator=accelerator)
    conditions = None
    if condition_kind != "none":
        conditions = condition_source(
            folder, condition, data, kind=condition_kind, vae=vae, accelerator=accelerator
        )
    return EncodedImages(folder, latents, masks, conditions)


def _samples(
    config: Config,
    images: EncodedImages,
    class_images: Folder | None,
    *,
    source: TextSource,
    encode: Callable[[Folder, DataConfig], EncodedImages],
    gives_time_ids: bool,
) -> tuple[LatentDataset | SubjectAndClassDataset, EpochOrder | PairedOrder]:
    """Return a run's samples and their order; class images are half of each step."""
    dataset = partial(_dataset, config, source=source, gives_time_ids=gives_time_ids)
    if images.masks is not None:
        _check_masks(images.masks, config.data)
    seed, transform = config.train.seed, caption_transform(config.data)
    subject = dataset(images, transform=transform, seed=seed)
    subject.zero_weight = find_images(images.folder, config.data.zero_weight_images)
    order = subject_order(config, images.folder)
    if class_images is None:
        return subject, order
    classes = encode(class_images, replace(config.data, mask="none"))
    seed_of_class = class_seed(seed)
    prior = dataset(classes, transform=CaptionTransform(), seed=seed_of_class)
    if images.masks is not None:
        prior.masks = AllOnesMasks(prior.latents.shape(0))
    both = SubjectAndClassDataset(
        subject,
        prior,
        num_subject=len(images.folder),
        prior_loss_weight=config.finetune.prior_loss_weight,
    )
    class_buckets = bucket_ids(classes.folder, config.data)
    half = config.train.batch_size // 2
    class_order = EpochOrder(class_buckets, batch_size=half, seed=seed_of_class, partial="fill")
    return both, PairedOrder(order, class_order)


def subject_order(config: Config, train: Folder) -> EpochOrder:
    """Return the order of the training images, of which class images leave a step the larger half.

    An epoch is one pass over them.
    """
    num_class = config.train.batch_size // 2 if config.finetune.class_prompt else 0
    buckets = bucket_ids(train, config.data)
    return EpochOrder(
        buckets,
        batch_size=config.train.batch_size - num_class,
        seed=config.train.seed,
        partial=config.data.partial_batches,
        draws=make_draws(train, buckets, source_weights(config.data)),
    )


def _dataset(
    config: Config,
    images: EncodedImages,
    *,
    source: TextSource,
    transform: CaptionTransform,
    seed: int,
    gives_time_ids: bool,
) -> LatentDataset:
    latents = images.latents
    return LatentDataset(
        latents.images if isinstance(latents, OnlineLatentEncoder) else latents,
        images.folder,
        encode_caption=source.item,
        transform=transform,
        seed=seed,
        caption_dropout=config.diffusion.caption_dropout,
        random_flip=config.data.random_flip,
        masks=images.masks,
        perturbs_input=config.diffusion.input_perturbation > 0,
        draws_guidance=config.distill.is_on,
        conditions=images.conditions,
        condition_dropout=config.condition.dropout_share,
        gives_time_ids=gives_time_ids,
    )


def _check_masks(masks: MaskSource, data: DataConfig) -> None:
    """Log the share that masks keep, on a subsample; ValueError where that is all, or nothing."""
    chosen = np.linspace(0, len(masks) - 1, min(len(masks), NUM_CHECKED_MASKS)).astype(int)
    kept = [float(masks.mask(i, flipped=False, crop=0.5).mean()) for i in chosen.tolist()]
    share = float(np.mean(kept))
    if share in (0.0, 1.0):
        white = {"alpha": "no image has transparency"}.get(data.mask, "the masks are all white")
        reason = white if share else "the masks are all black"
        raise ValueError(
            f"data.mask={data.mask} and {reason}, of {len(kept):,} checked; leave it out, or "
            "make masks in which the subject to learn is opaque, or white"
        )
    logger.info(
        "masks keep %.0f %% of the latents; %d of %d keep nothing, and teach nothing",
        100 * share,
        kept.count(0.0),
        len(kept),
    )


def condition_plan(config: Config, kind: str) -> str:
    """Describe how conditions reach the model: which are cached, and what each step costs."""
    if kind == "inpaint":
        return (
            "conditions: images are read again at every step, and encoded without what is hidden "
            "of them"
        )
    if kind == "controlnet":
        return "conditions: the ControlNet's images are read at every step"
    if kind == "upscale" and config.condition.source == "image":
        return "conditions: images are read again at every step, and made small"
    names = {"instruct_pix2pix": "images to edit are encoded", "depth": "maps are read"}
    how = "once and cached" if config.data.cache else "at every step (data.cache=false)"
    return f"conditions: {names.get(kind, 'low-resolution images are read')} {how}"


def _log_data_plan(data: DataConfig, order: EpochOrder | PairedOrder, source: TextSource) -> None:
    """Log how images and captions reach the model, before the first step."""
    if data.buckets:
        used, counts = np.unique(order.bucket_of, return_counts=True)
        buckets = bucket_sizes(data)
        shown = [f"{buckets[b]}: {n:,}" for b, n in zip(used, counts, strict=True)][
            :MAX_BUCKETS_LOGGED
        ]
        rest = (
            f" and {len(used) - MAX_BUCKETS_LOGGED} more" if len(used) > MAX_BUCKETS_LOGGED else ""
        )
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
        TokenIds: "the text encoder is trained on token ids",
        CachedPromptEmbeds: "prompt embeddings are encoded once and cached",
        OnlinePromptEmbeds: "tags change, so the frozen text encoder runs at every step",
    }[type(source)]
    logger.info(
        "images %s%s, latents %s; %s",
        views,
        ", half of them mirrored" if data.random_flip else "",
        (
            "are encoded once and cached"
            if data.cache
            else "are encoded at every step (data.cache=false)"
        ),
        how,
    )
