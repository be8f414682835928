"""Data workers outlive a signal that is sent to all processes, from their first moment on."""

import os
import signal
import time

from torch.utils.data import DataLoader

from latentdiff.training.inputs.workers import ignore_signals, start_workers


def _ignore_late(worker_id: int) -> None:
    time.sleep(0.5)
    ignore_signals(worker_id)


def test_a_signal_while_a_worker_starts_does_not_end_it() -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    numbers = start_workers(DataLoader(range(4), num_workers=1, worker_init_fn=_ignore_late))
    [worker] = numbers._workers
    os.kill(worker.pid, signal.SIGTERM)
    assert [int(n) for n in numbers] == [0, 1, 2, 3]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
