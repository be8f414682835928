"""From caches to batches: what one training sample is, and which samples an optimiser step takes.

The order of an epoch is a function of (seed, epoch) and of the images' buckets. Optimiser step s
takes batch s mod K of epoch s div K, whose images share a bucket, and so their size. Processes
and micro-batches share out a batch's places in the epoch, so the draws of a step, which depend on
the place, never depend on the layout.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from latentdiff.data.buckets import Epoch, Partial, make_epoch, num_batches
from latentdiff.data.captions import CaptionTransform, may_flip
from latentdiff.data.folder.folder import Record
from latentdiff.training.inputs.randomness import epoch_order, sample_generator, standard_normal

TextOf = Callable[[str], Tensor]
SMALL_BYTES = 1 << 16  # of an array in a worker's message


class Latents(Protocol):
    """Where latents come from: a cache, or the images themselves."""

    def shape(self, index: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of record `index`'s latents."""

    def inputs(self, index: int, noise: Tensor, *, flipped: bool, crop: float) -> dict[str, Tensor]:
        """Return z0 (C, h, w) for VAE noise (C, h, w), or what the device makes it of."""


class LatentMasks(Protocol):
    """Where masks come from: a cache, or the files themselves."""

    def mask(self, index: int, *, flipped: bool, crop: float) -> Tensor:
        """Return how much of each latent of record `index` counts: (1, h, w) in [0, 1]."""


class StepBatch(NamedTuple):
    """What an optimiser step takes: records, from place `start` of an epoch on."""

    epoch: int
    start: int
    indices: np.ndarray


class Steps(Protocol):
    """Which samples each optimiser step takes."""

    def batch(self, step: int) -> StepBatch:
        """Return what optimiser step `step` takes, counted from the start of the run."""


class EpochOrder:
    """Which samples each optimiser step takes: a function of (seed, step) and the buckets."""

    def __init__(
        self, bucket_of: np.ndarray, *, batch_size: int, seed: int, partial: Partial = "keep"
    ) -> None:
        """bucket_of: (N,) each sample's bucket. batch_size, partial: as in buckets.make_epoch."""
        self.bucket_of, self.batch_size, self.seed, self.partial = (
            bucket_of,
            batch_size,
            seed,
            partial,
        )
        counts = np.unique(bucket_of, return_counts=True)[1]
        self.steps_per_epoch = num_batches(counts, batch_size=batch_size)
        self._epochs: dict[int, Epoch] = {}

    def batch(self, step: int) -> StepBatch:
        """Return what optimiser step `step` takes, counted from the start of the run."""
        number, batch = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        return StepBatch(number, int(epoch.starts[batch]), epoch[batch])

    def count(self, step: int) -> int:
        """Return how many samples optimiser step `step` takes."""
        return len(self.batch(step).indices)

    def _epoch(self, number: int) -> Epoch:
        """Remember two epochs: data workers run ahead into the next."""
        if number not in self._epochs:
            self._epochs = {k: epoch for k, epoch in self._epochs.items() if abs(k - number) == 1}
            self._epochs[number] = make_epoch(
                self.bucket_of,
                batch_size=self.batch_size,
                seed=self.seed,
                epoch=number,
                partial=self.partial,
                order=epoch_order(self.seed, number, len(self.bucket_of)),
            )
        return self._epochs[number]


@dataclass(frozen=True)
class BatchLayout:
    """How the places of one optimiser step are shared out.

    batch_size: places of a full step; micro_batch_size: of one process in one forward pass.
    """

    batch_size: int
    micro_batch_size: int
    num_processes: int

    @classmethod
    def of(cls, batch_size: int, micro_batch_size: int, num_processes: int) -> "BatchLayout":
        """Fill in a micro-batch size of 0: the whole batch at once, over the processes."""
        micro = micro_batch_size or -(-batch_size // num_processes)
        return cls(batch_size, min(micro, batch_size), num_processes)

    @property
    def accumulation(self) -> int:
        """Forward passes of each process in one optimiser step."""
        return -(-self.batch_size // (self.micro_batch_size * self.num_processes))


@dataclass(frozen=True)
class SampleKey:
    """One sample's seat in a step: which sample, where in the epoch, and whether it counts."""

    index: int
    epoch: int
    index_in_epoch: int
    index_in_step: int  # place within the step
    weight: float  # 0 for the padding of a partial batch


class StepBatchSampler(Sampler[list[SampleKey]]):
    """The micro-batches of one process from `first_step` to `last_step`, in order."""

    def __init__(
        self, layout: BatchLayout, order: Steps, *, first_step: int, last_step: int, rank: int
    ) -> None:
        self.layout, self.order = layout, order
        self.first_step, self.last_step, self.rank = first_step, last_step, rank

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.layout.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        layout = self.layout
        for step in range(self.first_step, self.last_step):
            batch = self.order.batch(step)
            for accumulated in range(layout.accumulation):
                first = (accumulated * layout.num_processes + self.rank) * layout.micro_batch_size
                yield [_sample_key(batch, k) for k in range(first, first + layout.micro_batch_size)]


def _sample_key(batch: StepBatch, k: int) -> SampleKey:
    counts = k < len(batch.indices)
    index_in_step = k if counts else 0
    return SampleKey(
        int(batch.indices[index_in_step]),
        batch.epoch,
        batch.start + index_in_step,
        index_in_step,
        float(counts),
    )


class LatentDataset(Dataset[dict[str, Tensor]]):
    """Training samples by slot, every draw of them keyed by the slot alone.

    text(caption) -> ids (L,) or states (L, D).
    """

    def __init__(
        self,
        latents: Latents,
        records: Sequence[Record],
        text: TextOf,
        *,
        seed: int,
        caption_dropout: float,
        random_flip: bool,
        edits: CaptionTransform,
        masks: LatentMasks | None = None,
        perturbs: bool = False,
    ) -> None:
        """perturbs: draw a second noise for the U-Net's input."""
        self.latents, self.records, self.text, self.edits = latents, records, text, edits
        self.seed, self.caption_dropout, self.random_flip = seed, caption_dropout, random_flip
        self.masks, self.perturbs = masks, perturbs

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        """Return z0 or what it is made of; eps (C, h, w); offset (C, 1, 1); text; and the scalars.

        These are u in [0, 1) for the timestep, dropped, weight, place (in the step) and index.
        With masks, mask (1, h, w); with a second noise, perturbation (C, h, w).
        """

        def rng(purpose: str) -> Any:
            return sample_generator(self.seed, key.epoch, key.index, key.index_in_epoch, purpose)

        captions = self.records[key.index].captions
        flipped = self.random_flip and may_flip(captions) and rng("flip").random() < 0.5
        shape = self.latents.shape(key.index)
        crop = rng("crop").random()
        inputs = self.latents.inputs(
            key.index, standard_normal(rng("vae"), shape), flipped=flipped, crop=crop
        )
        if self.masks is not None:
            inputs["mask"] = self.masks.mask(key.index, flipped=flipped, crop=crop)
        if self.perturbs:
            inputs["perturbation"] = standard_normal(rng("perturbation"), shape)
        return inputs | {
            "eps": standard_normal(rng("noise"), shape),
            "offset": standard_normal(rng("offset"), (shape[0], 1, 1)),
            "u": torch.tensor(rng("timestep").random(), dtype=torch.float64),
            "text": self.text(self.edits.sample(captions, rng("caption"))),
            "dropped": torch.tensor(rng("dropout").random() < self.caption_dropout),
            "weight": torch.tensor(key.weight, dtype=torch.float32),
            "index_in_step": torch.tensor(key.index_in_step, dtype=torch.int64),
            "index": torch.tensor(key.index, dtype=torch.int64),
        }


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor | np.ndarray]:
    """Stack samples to a batch (B, ...), what is small as NumPy arrays.

    These travel in a data worker's message; each tensor costs the training process a shared file.
    """
    batch: dict[str, Tensor] = default_collate(list(samples))
    return {name: x.numpy() if x.nbytes <= SMALL_BYTES else x for name, x in batch.items()}
