"""One training sample: a record's latents, noise, timestep and caption, read and drawn by its key.

A sample is a function of (seed, key) alone, so that neither workers, processes, accumulation nor a
resumed run can change it. Which samples make a batch is decided in batches.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.data.cache.decode_ahead import CropPlan
from latentdiff.data.captions import CaptionTransform, may_flip
from latentdiff.data.folder.folder import Record
from latentdiff.models.text import NULL_CAPTION
from latentdiff.training.inputs.caption_dropout import is_caption_dropped, is_condition_dropped
from latentdiff.training.inputs.conditions import ConditionSource
from latentdiff.training.inputs.randomness import SampleKey, standard_normal

EncodeCaption = Callable[[str], dict[str, Tensor]]


class Latents(Protocol):
    """Where latents come from: a cache, or the images themselves."""

    def shape(self, index: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of record `index`'s latents."""

    @property
    def plan(self) -> CropPlan:
        """How the images are cropped."""

    def inputs(self, index: int, noise: Tensor, *, flipped: bool, crop: float) -> dict[str, Tensor]:
        """Return z0 (C, h, w) for VAE noise (C, h, w), or pixels and vae_noise to encode."""


class LatentMasks(Protocol):
    """Where masks come from: a cache, or the files themselves."""

    def mask(self, index: int, *, flipped: bool, crop: float) -> Tensor:
        """Return the weight of each latent pixel of record `index`: (1, h, w) in [0, 1]."""


class LatentDataset(Dataset[dict[str, Tensor]]):
    """Training samples by key, every random number of them drawn by the key alone."""

    def __init__(
        self,
        latents: Latents,
        records: Sequence[Record],
        *,
        encode_caption: EncodeCaption,
        transform: CaptionTransform,
        seed: int,
        caption_dropout: float,
        random_flip: bool,
        masks: LatentMasks | None = None,
        perturbs_input: bool = False,
        draws_guidance: bool = False,
        conditions: ConditionSource | None = None,
        condition_dropout: float = 0.0,
        gives_time_ids: bool = False,
        zero_weight: frozenset[int] = frozenset(),
    ) -> None:
        """encode_caption: to the fields of a Conditioning, such as prompt_embeds (L, D).

        zero_weight: indices of records whose loss weighs 0; all else of their samples is the same.
        perturbs_input: draw a second noise, for the U-Net's input. draws_guidance: draw the
        guidance of a distilled student. gives_time_ids: the sizes that SDXL reads.
        """
        self.latents, self.records, self.masks = latents, records, masks
        self.encode_caption, self.transform = encode_caption, transform
        self.seed, self.caption_dropout, self.random_flip = seed, caption_dropout, random_flip
        self.perturbs_input, self.draws_guidance = perturbs_input, draws_guidance
        self.conditions, self.condition_dropout = conditions, condition_dropout
        self.gives_time_ids, self.zero_weight = gives_time_ids, zero_weight

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        """Return z0, or pixels and vae_noise; eps (C, h, w); offset (C, 1, 1); and scalars.

        Next to them the fields of the conditioning that the caption fills. The scalars are u in
        [0, 1) for the timestep, dropped, weight, stratum and index.
        With conditions, what they read of the sample, and condition_dropped where some are dropped.
        With masks, mask (1, h, w); with a second noise, perturbation (C, h, w); for distillation,
        guidance in [0, 1): its place between the lowest scale and the highest.
        """
        rng = partial(key.generator, seed=self.seed)
        record = self.records[key.index]
        captions, transform = record.captions, self.transform.of_source(record.source)
        flipped = self.random_flip and may_flip(captions) and rng("flip").random() < 0.5
        crop = rng("crop").random()
        shape = self.latents.shape(key.index)
        vae_noise = standard_normal(rng("vae"), shape)
        sample = self.latents.inputs(key.index, vae_noise, flipped=flipped, crop=crop)
        sample |= self._optional_parts(key, record, flipped=flipped, crop=crop)
        caption = transform.sample(captions, rng("caption"))
        dropped = caption == NULL_CAPTION or is_caption_dropped(
            key, seed=self.seed, caption_dropout=self.caption_dropout
        )
        sample |= self.encode_caption(caption)
        weight = 0.0 if key.index in self.zero_weight else key.weight
        return sample | {
            "eps": standard_normal(rng("noise"), shape),
            "offset": standard_normal(rng("offset"), (shape[0], 1, 1)),
            "u": torch.tensor(rng("timestep").random(), dtype=torch.float64),
            "dropped": torch.tensor(dropped),
            "weight": torch.tensor(weight, dtype=torch.float32),
            "stratum": torch.tensor(key.stratum, dtype=torch.int64),
            "index": torch.tensor(key.index, dtype=torch.int64),
        }

    def _optional_parts(
        self, key: SampleKey, record: Record, *, flipped: bool, crop: float
    ) -> dict[str, Tensor]:
        """Return the parts of a sample that only some runs have: see `__getitem__`."""
        rng = partial(key.generator, seed=self.seed)
        parts: dict[str, Tensor] = {}
        if self.masks is not None:
            parts["mask"] = self.masks.mask(key.index, flipped=flipped, crop=crop)
        if self.conditions is not None:
            parts |= self.conditions.sample(key.index, flipped=flipped, crop=crop, rng=rng)
        if self.condition_dropout:
            parts["condition_dropped"] = torch.tensor(
                is_condition_dropped(
                    key,
                    seed=self.seed,
                    caption_dropout=self.caption_dropout,
                    condition_dropout=self.condition_dropout,
                )
            )
        if self.perturbs_input:
            shape = self.latents.shape(key.index)
            parts["perturbation"] = standard_normal(rng("perturbation"), shape)
        if self.gives_time_ids:
            parts["time_ids"] = time_ids(
                self.latents.plan, record, key.index, flipped=flipped, crop=crop
            )
        if self.draws_guidance:
            parts["guidance"] = torch.tensor(rng("guidance").random(), dtype=torch.float32)
        return parts


def time_ids(plan: CropPlan, record: Record, index: int, *, flipped: bool, crop: float) -> Tensor:
    """Return SDXL's sizes (6,) of a record's crop: see `CropPlan.time_ids`."""
    return plan.time_ids(index, (record.height, record.width), u=crop, flip=flipped)
