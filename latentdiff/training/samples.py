"""From caches to batches: what one training sample is, and which samples an optimiser step takes.

The order of an epoch is a permutation by (seed, epoch). Optimiser step s of an epoch takes places
[s B, (s + 1) B) of it; the last step takes what is left. Processes and micro-batches share out
those places, so the draws of a step, which hang on the place, never depend on the layout.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from latentdiff.data.captions import may_flip
from latentdiff.data.folder import Record
from latentdiff.training.randomness import draws, epoch_order, normal

TextOf = Callable[[str], Tensor]


class Moments(Protocol):
    """Where latents come from: the mean and standard deviation (C, h, w) of record `index`."""

    def __call__(self, index: int, *, flipped: bool) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Layout:
    """How the places of one optimiser step are shared out.

    batch_size: places of a full step; micro_batch_size: of one process in one forward pass.
    """

    batch_size: int
    micro_batch_size: int
    num_processes: int

    @classmethod
    def of(cls, batch_size: int, micro_batch_size: int, num_processes: int) -> "Layout":
        """Fill in a micro-batch size of 0: the whole batch at once, over the processes."""
        micro = micro_batch_size or -(-batch_size // num_processes)
        return cls(batch_size, min(micro, batch_size), num_processes)

    @property
    def accumulation(self) -> int:
        """Forward passes of each process in one optimiser step."""
        return -(-self.batch_size // (self.micro_batch_size * self.num_processes))

    def steps_per_epoch(self, num_samples: int) -> int:
        """Optimiser steps of an epoch, the last partial one included."""
        return -(-num_samples // self.batch_size)

    def count(self, step: int, num_samples: int) -> int:
        """Samples of optimiser step `step`, counted from the start of the run."""
        start = step % self.steps_per_epoch(num_samples) * self.batch_size
        return min(self.batch_size, num_samples - start)


@dataclass(frozen=True)
class Slot:
    """One sample's seat in a step: which sample, where in the epoch, and whether it counts."""

    index: int
    epoch: int
    place: int
    weight: float  # 0 for the padding of a partial batch


class StepSlots(Sampler[list[Slot]]):
    """The micro-batches of one process from `first_step` to `last_step`, in order."""

    def __init__(
        self,
        layout: Layout,
        *,
        num_samples: int,
        seed: int,
        first_step: int,
        last_step: int,
        rank: int,
    ) -> None:
        self.layout, self.num_samples, self.seed = layout, num_samples, seed
        self.first_step, self.last_step, self.rank = first_step, last_step, rank

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.layout.accumulation

    def __iter__(self) -> Iterator[list[Slot]]:
        layout, epoch, order = self.layout, -1, epoch_order(self.seed, 0, self.num_samples)
        per_epoch = layout.steps_per_epoch(self.num_samples)
        for step in range(self.first_step, self.last_step):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = epoch_order(self.seed, epoch, self.num_samples)
            start = step % per_epoch * layout.batch_size
            count = layout.count(step, self.num_samples)
            for accumulated in range(layout.accumulation):
                first = (accumulated * layout.num_processes + self.rank) * layout.micro_batch_size
                yield [
                    self._slot(order, epoch, start, k, count)
                    for k in range(first, first + layout.micro_batch_size)
                ]

    def _slot(self, order: Any, epoch: int, start: int, k: int, count: int) -> Slot:
        place = start + (k if k < count else 0)
        return Slot(int(order[place]), epoch, place, float(k < count))


class Samples(Dataset[dict[str, Tensor]]):
    """Training samples by slot, every draw of them keyed by the slot alone.

    moments(i, flipped=...) -> mean, std (C, h, w); text(caption) -> ids (L,) or states (L, D).
    """

    def __init__(
        self,
        moments: Moments,
        records: Sequence[Record],
        text: TextOf,
        *,
        seed: int,
        caption_dropout: float,
        random_flip: bool,
    ) -> None:
        self.moments, self.records, self.text = moments, records, text
        self.seed, self.caption_dropout, self.random_flip = seed, caption_dropout, random_flip

    def __getitem__(self, slot: Slot) -> dict[str, Tensor]:
        """Return z0, eps (C, h, w); offset (C, 1, 1); text; and the scalars of the sample.

        They are u in [0, 1) for the timestep, dropped, weight, place and index.
        """

        def rng(purpose: str) -> Any:
            return draws(self.seed, slot.epoch, slot.index, slot.place, purpose)

        captions = self.records[slot.index].captions
        flipped = self.random_flip and may_flip(captions) and rng("flip").random() < 0.5
        mean, std = self.moments(slot.index, flipped=flipped)
        caption = captions[int(rng("caption").integers(len(captions)))]
        return {
            "z0": mean + std * normal(rng("vae"), mean.shape),
            "eps": normal(rng("noise"), mean.shape),
            "offset": normal(rng("offset"), (len(mean), 1, 1)),
            "u": torch.tensor(rng("timestep").random(), dtype=torch.float64),
            "text": self.text(caption),
            "dropped": torch.tensor(rng("dropout").random() < self.caption_dropout),
            "weight": torch.tensor(slot.weight, dtype=torch.float32),
            "place": torch.tensor(slot.place, dtype=torch.int64),
            "index": torch.tensor(slot.index, dtype=torch.int64),
        }
