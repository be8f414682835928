"""Which random numbers a training sample gets: a function of its key alone.

The key is (seed, epoch, sample id, place in the epoch's global order). Neither workers, processes,
accumulation nor a resumed run can change them, and no generator has to be saved. The stream is
Philox4x64-10 (Salmon et al. 2011), a counter-based generator, so that a key costs microseconds.
A step's strata are a function of (seed, step). The history behind loss-aware timesteps depends on
more than a key: it is saved.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

STRATA_RULE = 2  # of new runs; a checkpoint keeps that of its run
RULE_BY_PLACE = 1  # until November 2026


@dataclass(frozen=True)
class SampleKey:
    """Which sample a step takes, where in the epoch, its stratum, and whether it counts."""

    index: int  # sample id
    epoch: int
    index_in_epoch: int
    stratum: int  # part of [0, 1) that stratified timesteps come from, one of the step's each
    weight: float  # 0 for the padding of a partial batch

    def generator(self, purpose: str, *, seed: int) -> np.random.Generator:
        """Return the sample's generator for one purpose: the stratum plays no part."""
        return sample_generator(seed, self.epoch, self.index, self.index_in_epoch, purpose)


def sample_generator(
    seed: int, epoch: int, sample_id: int, index_in_epoch: int, purpose: str
) -> np.random.Generator:
    """Return the generator of one sample for one purpose ("noise", "timestep", "crop", ...).

    index_in_epoch: in the epoch's global order, so that a sample shown twice in an epoch differs.
    Purposes are independent streams: one more purpose, or one more draw of it, changes no other.
    """
    return _generator("sample", seed, epoch, sample_id, index_in_epoch, purpose)


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Return the order of an epoch: a permutation of 0 .. num_samples - 1, (num_samples,) int64."""
    return _generator("order", seed, epoch).permutation(num_samples)


def draw_order(seed: int, epoch: int, source: int, bucket: int, num: int) -> np.ndarray:
    """Return the permutation of a source's samples of which an epoch shows the first once more."""
    return _generator("draws", seed, epoch, source, bucket).permutation(num)


def step_strata(seed: int, step: int, num_samples: int, *, rule: int = STRATA_RULE) -> np.ndarray:
    """Return the strata of a step's samples: a permutation of 0 .. num_samples - 1, int64.

    A sample's place in the step does not decide: class images come after those of the subject.
    rule: RULE_BY_PLACE makes the place the stratum, for runs that were begun with it.
    """
    if rule == RULE_BY_PLACE:
        return np.arange(num_samples)
    return _generator("strata", seed, step).permutation(num_samples)


def standard_normal(generator: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """Draw standard normal numbers on the CPU, float32, of the given shape."""
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def _generator(*key: str | int) -> np.random.Generator:
    """Key a Philox stream by the 128-bit hash of a tuple; its repr keeps the parts apart."""
    # A NumPy integer prints unlike the Python integer that it equals.
    text = repr(tuple(part if isinstance(part, str) else int(part) for part in key))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    words = _Key(np.frombuffer(digest, dtype="<u8"))
    # NumPy documents any ISeedSequence as a seed; its stubs know only one of them.
    return np.random.Generator(np.random.Philox(words))  # type: ignore[arg-type]


class _Key(ISeedSequence):
    """A Philox key, (2,) uint64; `Philox(key=...)` is the same, but asks the system for entropy."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        assert n_words == len(self.words)
        return self.words
