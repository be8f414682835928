"""Fixed triples of (image, timestep, noise) for the held-out loss, of held-out and training images.

What is measured on them is evaluation/metrics/heldout_loss.py's business.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latentdiff.config.text_to_image import Config
from latentdiff.data.folder.folder import Folder
from latentdiff.evaluation.metrics.heldout_loss import Triples, stratified_timesteps
from latentdiff.models.compatibility import reads_time_ids
from latentdiff.models.components import Components
from latentdiff.training.inputs.caption_dropout import null_text
from latentdiff.training.inputs.conditions import (
    ConditionEncoder,
    ConditionSource,
    fixed_condition,
    with_labels,
)
from latentdiff.training.inputs.dataset import time_ids
from latentdiff.training.inputs.encode import (
    LatentSource,
    MaskSource,
    TextSource,
    bucket_ids,
    caption_transform,
)
from latentdiff.training.inputs.randomness import sample_generator, standard_normal

MIN_TRIPLES = 64  # so that a handful of held-out images still covers the chain
HELDOUT = "held out"


@dataclass(frozen=True)
class EncodedImages:
    """A folder's images, encoded; masks, conditions: where the loss and the model have any."""

    folder: Folder
    latents: LatentSource
    masks: MaskSource | None
    conditions: ConditionSource | None = None


def fixed_triples(
    config: Config,
    train: EncodedImages,
    heldout: EncodedImages | None,
    *,
    source: TextSource,
    components: Components,
    condition_encoder: ConditionEncoder | None,
) -> tuple[Triples | None, Triples | None]:
    """Return held-out triples, and as many of training images with the same timesteps."""
    if heldout is None:
        return None, None
    num_heldout, num_train = len(heldout.folder), len(train.folder)
    n = min(config.eval.num_heldout, max(num_heldout, MIN_TRIPLES))
    t = stratified_timesteps(n, components.scheduler.config["num_train_timesteps"])
    fix = partial(
        _triples,
        config,
        source=source,
        t=t,
        components=components,
        condition_encoder=condition_encoder,
    )
    repeated = np.arange(n) % num_heldout
    subsample = np.arange(n) * max(num_train, n) // n % num_train
    return (
        fix(heldout, indices=repeated, purpose=HELDOUT),
        fix(train, indices=subsample, purpose="trained"),
    )


def _triples(
    config: Config,
    images: EncodedImages,
    *,
    indices: np.ndarray,
    source: TextSource,
    t: Tensor,
    purpose: str,
    components: Components,
    condition_encoder: ConditionEncoder | None,
) -> Triples:
    """Fix n (image, timestep, noise) triples of the records at `indices` (n,) and t (n,).

    Those of one bucket stand together. purpose: keys their random numbers.
    """
    folder, seed = images.folder, config.train.seed
    order = np.argsort(bucket_ids(folder, config.data)[indices], kind="stable").tolist()
    z0, eps, masks, conditions, nulls = [], [], [], [], []
    for i in order:
        index = int(indices[i])
        mean, std = images.latents.moments(index)
        vae_noise = sample_generator(seed, 0, index, i, f"{purpose} vae")
        z0.append(mean + std * standard_normal(vae_noise, mean.shape))
        eps.append(standard_normal(sample_generator(seed, 0, index, i, purpose), mean.shape))
        if images.masks is not None:
            masks.append(images.masks.mask(index, flipped=False, crop=0.5))
        if images.conditions is not None and condition_encoder is not None:
            key = partial(_generator, seed, index, i, purpose)
            read = images.conditions.sample(index, flipped=False, crop=0.5, rng=key)
            conditions.append(fixed_condition(read, condition_encoder))
            if purpose == HELDOUT:  # training images are measured under their own conditions
                nulls.append(condition_encoder.null(conditions[-1]["condition"]))
    transform = caption_transform(config.data)
    records = [folder[int(indices[i])] for i in order]
    text = source.batch([transform.first(record) for record in records])
    if reads_time_ids(components.unet.config):
        sizes = [
            time_ids(images.latents.plan, record, int(indices[i]), flipped=False, crop=0.5)
            for i, record in zip(order, records, strict=True)
        ]
        text = replace(text, time_ids=torch.stack(sizes))
    return Triples(
        z0=z0,
        eps=eps,
        t=t[order],
        text=with_labels(text, conditions),
        null_text=null_text(source, zeros=components.force_zeros_for_empty_prompt),
        mask=masks or None,
        condition=[one["condition"] for one in conditions] or None,
        null_condition=nulls or None,
        condition_field="control" if config.condition_kind == "controlnet" else "condition",
        images=torch.from_numpy(indices[order]),
    )


def _generator(seed: int, index: int, i: int, purpose: str, name: str) -> np.random.Generator:
    return sample_generator(seed, 0, index, i, f"{purpose} {name}")
