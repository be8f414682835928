"""Data workers: signals are their trainer's to answer, and one that dies is named with its sample.

What is read lies in memory that the workers share with the trainer, so that it can be told though
nothing of the worker is left. Does not answer for: what a sample is (samples.py).
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import RawArray, active_children
from types import FrameType

from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from latentdiff.training.inputs.dataset import SampleKey

IDLE = -1  # index of the sample that a worker between two samples reads


class DeadWorkerError(RuntimeError):
    """A data worker went without a word, such as by the system when memory ran out."""


class TrackedDataset(Dataset[dict[str, Tensor]]):
    """Samples, with a note in shared memory of which one each data worker is reading."""

    def __init__(self, samples: Dataset[dict[str, Tensor]], *, num_workers: int) -> None:
        self.samples = samples
        self._reading = RawArray("q", [IDLE] * num_workers)
        self._pids = RawArray("q", num_workers)

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        """Return samples[slot]."""
        worker = get_worker_info()
        if worker is None:
            return self.samples[key]
        self._pids[worker.id], self._reading[worker.id] = os.getpid(), key.index
        sample = self.samples[key]
        self._reading[worker.id] = IDLE
        return sample

    def in_flight_indices(self) -> list[int]:
        """Return the samples that workers were reading who are no longer alive."""
        alive = {process.pid for process in active_children()}
        dead = [k for k, pid in enumerate(self._pids) if pid and pid not in alive]
        return [self._reading[k] for k in dead if self._reading[k] != IDLE]


@contextmanager
def report_worker_crash(watched: TrackedDataset, ids: Sequence[str]) -> Iterator[None]:
    """Raise DeadWorkerError with what it was reading when a data worker dies inside the block.

    ids: names of the samples by index. torch raises in the main thread, whatever that is doing.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        names = ", ".join(str(ids[index]) for index in watched.in_flight_indices())
        where = f"while it read {names}" if names else "between two samples"
        reason = str(error).split(". ")[0]
        raise DeadWorkerError(
            f"a data worker died {where} ({reason}); the last checkpoint is kept. Where memory ran "
            "out, lower data.num_workers; else look at the file, with data.num_workers=0"
        ) from error


def ignore_signals(worker_id: int) -> None:
    """Let a data worker outlive a signal that is sent to all processes at once.

    torchrun, systemd, Slurm and a terminal's Ctrl-C do so; the trainer needs its workers to finish
    the step. A second SIGTERM ends the worker. For a DataLoader's worker_init_fn.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _let_one_pass)


def _let_one_pass(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
