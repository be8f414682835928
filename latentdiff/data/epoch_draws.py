"""Which records an epoch shows, and how often: repeats of folders, repeats and weights of sources.

A record comes as often as its folder says, times the repeats of its source. Where sources have
weights, each gives its exact share of an epoch: every image of it at least once, and a choice of
them, anew in each epoch, once more. Every epoch has as many samples of each bucket, and so as
many steps. The order of the samples is batches.py's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from latentdiff.data.folder.folder import Folder

Permute = Callable[[int, int, int], np.ndarray]  # (source, bucket, num): of range(num)


@dataclass(frozen=True)
class _Group:
    """The samples of one source in one bucket, and how many of them an epoch takes."""

    source: int
    bucket: int
    records: np.ndarray  # (n,) each as often as its repeats say
    num_drawn: int  # at least n


class EpochDraws:
    """The records of an epoch, each as often as it is shown: (M,) indices, M the same each time."""

    def __init__(
        self,
        repeats: np.ndarray,
        bucket_of: np.ndarray,
        *,
        sources: np.ndarray | None = None,
        weights: Sequence[float] = (),
    ) -> None:
        """repeats, bucket_of, sources: (N,) of each record; weights: of each source, or none."""
        self.bucket_of = bucket_of
        sources = np.zeros(len(repeats), np.int16) if sources is None else sources
        totals = np.bincount(sources, weights=repeats, minlength=len(weights))
        factors = source_factors(totals, weights)
        self._groups: list[_Group] = []
        for source in np.unique(sources):
            reached = 0.0
            for bucket in np.unique(bucket_of[sources == source]):
                members = np.flatnonzero((sources == source) & (bucket_of == bucket))
                records = np.repeat(members, repeats[members])
                before, reached = reached, reached + len(records) * factors[source]
                num = int(np.floor(reached + 0.5)) - int(np.floor(before + 0.5))
                self._groups.append(_Group(int(source), int(bucket), records, num))

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(group.num_drawn for group in self._groups)

    @property
    def bucket_counts(self) -> dict[int, int]:
        """Samples of an epoch by bucket."""
        return self._count_by(lambda group: group.bucket)

    @property
    def source_counts(self) -> dict[int, int]:
        """Samples of an epoch by source."""
        return self._count_by(lambda group: group.source)

    def records(self, permute: Permute) -> np.ndarray:
        """Return an epoch's records, (M,), in no order. permute: gives the epoch's permutations."""
        parts = []
        for group in self._groups:
            whole, extra = divmod(group.num_drawn, len(group.records))
            parts += [group.records] * whole
            if extra:
                order = permute(group.source, group.bucket, len(group.records))
                parts.append(group.records[order[:extra]])
        return np.concatenate(parts)

    def _count_by(self, key: Callable[[_Group], int]) -> dict[int, int]:
        counts: dict[int, int] = {}
        for group in self._groups:
            counts[key(group)] = counts.get(key(group), 0) + group.num_drawn
        return counts


def source_factors(totals: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return how often each source's samples come in an epoch, 1 or more; all 1 without weights.

    totals: (K,) samples of each source without weights; those of the source that has the most of
    them for its weight come once.
    """
    if not len(weights):
        return np.ones(len(totals))
    rates = np.asarray(weights, np.float64) / totals
    factors: np.ndarray = rates / rates.min()
    return factors


def make_draws(
    train: Folder, bucket_of: np.ndarray, weights: Sequence[float] = ()
) -> EpochDraws | None:
    """Return how often an epoch shows each training image; None where each comes once.

    bucket_of: (N,) of each image; weights: of each source, or none.
    """
    repeats = train.repeats
    if not len(weights) and (repeats == 1).all():
        return None
    return EpochDraws(repeats, bucket_of, sources=train.sources, weights=weights)
