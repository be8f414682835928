"""One run a folder, and an orderly end when the system or a person asks for one.

The lock keeps two runs out of one folder. Signals only set a mark that the loop reads between
steps, so that a step is finished and its state saved before the process leaves.
"""

import contextlib
import ctypes
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from accelerate import Accelerator

from latentdiff.atomic import remove_leftovers

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextlib.contextmanager
def open_run_folder(path: str, accelerator: Accelerator) -> Iterator[Path]:
    """Give a run's folder, locked; log which of several processes fails inside the block.

    The others then fail too, for want of it. ValueError when another run holds the folder.
    """
    folder = Path(path).expanduser()
    try:
        if not accelerator.is_main_process:
            yield folder
            return
        with RunLock(folder):
            remove_leftovers(folder)
            yield folder
    except Exception as error:
        if accelerator.num_processes > 1:
            rank, num = accelerator.process_index, accelerator.num_processes
            logger.error("rank %d of %d processes failed: %s", rank, num, error)
        raise


class RunLock:
    """Hold a run folder; ValueError names the holder when another run has it.

    The lock is the kernel's (flock on folder/.lock): it ends with the process, however that ends,
    and is not handed on to forked data workers. Take it in the main process only.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise ValueError(
                f"{self.path.parent} is in use by {holder}: wait for that run to end, or choose "
                "another output_dir"
            ) from None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): see to it that no second run uses it",
                self.path.parent,
                error,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file
        os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
        self._close()

    def _close(self) -> None:
        """Close our descriptor; in a forked child this leaves the parent's lock as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None


class StopSignals:
    """Note SIGTERM and SIGINT instead of dying of them; read `received` between steps.

    A second SIGINT raises KeyboardInterrupt, for a person who will not wait. Launchers pass on a
    Ctrl-C that the terminal has sent to all of them already: what follows within `echo_s` seconds
    is the same one. Enter it in the main thread.
    """

    def __init__(self, *, echo_s: float = 1.0) -> None:
        self.received: int | None = None
        self.echo_s = echo_s
        self._first_at = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """What the process is to exit with: 143 after SIGTERM, 130 after SIGINT, else 0."""
        return 0 if self.received is None else 128 + self.received

    def __enter__(self) -> "StopSignals":
        assert threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._first_at = number, now
        elif number == signal.SIGINT and now - self._first_at > self.echo_s:
            raise KeyboardInterrupt


def die_with_parent() -> bool:
    """Ask Linux for SIGTERM when the launcher dies, if that is `accelerate launch`; True if done.

    Its one-process launcher dies at once on SIGTERM and leaves the trainer running. torchrun passes
    signals on, and without a launcher the parent is a shell that may go: those are left alone.
    """
    under_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform != "linux" or not under_accelerate or under_torchrun:
        return False
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
            return False
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)
        return True
    return False
