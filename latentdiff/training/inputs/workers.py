"""Data workers: signals are left to the trainer, and a crash is reported with the sample it hit.

The index of the sample that a worker reads lies in memory shared with the trainer, so that it is
known when nothing else of the worker is left. One sample is made in dataset.py.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import RawArray, active_children
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from latentdiff.training.inputs.randomness import SampleKey

SIGNALS = (signal.SIGINT, signal.SIGTERM)
IDLE = -1  # index of the sample that a worker between two samples reads


class DeadWorkerError(RuntimeError):
    """A data worker died without an error of its own, as when the system runs out of memory."""


class TrackedDataset(Dataset[dict[str, Tensor]]):
    """A dataset that notes in shared memory which sample each data worker is reading."""

    def __init__(self, dataset: Dataset[dict[str, Tensor]], *, num_workers: int) -> None:
        self.dataset, self.num_workers = dataset, num_workers
        self._reading = RawArray("q", [IDLE] * num_workers)
        self._pids = RawArray("q", num_workers)

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        """Return dataset[key]."""
        worker = get_worker_info()
        if worker is None:
            return self.dataset[key]
        self._pids[worker.id], self._reading[worker.id] = os.getpid(), key.index
        sample = self.dataset[key]
        self._reading[worker.id] = IDLE
        return sample

    def in_flight_indices(self) -> list[int]:
        """Return the indices of the samples that workers no longer alive were reading."""
        alive = {process.pid for process in active_children()}
        dead = [k for k, pid in enumerate(self._pids) if pid and pid not in alive]
        return [self._reading[k] for k in dead if self._reading[k] != IDLE]


@contextmanager
def report_worker_crash(dataset: TrackedDataset, ids: Sequence[str]) -> Iterator[None]:
    """Raise DeadWorkerError with the samples being read when a data worker dies inside the block.

    ids: names of the samples by index. torch raises in the main thread, whatever that is doing.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        names = ", ".join(str(ids[index]) for index in dataset.in_flight_indices())
        where = f"while it read {names}" if names else "between two samples"
        reason = str(error).split(". ")[0]
        raise DeadWorkerError(
            f"a data worker died {where} ({reason}); the last checkpoint is kept. Where memory ran "
            "out, lower data.num_workers; else look at the file, with data.num_workers=0"
        ) from error


def ignore_signals(worker_id: int) -> None:
    """Let a data worker outlive a signal that is sent to all processes at once.

    torchrun, systemd, Slurm and a terminal's Ctrl-C send one; the trainer needs its workers to
    finish the step. A second SIGTERM ends the worker. For a DataLoader's worker_init_fn.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _let_one_pass)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return an iterator over a DataLoader whose worker_init_fn is ignore_signals.

    A signal that arrives while workers start waits until each of them can ignore the signal, but
    for Windows, where signals cannot be held back.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited by the workers
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _let_one_pass(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
