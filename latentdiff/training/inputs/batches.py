"""Batches: which samples an optimiser step takes, and how processes and micro-batches share them.

The order of an epoch is a function of (seed, epoch) and of the images' buckets and repeats.
Optimiser step s takes batch s mod K of epoch s div K, whose images share a bucket, and so their
size. Processes and micro-batches share out a batch's indices in the epoch, so the random numbers of
a step, which depend on that index, never depend on the layout. Nor do its strata, a function of
(seed, step). A resumed run begins at its step. The tensors of one sample are made in dataset.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from latentdiff.data.buckets import Epoch, Partial, make_epoch, num_batches
from latentdiff.data.cache.online_encode import OnlineLatentEncoder
from latentdiff.data.epoch_draws import EpochDraws
from latentdiff.training.inputs.conditions import ConditionEncoder
from latentdiff.training.inputs.encode import OnlinePromptEmbeds
from latentdiff.training.inputs.randomness import (
    STRATA_RULE,
    SampleKey,
    draw_order,
    epoch_order,
    step_strata,
)
from latentdiff.training.inputs.workers import TrackedDataset, ignore_signals, start_workers

SMALL_BYTES = 1 << 16  # of an array in a worker's message


class StepBatch(NamedTuple):
    """The records of one optimiser step; `start` is the first one's index in the epoch."""

    epoch: int
    start: int
    indices: np.ndarray


class StepOrder(Protocol):
    """Which samples each optimiser step takes."""

    def batch(self, step: int) -> StepBatch:
        """Return the records of optimiser step `step`, counted from the start of the run."""


class EpochOrder:
    """Which samples each optimiser step takes: a function of (seed, step) and the buckets."""

    def __init__(
        self,
        bucket_of: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        partial: Partial = "keep",
        draws: EpochDraws | None = None,
    ) -> None:
        """bucket_of: (N,) each record's bucket. batch_size, partial: as in buckets.make_epoch.

        draws: how often each record is shown; once, by default.
        """
        self.bucket_of, self.batch_size = bucket_of, batch_size
        self.seed, self.partial, self.draws = seed, partial, draws
        counts = np.unique(bucket_of, return_counts=True)[1]
        if draws is not None:
            counts = np.array(list(draws.bucket_counts.values()))
        self.steps_per_epoch = num_batches(counts, batch_size=batch_size)
        self._epochs: dict[int, Epoch] = {}

    def batch(self, step: int) -> StepBatch:
        """Return the records of optimiser step `step`, counted from the start of the run."""
        number, batch = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        return StepBatch(number, int(epoch.starts[batch]), epoch[batch])

    def count(self, step: int) -> int:
        """Return how many samples optimiser step `step` takes."""
        return len(self.batch(step).indices)

    def _epoch(self, number: int) -> Epoch:
        """Return an epoch's order; two are kept, as data workers run ahead into the next."""
        if number not in self._epochs:
            self._epochs = {k: epoch for k, epoch in self._epochs.items() if abs(k - number) == 1}
            self._epochs[number] = self._make_epoch(number)
        return self._epochs[number]

    def _make_epoch(self, number: int) -> Epoch:
        records, bucket_of = None, self.bucket_of
        if self.draws is not None:
            records = self.draws.records(partial(draw_order, self.seed, number))
            bucket_of = bucket_of[records]
        epoch = make_epoch(
            bucket_of,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=number,
            partial=self.partial,
            order=epoch_order(self.seed, number, len(bucket_of)),
        )
        return epoch if records is None else replace(epoch, indices=records[epoch.indices])


@dataclass(frozen=True)
class BatchLayout:
    """How the samples of one optimiser step are shared out.

    batch_size: samples of a full step; micro_batch_size: of one process in one forward pass.
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


class StepBatchSampler(Sampler[list[SampleKey]]):
    """The micro-batches of one process from `first_step` to `last_step`, in order."""

    def __init__(
        self,
        layout: BatchLayout,
        order: StepOrder,
        *,
        first_step: int,
        last_step: int,
        rank: int,
        seed: int,
        strata_rule: int = STRATA_RULE,
    ) -> None:
        """seed, strata_rule: as in `step_strata`."""
        self.layout, self.order, self.seed, self.strata_rule = layout, order, seed, strata_rule
        self.first_step, self.last_step, self.rank = first_step, last_step, rank

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.layout.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        layout = self.layout
        for step in range(self.first_step, self.last_step):
            batch = self.order.batch(step)
            strata = step_strata(self.seed, step, len(batch.indices), rule=self.strata_rule)
            for accumulated in range(layout.accumulation):
                first = (accumulated * layout.num_processes + self.rank) * layout.micro_batch_size
                places = range(first, first + layout.micro_batch_size)
                yield [_sample_key(batch, strata, k) for k in places]


def _sample_key(batch: StepBatch, strata: np.ndarray, k: int) -> SampleKey:
    """Return the key of the step's sample k; past its last one, padding by its first."""
    counts = k < len(batch.indices)
    k = k if counts else 0
    return SampleKey(
        index=int(batch.indices[k]),
        epoch=batch.epoch,
        index_in_epoch=batch.start + k,
        stratum=int(strata[k]),
        weight=float(counts),
    )


def train_batches(
    dataset: TrackedDataset,
    sampler: StepBatchSampler,
    *,
    device: torch.device,
    latent_encoder: OnlineLatentEncoder | None = None,
    text_encoder: OnlinePromptEmbeds | None = None,
    condition_encoder: ConditionEncoder | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield the sampler's micro-batches, on the CPU but for those parts that are encoded here.

    latent_encoder, text_encoder, condition_encoder: encode pixels and token ids where no cache
    holds the result.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=dataset.num_workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # the global one is what dropout draws from
    )
    for packed in start_workers(loader):
        batch = {name: torch.as_tensor(x) for name, x in packed.items()}
        if latent_encoder is not None:
            z0 = latent_encoder.encode(batch.pop("pixels"), batch.pop("vae_noise"))
            batch["z0"] = z0.contiguous()  # as from the cache: dropout draws in memory's order
        if text_encoder is not None:
            batch |= text_encoder.encode(batch.pop("input_ids")).tensors()
        if condition_encoder is not None:
            condition_encoder.encode(batch, device=device)
        yield batch


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor | np.ndarray]:
    """Stack samples to a batch (B, ...), small parts as NumPy arrays.

    Arrays travel in a data worker's message; a tensor costs the training process a shared file.
    """
    batch: dict[str, Tensor] = default_collate(list(samples))
    return {name: x.numpy() if x.nbytes <= SMALL_BYTES else x for name, x in batch.items()}
