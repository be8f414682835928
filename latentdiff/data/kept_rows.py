"""What a store keeps of each record of a folder, in every way it is cut."""

import numpy as np
from torch import Tensor

from latentdiff.data.cache_load import CropPlan, Item
from latentdiff.data.cache_store import MISSING, Store, in_share


class KeptRows:
    """The rows of N records in V variants: the plan's places, each twice with flips, the mirrored
    one second.

    keys: (V, N, 2) uint64. Everywhere `crop` is a draw in [0, 1) that chooses among the places.
    """

    def __init__(self, store: Store, keys: np.ndarray, *, plan: CropPlan, flips: bool) -> None:
        self.keys, self.plan, self.flips = keys, plan, flips
        self._store = store
        self._rows = self._find()

    def __len__(self) -> int:
        return int(self.keys.shape[1])

    def _row(self, index: int, *, flipped: bool, crop: float, name: str) -> Tensor:
        """Read one record's row; ValueError naming it when no process has written it."""
        variant = self.plan.variant(crop) * (1 + self.flips) + flipped
        if self._rows[variant, index] == MISSING:
            self._refresh()
        row = int(self._rows[variant, index])
        if row == MISSING:
            raise ValueError(
                f"{name} {index} is not in the cache; let all processes build before one reads"
            )
        return self._store.read(row)

    def _item(self, variant: int, index: int) -> Item:
        place, flip = divmod(variant, 1 + self.flips)
        u = (place + 0.5) / len(self.plan.places)
        return self.plan.item(index, u=u, flip=bool(flip))

    def _missing(self, shard: tuple[int, int]) -> np.ndarray:
        """Find this process's share of what the store lacks, each key once, sorted by size: (M, 2)
        (variant, index)."""
        flat = self.keys.reshape(-1, 2)
        places = np.flatnonzero((self._rows.ravel() == MISSING) & in_share(flat, shard))
        _, first = np.unique(flat[places], axis=0, return_index=True)
        variants, indices = np.divmod(places[np.sort(first)], max(1, len(self)))
        order = np.lexsort((indices, *self.plan.sizes[indices].T))
        return np.stack([variants, indices], axis=1)[order]

    def _refresh(self) -> None:
        """See what other processes have written meanwhile."""
        self._store.refresh()
        self._rows = self._find()

    def _find(self) -> np.ndarray:
        return self._store.find(self.keys.reshape(-1, 2)).reshape(self.keys.shape[:2])
